// The kernels of training that work row by row: every instruction set against sums in double, or against scalar.
#include <algorithm>
#include <numeric>

#include "../../csrc/training_table.h"
#include "check.h"

namespace bert_fast {
namespace {

const std::vector<int64_t> sizes{1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 96, 127, 128, 129, 257, 312, 600};

struct Range {
  int64_t begin, end;

  Range(Random& random, int64_t count) : begin(random.integer(0, count)), end(random.integer(begin, count)) {}
  bool has(int64_t i) const { return i >= begin && i < end; }
};

// For each instruction set, named in the message of a failure.
template <class Test>
void for_each_isa(const std::vector<const KernelTable*>& isas, const Test& test) {
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    test(*isa->training);
  }
  context = before;
}

void fuzz_random_bytes(Random& random, const std::vector<const KernelTable*>& isas) {
  const auto seed = static_cast<uint64_t>(random.integer(INT64_MIN, INT64_MAX));
  const int64_t row = random.integer(0, INT64_MAX), plane = random.integer(0, 1000), blocks = random.integer(0, 40);
  const Fenced<uint8_t> expected(blocks * DROPOUT_COLUMNS);
  isas[0]->training->random_bytes(seed, row, plane, blocks, expected.data());
  for_each_isa(isas, [&](const TrainingTable& table) {
    const Fenced<uint8_t> bytes(expected.size());
    table.random_bytes(seed, row, plane, blocks, bytes.data());
    CHECK(same_bits(expected, bytes));
  });
}

// What dropout multiplies each element of some rows with.
struct Factors {
  Dropout dropout;
  int64_t size;
  std::vector<uint8_t> bytes;

  Factors(Random& random, const TrainingTable& table, int64_t rows, int64_t columns)
      : dropout{static_cast<uint64_t>(random.integer(0, INT64_MAX)), 0, 1.0f},
        size(columns),
        bytes(static_cast<size_t>(rows * dropout_columns(columns))) {
    dropout.threshold = random.of(std::vector<int32_t>{0, 1, 26, 255, 256});
    if (dropout.threshold > 0)
      dropout.scale = dropout.threshold < 256 ? 256.0f / static_cast<float>(256 - dropout.threshold) : 0.0f;
    for (int64_t row = 0; row < rows; ++row)
      table.random_bytes(dropout.seed, row, 0, dropout_columns(size) / DROPOUT_COLUMNS,
                         bytes.data() + row * dropout_columns(size));
  }
  double operator()(int64_t row, int64_t i) const {
    return bytes[static_cast<size_t>(row * dropout_columns(size) + i)] >= dropout.threshold ? dropout.scale : 0.0;
  }
};

template <class X, class T>
void fuzz_residual_train(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), rows = random.integer(0, 5);
  const Range range(random, rows);
  const Fenced<X> x = random_memory<X>(random, rows * size);
  const Fenced<T> bias = random_memory<T>(random, size), residual = random_memory<T>(random, rows * size);
  const Fenced<T> weight = random_memory<T>(random, size), shift = random_memory<T>(random, size);
  const Factors factors(random, *isas[0]->training, rows, size);
  const float eps = random.of(std::vector<float>{1e-5f, 1e-12f});
  for_each_isa(isas, [&](const TrainingTable& table) {
    const Fenced<T> out(rows * size), normalized(rows * size);
    const Fenced<float> rstd(rows), scratch(size);
    const Fenced<uint8_t> bytes(dropout_columns(size));
    table.residual(X{}, T{}).forward({x.data(),
                                      bias.data(),
                                      residual.data(),
                                      out.data(),
                                      normalized.data(),
                                      rstd.data(),
                                      {weight.data(), shift.data(), size, eps},
                                      factors.dropout},
                                     range.begin, range.end, scratch.data(), bytes.data());
    for (int64_t row = 0; row < rows; ++row) {
      if (!range.has(row)) {
        CHECK(rstd.is_untouched(row));
        for (int64_t i = 0; i < size; ++i)
          CHECK(out.is_untouched(row * size + i) && normalized.is_untouched(row * size + i));
        continue;
      }
      std::vector<double> hidden;
      double mean = 0, variance = 0, largest = 0;
      for (int64_t i = 0; i < size; ++i) {
        const float sum = to_float(x[row * size + i]) + to_float(bias[i]);
        hidden.push_back(sum * factors(row, i) + to_float(residual[row * size + i]));
        largest = std::max(largest, std::abs(hidden.back()) + std::abs(sum * factors(row, i)));
      }
      for (const double v : hidden) mean += v / static_cast<double>(size);
      for (const double v : hidden) variance += (v - mean) * (v - mean) / static_cast<double>(size);
      const double deviation = 1 / std::sqrt(variance + eps), noise = FLOAT_EPS * 32 * largest * deviation;
      CHECK_CLOSE(deviation, rstd[row], deviation * (noise + 64 * FLOAT_EPS));
      for (int64_t i = 0; i < size; ++i) {
        const double n = (hidden[static_cast<size_t>(i)] - mean) * deviation, w = to_float(weight[i]);
        const double error = noise * (1 + std::abs(n)) + 64 * FLOAT_EPS * std::abs(n), b = to_float(shift[i]);
        CHECK_CLOSE(n, to_float(normalized[row * size + i]), error + EPS<T> * (std::abs(n) + error));
        const double sum = error * std::abs(w) + 4 * FLOAT_EPS * (std::abs(n * w) + std::abs(b));
        CHECK_CLOSE(n * w + b, to_float(out[row * size + i]), sum + EPS<T> * (std::abs(n * w + b) + sum));
      }
    }
  });
}

