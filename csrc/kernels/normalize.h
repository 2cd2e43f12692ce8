// What happens to whole rows between the products of an encoder: the sum of embeddings, LayerNorm, and the way to the
// type that the next product reads.
#pragma once

#include "layer_norm.h"
#include "tile.h"

namespace bert_fast::BERT_FAST_ISA {

template <class T>
void embedding_sum(const EmbeddingSum<T>& args, int64_t begin, int64_t end) {
  const int64_t size = args.hidden_size;
  for (int64_t row = begin; row < end; ++row) {
    const T* word = args.word_embeddings + args.input_ids[row] * size;
    const T* token_type = args.token_type_embeddings + args.token_type_ids[row] * size;
    const T* position = args.position_embeddings + args.position_ids[row] * size;
    float* out = args.out + row * args.out_stride;
    for (int64_t i = 0; i < size; i += LANES) {
      const int64_t left = size - i;
      store(out + i, load(word + i, left) + load(token_type + i, left) + load(position + i, left), left);
    }
  }
}

// One row to unsigned bytes; a row of equal values, or so close that the scale has no inverse, gets a scale of 1, and
// zeros.
template <class T>
BERT_FAST_INLINE void quantize_row(T* x, int64_t size, const int64_t* outlier_channels, uint8_t* out, RowCode& code) {
  T outliers[OUTLIERS] = {};
  for (int64_t i = 0; i < OUTLIERS; ++i) {
    if (outlier_channels[i] >= 0) outliers[i] = x[outlier_channels[i]];
    code.outliers[i] = sum(load(outliers + i, 1));
  }
  for (int64_t i = 0; i < OUTLIERS; ++i)
    if (outlier_channels[i] >= 0) x[outlier_channels[i]] = T{};
  Vec low = set1(std::numeric_limits<float>::infinity()), high = set1(-std::numeric_limits<float>::infinity());
  Vec nothing = set1(0.0f);  // a NaN or an infinity, which the comparisons may overlook, makes it NaN
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t left = size - i;
    const Vec v = load(x + i, left);
    low = min(low, first(v, left, low));
    high = max(high, first(v, left, high));
    nothing = fma(v, set1(0.0f), nothing);
  }
  code.minimum = lowest(low) + sum(nothing);
  const float range = highest(high) - code.minimum;
  code.scale = range >= 255.0f * std::numeric_limits<float>::min() ? range / 255.0f : 1.0f;
  const Vec inverse = set1(1.0f / code.scale), shift = set1(code.minimum);
  for (int64_t i = 0; i < size; i += LANES) store_bytes(out + i, (load(x + i, size - i) - shift) * inverse, size - i);
  for (int64_t i = 0; i < OUTLIERS; ++i)
    if (outlier_channels[i] >= 0) x[outlier_channels[i]] = outliers[i];
}

template <class T>
void quantize(const Quantize& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    quantize_row(static_cast<T*>(args.x) + row * args.x_stride, args.size, args.outlier_channels,
                 args.out + row * args.out_stride, args.codes[row]);
}

template <class P>
void normalize(const Normalize& args, int64_t begin, int64_t end) {
  const int64_t size = args.norm.hidden_size;
  const Prepared& out = args.out;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.x_stride;
    float* hidden = out.hidden + row * out.hidden_stride;
    Vec total = set1(0.0f);
    for (int64_t i = 0; i < size; i += LANES) total = total + load(x + i, size - i);
    layer_norm(args.norm, x, total, hidden);
    if constexpr (std::is_same_v<P, Bf16>) {
      bfloat16* input = static_cast<bfloat16*>(out.input) + row * out.input_stride;
      for (int64_t i = 0; i < size; i += LANES) store(input + i, load(hidden + i, size - i), size - i);
    } else if constexpr (std::is_same_v<P, Int8>) {
      quantize_row(hidden, size, out.outlier_channels, static_cast<uint8_t*>(out.input) + row * out.input_stride,
                   out.codes[row]);
    }
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
