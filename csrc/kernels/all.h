// Every kernel, for the instruction set whose vectors were included before, and the table of them.
#pragma once

#include "../vec/math.h"
#include "attention.h"
#include "bias_gelu.h"
#include "embedding_layer_norm.h"
#include "pooling.h"
#include "residual_layer_norm.h"

namespace bert_fast::BERT_FAST_ISA {

template <class T>
constexpr Kernels<T> all_kernels{bias_gelu<T>, residual_layer_norm<T>, embedding_layer_norm<T>, pooling<T>,
                                 attention<T>};

}  // namespace bert_fast::BERT_FAST_ISA
