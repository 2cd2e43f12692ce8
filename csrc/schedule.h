// How attention is cut into tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"

namespace bert_fast {

// The sequences of a ragged batch with these (batch_size + 1) offsets.
std::vector<AttentionSequence> ragged_sequences(const std::vector<int32_t>& cu_seqlens);

// The sequences of a padded (batch_size, seq_len) batch. `keep` has a byte per token, zero for those that are hidden,
// or is null; `rows` is filled with the kept tokens, and must outlive the sequences.
std::vector<AttentionSequence> padded_sequences(int64_t batch_size, int64_t seq_len, const uint8_t* keep,
                                                std::vector<int64_t>& rows);

// A task packs the keys and values of its head, so many queries share one; a long sequence is still cut, for the
// threads.
constexpr int64_t QUERIES_PER_TASK = 252;  // 18 tiles of 14

// The longest sequences come first, so that what is left for the last thread is short.
std::vector<AttentionTask> attention_tasks(std::vector<AttentionSequence> sequences, int64_t heads,
                                           int64_t queries_per_task = QUERIES_PER_TASK);

}  // namespace bert_fast
