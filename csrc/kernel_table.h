// What one instruction set offers to the rest of the program: its kernels, as a table of functions.
// Free of torch and of any instruction set. The contract of each kernel stands at the top of kernels/<name>.h.
#pragma once

#include <cstdint>

namespace bert_fast {

// Columns that a panel of packed weights holds.
constexpr int64_t PANEL = 32;

// Input channels of an int8 product that stay float: no byte is shared with them, however large their values are.
constexpr int64_t OUTLIERS = 2;

struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct BiasGelu {
  const T* x;     // (rows, features), contiguous
  const T* bias;  // (features)
  T* out;         // (rows, features), contiguous; may be x
  int64_t features;
  bool tanh;  // the tanh form; the erf form otherwise
};

template <class T>
struct LayerNorm {
  const T* weight;  // (hidden_size)
  const T* bias;    // (hidden_size)
  int64_t hidden_size;
  float eps;  // added to the variance
};

template <class T>
struct ResidualLayerNorm {
  const T* x;         // (rows, hidden_size), contiguous
  const T* bias;      // (hidden_size)
  const T* residual;  // (rows, hidden_size), contiguous
  T* out;             // (rows, hidden_size), contiguous; may be x or residual
  LayerNorm<T> norm;
};

template <class T>
struct EmbeddingLayerNorm {
  const int64_t* input_ids;  // (rows) each; every id is a row of its table
  const int64_t* position_ids;
  const int64_t* token_type_ids;
  const T* word_embeddings;  // (.., hidden_size) each, contiguous
  const T* position_embeddings;
  const T* token_type_embeddings;
  T* out;  // (rows, hidden_size), contiguous
  LayerNorm<T> norm;
};

enum class PoolingMode { cls, mean, max, mean_sqrt_len_tokens, weightedmean };

template <class T>
struct Pooling {
  const T* hidden;            // (num_tokens, hidden_size)
  int64_t stride;             // of its rows
  const int32_t* cu_seqlens;  // (batch_size + 1), non-decreasing, from 0 to num_tokens
  T* out;                     // (batch_size, hidden_size), contiguous
  int64_t hidden_size;
  PoolingMode mode;
};

// Channels that one pooling task takes: task t is block t % pooling_blocks of sequence t / pooling_blocks.
constexpr int64_t POOLING_BLOCK = 128;

inline int64_t pooling_blocks(int64_t hidden_size) { return (hidden_size + POOLING_BLOCK - 1) / POOLING_BLOCK; }

// Element strides of a (batch, token, head, head_dim) tensor whose last dimension is contiguous.
struct AttentionStrides {
  int64_t batch, token, head;
};

// One sequence: token i of it is token rows[i] (or i where rows is null) past the start of `batch`.
// A ragged tensor is addressed by batch stride = token stride and batch = the sequence's first token.
struct AttentionSequence {
  int64_t batch;
  int64_t length;
  const int64_t* rows;
};

template <class T>
struct Attention {
  const T *q, *k, *v;
  T* out;
  AttentionStrides q_strides, k_strides, v_strides, out_strides;
  int64_t head_dim;
  float scale;  // of the scores
};

// The queries [first_query, end_query) of one head of one sequence.
struct AttentionTask {
  AttentionSequence sequence;
  int64_t head;
  int64_t first_query, end_query;
};

// Floats of scratch that one attention task needs, aligned to 64 bytes; the same for every instruction set.
inline int64_t attention_scratch_size(int64_t length, int64_t head_dim) {
  constexpr int64_t tile_rows = 16;
  const int64_t keys = (length + PANEL - 1) / PANEL * PANEL, channels = (head_dim + PANEL - 1) / PANEL * PANEL;
  return 2 * keys * channels + tile_rows * (keys + PANEL + channels);
}

// What the products of an encoder are computed in.
enum class Precision { fp32, bf16, int8 };

enum class Activation { none, gelu_erf, gelu_tanh, relu };

// A weight matrix (out_features, in_features), packed for one precision; the layout is the same for every instruction
// set. out_features is padded to whole panels and in_features to whole PANELs, with zeros.
struct PackedLinear {
  const void* panels;     // (panels, depth / group, PANEL, group): float, pairs of bfloat16, or groups of four int8_t
  const float* bias;      // (panels * PANEL)
  const float* scales;    // (panels * PANEL); int8: a weight is its byte times the scale of its column
  const float* sums;      // (panels * PANEL); int8: the sum of the weights of a column
  const float* outliers;  // (OUTLIERS, panels * PANEL); int8: weights of the channels that stay float
  const int64_t* outlier_channels;  // (OUTLIERS); int8: which they are
  int64_t out_features, depth;      // padded; depth is in_features
};

// What the bytes of a row stand for: a value is scale * byte + minimum, or one of the outliers.
struct RowCode {
  float scale, minimum, outliers[OUTLIERS];
};

// out = activation(input weight^T + bias) + residual. Rows of `out` and `residual` have room for whole panels.
struct Linear {
  PackedLinear weight;
  const void* input;  // rows of `depth` floats, bfloat16 or uint8_t
  int64_t input_stride;
  const RowCode* input_codes;  // (rows); int8
  // Rows of float where there is a residual; with an activation, the precision's input type, or float for int8; or else
  // the type that attention reads: float for fp32, bfloat16 otherwise.
  void* out;
  int64_t out_stride;
  const float* residual;  // or null; not with an activation
  int64_t residual_stride;
  Activation activation;
};

// Rows ready to be the input of a product: as floats, and in the precision's type.
struct Prepared {
  float* hidden;  // rows of hidden_size floats
  int64_t hidden_stride;
  void* input;  // the same as bfloat16 or uint8_t, zero up to a whole PANEL; null for fp32
  int64_t input_stride;
  RowCode* codes;                   // (rows); int8
  const int64_t* outlier_channels;  // (OUTLIERS); int8
};

// LayerNorm of rows of floats, prepared for the product that follows.
struct Normalize {
  const float* x;
  int64_t x_stride;
  LayerNorm<float> norm;
  Prepared out;
};

// Rows of float or bfloat16 to unsigned bytes: scale = (max - min) / 255, byte = round((x - min) / scale), where the
// outliers are taken for zero.
struct Quantize {
  void* x;  // where there are outliers written on the way, and restored
  int64_t x_stride;
  int64_t size;  // values of a row
  uint8_t* out;  // zero from `size` to a whole PANEL
  int64_t out_stride;
  RowCode* codes;                   // (rows)
  const int64_t* outlier_channels;  // (OUTLIERS), distinct or not; negative for none
};

// The sums of three rows of tables, as floats.
template <class T>
struct EmbeddingSum {
  const int64_t* input_ids;  // (rows) each; every id is a row of its table
  const int64_t* position_ids;
  const int64_t* token_type_ids;
  const T* word_embeddings;  // (.., hidden_size) each, contiguous
  const T* position_embeddings;
  const T* token_type_embeddings;
  int64_t hidden_size;
  float* out;
  int64_t out_stride;
};

// Kernels that take [begin, end) work on those rows only (pooling: on those tasks).
template <class T>
struct Kernels {
  void (*bias_gelu)(const BiasGelu<T>&, int64_t begin, int64_t end);
  // scratch: hidden_size floats
  void (*residual_layer_norm)(const ResidualLayerNorm<T>&, int64_t begin, int64_t end, float* scratch);
  void (*embedding_layer_norm)(const EmbeddingLayerNorm<T>&, int64_t begin, int64_t end, float* scratch);
  void (*pooling)(const Pooling<T>&, int64_t begin, int64_t end);
  // scratch: attention_scratch_size floats
  void (*attention)(const Attention<T>&, const AttentionTask&, float* scratch);
  void (*embedding_sum)(const EmbeddingSum<T>&, int64_t begin, int64_t end);
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);
};

// The kernels of an encoder that depend on its precision.
struct PrecisionKernels {
  void (*linear)(const Linear&, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
  void (*normalize)(const Normalize&, int64_t begin, int64_t end);
};

struct TrainingTable;  // training_table.h

struct KernelTable {
  const char* name;
  const TrainingTable* training;
  Kernels<float> f32;
  Kernels<bfloat16> bf16;
  PrecisionKernels precisions[3];  // by Precision

  template <class T>
  const Kernels<T>& of() const;
};

template <>
inline const Kernels<float>& KernelTable::of<float>() const {
  return f32;
}

template <>
inline const Kernels<bfloat16>& KernelTable::of<bfloat16>() const {
  return bf16;
}

}  // namespace bert_fast
