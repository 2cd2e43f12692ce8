// The functions of training that Python calls: they validate everything, own memory and threads, and release the GIL.
#include "column_sums.h"

namespace py = pybind11;

namespace bert_fast {
namespace {

// The random bytes that decide about dropout: (rows, columns) uint8, for the rows [first_row, first_row + rows).
Tensor dropout_bytes(int64_t seed, int64_t first_row, int64_t rows, int64_t columns, int64_t plane) {
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0 && first_row >= 0 && plane >= 0, "dropout_bytes: first_row ", first_row,
                    ", rows ", rows, ", columns ", columns, ", plane ", plane, ", expected none below 0");
  const int64_t blocks = (columns + DROPOUT_COLUMNS - 1) / DROPOUT_COLUMNS;
  const Tensor out = at::empty({rows, blocks * DROPOUT_COLUMNS}, at::kByte);
  const TrainingTable& table = *chosen_kernels().training;
  uint8_t* bytes = mutable_data<uint8_t>(out);
  parallel_rows(rows, blocks * DROPOUT_COLUMNS, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      table.random_bytes(static_cast<uint64_t>(seed), first_row + row, plane, blocks,
                         bytes + row * blocks * DROPOUT_COLUMNS);
  });
  return out.narrow(1, 0, columns);
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias,
                                              const std::string& approximate) {
  const char* op = "bias_gelu_backward";
  check_kind(op, "x", x, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x is a scalar, expected (..., features)");
  check_kind(op, "grad", grad, "x", x);
  check_shape(op, "grad", grad, x.sizes());
  check_vector(op, "bias", bias, "x", x);
  TORCH_CHECK_VALUE(approximate == "none" || approximate == "tanh", op, ": approximate is '", approximate,
                    "', expected one of none, tanh");
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor dense_grad = contiguous(grad), dense = contiguous(x), dense_bias = contiguous(bias);
  const Tensor dx = at::empty(x.sizes(), x.options());
  const int64_t features = x.size(-1), rows = features > 0 ? x.numel() / features : 0;
  const Tensor sums = at::empty({sum_blocks(rows), features}, at::kFloat);
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    const BiasGeluBackward<T> args{
        data<T>(dense_grad),
        data<T>(dense),
        data<T>(dense_bias),
        mutable_data<T>(dx),
        mutable_data<float>(sums),
        rows,
        features,
        approximate == "tanh",
    };
    parallel_rows(sum_blocks(rows), SUM_ROWS * features,
                  [&](int64_t begin, int64_t end) { table.rows(T{}).bias_gelu_backward(args, begin, end); });
  });
  return {dx, column_sums(table, sums, bias)};
}

// Rows of hidden past the last sequence get zeros.
Tensor pooling_backward(const Tensor& grad, const Tensor& hidden, const Tensor& cu_seqlens, const std::string& mode) {
  const char* op = "pooling_backward";
  check_kind(op, "hidden", hidden, "hidden", hidden);
  TORCH_CHECK_VALUE(hidden.dim() == 2, op, ": hidden has shape ", shape_text(hidden.sizes()),
                    ", expected (num_tokens, hidden_size)");
  const std::vector<int32_t> offsets = checked_offsets(op, cu_seqlens, hidden.size(0), true);
  const int64_t batch_size = static_cast<int64_t>(offsets.size()) - 1, hidden_size = hidden.size(1);
  check_kind(op, "grad", grad, "hidden", hidden);
  check_shape(op, "grad", grad, {batch_size, hidden_size});
  const PoolingMode pooled_by = pooling_mode(mode);
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor dense_grad = contiguous(grad), dense = contiguous(hidden);
  const Tensor out = at::empty(hidden.sizes(), hidden.options());
  out.narrow(0, offsets.back(), hidden.size(0) - offsets.back()).zero_();
  const int64_t tasks = batch_size * pooling_blocks(hidden_size);
  if (out.numel() == 0 || tasks == 0) return out;
  with_element_type(hidden, [&](auto element) {
    using T = decltype(element);
    const PoolingBackward<T> args{data<T>(dense_grad),  data<T>(dense), offsets.data(),
                                  mutable_data<T>(out), hidden_size,    pooled_by};
    parallel_rows(tasks, hidden.numel() / tasks,
                  [&](int64_t begin, int64_t end) { table.rows(T{}).pooling_backward(args, begin, end); });
  });
  return out;
}

Tensor cross_entropy_(const Tensor& logits, const Tensor& bias, const Tensor& labels) {
  const char* op = "cross_entropy_";
  check_kind(op, "logits", logits, "logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 2, op, ": logits has shape ", shape_text(logits.sizes()),
                    ", expected (rows, classes)");
  TORCH_CHECK_VALUE(logits.is_contiguous() && !logits.is_neg(), op, ": logits has strides ",
                    shape_text(logits.strides()), ", expected a contiguous tensor: it is overwritten");
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_cpu(op, "bias", bias);
  check_shape(op, "bias", bias, {classes});
  TORCH_CHECK_VALUE(bias.scalar_type() == logits.scalar_type() || bias.scalar_type() == at::kFloat, op, ": bias is ",
                    dtype_text(bias), " but logits is ", dtype_text(logits));
  const Tensor indices = checked_ids(op, "labels", labels, {rows}, classes);
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor dense_bias = contiguous(bias.to(at::kFloat));
  at::assert_no_overlap(logits, dense_bias);
  const Tensor losses = at::empty({rows}, at::kFloat);
  with_element_type(logits, [&](auto element) {
    using T = decltype(element);
    const CrossEntropy<T> args{mutable_data<T>(logits), data<float>(dense_bias), data<int64_t>(indices),
                               mutable_data<float>(losses), classes};
    parallel_rows(rows, classes, [&](int64_t begin, int64_t end) {
      const auto scratch = allocate<float>(std::is_same_v<T, float> ? 0 : classes);
      table.rows(T{}).cross_entropy(args, begin, end, scratch.get());
    });
  });
  return losses;
}

}  // namespace

void bind_training(py::module_& module) {
  using torch::wrap_pybind_function_no_gil;
  module.def("dropout_bytes", wrap_pybind_function_no_gil(dropout_bytes), py::arg("seed"), py::arg("first_row"),
             py::arg("rows"), py::arg("columns"), py::arg("plane") = 0,
             "The random bytes that decide about dropout, (rows, columns) uint8.");
  module.def("bias_gelu_backward", wrap_pybind_function_no_gil(bias_gelu_backward));
  module.def("pooling_backward", wrap_pybind_function_no_gil(pooling_backward));
  module.def("cross_entropy_", wrap_pybind_function_no_gil(cross_entropy_));
}

}  // namespace bert_fast
