// dense and its left sums: against sums in double, for any part of the result, every way the matrices lie in memory.
#include <algorithm>
#include <memory>

#include "check.h"

namespace bert_fast {
namespace {

// A matrix as an operand: `runs` runs of `length` values, `stride` apart; the last ends where memory does.
template <class T>
struct Matrix {
  int64_t stride;
  bool along_k;
  Fenced<T> memory;

  Matrix(Random& random, int64_t outer, int64_t depth, bool k_is_inner)
      : stride((k_is_inner ? depth : outer) + random.integer(0, 3)),
        along_k(k_is_inner),
        memory(random_memory<T>(random, size(k_is_inner ? outer : depth, k_is_inner ? depth : outer))) {}

  int64_t size(int64_t runs, int64_t length) const { return runs == 0 ? 0 : (runs - 1) * stride + length; }
  double at(int64_t outer, int64_t k) const {
    const float value = to_float(memory[along_k ? outer * stride + k : k * stride + outer]);
    return sizeof(T) == 2 ? value : static_cast<double>(value);
  }
  DenseOperand operand() const { return {memory.data(), stride, along_k, sizeof(T) == 2}; }
};

double rounded(double value, bool to_narrow) {
  return to_narrow ? to_float(to_bfloat16(static_cast<float>(value))) : value;
}

template <class Left, class Right, class Out>
void check_case(Random& random, const std::vector<const KernelTable*>& isas) {
  constexpr bool is_narrow = sizeof(Left) == 2;
  const std::vector<int64_t> sizes{1, 2, 13, 14, 15, 31, 32, 33, 65, 130}, deep{1, 2, 3, 15, 16, 17, 33, 383, 385, 801};
  const int64_t rows = random.of(sizes), columns = random.of(sizes), depth = random.of(deep);
  const Matrix<Left> left(random, rows, depth, random.chance(0.5));
  const Matrix<Right> right(random, columns, depth, random.chance(0.5));
  const std::vector<float> bias = random.normals(columns);
  const bool has_bias = random.chance(0.5), wants_sums = !left.along_k;
  const int64_t out_stride = columns + random.integer(0, 3);
  const int64_t row_begin = random.integer(0, rows - 1), row_end = random.integer(row_begin + 1, rows);
  const int64_t column_begin = random.integer(0, (columns - 1) / PANEL) * PANEL;
  const int64_t column_end = std::min(columns, column_begin + random.integer(1, 4) * PANEL);
  const auto scratch = std::make_unique<DenseScratch>();

  const std::string before = context;
  for (const KernelTable* isa : isas) {
    context = before + ", " + isa->name;
    const auto run = [&](const Fenced<Out>& out, const Fenced<float>& sums, int64_t r0, int64_t r1, int64_t c0,
                         int64_t c1) {
      std::memset(static_cast<void*>(scratch.get()), 0xff, sizeof(DenseScratch));
      const Dense args{left.operand(),
                       right.operand(),
                       depth,
                       columns,
                       has_bias ? bias.data() : nullptr,
                       out.data(),
                       out_stride,
                       sizeof(Out) == 2,
                       wants_sums ? sums.data() : nullptr};
      isa->training->dense[is_narrow](args, r0, r1, c0, c1, *scratch);
      return args;
    };
    const auto fresh = [&] { return Fenced<Out>((rows - 1) * out_stride + columns); };
    const Fenced<Out> out = fresh();
    const Fenced<float> sums(rows);
    const Dense args = run(out, sums, row_begin, row_end, column_begin, column_end);
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t row = i / out_stride, column = i % out_stride;
      if (row < row_begin || row >= row_end || column < column_begin || column >= column_end) {
        CHECK(out.is_untouched(i));
        continue;
      }
      double sum = has_bias ? bias[static_cast<size_t>(column)] : 0.0, size = std::abs(sum);
      for (int64_t k = 0; k < depth; ++k) {
        const double product = left.at(row, k) * rounded(right.at(column, k), is_narrow);
        sum += product;
        size += std::abs(product);
      }
      const double tolerance = 1.2 * FLOAT_EPS * static_cast<double>(depth + 3) * size;
      CHECK_CLOSE(sum, to_float(out[i]), tolerance + (sizeof(Out) == 2 ? EPS<Out> * (std::abs(sum) + tolerance) : 0.0));
    }
    if (wants_sums) {
      for (int64_t row = 0; row < rows; ++row) {
        if (row < row_begin || row >= row_end) {
          CHECK(sums.is_untouched(row));
          continue;
        }
        double sum = 0, size = 0;
        for (int64_t k = 0; k < depth; ++k) {
          sum += left.at(row, k);
          size += std::abs(left.at(row, k));
        }
        CHECK_CLOSE(sum, sums[row], FLOAT_EPS * static_cast<double>(depth + 3) * size);
      }
      const Fenced<float> alone(rows);
      Dense only = args;
      only.left_sums = alone.data();
      isa->training->dense_sums[is_narrow](only, row_begin, row_end);
      CHECK(same_bits(sums, alone));
    }
    // The rows one by one and the panels one by one give the same bits.
    const Fenced<Out> single = fresh();
    const Fenced<float> single_sums(rows);
    for (int64_t row = row_begin; row < row_end; ++row)
      for (int64_t column = column_begin; column < column_end; column += PANEL)
        run(single, single_sums, row, row + 1, column, std::min(column + PANEL, column_end));
    CHECK(same_bits(out, single));
    CHECK(same_bits(sums, single_sums));
  }
  context = before;
}

}  // namespace

void test_dense() {
  const auto isas = tables();
  fuzz("dense", 10, 40, [&](Random& random) {
    switch (random.integer(0, 4)) {
      case 0:
        return check_case<float, float, float>(random, isas);
      case 1:
        return check_case<bfloat16, bfloat16, bfloat16>(random, isas);
      case 2:
        return check_case<bfloat16, float, bfloat16>(random, isas);
      case 3:
        return check_case<bfloat16, bfloat16, float>(random, isas);
      default:
        return check_case<bfloat16, float, float>(random, isas);
    }
  });
}

}  // namespace bert_fast
