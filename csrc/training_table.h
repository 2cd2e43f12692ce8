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

// A matrix of a product as its owner has it. Values side by side in memory are of consecutive k (`along_k`), or else of
// consecutive rows of the left, columns of the right matrix; `stride` values further come the next ones.
struct DenseOperand {
  const void* values;
  int64_t stride;
  bool along_k;
  bool is_bfloat16;
};

// out = left right + bias, of (rows, depth) and (depth, columns).
struct Dense {
  DenseOperand left;   // of the type that is multiplied
  DenseOperand right;  // the same, or float to be rounded to it
  int64_t depth, columns;
  const float* bias;  // (columns), or null
  void* out;
  int64_t out_stride;
  bool out_is_bfloat16;
  float* left_sums;  // (rows), or null: the sums of `left`, which is not along k, over k
};

// The most rows and columns of a part of `out` that one call makes; of a block of k, in floats or pairs of bfloat16; and
// rows of `left` that are packed together.
constexpr int64_t DENSE_ROWS = 1344, DENSE_COLUMNS = 12 * PANEL, DENSE_STEPS = 384, DENSE_BLOCK_ROWS = 112;

// What one thread packs into: most of a second-level cache, `sums` apart.
struct DenseScratch {
  float right[DENSE_COLUMNS * DENSE_STEPS];
  float left[DENSE_BLOCK_ROWS * (DENSE_STEPS + 16)];  // a cache line between rows, so that they share no set
  float bias[DENSE_COLUMNS];
  float sums[DENSE_ROWS * DENSE_COLUMNS];  // of the blocks of k so far, where `out` is bfloat16
};

// The part of `out` in these rows and columns (whole panels).
using DenseKernel = void (*)(const Dense&, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                             DenseScratch&);
// left_sums alone.
using DenseSums = void (*)(const Dense&, int64_t row_begin, int64_t row_end);

struct TrainingTable {
  // Random bytes of `blocks` times DROPOUT_COLUMNS columns of a row, from column 0 on, to `out`.
  void (*random_bytes)(uint64_t seed, int64_t row, int64_t plane, int64_t blocks, uint8_t* out);
  DenseKernel dense[2];  // of float, of bfloat16
  DenseSums dense_sums[2];
};

extern const TrainingTable scalar_training;
// x86 only
extern const TrainingTable avx2_training;
extern const TrainingTable avx512_training;  // with VNNI too, which training has no use for
extern const TrainingTable avx512_bf16_training;

}  // namespace bert_fast
