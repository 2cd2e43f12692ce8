// Encoder: a text gives the same bits alone, in any batch, in any order, on any number of threads.
#include <algorithm>
#include <atomic>
#include <thread>

#include "model.h"

namespace bert_fast {
namespace {

struct Shape {
  int64_t hidden_size, intermediate_size, num_heads, layers;
};

// Each sequence of `lengths`, alone on one thread.
std::vector<Answer> alone(const Model& model, const std::vector<int64_t>& lengths) {
  std::vector<Answer> answers;
  for (size_t i = 0; i < lengths.size(); ++i)
    answers.push_back(run(model, {{static_cast<int64_t>(i), lengths[i]}}, 1, on_threads));
  return answers;
}

// The sequence at `index` of a batch has the bits that it has alone.
void check_sequence(const Model& model, const Answer& batch, const std::vector<Text>& texts, size_t index,
                    const Answer& one) {
  const int64_t size = model.config.hidden_size;
  size_t first = 0;
  for (size_t i = 0; i < index; ++i) first += static_cast<size_t>(texts[i].length * size);
  const auto same = [&](const std::vector<float>& expected, const std::vector<float>& actual, size_t from) {
    CHECK(from + expected.size() <= actual.size());
    CHECK(expected.empty() || std::memcmp(expected.data(), actual.data() + from, expected.size() * sizeof(float)) == 0);
  };
  same(one.rows, batch.rows, first);
  same(one.pooled, batch.pooled, index * one.pooled.size());
  for (size_t i = 0; i < one.states.size(); ++i) same(one.states[i], batch.states[i], first);
}

void check_invariance(Random& random, const Shape& shape, Precision precision, Activation activation,
                      const std::vector<std::vector<int64_t>>& batches, int64_t max_threads) {
  const Model model(random, precision, activation, shape.hidden_size, shape.intermediate_size, shape.num_heads,
                    shape.layers);
  for (const std::vector<int64_t>& lengths : batches) {
    const std::vector<Answer> expected = alone(model, lengths);
    for (const Answer& answer : expected)
      for (const float value : answer.rows) CHECK(std::isfinite(value));
    std::vector<Text> texts;
    for (size_t i = 0; i < lengths.size(); ++i) texts.push_back({static_cast<int64_t>(i), lengths[i]});
    for (int64_t threads = 1; threads <= max_threads; ++threads) {
      std::shuffle(texts.begin(), texts.end(), random.engine());
      for (const bool has_threads : {true, false}) {
        if (!has_threads && threads != 3) continue;
        const Answer batch = run(model, texts, threads, has_threads ? on_threads : on_one);
        for (size_t i = 0; i < texts.size(); ++i)
          check_sequence(model, batch, texts, i, expected[static_cast<size_t>(texts[i].seed)]);
      }
    }
  }
}

std::vector<std::vector<int64_t>> batches(Random& random) {
  std::vector<std::vector<int64_t>> result{{}, {0}, {0, 0, 0}, {1}, {3, 0, 5}, {250}};
  std::vector<int64_t> many;
  for (int i = 0; i < 8; ++i) many.push_back(random.chance(0.1) ? 0 : random.integer(1, 40));
  result.push_back(many);
  result.push_back({150, 1, 2, 0, 20});  // one dominates: rows or columns are shared
  return result;
}

// 64 callers of two encoders at once.
void check_callers(Random& random, int callers) {
  const Model one(random, Precision::bf16, Activation::gelu_erf, 20, 33, 5, 2);
  const Model two(random, Precision::int8, Activation::relu, 96, 100, 3, 1);
  const std::vector<Text> texts{{0, 7}, {1, 0}, {2, 30}, {3, 2}};
  const Answer first = run(one, texts, 1, on_threads), second = run(two, texts, 1, on_threads);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i)
    threads.emplace_back([&, i] {
      const bool is_first = i % 2 == 0;
      const Answer answer = run(is_first ? one : two, texts, 1 + i % 4, on_threads);
      if (!(answer == (is_first ? first : second))) ++wrong;
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

const std::vector<Shape> shapes{{20, 33, 5, 2}, {1, 1, 1, 1},      {33, 65, 1, 2},
                                {96, 7, 3, 2},  {312, 130, 12, 1}, {64, 128, 4, 0}};

}  // namespace

void test_encoder() {
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    int64_t seed = 0;
    for (const Shape& shape : shapes)
      for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::int8}) {
        context = "encoder, " + isa + ", hidden_size " + std::to_string(shape.hidden_size) + ", precision " +
                  std::to_string(static_cast<int>(precision));
        Random random(static_cast<uint64_t>(++seed));
        const auto activation = static_cast<Activation>(1 + seed % 3);
        auto some = batches(random);
        if (isa == "scalar") some.resize(5);
        check_invariance(random, shape, precision, activation, some, 5);
      }
    std::printf("encoder %s: %lld models\n", isa.c_str(), static_cast<long long>(seed));
  }
  context = "a sequence of 2000 tokens";
  Random random(0);
  check_invariance(random, {32, 40, 2, 1}, Precision::bf16, Activation::gelu_tanh, {{2000, 3}}, 3);
  context = "64 callers";
  check_callers(random, 64);
  std::printf("encoder: long sequence, 64 callers\n");
}

void test_threads() {
  for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::int8}) {
    context = "threads, precision " + std::to_string(static_cast<int>(precision));
    Random random(static_cast<uint64_t>(precision));
    check_invariance(random, shapes[0], precision, Activation::gelu_erf,
                     {{3, 0, 5}, {60, 1, 20}, {200, 2}, {9, 8, 7, 6, 5}}, 5);
  }
  context = "threads, 16 callers";
  Random random(0);
  check_callers(random, 16);
  std::printf("threads: no races\n");
}

}  // namespace bert_fast