// A sum over rows as it should be, and the sum of the sizes of its terms.
struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::abs(term);
  }
};

// Residual: dropout comes before the LayerNorm, and there are dx and dbias; embeddings (AFTER): it comes after.
template <bool AFTER, class X, class T, class D, class Run>
void fuzz_backward(Random& random, const std::vector<const KernelTable*>& isas, const Run& run) {
  const int64_t size = random.of(sizes), rows = random.integer(0, 70), blocks = sum_blocks(rows);
  const Range range(random, blocks);
  const Fenced<T> grad = random_memory<T>(random, rows * size), normalized = random_memory<T>(random, rows * size);
  const Fenced<T> weight = random_memory<T>(random, size);
  Fenced<float> rstd(rows);
  for (int64_t row = 0; row < rows; ++row) rstd[row] = std::abs(random.normal()) + 0.1f;
  const Factors factors(random, *isas[0]->training, rows, size);
  const bool has_dx = !AFTER && (factors.dropout.threshold > 0 || !std::is_same_v<X, D>);
  for_each_isa(isas, [&](const TrainingTable& table) {
    const Fenced<D> dhidden(rows * size);
    const Fenced<X> dx(rows * size);
    const Fenced<float> dweight(blocks * size), dshift(blocks * size), dbias(blocks * size);
    const Fenced<uint8_t> bytes(dropout_columns(size));
    run(table,
        LayerNormBackward<X, T, D>{grad.data(), normalized.data(), rstd.data(), weight.data(), dhidden.data(),
                                   has_dx ? dx.data() : nullptr, dweight.data(), dshift.data(),
                                   AFTER ? nullptr : dbias.data(), rows, size, factors.dropout},
        range, bytes.data());
    for (int64_t block = 0; block < blocks; ++block) {
      std::vector<Sum> dweights(static_cast<size_t>(size)), dshifts(dweights), dbiases(dweights);
      for (int64_t row = block * SUM_ROWS; row < std::min((block + 1) * SUM_ROWS, rows); ++row) {
        const auto upstream = [&](int64_t i) {
          return to_float(grad[row * size + i]) * (AFTER ? factors(row, i) : 1.0);
        };
        Sum mean, slope;
        for (int64_t i = 0; i < size; ++i) {
          const double gw = upstream(i) * to_float(weight[i]) / static_cast<double>(size);
          mean.add(gw);
          slope.add(gw * to_float(normalized[row * size + i]));
        }
        for (int64_t i = 0; i < size; ++i) {
          const int64_t at = row * size + i;
          if (!range.has(block)) {
            CHECK(dhidden.is_untouched(at) && dx.is_untouched(at));
            continue;
          }
          const double g = upstream(i), n = to_float(normalized[at]), gw = g * to_float(weight[i]);
          const double d = rstd[row] * (gw - mean.value - n * slope.value);
          const double error =
              32 * FLOAT_EPS * rstd[row] * (std::abs(gw) + mean.size + std::abs(n) * slope.size) + 1e-38;
          CHECK_CLOSE(d, to_float(dhidden[at]), error + EPS<D> * (std::abs(d) + error));
          const double factor = AFTER ? 0.0 : factors(row, i);
          if (has_dx) CHECK_CLOSE(d * factor, to_float(dx[at]), factor * (error + 2 * EPS<X> * (std::abs(d) + error)));
          dweights[static_cast<size_t>(i)].add(g * n);
          dshifts[static_cast<size_t>(i)].add(g);
          dbiases[static_cast<size_t>(i)].add(d * factor);
          dbiases[static_cast<size_t>(i)].size += error * factor / FLOAT_EPS;
        }
      }
      for (int64_t i = 0; i < size; ++i) {
        const int64_t at = block * size + i;
        const auto check = [&](const Fenced<float>& sums, const Sum& sum) {
          if (range.has(block)) {
            CHECK_CLOSE(sum.value, sums[at], 40 * FLOAT_EPS * sum.size + 1e-38);
          } else {
            CHECK(sums.is_untouched(at));
          }
        };
        check(dweight, dweights[static_cast<size_t>(i)]);
        check(dshift, dshifts[static_cast<size_t>(i)]);
        if (!AFTER) check(dbias, dbiases[static_cast<size_t>(i)]);
      }
    }
  });
}

