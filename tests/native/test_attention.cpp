// attention against the definition in double: any head_dim, any stride, chosen rows, parts of the queries.
#include <algorithm>
#include <numeric>

#include "check.h"

namespace bert_fast {
namespace {

template <class T>
struct Input {
  AttentionStrides strides;
  Fenced<T> values;

  Input(Random& random, int64_t tokens, int64_t heads, int64_t head_dim, float scale)
      : strides{0, heads * head_dim + random.integer(0, 7), head_dim},
        values(random_memory<T>(random, tokens == 0 ? 0 : (tokens - 1) * strides.token + heads * head_dim, scale)) {
    strides.batch = strides.token;
  }
  const T& at(int64_t token, int64_t head, int64_t i) const {
    return values[token * strides.token + head * strides.head + i];
  }
};

// Rows of probabilities and the result, in double, with the largest value and score that entered.
template <class T>
void check_query(const Input<T>& q, const Input<T>& k, const Input<T>& v, const Input<T>& out,
                 const std::vector<int64_t>& tokens, int64_t query, int64_t head, int64_t head_dim, float scale) {
  std::vector<double> powers;
  double highest = -std::numeric_limits<double>::infinity(), size = 0, largest = 0;
  for (const int64_t key : tokens) {
    double score = 0, magnitude = 0;
    for (int64_t i = 0; i < head_dim; ++i) {
      const double product = static_cast<double>(to_float(q.at(query, head, i))) * to_float(k.at(key, head, i));
      score += product * scale;
      magnitude += std::abs(product * scale);
      largest = std::max(largest, std::abs(static_cast<double>(to_float(v.at(key, head, i)))));
    }
    powers.push_back(score);
    highest = std::max(highest, score);
    size = std::max(size, magnitude);
  }
  double total = 0;
  for (double& power : powers) total += power = std::exp(power - highest);
  // A score is off by head_dim roundings, a power by that much of itself twice; a bfloat16 probability is rounded.
  const double depth = static_cast<double>(head_dim), length = static_cast<double>(tokens.size());
  const double relative = 2 * FLOAT_EPS * ((depth + 4) * size + 2 * std::abs(highest) + length + 16) +
                          (sizeof(T) == 2 ? 2 * BFLOAT16_EPS + 6e-6 : 0.0);
  for (int64_t i = 0; i < head_dim; ++i) {
    double sum = 0;
    for (size_t j = 0; j < tokens.size(); ++j) sum += powers[j] / total * to_float(v.at(tokens[j], head, i));
    CHECK_CLOSE(sum, to_float(out.at(query, head, i)), relative * largest + EPS<T> * std::abs(sum) + 1e-37);
  }
}

template <class T>
void fuzz_attention(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t head_dim = random.integer(1, 130), heads = random.integer(1, 3);
  const int64_t all = random.chance(0.1) ? 0 : random.chance(0.1) ? random.integer(100, 300) : random.integer(1, 70);
  const int64_t first_token = random.integer(0, 3), tokens = first_token + all;
  const float size = random.of(std::vector<float>{1.0f, 1.0f, 8.0f});
  const float scale = (random.chance(0.2) ? -1.0f : 1.0f) / std::sqrt(static_cast<float>(head_dim));
  Input<T> q(random, tokens, heads, head_dim, size), k(random, tokens, heads, head_dim, size);
  Input<T> v(random, tokens, heads, head_dim, 1.0f);
  std::vector<int64_t> rows;
  const bool is_chosen = random.chance(0.4);
  for (int64_t i = 0; i < all; ++i)
    if (!is_chosen || random.chance(0.7)) rows.push_back(i);
  const int64_t length = static_cast<int64_t>(rows.size());
  Fenced<int64_t> fenced_rows(length);
  std::copy(rows.begin(), rows.end(), fenced_rows.data());
  const AttentionSequence sequence{first_token, length, is_chosen ? fenced_rows.data() : nullptr};
  const int64_t begin = random.integer(0, length), end = random.integer(begin, length);
  const int64_t head = random.integer(0, heads - 1), scratch_size = attention_scratch_size(length, head_dim);
  std::vector<int64_t> where;
  for (const int64_t row : rows) where.push_back(first_token + row);

  const auto run = [&](const KernelTable* isa, const Input<T>& out, int64_t from, int64_t to) {
    const Fenced<float> scratch(scratch_size);
    isa->of<T>().attention({q.values.data(), k.values.data(), v.values.data(), out.values.data(), q.strides, k.strides,
                            v.strides, out.strides, head_dim, scale},
                           {sequence, head, from, to}, scratch.data());
  };
  const Input<T> fresh(random, tokens, heads, head_dim, 1.0f);
  std::memset(static_cast<void*>(fresh.values.data()), 0xff, static_cast<size_t>(fresh.values.size()) * sizeof(T));
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context =
        before + ", " + isa->name + ", head_dim " + std::to_string(head_dim) + ", length " + std::to_string(length);
    const Input<T> out(fresh), single(fresh);
    run(isa, out, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      check_query(q, k, v, out, where, where[static_cast<size_t>(i)], head, head_dim, scale);
      run(isa, single, i, i + 1);
    }
    // The queries one by one give the same bits, and nothing else was written.
    CHECK(same_bits(out.values, single.values));
    const auto is_query = [&](int64_t token) {
      return std::find(where.begin() + begin, where.begin() + end, token) != where.begin() + end;
    };
    for (int64_t i = 0; i < out.values.size(); ++i) {
      const int64_t token = i / out.strides.token, channel = i % out.strides.token;
      if (!is_query(token) || channel / head_dim != head) CHECK(out.values.is_untouched(i));
    }
    if (begin == end) continue;
    // A NaN in a query stays in its row; in a key or a value it reaches every query.
    const int64_t bad = where[static_cast<size_t>(random.integer(begin, end - 1))];
    Input<T> bad_q(q);
    bad_q.values[bad * q.strides.token + head * head_dim + random.integer(0, head_dim - 1)] =
        from_float<T>(std::numeric_limits<float>::quiet_NaN());
    const Fenced<float> scratch(scratch_size);
    isa->of<T>().attention({bad_q.values.data(), k.values.data(), v.values.data(), single.values.data(), q.strides,
                            k.strides, v.strides, out.strides, head_dim, scale},
                           {sequence, head, begin, end}, scratch.data());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = where[static_cast<size_t>(i)];
      for (int64_t c = 0; c < head_dim; ++c) {
        if (token == bad) {
          CHECK(std::isnan(to_float(single.at(token, head, c))));
        } else {
          CHECK(to_float(single.at(token, head, c)) == to_float(out.at(token, head, c)));
        }
      }
    }
  }
  context = before;
}

}  // namespace

void test_attention() {
  const auto isas = tables();
  fuzz("attention float", 6, 30, [&](Random& random) { fuzz_attention<float>(random, isas); });
  fuzz("attention bfloat16", 6, 30, [&](Random& random) { fuzz_attention<bfloat16>(random, isas); });
}

}  // namespace bert_fast
