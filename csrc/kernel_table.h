// What one instruction set offers to the rest of the program: its kernels, as a table of functions.
// Free of torch and of any instruction set. The contract of each kernel stands at the top of kernels/<name>.h.
#pragma once

#include <cstdint>

namespace bert_fast {

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
  const T* hidden;            // (num_tokens, hidden_size), contiguous
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

// Widest block of queries that an instruction set takes at once.
constexpr int64_t MAX_QUERY_BLOCK = 64;

// Floats of scratch that one attention task needs, aligned to 64 bytes.
inline int64_t attention_scratch_size(int64_t length, int64_t head_dim) {
  constexpr int64_t alignment = 16;
  return 2 * (length * head_dim + alignment) + MAX_QUERY_BLOCK * (length + 2 * head_dim);
}

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
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<bfloat16> bf16;

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
