// Every kernel of training, for the instruction set whose vectors were included before, and the table of them.
#pragma once

#include "../training_table.h"
#include "../vec/math.h"
#include "attention_backward.h"
#include "attention_train.h"
#include "philox.h"

namespace bert_fast::BERT_FAST_ISA {

constexpr TrainingTable training_kernels{random_bytes,
                                         {attention_train<float>, attention_backward<float>},
                                         {attention_train<bfloat16>, attention_backward<bfloat16>}};

}  // namespace bert_fast::BERT_FAST_ISA
