// What the functions that Python calls have in common: checks of tensors, memory and threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../dispatch.h"
#include "../packing.h"

namespace bert_fast {

using at::Tensor;

// ---------------------------------------------------------------------------------------------------------- checking

inline std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string dtype_text(const Tensor& tensor) {
  return "torch." + std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": ", name, " has shape ", shape_text(tensor.sizes()),
                    ", expected ", shape_text(expected));
}

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.layout() == at::kStrided, op, ": ", name, " is on ",
                    tensor.device().str(), " with layout ", tensor.layout(), ", expected a dense tensor on cpu");
}

// float32 or bfloat16, dense, on the CPU, and of the dtype of `lead`.
inline void check_kind(const char* op, const char* name, const Tensor& tensor, const char* lead_name,
                       const Tensor& lead) {
  check_cpu(op, name, tensor);
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, op, ": ", name, " is ",
                    dtype_text(tensor), ", expected torch.float32 or torch.bfloat16");
  TORCH_CHECK_VALUE(tensor.scalar_type() == lead.scalar_type(), op, ": ", name, " is ", dtype_text(tensor), " but ",
                    lead_name, " is ", dtype_text(lead));
}

inline void check_vector(const char* op, const char* name, const Tensor& tensor, const char* lead_name,
                         const Tensor& lead) {
  check_kind(op, name, tensor, lead_name, lead);
  check_shape(op, name, tensor, {lead.size(-1)});
}

inline void check_no_dropout(const char* op, double dropout_p) {
  TORCH_CHECK_VALUE(dropout_p == 0, op, ": dropout_p is ", dropout_p, ", expected 0: the C++ kernels have no dropout");
}

// Which elements a call of an op drops. seed: an int64 scalar, not read where dropout_p is 0.
inline Dropout checked_dropout(const char* op, double dropout_p, const std::optional<Tensor>& seed) {
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p <= 1, op, ": dropout_p is ", dropout_p, ", expected 0 to 1");
  if (dropout_p == 0) return {0, 0, 1.0f};
  TORCH_CHECK_VALUE(seed.has_value(), op, ": dropout_p is ", dropout_p, " without a seed");
  check_cpu(op, "seed", *seed);
  TORCH_CHECK_VALUE(seed->dim() == 0 && seed->scalar_type() == at::kLong, op, ": seed is ", dtype_text(*seed),
                    " of shape ", shape_text(seed->sizes()), ", expected an int64 scalar");
  const auto key = static_cast<uint64_t>(seed->item<int64_t>());
  if (dropout_p == 1) return {key, 256, 0.0f};
  const int32_t threshold = std::clamp(static_cast<int32_t>(std::nearbyint(256 * dropout_p)), 1, 255);
  return {key, threshold, 256.0f / static_cast<float>(256 - threshold)};
}

// Sequence offsets, copied: int32 (batch_size + 1,) from 0 to num_tokens, or to fewer where some may be left over,
// never falling.
inline std::vector<int32_t> checked_offsets(const char* op, const Tensor& offsets, int64_t num_tokens,
                                            bool some_left_over = false) {
  check_cpu(op, "cu_seqlens", offsets);
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() >= 1 && offsets.scalar_type() == at::kInt, op,
                    ": cu_seqlens is ", dtype_text(offsets), " of shape ", shape_text(offsets.sizes()),
                    ", expected int32 (batch_size + 1,)");
  const Tensor dense = offsets.contiguous();
  const int32_t* data = dense.const_data_ptr<int32_t>();
  std::vector<int32_t> values(data, data + dense.numel());
  const bool ends_well = values.back() == num_tokens || (some_left_over && values.back() < num_tokens);
  TORCH_CHECK_VALUE(values.front() == 0 && ends_well, op, ": cu_seqlens runs from ", values.front(), " to ",
                    values.back(), ", expected 0 to ", num_tokens, " tokens");
  for (size_t i = 1; i < values.size(); ++i)
    TORCH_CHECK_VALUE(values[i - 1] <= values[i], op, ": cu_seqlens falls from ", values[i - 1], " to ", values[i],
                      " at index ", i);
  return values;
}