template <class X, class T>
void fuzz_residual_backward(Random& random, const std::vector<const KernelTable*>& isas) {
  fuzz_backward<false, X, T, T>(
      random, isas,
      [](const TrainingTable& table, const LayerNormBackward<X, T, T>& args, const Range& range, uint8_t* bytes) {
        table.residual(X{}, T{}).backward(args, range.begin, range.end, bytes);
      });
}

template <class T>
void fuzz_embedding_backward(Random& random, const std::vector<const KernelTable*>& isas) {
  fuzz_backward<true, float, T, float>(
      random, isas,
      [](const TrainingTable& table, const LayerNormBackward<float, T, float>& args, const Range& range,
         uint8_t* bytes) { table.rows(T{}).embedding_backward(args, range.begin, range.end, bytes); });
}

// Sums of the rows of a table, and of all rows.
template <class T>
void fuzz_sums(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), tokens = random.integer(0, 150), table_rows = random.integer(1, 6);
  const int64_t blocks = pooling_blocks(size);
  const Range range(random, table_rows * blocks), columns(random, size);
  const Fenced<float> rows = random_memory<float>(random, tokens * size);
  Fenced<int64_t> first(table_rows), next(tokens);
  std::fill_n(first.data(), table_rows, -1);
  std::vector<Sum> truth(static_cast<size_t>(table_rows * size)), all(static_cast<size_t>(size));
  for (int64_t token = tokens; token-- > 0;) {
    const int64_t id = random.integer(0, table_rows - 1);
    next[token] = first[id];
    first[id] = token;
    for (int64_t i = 0; i < size; ++i) {
      truth[static_cast<size_t>(id * size + i)].add(rows[token * size + i]);
      all[static_cast<size_t>(i)].add(rows[token * size + i]);
    }
  }
  for_each_isa(isas, [&](const TrainingTable& table) {
    const auto check = [](const Sum& sum, T value) {
      const double error = 64 * FLOAT_EPS * sum.size;
      CHECK_CLOSE(sum.value, to_float(value), error + EPS<T> * (std::abs(sum.value) + error));
    };
    const Fenced<T> out(table_rows * size), sums(size);
    table.rows(T{}).table_gradient({rows.data(), first.data(), next.data(), out.data(), size}, range.begin, range.end);
    for (int64_t i = 0; i < out.size(); ++i) {
      if (range.has(i / size * blocks + i % size / POOLING_BLOCK)) {
        check(truth[static_cast<size_t>(i)], out[i]);
      } else {
        CHECK(out.is_untouched(i));
      }
    }
    table.rows(T{}).column_sums({rows.data(), tokens, size, sums.data()}, columns.begin, columns.end);
    for (int64_t i = 0; i < size; ++i) {
      if (columns.has(i)) {
        check(all[static_cast<size_t>(i)], sums[i]);
      } else {
        CHECK(sums.is_untouched(i));
      }
    }
  });
}

