// The Python module bert_fast._C: validates everything it is given, owns memory and threads, and calls the kernels.
// The functions take the arguments of the schemas in bert_fast/ops, and release the GIL.
#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "schedule.h"

namespace py = pybind11;

namespace bert_fast {
namespace {

using at::Tensor;

// ---------------------------------------------------------------------------------------------------------- checking

std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

std::string dtype_text(const Tensor& tensor) {
  return "torch." + std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

void check_shape(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": ", name, " has shape ", shape_text(tensor.sizes()),
                    ", expected ", shape_text(expected));
}

void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.layout() == at::kStrided, op, ": ", name, " is on ",
                    tensor.device().str(), " with layout ", tensor.layout(), ", expected a dense tensor on cpu");
}

// float32 or bfloat16, dense, on the CPU, and of the dtype of `lead`.
void check_kind(const char* op, const char* name, const Tensor& tensor, const char* lead_name, const Tensor& lead) {
  check_cpu(op, name, tensor);
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, op, ": ", name, " is ",
                    dtype_text(tensor), ", expected torch.float32 or torch.bfloat16");
  TORCH_CHECK_VALUE(tensor.scalar_type() == lead.scalar_type(), op, ": ", name, " is ", dtype_text(tensor), " but ",
                    lead_name, " is ", dtype_text(lead));
}

void check_vector(const char* op, const char* name, const Tensor& tensor, const char* lead_name, const Tensor& lead) {
  check_kind(op, name, tensor, lead_name, lead);
  check_shape(op, name, tensor, {lead.size(-1)});
}

void check_no_dropout(const char* op, double dropout_p) {
  TORCH_CHECK_VALUE(dropout_p == 0, op, ": dropout_p is ", dropout_p, ", expected 0: the C++ kernels have no dropout");
}

// Sequence offsets, copied: int32 (batch_size + 1,) from 0 to num_tokens, never falling.
std::vector<int32_t> checked_offsets(const char* op, const Tensor& offsets, int64_t num_tokens) {
  check_cpu(op, "cu_seqlens", offsets);
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() >= 1 && offsets.scalar_type() == at::kInt, op,
                    ": cu_seqlens is ", dtype_text(offsets), " of shape ", shape_text(offsets.sizes()),
                    ", expected int32 (batch_size + 1,)");
  const Tensor dense = offsets.contiguous();
  const int32_t* data = dense.const_data_ptr<int32_t>();
  std::vector<int32_t> values(data, data + dense.numel());
  TORCH_CHECK_VALUE(values.front() == 0 && values.back() == num_tokens, op, ": cu_seqlens runs from ", values.front(),
                    " to ", values.back(), ", expected 0 to ", num_tokens, " tokens");
  for (size_t i = 1; i < values.size(); ++i)
    TORCH_CHECK_VALUE(values[i - 1] <= values[i], op, ": cu_seqlens falls from ", values[i - 1], " to ", values[i],
                      " at index ", i);
  return values;
}

// Index of an element of a contiguous tensor, as Python prints it: 5, or (0, 5).
std::string index_text(int64_t flat, at::IntArrayRef sizes) {
  std::vector<int64_t> index(sizes.size());
  for (size_t i = sizes.size(); i-- > 0; flat /= sizes[i]) index[i] = flat % sizes[i];
  return index.size() == 1 ? std::to_string(index[0]) : shape_text(index);
}

