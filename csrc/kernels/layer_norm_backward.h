// Backward of LayerNorm with dropout before it (residual_layer_norm) or after it (embeddings). With g the gradient of
// the LayerNorm's result, w its gain and n the normalised row:
//   dhidden = rstd (g w - mean(g w) - n mean(g w n))
// and summed over the rows of a block: dweight = g n, dlayer_norm_bias = g, dbias = dx, the dropped dhidden.
// In float; the gain and normalised rows as they were rounded. A block of rows gives a row of each of the sums.
#pragma once

#include "dropout.h"

namespace bert_fast::BERT_FAST_ISA {

// The gradient of the LayerNorm's result, in the columns [i, i + LANES) of a row.
template <bool AFTER, class Args>
BERT_FAST_INLINE Vec upstream(const Args& args, int64_t row, int64_t i, const uint8_t* bytes) {
  const Vec g = load(args.grad + row * args.hidden_size + i, args.hidden_size - i);
  return AFTER ? dropped(args.dropout, g, bytes + i) : g;
}

// R rows from `row` on, which share what is loaded and stored of the sums.
template <int R, bool AFTER, class X, class T, class D>
BERT_FAST_INLINE void layer_norm_backward_rows(const LayerNormBackward<X, T, D>& args, int64_t row, float* dweight,
                                               float* dlayer_norm_bias, float* dbias, uint8_t* bytes) {
  const int64_t size = args.hidden_size, stride = dropout_columns(size);
  for (int r = 0; r < R; ++r) row_bytes(args.dropout, row + r, size, bytes + r * stride);
  Vec sums[R], products[R];  // of g w and g w n
  for (int r = 0; r < R; ++r) sums[r] = products[r] = set1(0.0f);
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t left = size - i;
    const Vec w = load(args.weight + i, left);
    Vec dw = load(dweight + i, left), db = load(dlayer_norm_bias + i, left);
    for (int r = 0; r < R; ++r) {
      const Vec g = upstream<AFTER>(args, row + r, i, bytes + r * stride), gw = g * w;
      const Vec n = load(args.normalized + (row + r) * size + i, left);
      dw = fma(g, n, dw);
      db = db + g;
      sums[r] = sums[r] + gw;
      products[r] = fma(gw, n, products[r]);
    }
    store(dweight + i, dw, left);
    store(dlayer_norm_bias + i, db, left);
  }
  Vec rstd[R], mean[R], slope[R];
  for (int r = 0; r < R; ++r) {
    rstd[r] = set1(args.rstd[row + r]);
    mean[r] = set1(sum(sums[r]) / static_cast<float>(size));
    slope[r] = set1(sum(products[r]) / -static_cast<float>(size));
  }
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t left = size - i;
    const Vec w = load(args.weight + i, left);
    Vec db = AFTER ? set1(0.0f) : load(dbias + i, left);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * size + i;
      const Vec g = upstream<AFTER>(args, row + r, i, bytes + r * stride), n = load(args.normalized + at, left);
      const Vec d = rstd[r] * fma(n, slope[r], fma(g, w, set1(0.0f) - mean[r]));
      store(args.dhidden + at, d, left);
      if constexpr (!AFTER) {
        const Vec dx = dropped(args.dropout, d, bytes + r * stride + i);
        if (args.dx != nullptr) store(args.dx + at, dx, left);
        db = db + dx;
      }
    }
    if constexpr (!AFTER) store(dbias + i, db, left);
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
    const int64_t end = std::min((block + 1) * SUM_ROWS, args.rows);
    int64_t row = block * SUM_ROWS;
    for (; row + BACKWARD_ROWS <= end; row += BACKWARD_ROWS)
      layer_norm_backward_rows<BACKWARD_ROWS, AFTER>(args, row, dweight, dlayer_norm_bias, dbias, bytes);
    for (; row < end; ++row) layer_norm_backward_rows<1, AFTER>(args, row, dweight, dlayer_norm_bias, dbias, bytes);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
