// What one instruction set offers to training beside its KernelTable: forwards that keep what the backward wants,
// backwards, and the random bytes of dropout. The contract of each kernel stands at the top of kernels/<name>.h.
#pragma once

#include "kernel_table.h"

namespace bert_fast {

// Which elements a call of an op drops (bert_fast/ops/_dropout.py is the definition).
struct Dropout {
  uint64_t seed;
  int32_t threshold;  // bytes below it drop their element: 0 drops none, 256 all
  float scale;        // of the elements that are kept
};

// Columns that one call of the generator decides about.
constexpr int64_t DROPOUT_COLUMNS = 16;

struct TrainingTable {
  // Random bytes of `blocks` times DROPOUT_COLUMNS columns of a row, from column 0 on, to `out`.
  void (*random_bytes)(uint64_t seed, int64_t row, int64_t plane, int64_t blocks, uint8_t* out);
};

extern const TrainingTable scalar_training;
// x86 only
extern const TrainingTable avx2_training;
extern const TrainingTable avx512_training;  // with VNNI too, which training has no use for
extern const TrainingTable avx512_bf16_training;

}  // namespace bert_fast