// Ids as contiguous int64, every one in [0, size).
Tensor checked_ids(const char* op, const char* name, const Tensor& ids, at::IntArrayRef shape, int64_t size) {
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
const KernelTable& chosen_kernels() {
  try {
    return kernels();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// ------------------------------------------------------------------------------------------------- memory and threads

// The elements as they lie in memory, in row-major order.
Tensor contiguous(const Tensor& tensor) { return tensor.resolve_neg().contiguous(); }

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};

// Uninitialised floats, aligned to a cache line.
std::unique_ptr<float, AlignedDelete> allocate_floats(int64_t size) {
  const size_t bytes = static_cast<size_t>(size) * sizeof(float);
  return std::unique_ptr<float, AlignedDelete>(static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
}

// Elements below which a thread is not worth waking.
constexpr int64_t ELEMENTS_PER_THREAD = 16384;

// f(begin, end) over the rows on torch's own threads; a few rows run on the caller's.
// torch::stable runs inside torch: this module needs no OpenMP, of which a second copy would fight torch's.
template <class F>
void parallel_rows(int64_t rows, int64_t elements_per_row, const F& f) {
  torch::stable::parallel_for(0, rows,
                              std::max<int64_t>(1, ELEMENTS_PER_THREAD / std::max<int64_t>(1, elements_per_row)), f);
}

// f with a value of the type that the tensor holds: float or bfloat16.
template <class F>
void with_element_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kFloat) {
    f(float{});
  } else {
    f(bfloat16{});
  }
}

// The caller's `out`, checked, or fresh memory.
Tensor result(const char* op, const std::optional<Tensor>& out, at::IntArrayRef sizes, const Tensor& like) {
  if (!out.has_value()) return at::empty(sizes, like.options());
  check_cpu(op, "out", *out);
  check_shape(op, "out", *out, sizes);
  TORCH_CHECK_VALUE(out->scalar_type() == like.scalar_type(), op, ": out is ", dtype_text(*out), ", expected ",
                    dtype_text(like));
  TORCH_CHECK_VALUE(out->is_contiguous() && !out->is_neg(), op, ": out has strides ", shape_text(out->strides()),
                    ", expected a contiguous tensor");
  return *out;
}

// ---------------------------------------------------------------------------------------------------------------- ops

Tensor bias_gelu(const Tensor& x, const Tensor& bias, const std::string& approximate,
                 const std::optional<Tensor>& out_argument) {
  const char* op = "bias_gelu";
  check_kind(op, "x", x, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x is a scalar, expected (..., features)");
  check_vector(op, "bias", bias, "x", x);
  TORCH_CHECK_VALUE(approximate == "none" || approximate == "tanh", op, ": approximate is '", approximate,
                    "', expected one of none, tanh");
  const KernelTable& table = chosen_kernels();
  const Tensor dense = contiguous(x), dense_bias = contiguous(bias);
  const Tensor out = result(op, out_argument, x.sizes(), x);
  at::assert_no_partial_overlap(out, dense);
  at::assert_no_overlap(out, dense_bias);
  if (out.numel() == 0) return out;
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    const int64_t features = x.size(-1);
    const BiasGelu<T> args{data<T>(dense), data<T>(dense_bias), mutable_data<T>(out), features, approximate == "tanh"};
    parallel_rows(x.numel() / features, features,
                  [&](int64_t begin, int64_t end) { table.of<T>().bias_gelu(args, begin, end); });
  });
  return out;
}

Tensor residual_layer_norm(const Tensor& x, const Tensor& bias, const Tensor& residual, const Tensor& weight,
                           const Tensor& layer_norm_bias, double eps, double dropout_p,
                           const std::optional<Tensor>& out_argument) {
  const char* op = "residual_layer_norm";
  check_kind(op, "x", x, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x is a scalar, expected (..., hidden_size)");
  check_kind(op, "residual", residual, "x", x);
  check_shape(op, "residual", residual, x.sizes());
  check_vector(op, "bias", bias, "x", x);
  check_vector(op, "weight", weight, "x", x);
  check_vector(op, "layer_norm_bias", layer_norm_bias, "x", x);
  check_no_dropout(op, dropout_p);
  const KernelTable& table = chosen_kernels();
  const Tensor dense = contiguous(x), dense_bias = contiguous(bias), dense_residual = contiguous(residual);
  const Tensor gain = contiguous(weight), shift = contiguous(layer_norm_bias);
  const Tensor out = result(op, out_argument, x.sizes(), x);
  for (const Tensor& rows : {dense, dense_residual}) at::assert_no_partial_overlap(out, rows);
  for (const Tensor& vector : {dense_bias, gain, shift}) at::assert_no_overlap(out, vector);
  if (out.numel() == 0) return out;
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    const int64_t hidden_size = x.size(-1);
    const LayerNorm<T> norm{data<T>(gain), data<T>(shift), hidden_size, static_cast<float>(eps)};
    const ResidualLayerNorm<T> args{data<T>(dense), data<T>(dense_bias), data<T>(dense_residual), mutable_data<T>(out),
                                    norm};
    parallel_rows(x.numel() / hidden_size, hidden_size, [&](int64_t begin, int64_t end) {
      const auto scratch = allocate_floats(hidden_size);
      table.of<T>().residual_layer_norm(args, begin, end, scratch.get());
    });
  });
  return out;
}

