// BERT's encoder over a ragged batch, embeddings to last hidden state, in one call over packed weights.
//
// A batch of many sequences is dealt out to the threads, balanced by work, and each thread takes its sequences through
// all layers, some at a time, in memory of its own that stays in its cache: nobody waits before the end. Where that
// would leave threads idle (few or unequal sequences) all threads take every step together: by blocks of rows where
// there are enough tokens, else by columns, so that each weight is read by one thread only.
//
// A text gives the same bits whichever way is taken, alone or in any batch: every sum runs in an order that depends on
// the sizes of the model only.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "kernel_table.h"
#include "packing.h"

namespace bert_fast {

struct EncoderConfig {
  Precision precision;
  Activation activation;  // not none
  int64_t hidden_size, intermediate_size, num_heads;
  OutlierChannels residual_outliers = NO_OUTLIERS;  // int8: of the inputs of `qkv` and `intermediate`
};

// A LayerNorm's weight, then its bias, (2, hidden_size), and what is added to the variance.
struct Norm {
  std::vector<float> values;
  float eps;
};

struct EncoderLayer {
  PackedWeight qkv, attention_output, intermediate, output;
  Norm attention_norm, output_norm;
};

// Tables of float, or of bfloat16, not owned: (.., hidden_size) each, contiguous.
struct EmbeddingTables {
  const void *word, *position, *token_type;
  bool is_bfloat16;
};

// A batch without padding; every id is a row of its table.
struct EncoderBatch {
  const int64_t *input_ids, *position_ids, *token_type_ids;  // (num_tokens) each
  std::vector<int32_t> cu_seqlens;                           // (batch_size + 1), non-decreasing, from 0 to num_tokens
};

// What the caller wants, contiguous; null for what he does not. float, or bfloat16 where is_bfloat16.
struct EncoderOutput {
  void* rows = nullptr;             // (num_tokens, hidden_size), or more rows where there are places
  std::vector<void*> states;        // none, or 1 + layers of the same
  const int64_t* places = nullptr;  // (num_tokens): the row of `rows` that each token goes to; its own number if null
  float* pooled = nullptr;          // (batch_size, modes, hidden_size)
  std::vector<PoolingMode> modes;   // of `pooled`
  bool normalize = false;           // scale each row of `pooled` to length 1
  bool is_bfloat16 = false;
};

// f on some threads, at most `workers`, at least one.
using RunWorkers = std::function<void(int64_t workers, const std::function<void()>& f)>;

class Workspace;

class Encoder {
 public:
  Encoder(const EncoderConfig& config, std::vector<EncoderLayer> layers, const EmbeddingTables& tables,
          Norm embedding_norm);
  ~Encoder();

  // Safe to call from several threads. std::bad_alloc, before anything is computed, when there is no memory to work in.
  void forward(const EncoderBatch& batch, const EncoderOutput& output, int64_t threads, const RunWorkers& run) const;

  // Of the packed weights.
  int64_t bytes() const;

 private:
  class Forward;

  EncoderConfig config_;
  std::vector<EncoderLayer> layers_;
  EmbeddingTables tables_;
  Norm embedding_norm_;
  // Memory for the intermediate results of calls, kept for the next ones.
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> workspaces_;
};

}  // namespace bert_fast
