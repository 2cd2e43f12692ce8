// The matrix products of training: `dense` and its backward. They validate everything, share the parts of a result
// among the threads, and release the GIL.
#include <tuple>

#include "bindings.h"

namespace py = pybind11;

namespace bert_fast {
namespace {

// Multiply-adds below which a thread is not worth waking.
constexpr int64_t WORK_PER_THREAD = 250'000;
// What the rows of a part are a multiple of: the rows of the largest tile.
constexpr int64_t TILE_ROWS = 14;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// This thread's, in huge pages where the system has them, until the thread ends: fresh memory would cost more than what
// is packed into it.
DenseScratch& own_scratch() {
  thread_local PanelMemory memory(sizeof(DenseScratch));
  thread_local DenseScratch* const scratch = new (memory.take(sizeof(DenseScratch))) DenseScratch;
  return *scratch;
}

// How many parts of the rows, and of the panels of columns.
struct Grid {
  int64_t rows, columns;
};

Grid grid_of(int64_t rows, const Dense& args, int64_t workers) {
  const int64_t panels = divide_up(args.columns, PANEL);
  // Rows are bounded where bfloat16 results have sums of several blocks, which are kept in scratch.
  const bool keeps_sums = args.out_is_bfloat16 && args.depth > DENSE_STEPS;
  Grid grid{keeps_sums ? divide_up(rows, DENSE_ROWS) : 1, divide_up(args.columns, DENSE_COLUMNS)};
  // More parts than threads only where they cost little: where the left matrix is read as it is.
  const int64_t wanted = workers == 1 ? 1 : args.left.along_k ? 2 * workers : workers;
  while (grid.rows * grid.columns < wanted) {
    const bool can_cut_rows = grid.rows < divide_up(rows, TILE_ROWS), can_cut_columns = grid.columns < panels;
    if (!can_cut_rows && !can_cut_columns) break;
    // A part packs its own columns of the right matrix, and packs or reads its own rows of the left one.
    const int64_t left_cost = rows / grid.rows / (args.left.along_k ? 4 : 1), right_cost = args.columns / grid.columns;
    if (can_cut_rows && (!can_cut_columns || left_cost > right_cost)) {
      ++grid.rows;
    } else {
      ++grid.columns;
    }
  }
  return grid;
}

void multiply(const Dense& args, int64_t rows) {
  const DenseKernel kernel = chosen_kernels().training->dense[args.left.is_bfloat16];
  const int64_t useful = 1 + rows * args.columns * args.depth / WORK_PER_THREAD;
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), useful);
  const int64_t panels = divide_up(args.columns, PANEL), tiles = divide_up(rows, TILE_ROWS);
  const Grid grid = grid_of(rows, args, workers);
  run_tasks(grid.rows * grid.columns, workers, [&](int64_t i) {
    const int64_t row = i % grid.rows, column = i / grid.rows;
    Dense part = args;
    if (column > 0) part.left_sums = nullptr;
    kernel(part, tiles * row / grid.rows * TILE_ROWS, std::min(tiles * (row + 1) / grid.rows * TILE_ROWS, rows),
           panels * column / grid.columns * PANEL, std::min(panels * (column + 1) / grid.columns * PANEL, args.columns),
           own_scratch());
  });
}

// (rows, features) whose rows are dense; a view where that is possible.
Tensor as_matrix(const Tensor& tensor) {
  const Tensor resolved = tensor.resolve_neg();
  const Tensor matrix = resolved.reshape({resolved.numel() / tensor.size(-1), tensor.size(-1)});
  return matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

DenseOperand operand(const Tensor& matrix, bool along_k) {
  return {matrix.const_data_ptr(), matrix.stride(0), along_k, matrix.scalar_type() == at::kBFloat16};
}

// (.., features) of x's dtype, and the weight and bias that go with it.
void check_arguments(const char* op, const Tensor& x, const Tensor& weight) {
  check_kind(op, "x", x, "x", x);
  check_cpu(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat, op, ": weight is ",
                    dtype_text(weight), " but x is ", dtype_text(x), ", expected the same or torch.float32");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.numel() > 0, op, ": weight has shape ", shape_text(weight.sizes()),
                    ", expected (out_features, in_features), neither 0");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), op, ": x has shape ", shape_text(x.sizes()),
                    ", expected (..., ", weight.size(1), ")");
}

