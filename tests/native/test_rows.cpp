// The kernels that work row by row, and pooling: every instruction set against scalar.
#include <algorithm>

#include "check.h"

namespace bert_fast {
namespace {

const std::vector<int64_t> sizes{1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 96, 127, 129, 255, 257, 312, 600};

// Sometimes a value that is no ordinary number.
float strange(Random& random) {
  const std::vector<float> values{std::numeric_limits<float>::quiet_NaN(),
                                  std::numeric_limits<float>::infinity(),
                                  -std::numeric_limits<float>::infinity(),
                                  3e38f,
                                  -3e38f,
                                  1e-42f,
                                  0.0f};
  return random.of(values);
}

// Whether a row holds what lets no bound be given: NaN, an infinity, or squares beyond float.
bool is_wild(const std::vector<float>& row) {
  return std::any_of(row.begin(), row.end(), [](float v) { return !(std::abs(v) < 1e15f); });
}

template <class T>
void check_same(const Fenced<T>& expected, const Fenced<T>& actual) {
  for (int64_t i = 0; i < expected.size(); ++i) CHECK(std::memcmp(&expected[i], &actual[i], sizeof(T)) == 0);
}

// A row of LayerNorm: relative to its inputs, which are then multiplied by rstd <= 1 / sqrt(eps).
template <class T>
void check_layer_norm(const Fenced<T>& expected, const Fenced<T>& actual, int64_t row, int64_t stride,
                      const std::vector<float>& x, const Fenced<float>& weight, const Fenced<float>& bias, float eps) {
  const int64_t size = static_cast<int64_t>(x.size());
  double mean = 0, variance = 0, largest = 0;
  for (const float v : x) mean += v / static_cast<double>(size);
  for (const float v : x) variance += (v - mean) * (v - mean) / static_cast<double>(size);
  for (const float v : x) largest = std::max(largest, std::abs(static_cast<double>(v)));
  const double rstd = 1 / std::sqrt(variance + eps);
  for (int64_t i = 0; i < size; ++i) {
    const float a = to_float(expected[row * stride + i]), b = to_float(actual[row * stride + i]);
    if (is_wild(x)) {
      CHECK(std::isnan(a) == std::isnan(b) || !std::isfinite(a) || !std::isfinite(b) || std::abs(x[0]) >= 1e15f);
      continue;
    }
    const double normal = std::abs(x[static_cast<size_t>(i)] - mean) * rstd;
    const double error = FLOAT_EPS * (16 * largest * rstd + 32 * normal);
    const double tolerance =
        error * std::abs(weight[i]) + FLOAT_EPS * 4 * (std::abs(bias[i]) + std::abs(weight[i]) * normal);
    CHECK_CLOSE(a, b, tolerance + 2 * EPS<T> * std::abs(a));
    const double truth = (x[static_cast<size_t>(i)] - mean) * rstd * weight[i] + bias[i];
    CHECK_CLOSE(truth, a, tolerance + EPS<T> * (std::abs(a) + tolerance));
  }
}

struct NormCase {
  int64_t size;
  Fenced<float> weight, bias;
  float eps;

  NormCase(Random& random, int64_t n)
      : size(n),
        weight(random_memory<float>(random, n)),
        bias(random_memory<float>(random, n)),
        eps(random.of(std::vector<float>{1e-5f, 1e-12f})) {}

