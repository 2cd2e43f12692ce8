// What the functions of attention have in common: the sequences of a batch, checked, and the threads.
#pragma once

#include <atomic>

#include "../schedule.h"
#include "bindings.h"

namespace bert_fast {

// q, k and v of one kind and shape, and their sequences: ragged with cu_seqlens, padded without.
struct AttentionBatch {
  std::vector<AttentionSequence> sequences;
  bool has_mask = false;
  std::vector<int64_t> kept;  // tokens that the mask keeps, which the sequences point to

  AttentionBatch(const AttentionBatch&) = delete;
  AttentionBatch(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& attention_mask) {
    check_kind(op, "q", q, "q", q);
    check_kind(op, "k", k, "q", q);
    check_kind(op, "v", v, "q", q);
    check_shape(op, "k", k, q.sizes());
    check_shape(op, "v", v, q.sizes());
    if (cu_seqlens.has_value()) {
      TORCH_CHECK_VALUE(q.dim() == 3, op, ": q has shape ", shape_text(q.sizes()),
                        ", expected (num_tokens, heads, head_dim)");
      TORCH_CHECK_VALUE(!attention_mask.has_value(), op,
                        ": attention_mask and cu_seqlens are both given, expected one of them");
      sequences = ragged_sequences(checked_offsets(op, *cu_seqlens, q.size(0)));
      return;
    }
    TORCH_CHECK_VALUE(q.dim() == 4, op, ": q has shape ", shape_text(q.sizes()),
                      ", expected (batch_size, seq_len, heads, head_dim), or (num_tokens, heads, head_dim) with "
                      "cu_seqlens");
    Tensor mask;
    if (attention_mask.has_value()) {
      has_mask = true;
      check_cpu(op, "attention_mask", *attention_mask);
      check_shape(op, "attention_mask", *attention_mask, q.sizes().slice(0, 2));
      TORCH_CHECK_VALUE(attention_mask->scalar_type() == at::kBool, op, ": attention_mask is ",
                        dtype_text(*attention_mask), ", expected bool (True = attend)");
      mask = attention_mask->contiguous();
    }
    sequences = padded_sequences(q.size(0), q.size(1), has_mask ? data<uint8_t>(mask) : nullptr, kept);
  }
};

// The last dimension contiguous, the others as they come.
inline Tensor with_dense_heads(const Tensor& tensor) {
  const Tensor resolved = tensor.resolve_neg();
  return resolved.size(-1) == 1 || resolved.stride(-1) == 1 ? resolved : resolved.contiguous();
}

inline AttentionStrides attention_strides(const Tensor& tensor) {
  const int64_t token = tensor.stride(-3);
  return {tensor.dim() == 4 ? tensor.stride(0) : token, token, tensor.stride(-2)};
}

// Multiply-adds of attention below which a thread is not worth waking.
constexpr int64_t ATTENTION_WORK_PER_THREAD = 250'000;

// run(task, scratch) for every task, on as many threads as are worth it. `products` is the number of matrix products,
// and scratch_size(length, head_dim) the floats of scratch that one task needs.
template <class Run>
void run_attention(const std::vector<AttentionTask>& tasks, int64_t head_dim, int64_t products,
                   int64_t (*scratch_size)(int64_t, int64_t), const Run& run) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (count == 0) return;
  int64_t work = 0;
  for (const AttentionTask& task : tasks)
    work += (task.end_query - task.first_query) * task.sequence.length * head_dim * products;
  const int64_t size = scratch_size(tasks.front().sequence.length, head_dim);
  const int64_t useful = std::min(count, 1 + work / ATTENTION_WORK_PER_THREAD);
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), useful);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const auto scratch = allocate<float>(size);
    for (int64_t i = next++; i < count; i = next++) run(tasks[static_cast<size_t>(i)], scratch.get());
  });
}

}  // namespace bert_fast
