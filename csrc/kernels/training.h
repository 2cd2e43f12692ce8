// Every kernel of training, for the instruction set whose vectors were included before, and the table of them.
#pragma once

#include "../training_table.h"
#include "../vec/math.h"
#include "dense.h"
#include "philox.h"

namespace bert_fast::BERT_FAST_ISA {

constexpr TrainingTable training_kernels{
    random_bytes,
    {dense<Fp32>, dense<Bf16>},
    {dense_sums<Fp32>, dense_sums<Bf16>},
};

}  // namespace bert_fast::BERT_FAST_ISA
