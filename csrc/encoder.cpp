#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "dispatch.h"
#include "schedule.h"
#include "team.h"
#include "workspace.h"

namespace bert_fast {
namespace {

// Rows that a thread takes through the layers together, unless one sequence alone is longer.
constexpr int64_t CHUNK_ROWS = 192;
// Rows whose wide activations exist at once.
constexpr int64_t BLOCK_ROWS = 112;
// Tokens per thread from which on the threads share the rows of a step, not its columns.
constexpr int64_t ROWS_PER_THREAD = 64;
// How much more work than the average the busiest thread may have when whole sequences are dealt out.
constexpr double MAX_IMBALANCE = 1.1;
// Steps in which threads take a layer together, at most.
constexpr int64_t MAX_LAYER_STEPS = 9;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
};

// Part i of n nearly equal ones.
Range part(int64_t size, int64_t i, int64_t n) { return {size * i / n, size * (i + 1) / n}; }

void round_row(const float* from, int64_t size, bfloat16* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = to_bfloat16(from[i]);
}

// Sequences [begin, end) of `order`, which one thread takes through the layers together.
struct Chunk {
  size_t begin, end;
};

// Sequences dealt out to threads.
struct Deal {
  std::vector<int64_t> order;              // of the sequences: those of the first thread, then those of the second, ...
  std::vector<std::vector<Chunk>> chunks;  // of each thread
  double imbalance;                        // the work of the busiest thread over the average
  int64_t max_rows;                        // of a chunk
};

}  // namespace

// One call.
class Encoder::Forward {
 public:
  Forward(const Encoder& encoder, const EncoderBatch& batch, const EncoderOutput& output, int64_t threads)
      : encoder_(encoder),
        config_(encoder.config_),
        batch_(batch),
        output_(output),
        table_(kernels()),
        kernels_(table_.precisions[static_cast<int>(config_.precision)]),
        threads_(threads),
        num_tokens_(batch.cu_seqlens.back()),
        num_sequences_(static_cast<int64_t>(batch.cu_seqlens.size()) - 1) {}

  void run(const RunWorkers& run_workers) {
    if (num_sequences_ == 0) return;
    const Deal dealt = deal();
    const bool alone = threads_ == 1 || dealt.imbalance <= MAX_IMBALANCE;
    const int64_t longest = longest_sequence();
    const int64_t scratch = attention_scratch_size(longest, head_dim());
    const bool by_columns = !alone && num_tokens_ < ROWS_PER_THREAD * threads_;
    const std::vector<AttentionTask> tasks =
        alone ? std::vector<AttentionTask>{} : attention_tasks(ragged_sequences(batch_.cu_seqlens), config_.num_heads);
    take_workspaces(alone ? dealt.max_rows : num_tokens_, alone, by_columns, scratch);
    std::atomic<int64_t> arrived{0};
    Team team(alone ? static_cast<int64_t>(dealt.chunks.size()) : 2 + MAX_LAYER_STEPS * num_layers());
    run_workers(threads_, [&] {
      const int64_t worker = arrived.fetch_add(1);
      if (worker >= threads_) return;
      if (alone) {
        run_dealt(dealt, worker, team);
      } else if (by_columns) {
        run_by_columns(worker, tasks, team);
      } else {
        run_by_rows(worker, tasks, team);
      }
    });
    return_workspaces();
  }

 private:
  int64_t num_layers() const { return static_cast<int64_t>(encoder_.layers_.size()); }
  int64_t head_dim() const { return config_.hidden_size / config_.num_heads; }
  int64_t length(int64_t sequence) const {
    const auto i = static_cast<size_t>(sequence);
    return batch_.cu_seqlens[i + 1] - batch_.cu_seqlens[i];
  }
  int64_t first_token(int64_t sequence) const { return batch_.cu_seqlens[static_cast<size_t>(sequence)]; }
  int64_t longest_sequence() const {
    int64_t longest = 0;
    for (int64_t i = 0; i < num_sequences_; ++i) longest = std::max(longest, length(i));
    return longest;
  }

