// out = gelu(x + bias), computed in float and rounded once.
#pragma once

#include "../kernel_table.h"

namespace bert_fast::BERT_FAST_ISA {

template <class T>
void bias_gelu(const BiasGelu<T>& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = args.x + row * args.features;
    T* out = args.out + row * args.features;
    for (int64_t i = 0; i < args.features; i += LANES) {
      const int64_t left = args.features - i;
      const Vec sum = load(x + i, left) + load(args.bias + i, left);
      store(out + i, args.tanh ? gelu_tanh(sum) : gelu_erf(sum), left);
    }
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
