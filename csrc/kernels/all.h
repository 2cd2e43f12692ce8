// Every kernel, for the instruction set whose vectors were included before, and the table of them.
#pragma once

#include "../vec/math.h"
#include "attention.h"
#include "bias_gelu.h"
#include "embedding_layer_norm.h"
#include "linear.h"
#include "normalize.h"
#include "pooling.h"
#include "residual_layer_norm.h"

namespace bert_fast::BERT_FAST_ISA {

template <class T>
constexpr Kernels<T> all_kernels{bias_gelu<T>, residual_layer_norm<T>, embedding_layer_norm<T>,
                                 pooling<T>,   attention<T>,           embedding_sum<T>,
                                 quantize<T>};

template <class P>
constexpr PrecisionKernels precision_kernels{linear<P>, normalize<P>};

#define BERT_FAST_ALL_KERNELS                                                                                     \
  BERT_FAST_ISA::all_kernels<float>, BERT_FAST_ISA::all_kernels<bfloat16>, {                                      \
    BERT_FAST_ISA::precision_kernels<BERT_FAST_ISA::Fp32>, BERT_FAST_ISA::precision_kernels<BERT_FAST_ISA::Bf16>, \
        BERT_FAST_ISA::precision_kernels<BERT_FAST_ISA::Int8>                                                     \
  }

}  // namespace bert_fast::BERT_FAST_ISA
