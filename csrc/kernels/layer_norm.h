// LayerNorm of one row of floats (Ba et al., 2016), with the variance of the corrected two-pass algorithm
// (Chan, Golub & LeVeque, 1983): a row of equal values gives exactly its bias, however small eps is.
#pragma once

#include "../kernel_table.h"

namespace bert_fast::BERT_FAST_ISA {

// Elements that are summed on their own before they join the total: a long sum, in blocks, rounds less.
constexpr int64_t SUM_BLOCK = 256;

// Element x of a row becomes (x - mean - correction) * rstd, before gain and bias.
struct Moments {
  Vec mean, correction;
  float rstd;
};

// row: `size` floats, and `total` their sum in lanes, however roughly rounded.
BERT_FAST_INLINE Moments moments(const float* row, int64_t size, Vec total, float eps) {
  const float count = static_cast<float>(size);
  const Vec mean = set1(sum(total) / count);
  Vec sums = set1(0.0f), squares = set1(0.0f);
  for (int64_t block = 0; block < size; block += SUM_BLOCK) {
    Vec block_sums = set1(0.0f), block_squares = set1(0.0f);
    for (int64_t i = block; i < std::min(block + SUM_BLOCK, size); i += LANES) {
      const Vec centred = first(load(row + i, size - i) - mean, size - i);
      block_sums = block_sums + centred;
      block_squares = fma(centred, centred, block_squares);
    }
    sums = sums + block_sums;
    squares = squares + block_squares;
  }
  const float correction = sum(sums) / count;  // what rounding left out of the mean
  const float variance = std::max(sum(squares) / count - correction * correction, 0.0f);
  return {mean, set1(correction), 1.0f / std::sqrt(variance + eps)};
}

// row, total: as above; out: hidden_size elements, which do not overlap the row.
template <class T>
BERT_FAST_INLINE void layer_norm(const LayerNorm<T>& norm, const float* row, Vec total, T* out) {
  const int64_t size = norm.hidden_size;
  const Moments m = moments(row, size, total, norm.eps);
  const Vec rstd = set1(m.rstd);
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t left = size - i;
    const Vec centred = load(row + i, left) - m.mean - m.correction;
    store(out + i, fma(centred * rstd, load(norm.weight + i, left), load(norm.bias + i, left)), left);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