  // ------------------------------------------------------------------------------------------------------- planning

  // The work of a sequence, in multiply-adds of a layer.
  double work(int64_t sequence) const {
    const double n = static_cast<double>(length(sequence)), h = static_cast<double>(config_.hidden_size);
    return n * (4 * h * h + 2 * h * static_cast<double>(config_.intermediate_size)) + 4 * n * n * h;
  }

  // The longest sequence goes to the thread that has the least to do, then the next.
  Deal deal() const {
    Deal result;
    std::vector<int64_t> by_length(static_cast<size_t>(num_sequences_));
    std::iota(by_length.begin(), by_length.end(), 0);
    std::stable_sort(by_length.begin(), by_length.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    std::vector<double> loads(static_cast<size_t>(threads_), 0.0);
    std::vector<std::vector<int64_t>> sequences(static_cast<size_t>(threads_));
    for (const int64_t sequence : by_length) {
      const auto least = std::min_element(loads.begin(), loads.end());
      *least += work(sequence);
      sequences[static_cast<size_t>(least - loads.begin())].push_back(sequence);
    }
    const double total = std::accumulate(loads.begin(), loads.end(), 0.0);
    const double busiest = *std::max_element(loads.begin(), loads.end());
    result.imbalance = total > 0 ? busiest * static_cast<double>(threads_) / total : 1.0;
    result.max_rows = 0;
    for (const std::vector<int64_t>& own : sequences) {
      std::vector<Chunk> chunks;
      int64_t rows = 0;
      for (const int64_t sequence : own) {
        if (chunks.empty() || rows + length(sequence) > CHUNK_ROWS) {
          chunks.push_back({result.order.size(), result.order.size()});
          rows = 0;
        }
        result.order.push_back(sequence);
        ++chunks.back().end;
        rows += length(sequence);
        result.max_rows = std::max(result.max_rows, rows);
      }
      result.chunks.push_back(std::move(chunks));
    }
    return result;
  }

  // One for each thread: where each works alone, all alike; else the first holds the rows that all share.
  void take_workspaces(int64_t rows, bool alone, bool by_columns, int64_t scratch) {
    {
      const std::lock_guard lock(encoder_.mutex_);
      while (static_cast<int64_t>(workspaces_.size()) < threads_ && !encoder_.workspaces_.empty()) {
        workspaces_.push_back(std::move(encoder_.workspaces_.back()));
        encoder_.workspaces_.pop_back();
      }
      encoder_.workspaces_.reserve(kept_workspaces());  // so that giving them back cannot fail
    }
    while (static_cast<int64_t>(workspaces_.size()) < threads_)
      workspaces_.push_back(
          std::make_unique<Workspace>(config_.precision, config_.hidden_size, config_.intermediate_size));
    for (size_t i = 0; i < workspaces_.size(); ++i) {
      const bool holds_rows = alone || i == 0;
      workspaces_[i]->reserve(holds_rows ? rows : 0, by_columns ? (i == 0 ? rows : 0) : std::min(rows, BLOCK_ROWS),
                              scratch);
    }
  }

  // So many are kept for later calls, at most.
  size_t kept_workspaces() const { return static_cast<size_t>(2 * threads_); }

  void return_workspaces() {
    const std::lock_guard lock(encoder_.mutex_);
    for (auto& workspace : workspaces_)
      if (encoder_.workspaces_.size() < kept_workspaces()) encoder_.workspaces_.push_back(std::move(workspace));
    workspaces_.clear();
  }

  // -------------------------------------------------------------------------------------------------- the three ways

  void run_dealt(const Deal& dealt, int64_t worker, Team& team) const {
    const Workspace& space = *workspaces_[static_cast<size_t>(worker)];
    // Its own share first, then what others have not begun.
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t owner = (worker + i) % threads_;
      const std::vector<Chunk>& chunks = dealt.chunks[static_cast<size_t>(owner)];
      team.claim(owner, static_cast<int64_t>(chunks.size()),
                 [&](int64_t chunk) { run_chunk(dealt, chunks[static_cast<size_t>(chunk)], space); });
    }
  }

