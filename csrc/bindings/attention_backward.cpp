// Attention in training: the forward that keeps the logarithms of the softmax's sums, and the backward.
#include "attention.h"

namespace py = pybind11;

namespace bert_fast {
namespace {

void check_no_bias(const char* op, const std::optional<Tensor>& bias) {
  TORCH_CHECK_VALUE(!bias.has_value(), op, ": bias has shape ", shape_text(bias->sizes()),
                    ", expected None: the C++ kernels have no bias of the scores");
}

AttentionRows attention_rows(const Tensor& q) { return {q.dim() == 4 ? q.size(1) : 1, q.size(-2)}; }

std::tuple<Tensor, Tensor> attention_train(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const std::optional<Tensor>& cu_seqlens, int64_t /* max_seqlen */,
                                           const std::optional<Tensor>& attention_mask, double scale, double dropout_p,
                                           const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& /* schedule */,
                                           const std::optional<Tensor>& seed) {
  const char* op = "attention_train";
  check_no_bias(op, bias);
  const Dropout dropout = checked_dropout(op, dropout_p, seed);
  const AttentionBatch batch(op, q, k, v, cu_seqlens, attention_mask);
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor dense_q = with_dense_heads(q), dense_k = with_dense_heads(k), dense_v = with_dense_heads(v);
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = at::empty(q.sizes().slice(0, q.dim() - 1), q.options().dtype(at::kFloat));
  if (batch.has_mask || out.numel() == 0) {
    out.zero_();
    lse.zero_();
  }
  if (out.numel() == 0) return {out, lse};
  with_element_type(q, [&](auto element) {
    using T = decltype(element);
    const Attention<T> forward{data<T>(dense_q),           data<T>(dense_k),           data<T>(dense_v),
                               mutable_data<T>(out),       attention_strides(dense_q), attention_strides(dense_k),
                               attention_strides(dense_v), attention_strides(out),     q.size(-1),
                               static_cast<float>(scale)};
    const AttentionTrain<T> args{forward, mutable_data<float>(lse), attention_rows(q), dropout};
    run_attention(attention_tasks(batch.sequences, q.size(-2)), q.size(-1), 2, attention_train_scratch_size,
                  [&](const AttentionTask& task, float* scratch) {
                    table.attention(element).attention_train(args, task, scratch);
                  });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const std::optional<Tensor>& cu_seqlens, int64_t /* max_seqlen */,
                                                      const std::optional<Tensor>& attention_mask, double scale,
                                                      double dropout_p, const std::optional<Tensor>& bias,
                                                      const std::optional<Tensor>& /* schedule */,
                                                      const std::optional<Tensor>& seed) {
  const char* op = "attention_backward";
  check_no_bias(op, bias);
  const Dropout dropout = checked_dropout(op, dropout_p, seed);
  const AttentionBatch batch(op, q, k, v, cu_seqlens, attention_mask);
  check_kind(op, "grad", grad, "q", q);
  check_shape(op, "grad", grad, q.sizes());
  check_kind(op, "out", out, "q", q);
  check_shape(op, "out", out, q.sizes());
  check_cpu(op, "lse", lse);
  TORCH_CHECK_VALUE(lse.scalar_type() == at::kFloat, op, ": lse is ", dtype_text(lse), ", expected torch.float32");
  check_shape(op, "lse", lse, q.sizes().slice(0, q.dim() - 1));
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor dense_q = with_dense_heads(q), dense_k = with_dense_heads(k), dense_v = with_dense_heads(v);
  const Tensor dense_grad = with_dense_heads(grad), dense_out = with_dense_heads(out), statistics = contiguous(lse);
  std::vector<int64_t> shape = q.sizes().vec();
  shape.insert(shape.end() - 2, 3);
  const Tensor gradients = at::empty(shape, q.options());
  if (batch.has_mask) gradients.zero_();
  const Tensor dq = gradients.select(-3, 0), dk = gradients.select(-3, 1), dv = gradients.select(-3, 2);
  if (q.numel() == 0) return {dq, dk, dv};
  with_element_type(q, [&](auto element) {
    using T = decltype(element);
    const AttentionBackward<T> args{data<T>(dense_grad),
                                    data<T>(dense_q),
                                    data<T>(dense_k),
                                    data<T>(dense_v),
                                    data<T>(dense_out),
                                    data<float>(statistics),
                                    mutable_data<T>(dq),
                                    mutable_data<T>(dk),
                                    mutable_data<T>(dv),
                                    attention_strides(dense_grad),
                                    attention_strides(dense_q),
                                    attention_strides(dense_k),
                                    attention_strides(dense_v),
                                    attention_strides(dense_out),
                                    attention_strides(dq),
                                    q.size(-1),
                                    static_cast<float>(scale),
                                    attention_rows(q),
                                    dropout};
    // A task is a whole head: its dk and dv are sums over all queries.
    const auto tasks = attention_tasks(batch.sequences, q.size(-2), std::numeric_limits<int64_t>::max());
    run_attention(tasks, q.size(-1), 5, attention_backward_scratch_size,
                  [&](const AttentionTask& task, float* scratch) {
                    table.attention(element).attention_backward(args, task, scratch);
                  });
  });
  return {dq, dk, dv};
}

}  // namespace

void bind_attention_training(py::module_& module) {
  using torch::wrap_pybind_function_no_gil;
  const auto arg = [](const char* name) { return py::arg(name); };
  module.def("attention_train", wrap_pybind_function_no_gil(attention_train), arg("q"), arg("k"), arg("v"),
             arg("cu_seqlens"), arg("max_seqlen"), arg("attention_mask"), arg("scale"), arg("dropout_p"), arg("bias"),
             arg("schedule"), arg("seed"), "attention, and the logarithms of the softmax's sums.");
  module.def("attention_backward", wrap_pybind_function_no_gil(attention_backward), arg("grad"), arg("q"), arg("k"),
             arg("v"), arg("out"), arg("lse"), arg("cu_seqlens"), arg("max_seqlen"), arg("attention_mask"),
             arg("scale"), arg("dropout_p"), arg("bias"), arg("schedule"), arg("seed"),
             "The gradients of attention by q, k and v, views of one tensor.");
}

}  // namespace bert_fast
