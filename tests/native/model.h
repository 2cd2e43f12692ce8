// A small encoder with random weights, and calls of it.
#pragma once

#include <functional>
#include <memory>
#include <thread>

#include "../../csrc/encoder.h"
#include "check.h"

namespace bert_fast {

struct Model {
  static constexpr int64_t WORDS = 50, POSITIONS = 2048, TYPES = 2;

  EncoderConfig config;
  int64_t num_layers;
  std::vector<float> words, positions, types;
  std::unique_ptr<Encoder> encoder;

  Model(Random& random, Precision precision, Activation activation, int64_t hidden, int64_t intermediate, int64_t heads,
        int64_t layers)
      : config{precision, activation, hidden, intermediate, heads, {hidden / 3, hidden - 1}},
        num_layers(layers),
        words(random.normals(WORDS * hidden)),
        positions(random.normals(POSITIONS * hidden)),
        types(random.normals(TYPES * hidden)) {
    const auto linear = [&](PackedWeight& packed, int64_t out_features, int64_t in_features, int64_t column = 0) {
      const auto weight = random.normals(out_features * in_features, 1 / std::sqrt(static_cast<float>(in_features)));
      packed.pack(weight.data(), random.normals(out_features).data(), 0, out_features, column);
    };
    std::vector<EncoderLayer> packed;
    const int64_t width = round_up_to_panel(hidden);
    int64_t bytes = 0;
    for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{3 * width, hidden},
                                        {hidden, hidden},
                                        {intermediate, hidden},
                                        {hidden, intermediate}})
      bytes += layers * PackedWeight::panel_bytes(precision, rows, columns);
    const auto memory = std::make_shared<PanelMemory>(bytes);
    const auto weight = [&](int64_t rows, int64_t columns) {
      return PackedWeight(precision, rows, columns, NO_OUTLIERS, memory);
    };
    for (int64_t i = 0; i < layers; ++i) {
      EncoderLayer layer{weight(3 * width, hidden),
                         weight(hidden, hidden),
                         weight(intermediate, hidden),
                         weight(hidden, intermediate),
                         {random.normals(2 * hidden), 1e-12f},
                         {random.normals(2 * hidden), 1e-12f}};
      for (int64_t part = 0; part < 3; ++part) linear(layer.qkv, hidden, hidden, part * width);
      linear(layer.attention_output, hidden, hidden);
      linear(layer.intermediate, intermediate, hidden);
      linear(layer.output, hidden, intermediate);
      packed.push_back(std::move(layer));
    }
    encoder = std::make_unique<Encoder>(config, std::move(packed),
                                        EmbeddingTables{words.data(), positions.data(), types.data(), false},
                                        Norm{random.normals(2 * hidden), 1e-12f});
  }
};

// A text is made from its seed and its length alone.
struct Text {
  int64_t seed, length;
};

struct Answer {
  std::vector<float> rows, pooled;
  std::vector<std::vector<float>> states;

  bool operator==(const Answer& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
    };
    bool result = same(rows, other.rows) && same(pooled, other.pooled) && states.size() == other.states.size();
    for (size_t i = 0; result && i < states.size(); ++i) result = same(states[i], other.states[i]);
    return result;
  }
};

// A pool that gives as many threads as were asked for, and one that has only the caller.
inline void on_threads(int64_t workers, const std::function<void()>& f) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < workers; ++i) threads.emplace_back(f);
  f();
  for (std::thread& thread : threads) thread.join();
}
inline void on_one(int64_t, const std::function<void()>& f) { f(); }

// A call with its memory, so that nothing is allocated but by the encoder.
struct Call {
  std::vector<int64_t> word_ids, position_ids, type_ids;
  EncoderBatch batch;
  Answer answer;
  EncoderOutput output;

  Call(const Model& model, const std::vector<Text>& texts) {
    std::vector<int32_t> cu_seqlens{0};
    for (const Text& text : texts) {
      Random random(static_cast<uint64_t>(1000 * text.seed + text.length));
      for (int64_t i = 0; i < text.length; ++i) {
        word_ids.push_back(random.integer(0, Model::WORDS - 1));
        position_ids.push_back(i);
        type_ids.push_back(random.integer(0, Model::TYPES - 1));
      }
      cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(text.length));
    }
    batch = {word_ids.data(), position_ids.data(), type_ids.data(), cu_seqlens};
    const size_t size = static_cast<size_t>(model.config.hidden_size);
    const float untouched = 12345.0f;
    output.modes = {PoolingMode::cls, PoolingMode::mean, PoolingMode::max};
    output.normalize = true;
    answer.rows.assign(word_ids.size() * size, untouched);
    answer.pooled.assign(texts.size() * output.modes.size() * size, untouched);
    answer.states.assign(static_cast<size_t>(model.num_layers + 1), answer.rows);
    output.rows = answer.rows.data();
    output.pooled = answer.pooled.data();
    for (std::vector<float>& state : answer.states) output.states.push_back(state.data());
  }
  Call(const Call&) = delete;
};

inline Answer run(const Model& model, const std::vector<Text>& texts, int64_t threads, const RunWorkers& pool) {
  Call call(model, texts);
  model.encoder->forward(call.batch, call.output, threads, pool);
  return std::move(call.answer);
}

}  // namespace bert_fast
