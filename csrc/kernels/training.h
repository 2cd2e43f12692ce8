// Every kernel of training, for the instruction set whose vectors were included before, and the table of them.
#pragma once

#include "../training_table.h"
#include "../vec/math.h"
#include "bias_gelu_backward.h"
#include "column_sums.h"
#include "cross_entropy.h"
#include "layer_norm_backward.h"
#include "layer_norm_train.h"
#include "attention_backward.h"
#include "attention_train.h"
#include "dense.h"
#include "philox.h"
#include "pooling_backward.h"

namespace bert_fast::BERT_FAST_ISA {

template <class T>
constexpr RowTraining<T> row_training{embedding_layer_norm_train<T>,
                                      layer_norm_backward<true, float, T, float>,
                                      table_gradient<T>,
                                      column_sums<T>,
                                      bias_gelu_backward<T>,
                                      pooling_backward<T>,
                                      cross_entropy<T>};

template <class X, class T>
constexpr ResidualTraining<X, T> residual_training{residual_layer_norm_train<X, T>,
                                                   layer_norm_backward<false, X, T, T>};

constexpr TrainingTable training_kernels{
    random_bytes,
    row_training<float>,
    row_training<bfloat16>,
    residual_training<float, float>,
    residual_training<bfloat16, bfloat16>,
    residual_training<bfloat16, float>,
    {attention_train<float>, attention_backward<float>},
    {attention_train<bfloat16>, attention_backward<bfloat16>},
    {dense<Fp32>, dense<Bf16>},
    {dense_sums<Fp32>, dense_sums<Bf16>},
};

}  // namespace bert_fast::BERT_FAST_ISA