template <class T>
void fuzz_gelu_backward(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), rows = random.integer(0, 70), blocks = sum_blocks(rows);
  const Range range(random, blocks);
  const bool tanh = random.chance(0.5);
  const Fenced<T> bias = random_memory<T>(random, size), grad = random_memory<T>(random, rows * size);
  const Fenced<T> x = random_memory<T>(random, rows * size, random.of(std::vector<float>{1.0f, 10.0f, 1e30f}));
  const auto run = [&](const TrainingTable& table, const Fenced<T>& dx, const Fenced<float>& dbias) {
    table.rows(T{}).bias_gelu_backward({grad.data(), x.data(), bias.data(), dx.data(), dbias.data(), rows, size, tanh},
                                       range.begin, range.end);
  };
  const Fenced<T> expected(rows * size);
  const Fenced<float> expected_bias(blocks * size);
  run(*isas[0]->training, expected, expected_bias);
  for_each_isa(isas, [&](const TrainingTable& table) {
    const Fenced<T> dx(rows * size);
    const Fenced<float> dbias(blocks * size);
    run(table, dx, dbias);
    for (int64_t i = 0; i < dx.size(); ++i) {
      if (!range.has(i / size / SUM_ROWS)) {
        CHECK(dx.is_untouched(i));
        continue;
      }
      // Near -0.75 the two terms of the derivative, each below 1/4, cancel.
      const double sum = std::min(13.0, std::abs(to_float(x[i]) + to_float(bias[i % size])) * 1.0);
      const double error = (16 + 4 * sum * sum) * FLOAT_EPS * std::abs(to_float(grad[i]));
      CHECK_CLOSE(to_float(expected[i]), to_float(dx[i]), error + 2 * EPS<T> * std::abs(to_float(expected[i])));
    }
    for (int64_t i = 0; i < dbias.size(); ++i) {
      if (range.has(i / size)) {
        CHECK_CLOSE(expected_bias[i], dbias[i], 32 * 700 * FLOAT_EPS * 4);
      } else {
        CHECK(dbias.is_untouched(i));
      }
    }
  });
}

template <class T>
void fuzz_pooling_backward(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), batch = random.integer(0, 4);
  Fenced<int32_t> offsets(batch + 1);
  offsets[0] = 0;
  for (int64_t i = 0; i < batch; ++i)
    offsets[i + 1] = offsets[i] + static_cast<int32_t>(random.chance(0.2) ? 0 : random.integer(1, 40));
  const int64_t tokens = offsets[batch], blocks = pooling_blocks(size);
  Fenced<T> hidden = random_memory<T>(random, tokens * size);
  for (int64_t i = 0; i < hidden.size(); ++i)
    if (random.chance(0.3)) hidden[i] = from_float<T>(random.chance(0.01) ? NAN : 1.5f);  // ties
  const Fenced<T> grad = random_memory<T>(random, batch * size);
  const Range range(random, batch * blocks);
  const auto mode = static_cast<PoolingMode>(random.integer(0, 4));
  const auto run = [&](const TrainingTable& table, const Fenced<T>& out) {
    table.rows(T{}).pooling_backward({grad.data(), hidden.data(), offsets.data(), out.data(), size, mode}, range.begin,
                                     range.end);
  };
  const Fenced<T> expected(tokens * size);
  run(*isas[0]->training, expected);
  for_each_isa(isas, [&](const TrainingTable& table) {
    const Fenced<T> out(tokens * size);
    run(table, out);
    for (int64_t sequence = 0; sequence < batch; ++sequence) {
      for (int64_t i = offsets[sequence] * size; i < offsets[sequence + 1] * size; ++i) {
        if (range.has(sequence * blocks + i % size / POOLING_BLOCK)) {
          CHECK_CLOSE(to_float(expected[i]), to_float(out[i]), 2 * EPS<T> * std::abs(to_float(expected[i])));
        } else {
          CHECK(out.is_untouched(i));
        }
      }
    }
  });
}