  LayerNorm<float> norm() const { return {weight.data(), bias.data(), size, eps}; }
};

OutlierChannels random_outliers(Random& random, int64_t size) {
  if (random.chance(0.5)) return NO_OUTLIERS;
  return {random.integer(0, size - 1), random.integer(0, size - 1)};
}

bool same_code(const RowCode& a, const RowCode& b) {
  bool result = is_close(a.minimum, b.minimum, 0) && (std::isnan(a.minimum) || is_close(a.scale, b.scale, 0));
  for (int64_t i = 0; i < OUTLIERS; ++i) result = result && is_close(a.outliers[i], b.outliers[i], 0);
  return result;
}

// normalize writes floats, and the same rows as bfloat16, or as bytes as quantize would.
void fuzz_normalize(Random& random, const std::vector<const KernelTable*>& isas) {
  const NormCase c(random, random.of(sizes));
  const int64_t rows = random.integer(0, 5), padded = round_up_to_panel(c.size);
  const int64_t x_stride = c.size + random.integer(0, 9), out_stride = padded + random.integer(0, 9);
  const int64_t begin = random.integer(0, rows), end = random.integer(begin, rows);
  Fenced<float> x(rows == 0 ? 0 : (rows - 1) * x_stride + c.size);
  const float scale = random.of(std::vector<float>{1.0f, 1e-6f, 1e6f}), shift = random.chance(0.3) ? 1000.0f : 0.0f;
  for (int64_t i = 0; i < x.size(); ++i)
    x[i] = random.chance(0.001) ? strange(random) : scale * (random.normal() + shift);
  const auto floats = [&] { return Fenced<float>(rows == 0 ? 0 : (rows - 1) * out_stride + c.size); };
  const Fenced<float> expected = floats();
  isas[0]->precisions[0].normalize(
      {x.data(), x_stride, c.norm(), {expected.data(), out_stride, nullptr, 0, nullptr, nullptr}}, begin, end);
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    const Fenced<float> hidden = floats(), hidden16 = floats(), hidden8 = floats();
    const Fenced<RowCode> codes(rows), own_codes(rows);
    const OutlierChannels outliers = random_outliers(random, c.size);
    const Fenced<bfloat16> narrow(rows == 0 ? 0 : (rows - 1) * out_stride + c.size);
    const Fenced<uint8_t> bytes(rows == 0 ? 0 : (rows - 1) * out_stride + c.size);
    isa->precisions[0].normalize(
        {x.data(), x_stride, c.norm(), {hidden.data(), out_stride, nullptr, 0, nullptr, nullptr}}, begin, end);
    isa->precisions[1].normalize(
        {x.data(), x_stride, c.norm(), {hidden16.data(), out_stride, narrow.data(), out_stride, nullptr, nullptr}},
        begin, end);
    isa->precisions[2].normalize(
        {x.data(),
         x_stride,
         c.norm(),
         {hidden8.data(), out_stride, bytes.data(), out_stride, codes.data(), outliers.data()}},
        begin, end);
    check_same(hidden, hidden16);
    check_same(hidden, hidden8);
    const Fenced<uint8_t> own_bytes(bytes.size());
    isas[0]->f32.quantize(
        {hidden.data(), out_stride, c.size, own_bytes.data(), out_stride, own_codes.data(), outliers.data()}, begin,
        end);
    for (int64_t row = 0; row < rows; ++row) {
      const bool is_in = row >= begin && row < end;
      std::vector<float> values(x.data() + row * x_stride, x.data() + row * x_stride + c.size);
      if (is_in) check_layer_norm(expected, hidden, row, out_stride, values, c.weight, c.bias, c.eps);
      if (is_in && !is_wild(values)) CHECK(same_code(codes[row], own_codes[row]));
      for (int64_t i = 0; i < (row + 1 < rows ? out_stride : c.size); ++i) {
        const int64_t at = row * out_stride + i;
        if (!is_in || i >= c.size) {
          CHECK(hidden.is_untouched(at) && narrow.is_untouched(at) && bytes.is_untouched(at));
        } else if (!is_wild(values)) {
          CHECK(bytes[at] == own_bytes[at]);
          CHECK(is_close(hidden[at], to_float(narrow[at]), BFLOAT16_EPS * std::abs(hidden[at])));
        }
      }
    }
  }
  context = before;
}

// Bytes and codes are equal on every instruction set; outliers count as zero in the range, and x comes back as it was.
template <class T>
void fuzz_quantize(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), rows = random.integer(0, 5);
  const int64_t x_stride = size + random.integer(0, 9), out_stride = size + random.integer(0, 9);
  const int64_t begin = random.integer(0, rows), end = random.integer(begin, rows);
  Fenced<T> x(rows == 0 ? 0 : (rows - 1) * x_stride + size);
  const float scale = random.of(std::vector<float>{1.0f, 0.0f, 1e-42f, 1e-36f, 1e30f});
  for (int64_t i = 0; i < x.size(); ++i)
    x[i] = from_float<T>(random.chance(0.001) ? strange(random) : scale * random.normal());
  const int64_t bytes = rows == 0 ? 0 : (rows - 1) * out_stride + size;
  const OutlierChannels outliers = random_outliers(random, size);
  const auto is_outlier = [&](int64_t i) { return std::count(outliers.begin(), outliers.end(), i) > 0; };
  const Fenced<T> before_all(x);
  const auto run = [&](const KernelTable* isa, const Fenced<uint8_t>& out, const Fenced<RowCode>& codes) {
    isa->of<T>().quantize({x.data(), x_stride, size, out.data(), out_stride, codes.data(), outliers.data()}, begin,
                          end);
    CHECK(same_bits(x, before_all));
  };
  const Fenced<uint8_t> expected(bytes);
  const Fenced<RowCode> codes(rows);
  run(isas[0], expected, codes);
  for (int64_t row = begin; row < end; ++row) {
    bool is_finite = true;
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (int64_t i = 0; i < size; ++i) {
      const float v = is_outlier(i) ? 0.0f : to_float(x[row * x_stride + i]);
      is_finite = is_finite && std::isfinite(v);
      low = std::min(low, v);
      high = std::max(high, v);
    }
    CHECK(is_finite || std::isnan(codes[row].minimum));
    if (!is_finite || !std::isfinite(high - low)) continue;
    CHECK(codes[row].minimum == low);
    for (int64_t i = 0; i < OUTLIERS; ++i)
      CHECK(outliers[i] < 0 || is_close(codes[row].outliers[i], to_float(x[row * x_stride + outliers[i]]), 0));
    for (int64_t i = 0; i < size; ++i) {
      const double v = is_outlier(i) ? 0.0 : to_float(x[row * x_stride + i]);
      const double byte = expected[row * out_stride + i], restored = byte * codes[row].scale + codes[row].minimum;
      CHECK_CLOSE(v, restored,
                  0.501 * std::max(static_cast<double>(high) - low, 0.0) / 255 + 4e-36 + 1e-6 * std::abs(v));
    }
  }
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    const Fenced<uint8_t> out(bytes);
    const Fenced<RowCode> own_codes(rows);
    run(isa, out, own_codes);
    for (int64_t row = 0; row < rows; ++row) {
      const bool is_wild = std::isnan(codes[row].minimum) || !std::isfinite(codes[row].scale);
      if (row >= begin && row < end) CHECK(same_code(codes[row], own_codes[row]));
      for (int64_t i = 0; i < (row + 1 < rows ? out_stride : size); ++i) {
        if (row < begin || row >= end || i >= size) {
          CHECK(out.is_untouched(row * out_stride + i));
        } else if (!is_wild) {
          CHECK(out[row * out_stride + i] == expected[row * out_stride + i]);
        }
      }
    }
  }
  context = before;
}

