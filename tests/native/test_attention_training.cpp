// Attention in training against the definition in double: forward with dropout, logarithms of the sums, gradients.
#include <algorithm>

#include "check.h"

namespace bert_fast {
namespace {

// (token, head, head_dim) values, rows a few values apart.
template <class T>
struct Input {
  AttentionStrides strides;
  Fenced<T> values;

  Input(Random& random, int64_t tokens, int64_t heads, int64_t head_dim)
      : strides{0, heads * head_dim + random.integer(0, 7), head_dim},
        values(random_memory<T>(random, tokens == 0 ? 0 : (tokens - 1) * strides.token + heads * head_dim)) {
    strides.batch = strides.token;
  }
  double at(int64_t token, int64_t head, int64_t i) const {
    return static_cast<double>(to_float(values[token * strides.token + head * strides.head + i]));
  }
  void forget() const {
    std::memset(static_cast<void*>(values.data()), 0xff, static_cast<size_t>(values.size()) * sizeof(T));
  }
};

// A value, and a bound of what roundings of its summands may make of it.
struct Bounded {
  double value = 0, bound = 0;
  void add(double term, double error) {
    value += term;
    bound += error;
  }
};

template <class T>
struct Case {
  int64_t head_dim, heads, head, first_token;
  std::vector<int64_t> tokens;  // of the sequence
  float scale;
  Dropout dropout;
  std::vector<uint8_t> bytes;  // (tokens, tokens)

  double factor(size_t query, size_t key) const {
    return bytes[query * tokens.size() + key] >= dropout.threshold ? static_cast<double>(dropout.scale) : 0.0;
  }
};

template <class T>
void check_values(const Case<T>& c, const Input<T>& grad, const Input<T>& q, const Input<T>& k, const Input<T>& v,
                  const Input<T>& out, const Fenced<float>& lse, const Input<T>& dq, const Input<T>& dk,
                  const Input<T>& dv) {
  const size_t length = c.tokens.size(), size = static_cast<size_t>(c.head_dim);
  const auto dot = [&](const Input<T>& a, int64_t i, const Input<T>& b, int64_t j) {
    Bounded sum;
    for (int64_t x = 0; x < c.head_dim; ++x) {
      const double product = a.at(i, c.head, x) * b.at(j, c.head, x);
      sum.add(product, std::abs(product));
    }
    return sum;
  };
  std::vector<Bounded> keys(length * size), values(length * size);
  const double depth = static_cast<double>(c.head_dim), rounded = sizeof(T) == 2 ? 2 * BFLOAT16_EPS : 0.0;
  for (size_t i = 0; i < length; ++i) {
    const int64_t query = c.tokens[i];
    std::vector<double> p(length), dp(length);
    double highest = -std::numeric_limits<double>::infinity(), total = 0, score_size = 0, dp_size = 0, delta = 0;
    for (size_t j = 0; j < length; ++j) {
      const Bounded score = dot(q, query, k, c.tokens[j]), product = dot(grad, query, v, c.tokens[j]);
      p[j] = score.value * static_cast<double>(c.scale);
      dp[j] = product.value * c.factor(i, j);
      highest = std::max(highest, p[j]);
      score_size = std::max(score_size, score.bound * std::abs(static_cast<double>(c.scale)));
      dp_size = std::max(dp_size, product.bound * c.factor(i, j));
    }
    for (const double score : p) total += std::exp(score - highest);
    const double expected_lse = highest + std::log(total);
    const double relative =
        2 * FLOAT_EPS * ((depth + 6) * score_size + 3 * std::abs(expected_lse) + static_cast<double>(length) + 20);
    CHECK_CLOSE(expected_lse, lse[query * c.heads + c.head], relative);
    for (size_t j = 0; j < length; ++j) {
      p[j] = std::exp(p[j] - expected_lse);
      delta += p[j] * dp[j];
    }
    std::vector<Bounded> context_row(size), query_row(size);
    for (size_t j = 0; j < length; ++j) {
      const double kept = p[j] * c.factor(i, j), ds = p[j] * (dp[j] - delta) * static_cast<double>(c.scale);
      const double ds_error = p[j] * std::abs(static_cast<double>(c.scale)) * 2 * dp_size *
                              (2 * relative + rounded + 2 * FLOAT_EPS * (depth + static_cast<double>(length)));
      const double kept_error = kept * (relative + rounded + FLOAT_EPS * static_cast<double>(length));
      for (size_t x = 0; x < size; ++x) {
        const int64_t channel = static_cast<int64_t>(x);
        const double value = v.at(c.tokens[j], c.head, channel), key = k.at(c.tokens[j], c.head, channel);
        const double upstream = grad.at(query, c.head, channel), from = q.at(query, c.head, channel);
        context_row[x].add(kept * value, kept_error * std::abs(value));
        query_row[x].add(ds * key, ds_error * std::abs(key));
        keys[j * size + x].add(ds * from, ds_error * std::abs(from));
        values[j * size + x].add(kept * upstream, kept_error * std::abs(upstream));
      }
    }
    for (size_t x = 0; x < size; ++x) {
      const int64_t channel = static_cast<int64_t>(x);
      const auto check = [&](const Bounded& expected, const Input<T>& actual) {
        CHECK_CLOSE(expected.value, actual.at(query, c.head, channel),
                    2 * expected.bound + EPS<T> * std::abs(expected.value) + 1e-37);
      };
      check(context_row[x], out);
      check(query_row[x], dq);
    }
  }
  for (size_t j = 0; j < length; ++j)
    for (size_t x = 0; x < size; ++x) {
      const auto check = [&](const Bounded& expected, const Input<T>& actual) {
        CHECK_CLOSE(expected.value, actual.at(c.tokens[j], c.head, static_cast<int64_t>(x)),
                    2 * expected.bound + EPS<T> * std::abs(expected.value) + 1e-37);
      };
      check(keys[j * size + x], dk);
      check(values[j * size + x], dv);
    }
}

template <class T>
void fuzz_attention_training(Random& random, const std::vector<const KernelTable*>& isas) {
  Case<T> c;
  c.head_dim = random.integer(1, 100);
  c.heads = random.integer(1, 3);
  c.head = random.integer(0, c.heads - 1);
  c.first_token = random.integer(0, 3);
  c.scale = (random.chance(0.2) ? -1.0f : 1.0f) / std::sqrt(static_cast<float>(c.head_dim));
  const int32_t threshold = random.of(std::vector<int32_t>{0, 1, 26, 128, 255, 256});
  const float kept_scale = threshold == 256 ? 0.0f : 256.0f / static_cast<float>(256 - threshold);
  c.dropout = {random.engine()(), threshold, kept_scale};
  const int64_t all = random.chance(0.1) ? 0 : random.chance(0.1) ? random.integer(100, 200) : random.integer(1, 70);
  const bool is_chosen = random.chance(0.4);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < all; ++i)
    if (!is_chosen || random.chance(0.7)) rows.push_back(i);
  for (const int64_t row : rows) c.tokens.push_back(c.first_token + row);
  const int64_t tokens = c.first_token + all, length = static_cast<int64_t>(rows.size());
  Fenced<int64_t> fenced_rows(length);
  std::copy(rows.begin(), rows.end(), fenced_rows.data());
  const AttentionSequence sequence{c.first_token, length, is_chosen ? fenced_rows.data() : nullptr};
  const AttentionTask task{sequence, c.head, 0, length};
  const int64_t blocks = (all + DROPOUT_COLUMNS - 1) / DROPOUT_COLUMNS;
  for (const int64_t query : rows) {
    std::vector<uint8_t> bytes(static_cast<size_t>(blocks * DROPOUT_COLUMNS));
    isas.front()->training->random_bytes(c.dropout.seed, c.first_token + query, c.head, blocks, bytes.data());
    for (const int64_t key : rows) c.bytes.push_back(bytes[static_cast<size_t>(key)]);
  }

