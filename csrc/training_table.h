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

// Sums over all rows (gradients of biases and gains) are taken in blocks of so many rows, and the sums of the blocks
// are added in their order: the same bits whatever the number of threads.
constexpr int64_t SUM_ROWS = 16;

inline int64_t sum_blocks(int64_t rows) { return (rows + SUM_ROWS - 1) / SUM_ROWS; }

// `x` is in the product's dtype, the rest in the parameters'.
template <class X, class T>
struct ResidualLayerNormTrain {
  const X* x;         // (rows, hidden_size), contiguous, as are all
  const T* bias;      // (hidden_size)
  const T* residual;  // (rows, hidden_size)
  T* out;             // (rows, hidden_size)
  T* normalized;      // (rows, hidden_size)
  float* rstd;        // (rows)
  LayerNorm<T> norm;
  Dropout dropout;
};

template <class T>
struct EmbeddingLayerNormTrain {
  EmbeddingLayerNorm<T> forward;
  T* normalized;  // (rows, hidden_size)
  float* rstd;    // (rows)
  Dropout dropout;
};

// X: of dx, before the residual's dropout. D: of dhidden, the gradient of what was normalised. For embeddings, whose
// dropout comes after the LayerNorm, X is D and there is no dx.
template <class X, class T, class D>
struct LayerNormBackward {
  const T* grad;        // (rows, hidden_size)
  const T* normalized;  // (rows, hidden_size)
  const float* rstd;    // (rows)
  const T* weight;      // (hidden_size)
  D* dhidden;           // (rows, hidden_size)
  X* dx;                // (rows, hidden_size), or null where it would be dhidden
  float* dweight;       // (sum_blocks, hidden_size), as are both biases
  float* dlayer_norm_bias;
  float* dbias;  // not for embeddings
  int64_t rows, hidden_size;
  Dropout dropout;
};

// out[c] = the sum of partials[.., c].
template <class T>
struct ColumnSums {
  const float* partials;  // (blocks, columns)
  int64_t blocks, columns;
  T* out;  // (columns)
};

// Gradient of a table of embeddings: each row of it is the sum, in order, of the rows of the tokens that read it.
template <class T>
struct TableGradient {
  const float* rows;     // (num_tokens, hidden_size)
  const int64_t* first;  // (rows of the table): the first token that read it, or -1
  const int64_t* next;   // (num_tokens): the next token with the same id, or -1
  T* out;                // (rows of the table, hidden_size)
  int64_t hidden_size;
};

template <class T>
struct BiasGeluBackward {
  const T* grad;  // (rows, features)
  const T* x;     // (rows, features)
  const T* bias;  // (features)
  T* dx;          // (rows, features)
  float* dbias;   // (sum_blocks, features)
  int64_t rows, features;
  bool tanh;
};

// Tasks as for Pooling.
template <class T>
struct PoolingBackward {
  const T* grad;              // (batch_size, hidden_size)
  const T* hidden;            // (num_tokens, hidden_size); read for the maximum only
  const int32_t* cu_seqlens;  // (batch_size + 1)
  T* out;                     // (num_tokens, hidden_size)
  int64_t hidden_size;
  PoolingMode mode;
};

template <class T>
struct CrossEntropy {
  T* logits;              // (rows, classes); becomes softmax(logits + bias) - onehot(labels)
  const float* bias;      // (classes)
  const int64_t* labels;  // (rows), each in [0, classes)
  float* losses;          // (rows)
  int64_t classes;
};

// Kernels that take [begin, end) work on those rows only, or on those blocks of SUM_ROWS rows, or tasks. Scratch of
// floats, where there is some, has room for a row; bytes for a row of dropout_columns.
template <class T>
struct RowTraining {
  void (*embedding_layer_norm)(const EmbeddingLayerNormTrain<T>&, int64_t begin, int64_t end, float* scratch,
                               uint8_t* bytes);
  void (*embedding_backward)(const LayerNormBackward<float, T, float>&, int64_t block_begin, int64_t block_end,
                             uint8_t* bytes);
  void (*table_gradient)(const TableGradient<T>&, int64_t task_begin, int64_t task_end);
  void (*column_sums)(const ColumnSums<T>&, int64_t column_begin, int64_t column_end);
  void (*bias_gelu_backward)(const BiasGeluBackward<T>&, int64_t block_begin, int64_t block_end);
  void (*pooling_backward)(const PoolingBackward<T>&, int64_t task_begin, int64_t task_end);
  void (*cross_entropy)(const CrossEntropy<T>&, int64_t begin, int64_t end, float* scratch);
};

template <class X, class T>
struct ResidualTraining {
  void (*forward)(const ResidualLayerNormTrain<X, T>&, int64_t begin, int64_t end, float* scratch, uint8_t* bytes);
  void (*backward)(const LayerNormBackward<X, T, T>&, int64_t block_begin, int64_t block_end, uint8_t* bytes);
};

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
  const T* out;      // of the forward
  const float* lse;  // of the forward
  T *dq, *dk, *dv;   // all with the strides `gradient_strides`
  AttentionStrides grad_strides, q_strides, k_strides, v_strides, out_strides, gradient_strides;
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

// The most columns of a part of `out` that one call makes; its most rows, where its sums are kept in scratch; the most
// floats or pairs of bfloat16 in a block of k; and the rows of `left` that are packed together.
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
  RowTraining<float> f32_rows;
  RowTraining<bfloat16> bf16_rows;
  ResidualTraining<float, float> f32_residual;
  ResidualTraining<bfloat16, bfloat16> bf16_residual;
  ResidualTraining<bfloat16, float> mixed_residual;
  AttentionTraining<float> attention_f32;
  AttentionTraining<bfloat16> attention_bf16;
  DenseKernel dense[2];  // of float, of bfloat16
  DenseSums dense_sums[2];

  const RowTraining<float>& rows(float) const { return f32_rows; }
  const RowTraining<bfloat16>& rows(bfloat16) const { return bf16_rows; }
  const ResidualTraining<float, float>& residual(float, float) const { return f32_residual; }
  const ResidualTraining<bfloat16, bfloat16>& residual(bfloat16, bfloat16) const { return bf16_residual; }
  const ResidualTraining<bfloat16, float>& residual(bfloat16, float) const { return mixed_residual; }
  const AttentionTraining<float>& attention(float) const { return attention_f32; }
  const AttentionTraining<bfloat16>& attention(bfloat16) const { return attention_bf16; }
};

extern const TrainingTable scalar_training;
// x86 only
extern const TrainingTable avx2_training;
extern const TrainingTable avx512_training;  // with VNNI too, which training has no use for
extern const TrainingTable avx512_bf16_training;

}  // namespace bert_fast
