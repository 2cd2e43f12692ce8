// Gradient of pooling, computed in float and rounded once. Of the maximum: tokens that share it get equal parts, and a
// channel whose maximum is NaN gets NaN, as torch's amax has it.
#pragma once

#include "pooling.h"

namespace bert_fast::BERT_FAST_ISA {

// Channels [i, i + LANES) of a sequence; `left` is how many channels there are from i on.
template <class T>
BERT_FAST_INLINE void pool_max_backward(const T* rows, Vec grad, int64_t length, int64_t stride, int64_t left, T* out) {
  const Vec highest = pool_max(rows, length, stride, left), one = set1(1.0f), zero = set1(0.0f);
  Vec count = zero;
  for (int64_t token = 0; token < length; ++token)
    count = count + select_ge(load(rows + token * stride, left), highest, one, zero);
  const Vec share = grad / count, nothing = zero / count;
  for (int64_t token = 0; token < length; ++token)
    store(out + token * stride, select_ge(load(rows + token * stride, left), highest, share, nothing), left);
}

template <class T>
void pooling_backward(const PoolingBackward<T>& args, int64_t begin, int64_t end) {
  const int64_t size = args.hidden_size, blocks = pooling_blocks(size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sequence = task / blocks, first = task % blocks * POOLING_BLOCK;
    const int64_t last = std::min(first + POOLING_BLOCK, size);
    const int64_t start = args.cu_seqlens[sequence], length = args.cu_seqlens[sequence + 1] - start;
    if (length == 0) continue;
    const T* grad = args.grad + sequence * size;
    if (args.mode == PoolingMode::max) {
      for (int64_t i = first; i < last; i += LANES)
        pool_max_backward(args.hidden + start * size + i, load(grad + i, size - i), length, size, size - i,
                          args.out + start * size + i);
      continue;
    }
    const float share = args.mode == PoolingMode::cls ? 1.0f : 1.0f / pooling_divisor(args.mode, length);
    for (int64_t token = 0; token < length; ++token) {
      T* const out = args.out + (start + token) * size;
      const float weight = args.mode == PoolingMode::weightedmean ? static_cast<float>(token + 1) * share : share;
      for (int64_t i = first; i < last; i += LANES) {
        const bool is_read = args.mode != PoolingMode::cls || token == 0;
        store(out + i, is_read ? load(grad + i, size - i) * set1(weight) : set1(0.0f), size - i);
      }
    }
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