  void run_chunk(const Deal& dealt, const Chunk& chunk, const Workspace& space) const {
    int64_t rows = 0;
    const auto each_sequence = [&](const auto& f) {
      int64_t row = 0;
      for (size_t i = chunk.begin; i < chunk.end; row += length(dealt.order[i++])) f(dealt.order[i], row);
      rows = row;
    };
    each_sequence([&](int64_t sequence, int64_t row) { embed(space, row, first_token(sequence), length(sequence)); });
    each_sequence(
        [&](int64_t sequence, int64_t row) { emit_state(0, space, row, first_token(sequence), length(sequence)); });
    for (int64_t layer = 0; layer < num_layers(); ++layer) {
      project_qkv(layer, space, {0, rows}, all_panels(encoder_.layers_[static_cast<size_t>(layer)].qkv));
      each_sequence([&](int64_t sequence, int64_t row) {
        for (int64_t head = 0; head < config_.num_heads; ++head)
          attend(space, {{row, length(sequence), nullptr}, head, 0, length(sequence)}, space.scratch.get());
      });
      const int64_t blocks = divide_up(rows, BLOCK_ROWS);
      for (int64_t i = 0; i < blocks; ++i) after_attention(layer, space, space, part(rows, i, blocks));
      each_sequence([&](int64_t sequence, int64_t row) {
        emit_state(layer + 1, space, row, first_token(sequence), length(sequence));
      });
    }
    each_sequence([&](int64_t sequence, int64_t row) { emit_sequence(sequence, space, row); });
  }

  // tasks: heads of sequences, the longest first, a long one in parts.
  void run_by_rows(int64_t worker, const std::vector<AttentionTask>& tasks, Team& team) const {
    const Workspace &space = *workspaces_[0], &own = *workspaces_[static_cast<size_t>(worker)];
    const int64_t blocks = divide_up(divide_up(num_tokens_, BLOCK_ROWS), threads_) * threads_;
    int64_t step = 0;
    for (int64_t layer = 0; layer <= num_layers(); ++layer) {
      team.run(step++, blocks, [&](int64_t i) {
        const Range rows = part(num_tokens_, i, blocks);
        if (layer == 0) {
          embed(space, rows.begin, rows.begin, rows.end - rows.begin);
        } else {
          after_attention(layer - 1, space, own, rows);
        }
        emit_state(layer, space, rows.begin, rows.begin, rows.end - rows.begin);
        if (layer < num_layers())
          project_qkv(layer, space, rows, all_panels(encoder_.layers_[static_cast<size_t>(layer)].qkv));
      });
      if (layer < num_layers())
        team.run(step++, static_cast<int64_t>(tasks.size()),
                 [&](int64_t i) { attend(space, tasks[static_cast<size_t>(i)], own.scratch.get()); });
    }
    team.run(step++, num_sequences_, [&](int64_t i) { emit_sequence(i, space, first_token(i)); });
  }

