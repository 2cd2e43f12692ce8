// The op `linear` of bert_fast/ops/linear.py, and the packing of its weights.
//
// Many rows are shared among the threads in blocks, each of which is prepared, multiplied and normalised while it is in
// a cache; of few rows the columns are shared, so that each weight is read by one thread only. A row's result has the
// same bits either way, alone or among others.
#include <array>
#include <cmath>
#include <tuple>

#include "bindings.h"

namespace py = pybind11;

namespace bert_fast {
namespace {

constexpr const char* OP = "linear";

// Rows that are prepared, multiplied and normalised together.
constexpr int64_t BLOCK_ROWS = 112;
// Rows per thread from which on the threads share rows, not columns.
constexpr int64_t ROWS_PER_THREAD = 64;
// Multiply-adds below which a thread is not worth waking.
constexpr int64_t WORK_PER_THREAD = 250'000;
// Column tasks per thread: enough that a thread that is late does not hold up the others.
constexpr int64_t PARTS_PER_THREAD = 3;

constexpr std::array<const char*, 3> PRECISIONS{"fp32", "bf16", "int8"};
constexpr std::array<at::ScalarType, 3> WEIGHT_TYPES{at::kFloat, at::kBFloat16, at::kChar};
constexpr std::array<int64_t, 3> GROUPS{1, 2, 4};  // values of a column side by side

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shape of packed weights; PackedLinear in kernel_table.h.
std::vector<int64_t> panels_shape(int64_t precision, int64_t out_features, int64_t in_features) {
  const int64_t group = GROUPS[static_cast<size_t>(precision)];
  return {divide_up(out_features, PANEL), round_up_to_panel(in_features) / group, PANEL, group};
}

// --------------------------------------------------------------------------------------------------------------
// packing

// panels, and (3, columns): bias, scales, sums, as tensors over the memory of a PackedWeight.
std::tuple<Tensor, Tensor> pack_weight(const Tensor& weight, const Tensor& bias, const std::string& precision) {
  const char* op = "pack_weight";
  const auto name = std::find(PRECISIONS.begin(), PRECISIONS.end(), precision);
  TORCH_CHECK_VALUE(name != PRECISIONS.end(), op, ": precision is '", precision, "', expected one of fp32, bf16, int8");
  const int64_t index = name - PRECISIONS.begin();
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"weight", weight}, {"bias", bias}}) {
    check_cpu(op, name, tensor);
    TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, op, ": ", name, " is ", dtype_text(tensor),
                      ", expected torch.float32");
  }
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.numel() > 0, op, ": weight has shape ", shape_text(weight.sizes()),
                    ", expected (out_features, in_features), neither 0");
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check_shape(op, "bias", bias, {out_features});
  const Tensor dense = contiguous(weight), dense_bias = contiguous(bias);

  std::shared_ptr<PackedWeight> packed;
  try {
    packed = std::make_shared<PackedWeight>(static_cast<Precision>(index), out_features, in_features);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, op, ": ", error.what());
  }
  parallel_rows(out_features, in_features, [&](int64_t begin, int64_t end) {
    packed->pack(data<float>(dense), data<float>(dense_bias), begin, end, begin);
  });
  const PackedLinear view = packed->view();
  const auto tensor = [&](const void* memory, at::IntArrayRef shape, at::ScalarType type) {
    return at::from_blob(const_cast<void*>(memory), shape, [packed](void*) {}, at::TensorOptions(type));
  };
  return {tensor(view.panels, panels_shape(index, out_features, in_features), WEIGHT_TYPES[static_cast<size_t>(index)]),
          tensor(view.bias, {3, packed->panels() * PANEL}, at::kFloat)};
}

// -------------------------------------------------------------------------------------------------------------
// products

int64_t checked_precision(const Tensor& panels, const Tensor& vectors, int64_t out_features, int64_t in_features) {
  check_cpu(OP, "weight", panels);
  check_cpu(OP, "weight", vectors);
  const auto type = std::find(WEIGHT_TYPES.begin(), WEIGHT_TYPES.end(), panels.scalar_type());
  const int64_t precision = type - WEIGHT_TYPES.begin();
  TORCH_CHECK_VALUE(type != WEIGHT_TYPES.end() && vectors.scalar_type() == at::kFloat && panels.is_contiguous() &&
                        vectors.is_contiguous() && out_features > 0 && in_features > 0 &&
                        panels.sizes() == panels_shape(precision, out_features, in_features) &&
                        vectors.sizes() == at::IntArrayRef({3, panels.size(0) * PANEL}),
                    OP, ": weight has panels of ", dtype_text(panels), " ", shape_text(panels.sizes()),
                    " and vectors of ", dtype_text(vectors), " ", shape_text(vectors.sizes()),
                    ", which no packing of (", out_features, ", ", in_features, ") gives");
  return precision;
}

