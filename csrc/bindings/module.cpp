// The Python module bert_fast._C: validates everything it is given, owns memory and threads, and calls the kernels.
// The functions take the arguments of the schemas in bert_fast/ops, and release the GIL.
#include "attention.h"

#include <torch/version.h>

namespace py = pybind11;

namespace bert_fast {
namespace {

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
      const auto scratch = allocate<float>(hidden_size);
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
      const auto scratch = allocate<float>(hidden_size);
      table.of<T>().embedding_layer_norm(args, begin, end, scratch.get());
    });
  });
  return out;
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
    const Pooling<T> args{data<T>(dense), hidden_size, offsets.data(), mutable_data<T>(out), hidden_size, pooled_by};
    const int64_t tasks = batch_size * pooling_blocks(hidden_size);
    parallel_rows(tasks, hidden.numel() / tasks,
                  [&](int64_t begin, int64_t end) { table.of<T>().pooling(args, begin, end); });
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------- attention

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cu_seqlens,
                 int64_t /* max_seqlen */, const std::optional<Tensor>& attention_mask, double scale, double dropout_p,
                 const std::optional<Tensor>& out_argument) {
  const char* op = "attention";
  check_no_dropout(op, dropout_p);
  const AttentionBatch batch(op, q, k, v, cu_seqlens, attention_mask);
  const KernelTable& table = chosen_kernels();
  const Tensor dense_q = with_dense_heads(q), dense_k = with_dense_heads(k), dense_v = with_dense_heads(v);
  const Tensor out = result(op, out_argument, q.sizes(), q);
  for (const Tensor& rows : {dense_q, dense_k, dense_v}) at::assert_no_overlap(out, rows);
  if (batch.has_mask) out.zero_();  // positions that the mask hides are zeros
  if (out.numel() == 0) return out;
  const std::vector<AttentionTask> tasks = attention_tasks(batch.sequences, q.size(-2));
  with_element_type(q, [&](auto element) {
    using T = decltype(element);
    const Attention<T> args{data<T>(dense_q),           data<T>(dense_k),           data<T>(dense_v),
                            mutable_data<T>(out),       attention_strides(dense_q), attention_strides(dense_k),
                            attention_strides(dense_v), attention_strides(out),     q.size(-1),
                            static_cast<float>(scale)};
    run_attention(tasks, q.size(-1), 2, attention_scratch_size,
                  [&](const AttentionTask& task, float* scratch) { table.of<T>().attention(args, task, scratch); });
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
  bind_linear(module);
  bind_encoder(module);
  bind_fingerprint(module);
  bind_training(module);
  bind_layer_norm_training(module);
  bind_attention_training(module);
  bind_dense(module);
  module.def("available_isas", available_isas, "Instruction sets that this machine has, best last.");
  module.def("set_isa", set_isa, "Run on this instruction set; ValueError when the machine does not have it.");
  module.def("get_isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  module.def("build_info", build_info, "Compiler and torch that this module was built with.");
}

}  // namespace bert_fast