  void run_by_columns(int64_t worker, const std::vector<AttentionTask>& tasks, Team& team) const {
    const Workspace &space = *workspaces_[0], &own = *workspaces_[static_cast<size_t>(worker)];
    const Range all{0, num_tokens_};
    int64_t step = 0;
    const auto each_row = [&](const auto& f) {
      const int64_t parts = std::min(num_tokens_, threads_);
      team.run(step++, parts, [&](int64_t i) { f(part(num_tokens_, i, parts)); });
    };
    const auto each_panel = [&](const PackedWeight& weight, const auto& f) {
      const int64_t parts = std::min(weight.panels(), PARTS_PER_THREAD * threads_);
      team.run(step++, parts, [&](int64_t i) { f(part(weight.panels(), i, parts)); });
    };
    each_row([&](Range rows) {
      embed(space, rows.begin, rows.begin, rows.end - rows.begin);
      emit_state(0, space, rows.begin, rows.begin, rows.end - rows.begin);
    });
    for (int64_t i = 0; i < num_layers(); ++i) {
      const EncoderLayer& layer = encoder_.layers_[static_cast<size_t>(i)];
      each_panel(layer.qkv, [&](Range panels) { project_qkv(i, space, all, panels); });
      team.run(step++, static_cast<int64_t>(tasks.size()),
               [&](int64_t task) { attend(space, tasks[static_cast<size_t>(task)], own.scratch.get()); });
      if (config_.precision == Precision::int8) each_row([&](Range rows) { quantize_context(layer, space, rows); });
      each_panel(layer.attention_output, [&](Range panels) { project_context(layer, space, all, panels); });
      each_row([&](Range rows) { normalize(layer.attention_norm, space, rows); });
      each_panel(layer.intermediate, [&](Range panels) { widen(layer, space, space, all, 0, panels); });
      if (config_.precision == Precision::int8) each_row([&](Range rows) { quantize_wide(layer, space, rows); });
      each_panel(layer.output, [&](Range panels) { narrow(layer, space, space, all, 0, panels); });
      each_row([&](Range rows) {
        normalize(layer.output_norm, space, rows);
        emit_state(i + 1, space, rows.begin, rows.begin, rows.end - rows.begin);
      });
    }
    team.run(step++, num_sequences_, [&](int64_t sequence) { emit_sequence(sequence, space, first_token(sequence)); });
  }

  // ------------------------------------------------------------------------------------------------------- the steps

  static Range all_panels(const PackedWeight& weight) { return {0, weight.panels()}; }

  // `count` tokens from `token` on -> rows from `row` on.
  void embed(const Workspace& space, int64_t row, int64_t token, int64_t count) const {
    const auto sum = [&](auto element) {
      using T = decltype(element);
      const EmbeddingTables& tables = encoder_.tables_;
      const EmbeddingSum<T> args{batch_.input_ids + token,
                                 batch_.position_ids + token,
                                 batch_.token_type_ids + token,
                                 static_cast<const T*>(tables.word),
                                 static_cast<const T*>(tables.position),
                                 static_cast<const T*>(tables.token_type),
                                 config_.hidden_size,
                                 space.product.row(row),
                                 space.product.stride()};
      table_.of<T>().embedding_sum(args, 0, count);
    };
    if (encoder_.tables_.is_bfloat16) {
      sum(bfloat16{});
    } else {
      sum(float{});
    }
    normalize(encoder_.embedding_norm_, space, {row, row + count});
  }

  void normalize(const Norm& norm, const Workspace& space, Range rows) const {
    const bool int8 = config_.precision == Precision::int8, fp32 = config_.precision == Precision::fp32;
    const Prepared prepared{space.hidden.row(0),
                            space.hidden.stride(),
                            fp32 ? nullptr : space.input.row(0),
                            space.input.stride(),
                            int8 ? space.codes.get() : nullptr,
                            int8 ? config_.residual_outliers.data() : nullptr};
    const LayerNorm<float> layer_norm{norm.values.data(), norm.values.data() + config_.hidden_size, config_.hidden_size,
                                      norm.eps};
    kernels_.normalize({space.product.row(0), space.product.stride(), layer_norm, prepared}, rows.begin, rows.end);
  }

  void project_qkv(int64_t layer, const Workspace& space, Range rows, Range panels) const {
    Linear args = from_input(encoder_.layers_[static_cast<size_t>(layer)].qkv, space);
    args.out = space.qkv.row(0);
    args.out_stride = space.qkv.stride();
    run_linear(args, rows, panels);
  }