Activation checked_activation(const std::optional<std::string>& name) {
  constexpr std::array<const char*, 3> names{"gelu", "gelu_tanh", "relu"};
  if (!name.has_value()) return Activation::none;
  const auto found = std::find(names.begin(), names.end(), *name);
  TORCH_CHECK_VALUE(found != names.end(), OP, ": activation is '", *name, "', expected one of gelu, gelu_tanh, relu");
  return static_cast<Activation>(1 + (found - names.begin()));
}

// (rows, features) whose rows are dense; a view where that is possible.
Tensor as_rows(const Tensor& tensor, int64_t rows) {
  const Tensor matrix = tensor.resolve_neg().reshape({rows, tensor.size(-1)});
  return matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

// Memory for rows of `size` values, with zeros from there to a whole PANEL, each a cache line longer than that.
Tensor room_for(int64_t rows, int64_t size, at::ScalarType type) {
  const int64_t width = round_up_to_panel(size), line = 64 / static_cast<int64_t>(c10::elementSize(type));
  const Tensor result = at::empty({rows, width + line}, type).narrow(1, 0, width);
  if (size < width) result.narrow(1, size, width - size).zero_();
  return result;
}

// `matrix` in `type` with zeros up to a whole PANEL; a copy where it is not like that, or where `copies`.
Tensor padded(const Tensor& matrix, at::ScalarType type, bool copies = false) {
  const int64_t size = matrix.size(1);
  if (!copies && size % PANEL == 0 && matrix.scalar_type() == type) return matrix;
  const Tensor result = room_for(matrix.size(0), size, type);
  result.narrow(1, 0, size).copy_(matrix);
  return result;
}

// Whether the rows of a tile fall into one set of the first-level cache, and are read often enough for a copy to pay.
bool rows_collide(const Tensor& matrix, int64_t out_features) {
  constexpr int64_t way_bytes = 4096, min_rows = 9, min_reads = 256;
  return matrix.stride(0) * static_cast<int64_t>(matrix.element_size()) % way_bytes == 0 &&
         matrix.size(0) >= min_rows && out_features >= min_reads;
}

// prepare(rows), multiply(rows, panels) and finish(rows), in that order, over all rows and panels.
template <class Prepare, class Multiply, class Finish>
void schedule(int64_t rows, int64_t panels, int64_t depth, const Prepare& prepare, const Multiply& multiply,
              const Finish& finish) {
  const int64_t useful = 1 + rows * panels * PANEL * depth / WORK_PER_THREAD;
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), useful);
  if (workers > 1 && rows < ROWS_PER_THREAD * workers && panels > 1) {
    const int64_t parts = std::min(panels, PARTS_PER_THREAD * workers);
    parallel_rows(rows, depth, prepare);
    run_tasks(parts, workers, [&](int64_t i) { multiply(0, rows, panels * i / parts, panels * (i + 1) / parts); });
    parallel_rows(rows, panels * PANEL, finish);
  } else {
    const int64_t blocks = divide_up(divide_up(rows, BLOCK_ROWS), workers) * workers;
    run_tasks(blocks, workers, [&](int64_t i) {
      const int64_t begin = rows * i / blocks, end = rows * (i + 1) / blocks;
      prepare(begin, end);
      multiply(begin, end, 0, panels);
      finish(begin, end);
    });
  }
}

// The shape of the result.
std::vector<int64_t> checked_shape(const Tensor& x, int64_t out_features, int64_t in_features, bool activates,
                                   const std::optional<Tensor>& residual, const std::optional<Tensor>& norm_weight,
                                   const std::optional<Tensor>& norm_bias, double eps) {
  check_kind(OP, "x", x, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == in_features, OP, ": x has shape ", shape_text(x.sizes()),
                    ", expected (..., ", in_features, ")");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out_features;
  if (residual.has_value()) {
    check_kind(OP, "residual", *residual, "x", x);
    check_shape(OP, "residual", *residual, shape);
  }
  const bool normalizes = norm_weight.has_value();
  TORCH_CHECK_VALUE(norm_bias.has_value() == normalizes, OP,
                    ": one of norm_weight and norm_bias is given, expected both");
  if (normalizes) {
    check_kind(OP, "layer_norm weight", *norm_weight, "x", x);
    check_kind(OP, "layer_norm bias", *norm_bias, "x", x);
    check_shape(OP, "layer_norm weight", *norm_weight, {out_features});
    check_shape(OP, "layer_norm bias", *norm_bias, {out_features});
    TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, OP, ": eps is ", eps, ", expected a number from 0 on");
  }
  TORCH_CHECK_VALUE(!activates || !(residual.has_value() || normalizes), OP,
                    ": an activation is given with a residual or a LayerNorm, expected one or the other");
  return shape;
}

