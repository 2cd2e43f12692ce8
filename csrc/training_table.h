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

// Columns whose bytes are made together, and those of a row of bytes: whole ones of them.
constexpr int64_t PHILOX_COLUMNS = 128;

inline int64_t dropout_columns(int64_t columns) {
  return (columns + PHILOX_COLUMNS - 1) / PHILOX_COLUMNS * PHILOX_COLUMNS;
}

// Which rows of a mask of dropout, and of the statistics of a softmax, belong to the queries of attention: query i of
// `batch` is row batch * batch_rows + i.
struct AttentionRows {
  int64_t batch_rows;  // 1 for a ragged tensor, seq_len for a padded one
  int64_t heads;
};

template <class T>
struct AttentionTrain {
  Attention<T> attention;
  float* lse;  // (rows, heads), contiguous: natural logarithm of the sum of e^(scaled score)
  AttentionRows rows;
  Dropout dropout;  // its row is the query's, its column the place of the key in its sequence, its plane the head
};

template <class T>
struct AttentionBackward {
  const T *grad, *q, *k, *v;
  const float* lse;  // of the forward
  T *dq, *dk, *dv;   // all with the strides `out_strides`
  AttentionStrides grad_strides, q_strides, k_strides, v_strides, out_strides;
  int64_t head_dim;
  float scale;  // of the scores
  AttentionRows rows;
  Dropout dropout;
};

// Queries that meet all keys at once in the backward of attention: the longer, the rarer sums are written; the shorter,
// the less memory there is between the products.
constexpr int64_t ATTENTION_BLOCK = 56;  // an even number, and four tiles of 14

// Queries whose random bytes are drawn at once.
constexpr int64_t DROPOUT_QUERIES = 16;

// Floats of scratch that one task of the forward or of the backward needs, aligned to 64 bytes; the same for every
// instruction set.
inline int64_t attention_train_scratch_size(int64_t length, int64_t head_dim) {
  const int64_t keys = (length + PANEL - 1) / PANEL * PANEL;
  return attention_scratch_size(length, head_dim) + keys * DROPOUT_QUERIES / 4;
}
inline int64_t attention_backward_scratch_size(int64_t length, int64_t head_dim) {
  const int64_t keys = (length + PANEL - 1) / PANEL * PANEL, channels = (head_dim + PANEL - 1) / PANEL * PANEL;
  const int64_t sums = length > ATTENTION_BLOCK ? 2 * keys * channels : 0;
  return 3 * keys * channels + 4 * ATTENTION_BLOCK * channels + 2 * ATTENTION_BLOCK * (keys + PANEL) + sums +
         keys * DROPOUT_QUERIES / 4;
}

template <class T>
struct AttentionTraining {
  // scratch: attention_train_scratch_size floats
  void (*attention_train)(const AttentionTrain<T>&, const AttentionTask&, float* scratch);
  // All queries of the task's head; scratch: attention_backward_scratch_size floats
  void (*attention_backward)(const AttentionBackward<T>&, const AttentionTask&, float* scratch);
};

struct TrainingTable {
  // Random bytes of `blocks` times DROPOUT_COLUMNS columns of a row, from column 0 on, to `out`.
  void (*random_bytes)(uint64_t seed, int64_t row, int64_t plane, int64_t blocks, uint8_t* out);
  AttentionTraining<float> attention_f32;
  AttentionTraining<bfloat16> attention_bf16;

  const AttentionTraining<float>& attention(float) const { return attention_f32; }
  const AttentionTraining<bfloat16>& attention(bfloat16) const { return attention_bf16; }
};

extern const TrainingTable scalar_training;
// x86 only
extern const TrainingTable avx2_training;
extern const TrainingTable avx512_training;  // with VNNI too, which training has no use for
extern const TrainingTable avx512_bf16_training;

}  // namespace bert_fast