std::vector<int64_t> result_shape(const Tensor& x, const Tensor& weight) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return shape;
}

Tensor dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "dense";
  check_arguments(op, x, weight);
  if (bias.has_value()) {
    check_kind(op, "bias", *bias, "weight", weight);
    check_shape(op, "bias", *bias, {weight.size(0)});
  }
  const Tensor out = at::empty(result_shape(x, weight), x.options());
  const Tensor left = as_matrix(x), right = as_matrix(weight);
  const Tensor shift = bias.has_value() ? contiguous(bias->to(at::kFloat)) : Tensor();
  if (left.size(0) == 0) return out;
  Dense args{};
  args.left = operand(left, true);
  args.right = operand(right, true);
  args.depth = weight.size(1);
  args.columns = weight.size(0);
  args.bias = bias.has_value() ? data<float>(shift) : nullptr;
  args.out = out.mutable_data_ptr();
  args.out_stride = weight.size(0);
  args.out_is_bfloat16 = args.left.is_bfloat16;
  multiply(args, left.size(0));
  return out;
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> dense_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, bool need_dx, bool need_dweight, bool need_dbias) {
  const char* op = "dense_backward";
  check_arguments(op, x, weight);
  check_kind(op, "grad", grad, "x", x);
  check_shape(op, "grad", grad, result_shape(x, weight));
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  const Tensor dy = as_matrix(grad), input = as_matrix(x);
  const int64_t rows = dy.size(0);
  std::optional<Tensor> dx, dweight, dbias;

  if (need_dx) {
    dx = at::empty(x.sizes(), x.options());
    const Tensor right = as_matrix(weight);
    Dense args{};
    args.left = operand(dy, true);
    args.right = operand(right, false);
    args.depth = out_features;
    args.columns = in_features;
    args.out = dx->mutable_data_ptr();
    args.out_stride = in_features;
    args.out_is_bfloat16 = args.left.is_bfloat16;
    if (rows > 0) multiply(args, rows);
  }
  if (!need_dweight && !need_dbias) return {dx, dweight, dbias};

  Dense args{};
  args.left = operand(dy, false);
  args.depth = rows;
  const Tensor sums = need_dbias ? at::zeros({out_features}, at::kFloat) : Tensor();
  if (need_dbias) args.left_sums = mutable_data<float>(sums);
  if (need_dweight) {
    dweight = rows > 0 ? at::empty(weight.sizes(), weight.options()) : at::zeros(weight.sizes(), weight.options());
    args.right = operand(input, false);
    args.columns = in_features;
    args.out = dweight->mutable_data_ptr();
    args.out_stride = in_features;
    args.out_is_bfloat16 = weight.scalar_type() == at::kBFloat16;
    if (rows > 0) multiply(args, out_features);
  } else if (rows > 0) {
    const DenseSums kernel = chosen_kernels().training->dense_sums[args.left.is_bfloat16];
    parallel_rows(out_features, rows, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  if (need_dbias) dbias = sums.to(weight.scalar_type());
  return {dx, dweight, dbias};
}

}  // namespace

void bind_dense(py::module_& module) {
  using torch::wrap_pybind_function_no_gil;
  module.def("dense", wrap_pybind_function_no_gil(dense), py::arg("x"), py::arg("weight"), py::arg("bias"));
  module.def("dense_backward", wrap_pybind_function_no_gil(dense_backward), py::arg("grad"), py::arg("x"),
             py::arg("weight"), py::arg("need_dx"), py::arg("need_dweight"), py::arg("need_dbias"));
}

}  // namespace bert_fast
