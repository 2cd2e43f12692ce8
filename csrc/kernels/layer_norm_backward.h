// Backward of LayerNorm with dropout before it (residual_layer_norm) or after it (embeddings). With g the gradient of
// the LayerNorm's result, w its gain and n the normalised row:
//   dhidden = rstd (g w - mean(g w) - n mean(g w n))
// and summed over the rows of a block: dweight = g n, dlayer_norm_bias = g, dbias = dx, the dropped dhidden.
// In float; the gain and normalised rows as they were rounded. A block of rows gives a row of each of the sums.
#pragma once

#include "dropout.h"

namespace bert_fast::BERT_FAST_ISA {

// The gradient of the LayerNorm's result, in the columns [i, i + LANES) of a row.
template <bool AFTER, class T>
BERT_FAST_INLINE Vec upstream(const Dropout& dropout, const T* grad, int64_t i, int64_t left, const uint8_t* bytes) {
  const Vec g = load(grad + i, left);
  return AFTER ? dropped(dropout, g, bytes + i) : g;
}

// Columns that are summed on their own before they join the total: an error in the means of a row is one in the
// gradient of every one of its columns.
constexpr int64_t GRADIENT_BLOCK = 64;

// One row after another: several side by side, to load and store the sums less often, were slower where the rows come
// from memory, which is read ahead from one row into the next.
template <bool AFTER, class X, class T, class D>
BERT_FAST_INLINE void layer_norm_backward_row(const LayerNormBackward<X, T, D>& args, int64_t row, float* dweight,
                                              float* dlayer_norm_bias, float* dbias, uint8_t* bytes) {
  const int64_t size = args.hidden_size;
  const T* grad = args.grad + row * size;
  const T* normalized = args.normalized + row * size;
  row_bytes(args.dropout, row, size, bytes);
  Vec sums = set1(0.0f), products = set1(0.0f);  // of g w and g w n
  for (int64_t block = 0; block < size; block += GRADIENT_BLOCK) {
    Vec block_sums = set1(0.0f), block_products = set1(0.0f);
    for (int64_t i = block; i < std::min(block + GRADIENT_BLOCK, size); i += LANES) {
      const int64_t left = size - i;
      const Vec g = upstream<AFTER>(args.dropout, grad, i, left, bytes), n = load(normalized + i, left);
      const Vec gw = g * load(args.weight + i, left);
      store(dweight + i, fma(g, n, load(dweight + i, left)), left);
      store(dlayer_norm_bias + i, load(dlayer_norm_bias + i, left) + g, left);
      block_sums = block_sums + gw;
      block_products = fma(gw, n, block_products);
    }
    sums = sums + block_sums;
    products = products + block_products;
  }
  const Vec rstd = set1(args.rstd[row]), mean = set1(sum(sums) / static_cast<float>(size));
  const Vec slope = set1(sum(products) / -static_cast<float>(size));
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t left = size - i, at = row * size + i;
    const Vec g = upstream<AFTER>(args.dropout, grad, i, left, bytes), n = load(normalized + i, left);
    const Vec gw = g * load(args.weight + i, left);  // rounded as it went into the mean: one element leaves nothing
    const Vec d = rstd * fma(n, slope, gw - mean);
    store(args.dhidden + at, d, left);
    if constexpr (!AFTER) {
      const Vec dx = dropped(args.dropout, d, bytes + i);
      if (args.dx != nullptr) store(args.dx + at, dx, left);
      store(dbias + i, load(dbias + i, left) + dx, left);
    }
  }
}

template <bool AFTER, class X, class T, class D>
void layer_norm_backward(const LayerNormBackward<X, T, D>& args, int64_t block_begin, int64_t block_end,
                         uint8_t* bytes) {
  const int64_t size = args.hidden_size;
  for (int64_t block = block_begin; block < block_end; ++block) {
    float* const dweight = args.dweight + block * size;
    float* const dlayer_norm_bias = args.dlayer_norm_bias + block * size;
    float* const dbias = AFTER ? nullptr : args.dbias + block * size;
    for (float* sums : {dweight, dlayer_norm_bias, dbias})
      if (sums != nullptr) std::memset(sums, 0, static_cast<size_t>(size) * sizeof(float));
    for (int64_t row = block * SUM_ROWS; row < std::min((block + 1) * SUM_ROWS, args.rows); ++row)
      layer_norm_backward_row<AFTER>(args, row, dweight, dlayer_norm_bias, dbias, bytes);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