  void attend(const Workspace& space, const AttentionTask& task, float* scratch) const {
    const auto run = [&](auto element) {
      using T = decltype(element);
      const int64_t width = round_up_to_panel(config_.hidden_size), stride = space.qkv.stride();
      const T* q = static_cast<const T*>(space.qkv.row(0));
      const AttentionStrides in{stride, stride, head_dim()};
      const AttentionStrides out{space.context.stride(), space.context.stride(), head_dim()};
      const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim()));
      const Attention<T> args{q,   q + width,  q + 2 * width, static_cast<T*>(space.context.row(0)), in, in, in,
                              out, head_dim(), scale};
      table_.of<T>().attention(args, task, scratch);
    };
    if (config_.precision == Precision::fp32) {
      run(float{});
    } else {
      run(bfloat16{});
    }
  }

  // The rest of a layer, row by row; `own` has the wide activations.
  void after_attention(int64_t index, const Workspace& space, const Workspace& own, Range rows) const {
    const EncoderLayer& layer = encoder_.layers_[static_cast<size_t>(index)];
    if (config_.precision == Precision::int8) quantize_context(layer, space, rows);
    project_context(layer, space, rows, all_panels(layer.attention_output));
    normalize(layer.attention_norm, space, rows);
    widen(layer, space, own, rows, rows.begin, all_panels(layer.intermediate));
    if (config_.precision == Precision::int8) quantize_wide(layer, own, {0, rows.end - rows.begin});
    narrow(layer, space, own, rows, rows.begin, all_panels(layer.output));
    normalize(layer.output_norm, space, rows);
  }

  void quantize_context(const EncoderLayer& layer, const Workspace& space, Range rows) const {
    table_.bf16.quantize(
        {space.context.row(0), space.context.stride(), config_.hidden_size, static_cast<uint8_t*>(space.input.row(0)),
         space.input.stride(), space.codes.get(), layer.attention_output.view().outlier_channels},
        rows.begin, rows.end);
  }

  void quantize_wide(const EncoderLayer& layer, const Workspace& own, Range rows) const {
    table_.f32.quantize({own.wide_sums.row(0), own.wide_sums.stride(), config_.intermediate_size,
                         static_cast<uint8_t*>(own.wide.row(0)), own.wide.stride(), own.wide_codes.get(),
                         layer.output.view().outlier_channels},
                        rows.begin, rows.end);
  }

  void project_context(const EncoderLayer& layer, const Workspace& space, Range rows, Range panels) const {
    Linear args = from_input(layer.attention_output, space);
    if (config_.precision != Precision::int8) {
      args.input = space.context.row(0);
      args.input_stride = space.context.stride();
    }
    to_product(args, space);
    run_linear(args, rows, panels);
  }

  // Rows of the batch -> rows of `own` from zero on, of which the first is `first`.
  void widen(const EncoderLayer& layer, const Workspace& space, const Workspace& own, Range rows, int64_t first,
             Range panels) const {
    const bool int8 = config_.precision == Precision::int8;
    Linear args = from_input(layer.intermediate, space, first);
    args.activation = config_.activation;
    args.out = int8 ? own.wide_sums.row(0) : own.wide.row(0);
    args.out_stride = int8 ? own.wide_sums.stride() : own.wide.stride();
    run_linear(args, {rows.begin - first, rows.end - first}, panels);
  }

  void narrow(const EncoderLayer& layer, const Workspace& space, const Workspace& own, Range rows, int64_t first,
              Range panels) const {
    const bool int8 = config_.precision == Precision::int8;
    Linear args{};
    args.weight = layer.output.view();
    args.input = own.wide.row(0);
    args.input_stride = own.wide.stride();
    args.input_codes = int8 ? own.wide_codes.get() : nullptr;
    to_product(args, space, first);
    run_linear(args, {rows.begin - first, rows.end - first}, panels);
  }

  // A product of what LayerNorm (or the quantisation of the context) has prepared; its row 0 is row `first`.
  Linear from_input(const PackedWeight& weight, const Workspace& space, int64_t first = 0) const {
    Linear args{};
    args.weight = weight.view();
    const bool fp32 = config_.precision == Precision::fp32, int8 = config_.precision == Precision::int8;
    args.input = fp32 ? space.hidden.row(first) : space.input.row(first);
    args.input_stride = fp32 ? space.hidden.stride() : space.input.stride();
    args.input_codes = int8 ? space.codes.get() + first : nullptr;
    args.activation = Activation::none;
    return args;
  }

  // The result of a product, plus the residual stream, goes to `product`.
  void to_product(Linear& args, const Workspace& space, int64_t first = 0) const {
    args.out = space.product.row(first);
    args.out_stride = space.product.stride();
    args.residual = space.hidden.row(first);
    args.residual_stride = space.hidden.stride();
  }

  void run_linear(const Linear& args, Range rows, Range panels) const {
    kernels_.linear(args, rows.begin, rows.end, panels.begin, panels.end);
  }

  // --------------------------------------------------------------------------------------------------- what comes out

  void emit_rows(void* to, const Workspace& space, int64_t row, int64_t token, int64_t count) const {
    const int64_t size = config_.hidden_size;
    for (int64_t i = 0; i < count; ++i) {
      const float* from = space.hidden.row(row + i);
      const int64_t place = output_.places == nullptr ? token + i : output_.places[token + i];
      if (output_.is_bfloat16) {
        round_row(from, size, static_cast<bfloat16*>(to) + place * size);
      } else {
        std::memcpy(static_cast<float*>(to) + place * size, from, static_cast<size_t>(size) * sizeof(float));
      }
    }
  }

  void emit_state(int64_t index, const Workspace& space, int64_t row, int64_t token, int64_t count) const {
    if (!output_.states.empty()) emit_rows(output_.states[static_cast<size_t>(index)], space, row, token, count);
  }

  void emit_sequence(int64_t sequence, const Workspace& space, int64_t row) const {
    if (output_.rows != nullptr) emit_rows(output_.rows, space, row, first_token(sequence), length(sequence));
    if (output_.pooled == nullptr) return;
    const int64_t size = config_.hidden_size, modes = static_cast<int64_t>(output_.modes.size());
    float* pooled = output_.pooled + sequence * modes * size;
    const int32_t offsets[] = {0, static_cast<int32_t>(length(sequence))};
    for (int64_t i = 0; i < modes; ++i)
      table_.f32.pooling({space.hidden.row(row), space.hidden.stride(), offsets, pooled + i * size, size,
                          output_.modes[static_cast<size_t>(i)]},
                         0, pooling_blocks(size));
    if (!output_.normalize) return;
    double squares = 0;
    for (int64_t i = 0; i < modes * size; ++i) squares += static_cast<double>(pooled[i]) * pooled[i];
    const float norm = std::max(static_cast<float>(std::sqrt(squares)), 1e-12f);  // as torch.nn.functional.normalize
    for (int64_t i = 0; i < modes * size; ++i) pooled[i] /= norm;
  }

  // Column tasks of a step per thread: enough that a thread that is late does not hold up the others.
  static constexpr int64_t PARTS_PER_THREAD = 3;

  const Encoder& encoder_;
  const EncoderConfig& config_;
  const EncoderBatch& batch_;
  const EncoderOutput& output_;
  const KernelTable& table_;
  const PrecisionKernels& kernels_;
  const int64_t threads_;
  const int64_t num_tokens_, num_sequences_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;
};

Encoder::Encoder(const EncoderConfig& config, std::vector<EncoderLayer> layers, const EmbeddingTables& tables,
                 Norm embedding_norm)
    : config_(config), layers_(std::move(layers)), tables_(tables), embedding_norm_(std::move(embedding_norm)) {}

Encoder::~Encoder() = default;

void Encoder::forward(const EncoderBatch& batch, const EncoderOutput& output, int64_t threads,
                      const RunWorkers& run) const {
  Forward(*this, batch, output, threads).run(run);
}

int64_t Encoder::bytes() const {
  int64_t total = 0;
  for (const EncoderLayer& layer : layers_)
    total += layer.qkv.bytes() + layer.attention_output.bytes() + layer.intermediate.bytes() + layer.output.bytes();
  return total;
}

}  // namespace bert_fast
