// The functions of training that Python calls: they validate everything, own memory and threads, and release the GIL.
#include "bindings.h"

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

}  // namespace

void bind_training(py::module_& module) {
  using torch::wrap_pybind_function_no_gil;
  module.def("dropout_bytes", wrap_pybind_function_no_gil(dropout_bytes), py::arg("seed"), py::arg("first_row"),
             py::arg("rows"), py::arg("columns"), py::arg("plane") = 0,
             "The random bytes that decide about dropout, (rows, columns) uint8.");
}

}  // namespace bert_fast