  const Input<T> grad(random, tokens, c.heads, c.head_dim), q(random, tokens, c.heads, c.head_dim);
  const Input<T> k(random, tokens, c.heads, c.head_dim), v(random, tokens, c.heads, c.head_dim);
  const Input<T> fresh(random, tokens, c.heads, c.head_dim);
  fresh.forget();
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name + ", head_dim " + std::to_string(c.head_dim) + ", length " +
              std::to_string(length) + ", threshold " + std::to_string(threshold);
    const Input<T> out(fresh), dq(fresh), dk(fresh), dv(fresh);
    const Fenced<float> lse(tokens * c.heads);
    const AttentionRows places{1, c.heads};
    const AttentionTraining<T>& kernels = isa->training->attention(T{});
    // The forward in two tasks: a query's bits do not depend on the others.
    const int64_t middle = random.integer(0, length);
    for (const auto& [begin, end] : {std::pair{int64_t{0}, middle}, std::pair{middle, length}}) {
      const Fenced<float> scratch(attention_train_scratch_size(length, c.head_dim));
      kernels.attention_train({{q.values.data(), k.values.data(), v.values.data(), out.values.data(), q.strides,
                                k.strides, v.strides, out.strides, c.head_dim, c.scale},
                               lse.data(),
                               places,
                               c.dropout},
                              {sequence, c.head, begin, end}, scratch.data());
    }
    const Fenced<float> scratch(attention_backward_scratch_size(length, c.head_dim));
    kernels.attention_backward(
        {grad.values.data(), q.values.data(), k.values.data(), v.values.data(), out.values.data(), lse.data(),
         dq.values.data(), dk.values.data(), dv.values.data(), grad.strides, q.strides, k.strides, v.strides,
         out.strides, fresh.strides, c.head_dim, c.scale, places, c.dropout},
        task, scratch.data());
    check_values(c, grad, q, k, v, out, lse, dq, dk, dv);
    const auto is_token = [&](int64_t token) {
      return std::find(c.tokens.begin(), c.tokens.end(), token) != c.tokens.end();
    };
    for (const Input<T>* result : {&out, &dq, &dk, &dv})
      for (int64_t i = 0; i < result->values.size(); ++i)
        if (!is_token(i / fresh.strides.token) || i % fresh.strides.token / c.head_dim != c.head)
          CHECK(result->values.is_untouched(i));
    for (int64_t i = 0; i < lse.size(); ++i)
      if (!is_token(i / c.heads) || i % c.heads != c.head) CHECK(lse.is_untouched(i));
  }
  context = before;
}

}  // namespace

void test_attention_training() {
  const auto isas = tables();
  fuzz("attention training float", 6, 30, [&](Random& random) { fuzz_attention_training<float>(random, isas); });
  fuzz("attention training bfloat16", 6, 30, [&](Random& random) { fuzz_attention_training<bfloat16>(random, isas); });
}

}  // namespace bert_fast