template <class T>
std::vector<float> as_floats(const T* values, int64_t size) {
  std::vector<float> result;
  for (int64_t i = 0; i < size; ++i) result.push_back(to_float(values[i]));
  return result;
}

// Sums of three rows of tables, and LayerNorm of them.
template <class T>
void fuzz_embeddings(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), rows = random.integer(0, 5), stride = size + random.integer(0, 9);
  const int64_t begin = random.integer(0, rows), end = random.integer(begin, rows);
  const NormCase c(random, size);
  Fenced<T> weight(size), bias(size);
  for (int64_t i = 0; i < size; ++i) {
    weight[i] = from_float<T>(c.weight[i]);
    c.weight[i] = to_float(weight[i]);
    bias[i] = from_float<T>(c.bias[i]);
    c.bias[i] = to_float(bias[i]);
  }
  const Fenced<T> words = random_memory<T>(random, 7 * size), positions = random_memory<T>(random, 5 * size);
  const Fenced<T> types = random_memory<T>(random, 2 * size);
  Fenced<int64_t> word_ids(rows), position_ids(rows), type_ids(rows);
  for (int64_t i = 0; i < rows; ++i) {
    word_ids[i] = random.integer(0, 6);
    position_ids[i] = random.integer(0, 4);
    type_ids[i] = random.integer(0, 1);
  }
  const auto sums = [&](const KernelTable* isa, const Fenced<float>& out) {
    isa->of<T>().embedding_sum({word_ids.data(), position_ids.data(), type_ids.data(), words.data(), positions.data(),
                                types.data(), size, out.data(), stride},
                               begin, end);
  };
  const auto norms = [&](const KernelTable* isa, const Fenced<T>& out) {
    const Fenced<float> scratch(size);
    isa->of<T>().embedding_layer_norm({word_ids.data(),
                                       position_ids.data(),
                                       type_ids.data(),
                                       words.data(),
                                       positions.data(),
                                       types.data(),
                                       out.data(),
                                       {weight.data(), bias.data(), size, c.eps}},
                                      begin, end, scratch.data());
  };
  const Fenced<float> expected(rows == 0 ? 0 : (rows - 1) * stride + size);
  const Fenced<T> expected_norms(rows * size);
  sums(isas[0], expected);
  norms(isas[0], expected_norms);
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    const Fenced<float> out(expected.size());
    sums(isa, out);
    check_same(expected, out);
    const Fenced<T> own_norms(rows * size);
    norms(isa, own_norms);
    for (int64_t row = 0; row < rows; ++row) {
      if (row >= begin && row < end) {
        check_layer_norm(expected_norms, own_norms, row, size, as_floats(out.data() + row * stride, size), c.weight,
                         c.bias, c.eps);
      } else {
        for (int64_t i = 0; i < size; ++i) CHECK(own_norms.is_untouched(row * size + i));
      }
    }
  }
  context = before;
}

