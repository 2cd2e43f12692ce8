// out = LayerNorm(x + bias + residual), computed in float and rounded once.
#pragma once

#include "layer_norm.h"

namespace bert_fast::BERT_FAST_ISA {

template <class T>
void residual_layer_norm(const ResidualLayerNorm<T>& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t size = args.norm.hidden_size;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = args.x + row * size;
    const T* residual = args.residual + row * size;
    Vec total = set1(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
      const int64_t left = size - i;
      const Vec hidden = load(x + i, left) + load(args.bias + i, left) + load(residual + i, left);
      total = total + hidden;
      store(scratch + i, hidden, left);
    }
    layer_norm(args.norm, scratch, total, args.out + row * size);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
