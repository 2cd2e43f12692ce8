// Every kernel of training, for the instruction set whose vectors were included before, and the table of them.
#pragma once

#include "../training_table.h"
#include "../vec/math.h"
#include "philox.h"

namespace bert_fast::BERT_FAST_ISA {

constexpr TrainingTable training_kernels{random_bytes};

}  // namespace bert_fast::BERT_FAST_ISA