template <class T>
void fuzz_cross_entropy(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t classes = random.of(sizes), rows = random.integer(0, 4);
  const Range range(random, rows);
  const Fenced<T> logits = random_memory<T>(random, rows * classes, random.of(std::vector<float>{1.0f, 30.0f}));
  const Fenced<float> bias = random_memory<float>(random, classes);
  Fenced<int64_t> labels(rows);
  for (int64_t row = 0; row < rows; ++row) labels[row] = random.integer(0, classes - 1);
  for_each_isa(isas, [&](const TrainingTable& table) {
    const Fenced<T> out(logits);
    const Fenced<float> losses(rows), scratch(classes);
    table.rows(T{}).cross_entropy({out.data(), bias.data(), labels.data(), losses.data(), classes}, range.begin,
                                  range.end, scratch.data());
    for (int64_t row = 0; row < rows; ++row) {
      if (!range.has(row)) {
        CHECK(losses.is_untouched(row));
        CHECK(std::memcmp(&out[row * classes], &logits[row * classes], static_cast<size_t>(classes) * sizeof(T)) == 0);
        continue;
      }
      std::vector<double> values;
      for (int64_t i = 0; i < classes; ++i) values.push_back(to_float(logits[row * classes + i]) + bias[i]);
      const double largest = *std::max_element(values.begin(), values.end());
      double total = 0;
      for (const double v : values) total += std::exp(v - largest);
      const double of_label = values[static_cast<size_t>(labels[row])];
      CHECK_CLOSE(largest + std::log(total) - of_label, losses[row], 8 * FLOAT_EPS * (4 + largest - of_label));
      for (int64_t i = 0; i < classes; ++i) {
        const double distance = largest - values[static_cast<size_t>(i)];
        const double p = std::exp(-distance) / total, d = p - (i == labels[row] ? 1 : 0);
        const double error = FLOAT_EPS * (32 + 4 * distance) * p + FLOAT_EPS * 32 + 1e-37;
        CHECK_CLOSE(d, to_float(out[row * classes + i]), error + EPS<T> * (std::abs(d) + error));
      }
    }
  });
}

}  // namespace

void test_training_rows() {
  const auto isas = tables();
  const auto check = [&](const char* name, auto test) {
    fuzz(name, 0.5, 40, [&](Random& random) { test(random, isas); });
  };
  check("random bytes", fuzz_random_bytes);
  check("residual train float", fuzz_residual_train<float, float>);
  check("residual train bfloat16", fuzz_residual_train<bfloat16, bfloat16>);
  check("residual train mixed", fuzz_residual_train<bfloat16, float>);
  check("residual backward float", fuzz_residual_backward<float, float>);
  check("residual backward bfloat16", fuzz_residual_backward<bfloat16, bfloat16>);
  check("residual backward mixed", fuzz_residual_backward<bfloat16, float>);
  check("embedding backward float", fuzz_embedding_backward<float>);
  check("embedding backward bfloat16", fuzz_embedding_backward<bfloat16>);
  check("sums float", fuzz_sums<float>);
  check("sums bfloat16", fuzz_sums<bfloat16>);
  check("gelu backward float", fuzz_gelu_backward<float>);
  check("gelu backward bfloat16", fuzz_gelu_backward<bfloat16>);
  check("pooling backward float", fuzz_pooling_backward<float>);
  check("pooling backward bfloat16", fuzz_pooling_backward<bfloat16>);
  check("cross_entropy float", fuzz_cross_entropy<float>);
  check("cross_entropy bfloat16", fuzz_cross_entropy<bfloat16>);
}

}  // namespace bert_fast