template <class T>
void fuzz_residual_layer_norm(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), rows = random.integer(0, 5);
  const int64_t begin = random.integer(0, rows), end = random.integer(begin, rows);
  const NormCase c(random, size);
  Fenced<T> weight(size), norm_bias(size);
  for (int64_t i = 0; i < size; ++i) {
    weight[i] = from_float<T>(c.weight[i]);
    c.weight[i] = to_float(weight[i]);
    norm_bias[i] = from_float<T>(c.bias[i]);
    c.bias[i] = to_float(norm_bias[i]);
  }
  const Fenced<T> x = random_memory<T>(random, rows * size), bias = random_memory<T>(random, size);
  const Fenced<T> residual = random_memory<T>(random, rows * size);
  const auto run = [&](const KernelTable* isa, const Fenced<T>& out) {
    const Fenced<float> scratch(size);
    isa->of<T>().residual_layer_norm(
        {x.data(), bias.data(), residual.data(), out.data(), {weight.data(), norm_bias.data(), size, c.eps}}, begin,
        end, scratch.data());
  };
  const Fenced<T> expected(rows * size);
  run(isas[0], expected);
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    const Fenced<T> out(rows * size), in_place(x);
    run(isa, out);
    const Fenced<float> scratch(size);
    isa->of<T>().residual_layer_norm({in_place.data(),
                                      bias.data(),
                                      residual.data(),
                                      in_place.data(),
                                      {weight.data(), norm_bias.data(), size, c.eps}},
                                     begin, end, scratch.data());
    for (int64_t row = 0; row < rows; ++row) {
      if (row < begin || row >= end) {
        for (int64_t i = 0; i < size; ++i) CHECK(out.is_untouched(row * size + i));
        continue;
      }
      std::vector<float> hidden;
      for (int64_t i = 0; i < size; ++i)
        hidden.push_back(to_float(x[row * size + i]) + to_float(bias[i]) + to_float(residual[row * size + i]));
      check_layer_norm(expected, out, row, size, hidden, c.weight, c.bias, c.eps);
      CHECK(std::memcmp(&out[row * size], &in_place[row * size], static_cast<size_t>(size) * sizeof(T)) == 0);
    }
  }
  context = before;
}

template <class T>
void fuzz_bias_gelu(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), rows = random.integer(0, 5);
  const int64_t begin = random.integer(0, rows), end = random.integer(begin, rows);
  const bool tanh = random.chance(0.5);
  const Fenced<T> bias = random_memory<T>(random, size);
  Fenced<T> x = random_memory<T>(random, rows * size, random.of(std::vector<float>{1.0f, 10.0f, 1e30f}));
  for (int64_t i = 0; i < x.size(); ++i)
    if (random.chance(0.01)) x[i] = from_float<T>(strange(random));
  const Fenced<T> expected(rows * size);
  isas[0]->of<T>().bias_gelu({x.data(), bias.data(), expected.data(), size, tanh}, begin, end);
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    const Fenced<T> out(rows * size);
    isa->of<T>().bias_gelu({x.data(), bias.data(), out.data(), size, tanh}, begin, end);
    for (int64_t i = 0; i < out.size(); ++i) {
      if (i / size < begin || i / size >= end) {
        CHECK(out.is_untouched(i));
        continue;
      }
      const float sum = to_float(x[i]) + to_float(bias[i % size]);
      const float a = to_float(expected[i]), b = to_float(out[i]);
      if (std::isnan(sum)) CHECK(std::isnan(a) && std::isnan(b));
      if (!std::isfinite(sum)) continue;
      // The exponent of a tail, which scalar rounds twice for want of an FMA, is about x^2 / 2; beyond -12.6 it stands.
      const double exponent = std::min(80.0, static_cast<double>(sum) * sum / 2);
      CHECK_CLOSE(a, b, (2 * EPS<T> + (16 + 4 * exponent) * FLOAT_EPS) * std::abs(a) + 1e-30);
    }
  }
  context = before;
}