Tensor embedding_layer_norm(const Tensor& input_ids, const Tensor& position_ids, const Tensor& token_type_ids,
                            const Tensor& word_embeddings, const Tensor& position_embeddings,
                            const Tensor& token_type_embeddings, const Tensor& weight, const Tensor& layer_norm_bias,
                            double eps, double dropout_p) {
  const char* op = "embedding_layer_norm";
  check_kind(op, "word_embeddings", word_embeddings, "word_embeddings", word_embeddings);
  const int64_t hidden_size = word_embeddings.dim() > 0 ? word_embeddings.size(-1) : 0;
  const auto check_table = [&](const char* name, const Tensor& table) {
    check_kind(op, name, table, "word_embeddings", word_embeddings);
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == hidden_size, op, ": ", name, " has shape ",
                      shape_text(table.sizes()), ", expected (rows, ", hidden_size, ")");
  };
  check_table("word_embeddings", word_embeddings);
  check_table("position_embeddings", position_embeddings);
  check_table("token_type_embeddings", token_type_embeddings);
  check_vector(op, "weight", weight, "word_embeddings", word_embeddings);
  check_vector(op, "layer_norm_bias", layer_norm_bias, "word_embeddings", word_embeddings);
  check_no_dropout(op, dropout_p);
  const at::IntArrayRef shape = input_ids.sizes();
  const Tensor words = checked_ids(op, "input_ids", input_ids, shape, word_embeddings.size(0));
  const Tensor positions = checked_ids(op, "position_ids", position_ids, shape, position_embeddings.size(0));
  const Tensor token_types = checked_ids(op, "token_type_ids", token_type_ids, shape, token_type_embeddings.size(0));

  const KernelTable& table = chosen_kernels();
  const Tensor word_table = contiguous(word_embeddings), position_table = contiguous(position_embeddings);
  const Tensor token_type_table = contiguous(token_type_embeddings);
  const Tensor gain = contiguous(weight), shift = contiguous(layer_norm_bias);
  std::vector<int64_t> out_shape = shape.vec();
  out_shape.push_back(hidden_size);
  Tensor out = at::empty(out_shape, word_embeddings.options());
  if (out.numel() == 0) return out;
  with_element_type(word_embeddings, [&](auto element) {
    using T = decltype(element);
    const LayerNorm<T> norm{data<T>(gain), data<T>(shift), hidden_size, static_cast<float>(eps)};
    const EmbeddingLayerNorm<T> args{
        data<int64_t>(words),    data<int64_t>(positions),  data<int64_t>(token_types), data<T>(word_table),
        data<T>(position_table), data<T>(token_type_table), mutable_data<T>(out),       norm};
    parallel_rows(words.numel(), hidden_size, [&](int64_t begin, int64_t end) {
      const auto scratch = allocate_floats(hidden_size);
      table.of<T>().embedding_layer_norm(args, begin, end, scratch.get());
    });
  });
  return out;
}

PoolingMode pooling_mode(const std::string& name) {
  constexpr const char* names[] = {"cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<PoolingMode>(i);
  TORCH_CHECK_VALUE(false, "pooling: mode is '", name,
                    "', expected one of cls, mean, max, mean_sqrt_len_tokens, weightedmean");
}

Tensor pooling(const Tensor& hidden, const Tensor& cu_seqlens, const std::string& mode) {
  const char* op = "pooling";
  check_kind(op, "hidden", hidden, "hidden", hidden);
  TORCH_CHECK_VALUE(hidden.dim() == 2, op, ": hidden has shape ", shape_text(hidden.sizes()),
                    ", expected (num_tokens, hidden_size)");
  const std::vector<int32_t> offsets = checked_offsets(op, cu_seqlens, hidden.size(0));
  const PoolingMode pooled_by = pooling_mode(mode);
  const KernelTable& table = chosen_kernels();
  const Tensor dense = contiguous(hidden);
  const int64_t batch_size = static_cast<int64_t>(offsets.size()) - 1, hidden_size = hidden.size(1);
  Tensor out = at::empty({batch_size, hidden_size}, hidden.options());
  if (out.numel() == 0) return out;
  with_element_type(hidden, [&](auto element) {
    using T = decltype(element);
    const Pooling<T> args{data<T>(dense), offsets.data(), mutable_data<T>(out), hidden_size, pooled_by};
    const int64_t tasks = batch_size * pooling_blocks(hidden_size);
    parallel_rows(tasks, hidden.numel() / tasks,
                  [&](int64_t begin, int64_t end) { table.of<T>().pooling(args, begin, end); });
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------- attention

// Multiply-adds of attention below which a thread is not worth waking.
constexpr int64_t ATTENTION_WORK_PER_THREAD = 250'000;

template <class T>
void run_attention(const KernelTable& table, const Attention<T>& args, const std::vector<AttentionTask>& tasks) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (count == 0) return;
  int64_t work = 0;
  for (const AttentionTask& task : tasks)
    work += (task.end_query - task.first_query) * task.sequence.length * args.head_dim * 2;
  const int64_t scratch_size = attention_scratch_size(tasks.front().sequence.length, args.head_dim);
  const int64_t useful = std::min(count, 1 + work / ATTENTION_WORK_PER_THREAD);
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), useful);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const auto scratch = allocate_floats(scratch_size);
    for (int64_t i = next++; i < count; i = next++) table.of<T>().attention(args, tasks[i], scratch.get());
  });
}

// The last dimension contiguous, the others as they come.
Tensor with_dense_heads(const Tensor& tensor) {
  const Tensor resolved = tensor.resolve_neg();
  return resolved.size(-1) == 1 || resolved.stride(-1) == 1 ? resolved : resolved.contiguous();
}

