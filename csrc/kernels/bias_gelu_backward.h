// dx = grad gelu'(x + bias), computed in float and rounded once, and its sums over the rows of a block before rounding.
#pragma once

#include "../training_table.h"

namespace bert_fast::BERT_FAST_ISA {

template <class T>
void bias_gelu_backward(const BiasGeluBackward<T>& args, int64_t block_begin, int64_t block_end) {
  const int64_t size = args.features;
  for (int64_t block = block_begin; block < block_end; ++block) {
    float* const dbias = args.dbias + block * size;
    std::memset(dbias, 0, static_cast<size_t>(size) * sizeof(float));
    const int64_t end = std::min((block + 1) * SUM_ROWS, args.rows);
    for (int64_t row = block * SUM_ROWS; row < end; ++row) {
      for (int64_t i = 0; i < size; i += LANES) {
        const int64_t at = row * size + i, left = size - i;
        const Vec sum = load(args.x + at, left) + load(args.bias + i, left);
        const Vec slope = args.tanh ? gelu_tanh_derivative(sum) : gelu_erf_derivative(sum);
        const Vec dx = load(args.grad + at, left) * slope;
        store(args.dx + at, dx, left);
        store(dbias + i, load(dbias + i, left) + dx, left);
      }
    }
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