// Index of an element of a contiguous tensor, as Python prints it: 5, or (0, 5).
inline std::string index_text(int64_t flat, at::IntArrayRef sizes) {
  std::vector<int64_t> index(sizes.size());
  for (size_t i = sizes.size(); i-- > 0; flat /= sizes[i]) index[i] = flat % sizes[i];
  return index.size() == 1 ? std::to_string(index[0]) : shape_text(index);
}

// Ids as contiguous int64, every one in [0, size).
inline Tensor checked_ids(const char* op, const char* name, const Tensor& ids, at::IntArrayRef shape, int64_t size) {
  check_cpu(op, name, ids);
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, op, ": ", name, " is ",
                    dtype_text(ids), ", expected int64 or int32");
  check_shape(op, name, ids, shape);
  const Tensor dense = ids.to(at::kLong).contiguous();
  const int64_t* data = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i)
    TORCH_CHECK_VALUE(data[i] >= 0 && data[i] < size, name, " ", data[i], " at index ", index_text(i, shape),
                      " is out of range [0, ", size, ")");
  return dense;
}

// The kernels of the instruction set in use; ValueError when the environment names one that is not there.
inline const KernelTable& chosen_kernels() {
  try {
    return kernels();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// ------------------------------------------------------------------------------------------------- memory and threads

// The elements as they lie in memory, in row-major order.
inline Tensor contiguous(const Tensor& tensor) { return tensor.resolve_neg().contiguous(); }

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Elements below which a thread is not worth waking.
constexpr int64_t ELEMENTS_PER_THREAD = 16384;

// f(begin, end) over the rows on torch's own threads; a few rows run on the caller's.
// torch::stable runs inside torch: this module needs no OpenMP, of which a second copy would fight torch's.
template <class F>
inline void parallel_rows(int64_t rows, int64_t elements_per_row, const F& f) {
  torch::stable::parallel_for(0, rows,
                              std::max<int64_t>(1, ELEMENTS_PER_THREAD / std::max<int64_t>(1, elements_per_row)), f);
}

// task(i) for every i < count, each on whichever of `workers` threads is free.
template <class Task>
inline void run_tasks(int64_t count, int64_t workers, const Task& task) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(count, workers), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// f with a value of the type that the tensor holds: float or bfloat16.
template <class F>
inline void with_element_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kFloat) {
    f(float{});
  } else {
    f(bfloat16{});
  }
}

// The caller's `out`, checked, or fresh memory.
inline Tensor result(const char* op, const std::optional<Tensor>& out, at::IntArrayRef sizes, const Tensor& like) {
  if (!out.has_value()) return at::empty(sizes, like.options());
  check_cpu(op, "out", *out);
  check_shape(op, "out", *out, sizes);
  TORCH_CHECK_VALUE(out->scalar_type() == like.scalar_type(), op, ": out is ", dtype_text(*out), ", expected ",
                    dtype_text(like));
  TORCH_CHECK_VALUE(out->is_contiguous() && !out->is_neg(), op, ": out has strides ", shape_text(out->strides()),
                    ", expected a contiguous tensor");
  return *out;
}

inline PoolingMode pooling_mode(const std::string& name) {
  constexpr const char* names[] = {"cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<PoolingMode>(i);
  TORCH_CHECK_VALUE(false, "pooling: mode is '", name,
                    "', expected one of cls, mean, max, mean_sqrt_len_tokens, weightedmean");
}

// Adds the class Encoder to the module.
void bind_encoder(pybind11::module_& module);

// Adds the function fingerprint.
void bind_fingerprint(pybind11::module_& module);

// Adds what training needs: the ops' forwards for it, their backwards, and the random bytes of dropout.
void bind_training(pybind11::module_& module);

// Adds what training needs of the ops that end in a LayerNorm.
void bind_layer_norm_training(pybind11::module_& module);
// Adds attention's forward for training and its backward.
void bind_attention_training(pybind11::module_& module);
// Adds the matrix products of training.
void bind_dense(pybind11::module_& module);

// Adds the op linear and the packing of its weights to the module.
void bind_linear(pybind11::module_& module);

}  // namespace bert_fast