AttentionStrides attention_strides(const Tensor& tensor) {
  const int64_t token = tensor.stride(-3);
  return {tensor.dim() == 4 ? tensor.stride(0) : token, token, tensor.stride(-2)};
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu_seqlens,
                 int64_t /* max_seqlen */, const std::optional<Tensor>& attention_mask, double scale, double dropout_p,
                 const std::optional<Tensor>& out_argument) {
  const char* op = "attention";
  check_kind(op, "q", q, "q", q);
  check_kind(op, "k", k, "q", q);
  check_kind(op, "v", v, "q", q);
  check_shape(op, "k", k, q.sizes());
  check_shape(op, "v", v, q.sizes());
  check_no_dropout(op, dropout_p);
  Tensor mask;
  std::vector<int64_t> rows;
  std::vector<AttentionSequence> sequences;
  if (cu_seqlens.has_value()) {
    TORCH_CHECK_VALUE(q.dim() == 3, op, ": q has shape ", shape_text(q.sizes()),
                      ", expected (num_tokens, heads, head_dim)");
    TORCH_CHECK_VALUE(!attention_mask.has_value(), op,
                      ": attention_mask and cu_seqlens are both given, expected one of them");
    sequences = ragged_sequences(checked_offsets(op, *cu_seqlens, q.size(0)));
  } else {
    TORCH_CHECK_VALUE(q.dim() == 4, op, ": q has shape ", shape_text(q.sizes()),
                      ", expected (batch_size, seq_len, heads, head_dim), or (num_tokens, heads, head_dim) with "
                      "cu_seqlens");
    if (attention_mask.has_value()) {
      check_cpu(op, "attention_mask", *attention_mask);
      check_shape(op, "attention_mask", *attention_mask, q.sizes().slice(0, 2));
      TORCH_CHECK_VALUE(attention_mask->scalar_type() == at::kBool, op, ": attention_mask is ",
                        dtype_text(*attention_mask), ", expected bool (True = attend)");
      mask = attention_mask->contiguous();
    }
    const uint8_t* keep = mask.defined() ? data<uint8_t>(mask) : nullptr;
    sequences = padded_sequences(q.size(0), q.size(1), keep, rows);
  }

  const KernelTable& table = chosen_kernels();
  const Tensor dense_q = with_dense_heads(q), dense_k = with_dense_heads(k), dense_v = with_dense_heads(v);
  const Tensor out = result(op, out_argument, q.sizes(), q);
  for (const Tensor& rows : {dense_q, dense_k, dense_v}) at::assert_no_overlap(out, rows);
  if (mask.defined()) out.zero_();  // positions that the mask hides are zeros
  if (out.numel() == 0) return out;
  const std::vector<AttentionTask> tasks = attention_tasks(std::move(sequences), q.size(-2));
  with_element_type(q, [&](auto element) {
    using T = decltype(element);
    const Attention<T> args{data<T>(dense_q),           data<T>(dense_k),           data<T>(dense_v),
                            mutable_data<T>(out),       attention_strides(dense_q), attention_strides(dense_k),
                            attention_strides(dense_v), attention_strides(out),     q.size(-1),
                            static_cast<float>(scale)};
    run_attention(table, args, tasks);
  });
  return out;
}

std::string build_info() { return std::string("compiler ") + __VERSION__ + ", torch " + TORCH_VERSION; }

}  // namespace

PYBIND11_MODULE(_C, module) {
  using torch::wrap_pybind_function_no_gil;
  module.doc() = "The C++ kernels of bert_fast, for CPUs. Shapes and meaning: bert_fast.ops.";
  const auto arg = [](const char* name) { return py::arg(name); };
  const py::arg_v out = py::arg("out") = py::none();
  module.def("bias_gelu", wrap_pybind_function_no_gil(bias_gelu), arg("x"), arg("bias"), arg("approximate"), out);
  module.def("residual_layer_norm", wrap_pybind_function_no_gil(residual_layer_norm), arg("x"), arg("bias"),
             arg("residual"), arg("weight"), arg("layer_norm_bias"), arg("eps"), arg("dropout_p"), out);
  module.def("embedding_layer_norm", wrap_pybind_function_no_gil(embedding_layer_norm));
  module.def("attention", wrap_pybind_function_no_gil(attention), arg("q"), arg("k"), arg("v"), arg("cu_seqlens"),
             arg("max_seqlen"), arg("attention_mask"), arg("scale"), arg("dropout_p"), out);
  module.def("pooling", wrap_pybind_function_no_gil(pooling));
  module.def("available_isas", available_isas, "Instruction sets that this machine has, best last.");
  module.def("set_isa", set_isa, "Run on this instruction set; ValueError when the machine does not have it.");
  module.def("get_isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  module.def("build_info", build_info, "Compiler and torch that this module was built with.");
}

}  // namespace bert_fast
