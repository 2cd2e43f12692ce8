// One vector per sequence: its first token, or the maximum or a weighted sum over its tokens, computed in float.
// Zeros for a sequence without tokens. A NaN reaches the result of its own channel and sequence.
#pragma once

#include "../kernel_table.h"

namespace bert_fast::BERT_FAST_ISA {

// Channels [i, i + LANES) of `length` rows; `left` is how many channels there are from i on.
template <class T>
BERT_FAST_INLINE Vec pool_max(const T* rows, int64_t length, int64_t stride, int64_t left) {
  Vec result = load(rows, left);
  for (int64_t token = 1; token < length; ++token) {
    const Vec x = load(rows + token * stride, left);
    // max() gives its second argument where either is NaN: a NaN in x is taken, one in result is kept by the second.
    result = select_ge(result, result, max(result, x), result);
  }
  return result;
}

// Summed in blocks, so that the rounding error does not grow with the length alone.
template <class T>
BERT_FAST_INLINE Vec pool_sum(const T* rows, int64_t length, int64_t stride, int64_t left, bool by_position) {
  constexpr int64_t block_size = 32;
  Vec total = set1(0.0f);
  for (int64_t block = 0; block < length; block += block_size) {
    Vec partial = set1(0.0f);
    for (int64_t token = block; token < std::min(block + block_size, length); ++token) {
      const Vec weight = set1(by_position ? static_cast<float>(token + 1) : 1.0f);
      partial = fma(load(rows + token * stride, left), weight, partial);
    }
    total = total + partial;
  }
  return total;
}

// What the sum over `length` tokens is divided by.
inline float pooling_divisor(PoolingMode mode, int64_t length) {
  const double n = static_cast<double>(length);
  if (mode == PoolingMode::mean_sqrt_len_tokens) return static_cast<float>(std::sqrt(n));
  return static_cast<float>(mode == PoolingMode::weightedmean ? n * (n + 1) / 2 : n);
}

template <class T>
void pooling(const Pooling<T>& args, int64_t begin, int64_t end) {
  const int64_t size = args.hidden_size, blocks = pooling_blocks(size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sequence = task / blocks, first = task % blocks * POOLING_BLOCK;
    const T* rows = args.hidden + args.cu_seqlens[sequence] * args.stride;
    const int64_t length = args.cu_seqlens[sequence + 1] - args.cu_seqlens[sequence];
    const Vec divisor = set1(pooling_divisor(args.mode, length));
    for (int64_t i = first; i < std::min(first + POOLING_BLOCK, size); i += LANES) {
      const int64_t left = size - i;
      Vec result = set1(0.0f);
      if (length > 0 && args.mode == PoolingMode::cls) {
        result = load(rows + i, left);
      } else if (length > 0 && args.mode == PoolingMode::max) {
        result = pool_max(rows + i, length, args.stride, left);
      } else if (length > 0) {
        result = pool_sum(rows + i, length, args.stride, left, args.mode == PoolingMode::weightedmean) / divisor;
      }
      store(args.out + sequence * size + i, result, left);
    }
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
