// linear in each precision with each epilogue: against sums in double, for any part of the rows and panels.
#include <algorithm>

#include "check.h"

namespace bert_fast {
namespace {

double gelu_erf(double x) { return x / 2 * std::erfc(-x / std::sqrt(2.0)); }
double gelu_tanh(double x) { return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

double activate(Activation activation, double x) {
  if (std::isnan(x)) return x;
  if (activation == Activation::gelu_erf) return gelu_erf(x);
  if (activation == Activation::gelu_tanh) return gelu_tanh(x);
  return activation == Activation::relu ? std::max(0.0, x) : x;
}

// One product, with all that it reads; only the output belongs to the caller.
struct Case {
  Precision precision;
  int64_t rows, out_features, in_features, depth, padded;
  std::vector<float> weight, bias;
  PackedWeight packed;
  Fenced<uint8_t> input;  // in the precision's type
  Fenced<RowCode> codes;
  Fenced<float> residual;
  int64_t input_stride, residual_stride;
  Activation activation = Activation::none;
  bool has_residual = false;

  int64_t element_size() const { return precision == Precision::fp32 ? 4 : precision == Precision::bf16 ? 2 : 1; }

  Case(Random& random, Precision p, int64_t m, int64_t n, int64_t k)
      : precision(p),
        rows(m),
        out_features(n),
        in_features(k),
        depth(round_up_to_panel(k)),
        padded(round_up_to_panel(n)),
        weight(random.normals(n * k)),
        bias(random.normals(n)),
        packed(p, n, k, random.chance(0.5) ? NO_OUTLIERS : OutlierChannels{random.integer(0, k - 1), k / 2}),
        input((m == 0 ? 0 : (m - 1) * (depth + 4) + depth) * element_size()),
        codes(m),
        residual(m == 0 ? 0 : (m - 1) * (padded + 3) + padded),
        input_stride(depth + 4),
        residual_stride(padded + 3) {
    if (random.chance(0.1)) std::fill_n(weight.begin(), k, 1e-42f);  // below what has an inverse
    const int64_t cut = random.integer(0, n);
    packed.pack(weight.data(), bias.data(), cut, n, cut);
    packed.pack(weight.data(), bias.data(), 0, cut, 0);
    for (int64_t i = 0; i < residual.size(); ++i) residual[i] = random.normal();
    for (int64_t row = 0; row < rows; ++row) {
      codes[row] = {std::abs(random.normal()) / 255, random.normal(), {random.normal(), random.normal()}};
      for (int64_t i = 0; i < depth; ++i) {
        const float value = i < k ? random.normal() : 0.0f;
        void* to = input.data() + (row * input_stride + i) * element_size();
        if (precision == Precision::fp32) {
          std::memcpy(to, &value, 4);
        } else if (precision == Precision::bf16) {
          const bfloat16 narrow = to_bfloat16(value);
          std::memcpy(to, &narrow, 2);
        } else {
          *static_cast<uint8_t*>(to) = i < k ? static_cast<uint8_t>(random.integer(0, 255)) : 0;
        }
      }
    }
  }

  double input_at(int64_t row, int64_t i) const {
    const uint8_t* from = input.data() + (row * input_stride + i) * element_size();
    if (precision == Precision::int8) return *from;
    if (precision == Precision::bf16) {
      bfloat16 value;
      std::memcpy(&value, from, 2);
      return to_float(value);
    }
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }

  // As packed, in whole panels of (depth / group, PANEL, group).
  double weight_at(int64_t column, int64_t i) const {
    const int64_t group = 4 / element_size();
    const int64_t at =
        (column / PANEL * (depth / group) + i / group) * PANEL * group + column % PANEL * group + i % group;
    const void* panels = packed.view().panels;
    if (precision == Precision::int8) return static_cast<const int8_t*>(panels)[at];
    return precision == Precision::bf16 ? to_float(static_cast<const bfloat16*>(panels)[at])
                                        : static_cast<const float*>(panels)[at];
  }

  template <class T>
  Linear args(const Fenced<T>& out, int64_t out_stride) const {
    return {packed.view(),
            input.data(),
            input_stride,
            codes.data(),
            out.data(),
            out_stride,
            has_residual ? residual.data() : nullptr,
            residual_stride,
            activation};
  }
};

// The result before the activation, and the most that its rounding may change.
struct Expected {
  double value, tolerance;
};

Expected expected_sum(const Case& c, int64_t row, int64_t column) {
  double sum = 0, size = 0;
  for (int64_t i = 0; i < c.depth; ++i) {
    const double product = c.input_at(row, i) * c.weight_at(column, i);
    sum += product;
    size += std::abs(product);
  }
  const PackedLinear view = c.packed.view();
  double value = sum + view.bias[column];
  double tolerance = FLOAT_EPS * static_cast<double>(c.depth + 2) * (size + std::abs(view.bias[column]));
  if (c.precision == Precision::int8) {  // the sum is exact, what follows are a few roundings
    const RowCode& code = c.codes[row];
    std::vector<double> terms{sum * view.scales[column] * code.scale,
                              static_cast<double>(code.minimum) * view.sums[column], view.bias[column]};
    for (int64_t i = 0; i < OUTLIERS; ++i)
      terms.push_back(static_cast<double>(code.outliers[i]) * view.outliers[i * view.out_features + column]);
    value = tolerance = 0;
    for (const double term : terms) {
      value += term;
      tolerance += (5 + OUTLIERS) * FLOAT_EPS * std::abs(term);
    }
  }
  if (c.has_residual) {
    const double residual = c.residual[row * c.residual_stride + column];
    value += residual;
    tolerance += FLOAT_EPS * (std::abs(value) + tolerance);
  }
  return {value, tolerance};
}

template <class T>
void check_case(Random& random, Case& c, const std::vector<const KernelTable*>& isas) {
  const int64_t panels = c.packed.panels(), out_stride = c.padded + random.integer(0, 5);
  const int64_t row_begin = random.integer(0, c.rows), row_end = random.integer(row_begin, c.rows);
  const int64_t panel_begin = random.integer(0, panels), panel_end = random.integer(panel_begin, panels);
  const auto fresh = [&] { return Fenced<T>(c.rows == 0 ? 0 : (c.rows - 1) * out_stride + c.padded); };
  const auto linear = [&](const KernelTable* isa) { return isa->precisions[static_cast<int>(c.precision)].linear; };
  // What an approximation of GELU may add: see vec/math.h.
  const double per_input = c.activation == Activation::gelu_erf    ? (c.precision == Precision::fp32 ? 1e-6 : 8e-5)
                           : c.activation == Activation::gelu_tanh ? 1e-6
                                                                   : 0.0;
  std::vector<Expected> sums;
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t column = panel_begin * PANEL; column < panel_end * PANEL; ++column)
      sums.push_back(expected_sum(c, row, column));
  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    const Fenced<T> out = fresh();
    linear(isa)(c.args(out, out_stride), row_begin, row_end, panel_begin, panel_end);
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t row = i / out_stride, column = i % out_stride;
      const bool in_rows = row >= row_begin && row < row_end;
      if (!in_rows || column < panel_begin * PANEL || column >= panel_end * PANEL) {
        CHECK(out.is_untouched(i));
      } else {
        const int64_t index = (row - row_begin) * (panel_end - panel_begin) * PANEL + column - panel_begin * PANEL;
        const Expected sum = sums[static_cast<size_t>(index)];
        const double value = activate(c.activation, sum.value);
        const double tolerance = 1.2 * sum.tolerance + per_input * std::abs(sum.value);
        CHECK_CLOSE(value, to_float(out[i]), tolerance + EPS<T> * (std::abs(value) + tolerance));
        if (column >= c.out_features)
          CHECK(to_float(out[i]) == (c.has_residual ? c.residual[row * c.residual_stride + column] : 0.0f));
      }
    }
    // The rows one by one and the panels one by one give the same bits, and one of them that is NaN stays alone.
    const Fenced<T> single = fresh();
    for (int64_t row = row_begin; row < row_end; ++row)
      for (int64_t panel = panel_begin; panel < panel_end; ++panel)
        linear(isa)(c.args(single, out_stride), row, row + 1, panel, panel + 1);
    CHECK(same_bits(out, single));
    if (row_begin == row_end) continue;
    const int64_t bad = random.integer(row_begin, row_end - 1);
    Fenced<uint8_t> clean(c.input);
    const float minimum = c.codes[bad].minimum;
    std::memset(c.input.data() + bad * c.input_stride * c.element_size(), 0xff,
                static_cast<size_t>(c.in_features * c.element_size()));
    c.codes[bad].minimum = std::numeric_limits<float>::quiet_NaN();
    linear(isa)(c.args(single, out_stride), row_begin, row_end, panel_begin, panel_end);
    for (int64_t i = 0; i < out.size(); ++i) {
      if (i / out_stride != bad) {
        CHECK(std::memcmp(&out[i], &single[i], sizeof(T)) == 0);
      } else if (i % out_stride >= panel_begin * PANEL &&
                 i % out_stride < std::min(panel_end * PANEL, c.out_features)) {
        CHECK(std::isnan(to_float(single[i])));
      }
    }
    c.codes[bad].minimum = minimum;
    std::memcpy(c.input.data(), clean.data(), static_cast<size_t>(clean.size()));
  }
  context = before;
}

}  // namespace

void test_linear() {
  const auto isas = tables();
  const std::vector<int64_t> wide{1, 2, 31, 32, 33, 63, 64, 65, 100};
  const std::vector<int64_t> deep{1, 2, 3, 4, 5, 31, 32, 33, 64, 97, 383, 385, 800};
  fuzz("linear", 10, 40, [&](Random& random) {
    const auto precision = static_cast<Precision>(random.integer(0, 2));
    const int64_t rows = random.chance(0.1) ? 0 : random.integer(1, 36);
    Case c(random, precision, rows, random.of(wide), random.of(deep));
    c.has_residual = random.chance(0.3);
    if (!c.has_residual) c.activation = static_cast<Activation>(random.integer(0, 3));
    const bool is_narrow = !c.has_residual && (precision == Precision::bf16 ||
                                               (precision == Precision::int8 && c.activation == Activation::none));
    if (is_narrow) {
      check_case<bfloat16>(random, c, isas);
    } else {
      check_case<float>(random, c, isas);
    }
  });
}

}  // namespace bert_fast