Tensor linear(const Tensor& x, const Tensor& panels, const Tensor& vectors, int64_t out_features, int64_t in_features,
              const std::optional<std::string>& activation_name, const std::optional<Tensor>& residual,
              const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps) {
  const int64_t index = checked_precision(panels, vectors, out_features, in_features);
  const Activation activation = checked_activation(activation_name);
  const bool activates = activation != Activation::none, normalizes = norm_weight.has_value();
  const std::vector<int64_t> shape =
      checked_shape(x, out_features, in_features, activates, residual, norm_weight, norm_bias, eps);

  const KernelTable& table = chosen_kernels();
  const PrecisionKernels& kernels = table.precisions[index];
  const bool is_fp32 = index == static_cast<int64_t>(Precision::fp32);
  const bool is_int8 = index == static_cast<int64_t>(Precision::int8), is_bfloat16 = x.scalar_type() == at::kBFloat16;
  const int64_t rows = x.numel() / in_features, width = round_up_to_panel(out_features);
  const int64_t depth = round_up_to_panel(in_features);

  const Tensor source = as_rows(x, rows);
  const Tensor input = is_int8 ? room_for(rows, in_features, at::kByte)
                               : padded(source, panels.scalar_type(), rows_collide(source, out_features));
  const auto codes = allocate<RowCode>(is_int8 ? rows : 0);
  const Tensor no_outliers = at::zeros({OUTLIERS, is_int8 ? width : 0}, at::kFloat);
  // The kernels write floats in fp32, where there is a residual, and where an activation is to be quantised.
  const bool wants_floats = residual.has_value() || normalizes || !is_bfloat16;
  const bool writes_floats = is_fp32 || (activates ? is_int8 : wants_floats);
  Tensor added;
  if (residual.has_value()) {
    added = padded(as_rows(*residual, rows), at::kFloat);
  } else if (!is_fp32 && !activates && wants_floats) {
    added = at::zeros({1, width}, at::kFloat).expand({rows, width});
  }
  const Tensor product = at::empty({rows, width}, writes_floats ? at::kFloat : at::kBFloat16);
  Linear args{};
  args.weight = {panels.const_data_ptr(),
                 data<float>(vectors),
                 data<float>(vectors) + width,
                 data<float>(vectors) + 2 * width,
                 data<float>(no_outliers),
                 NO_OUTLIERS.data(),
                 width,
                 depth};
  args.input = input.const_data_ptr();
  args.input_stride = input.stride(0);
  args.input_codes = codes.get();
  args.out = product.mutable_data_ptr();
  args.out_stride = width;
  args.residual = added.defined() ? data<float>(added) : nullptr;
  args.residual_stride = added.defined() ? added.stride(0) : 0;
  args.activation = activation;

  const Tensor gain = normalizes ? contiguous(norm_weight->to(at::kFloat)) : Tensor();
  const Tensor shift = normalizes ? contiguous(norm_bias->to(at::kFloat)) : Tensor();
  const Tensor normalized =
      normalizes ? at::empty({rows, out_features}, x.options()) : product.narrow(1, 0, out_features);
  const auto prepare = [&](int64_t begin, int64_t end) {
    if (!is_int8) return;
    // Without outliers the source is only read.
    const Quantize bytes{const_cast<void*>(source.const_data_ptr()),
                         source.stride(0),
                         in_features,
                         mutable_data<uint8_t>(input),
                         input.stride(0),
                         codes.get(),
                         NO_OUTLIERS.data()};
    (is_bfloat16 ? table.bf16.quantize : table.f32.quantize)(bytes, begin, end);
  };
  const auto multiply = [&](int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
    kernels.linear(args, row_begin, row_end, panel_begin, panel_end);
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    if (!normalizes) return;
    const LayerNorm<float> norm{data<float>(gain), data<float>(shift), out_features, static_cast<float>(eps)};
    const Precision stored = is_bfloat16 ? Precision::bf16 : Precision::fp32;
    const auto scratch = allocate<float>(out_features);  // one row, before it is rounded
    const Prepared out = is_bfloat16
                             ? Prepared{scratch.get(), 0, normalized.mutable_data_ptr(), out_features, nullptr, nullptr}
                             : Prepared{mutable_data<float>(normalized), out_features, nullptr, 0, nullptr, nullptr};
    table.precisions[static_cast<int>(stored)].normalize({data<float>(product), width, norm, out}, begin, end);
  };
  if (rows > 0) schedule(rows, panels.size(0), depth, prepare, multiply, finish);
  return normalized.to(x.scalar_type()).contiguous().view(shape);
}

}  // namespace

void bind_linear(py::module_& module) {
  using torch::wrap_pybind_function_no_gil;
  module.def("pack_weight", wrap_pybind_function_no_gil(pack_weight));
  module.def("linear", wrap_pybind_function_no_gil(linear));
}

}  // namespace bert_fast