template <class T>
void fuzz_pooling(Random& random, const std::vector<const KernelTable*>& isas) {
  const int64_t size = random.of(sizes), stride = size + random.integer(0, 9), batch = random.integer(0, 4);
  std::vector<int32_t> offsets{0};
  for (int64_t i = 0; i < batch; ++i)
    offsets.push_back(offsets.back() + static_cast<int32_t>(random.chance(0.2) ? 0 : random.integer(1, 70)));
  Fenced<int32_t> cu_seqlens(batch + 1);
  for (int64_t i = 0; i <= batch; ++i) cu_seqlens[i] = offsets[static_cast<size_t>(i)];
  const int64_t tokens = offsets.back(), tasks = batch * pooling_blocks(size);
  Fenced<T> hidden = random_memory<T>(random, tokens == 0 ? 0 : (tokens - 1) * stride + size);
  for (int64_t i = 0; i < hidden.size(); ++i)
    if (random.chance(0.001)) hidden[i] = from_float<T>(strange(random));
  const int64_t begin = random.integer(0, tasks), end = random.integer(begin, tasks);
  const auto mode = static_cast<PoolingMode>(random.integer(0, 4));
  const auto run = [&](const KernelTable* isa, const Fenced<T>& out) {
    isa->of<T>().pooling({hidden.data(), stride, cu_seqlens.data(), out.data(), size, mode}, begin, end);
  };
  const Fenced<T> expected(batch * size);
  run(isas[0], expected);
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    const Fenced<T> out(batch * size);
    run(isa, out);
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t sequence = i / size, task = sequence * pooling_blocks(size) + i % size / POOLING_BLOCK;
      if (task < begin || task >= end) {
        CHECK(out.is_untouched(i));
        continue;
      }
      double sum = 0;  // of sizes: what the result may have been summed from
      for (int64_t token = offsets[static_cast<size_t>(sequence)]; token < offsets[static_cast<size_t>(sequence) + 1];
           ++token)
        sum += std::abs(to_float(hidden[token * stride + i % size]));
      const float a = to_float(expected[i]), b = to_float(out[i]);
      if (std::isfinite(sum) && sum < 1e38) CHECK_CLOSE(a, b, 80 * FLOAT_EPS * sum + 2 * EPS<T> * std::abs(a));
      if (std::isnan(sum) && mode != PoolingMode::cls) CHECK(std::isnan(a) && std::isnan(b));
    }
  }
  context = before;
}

}  // namespace

void test_rows() {
  const auto isas = tables();
  fuzz("normalize", 2, 40, [&](Random& random) { fuzz_normalize(random, isas); });
  fuzz("quantize float", 1, 40, [&](Random& random) { fuzz_quantize<float>(random, isas); });
  fuzz("quantize bfloat16", 1, 40, [&](Random& random) { fuzz_quantize<bfloat16>(random, isas); });
  fuzz("embeddings float", 1, 40, [&](Random& random) { fuzz_embeddings<float>(random, isas); });
  fuzz("embeddings bfloat16", 1, 40, [&](Random& random) { fuzz_embeddings<bfloat16>(random, isas); });
  fuzz("residual_layer_norm float", 1, 40, [&](Random& random) { fuzz_residual_layer_norm<float>(random, isas); });
  fuzz("residual_layer_norm bfloat16", 1, 40,
       [&](Random& random) { fuzz_residual_layer_norm<bfloat16>(random, isas); });
  fuzz("bias_gelu float", 1, 40, [&](Random& random) { fuzz_bias_gelu<float>(random, isas); });
  fuzz("bias_gelu bfloat16", 1, 40, [&](Random& random) { fuzz_bias_gelu<bfloat16>(random, isas); });
  fuzz("pooling float", 1, 40, [&](Random& random) { fuzz_pooling<float>(random, isas); });
  fuzz("pooling bfloat16", 1, 40, [&](Random& random) { fuzz_pooling<bfloat16>(random, isas); });
}

}  // namespace bert_fast
