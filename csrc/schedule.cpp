#include "schedule.h"

#include <algorithm>

namespace bert_fast {

std::vector<AttentionSequence> ragged_sequences(const std::vector<int32_t>& cu_seqlens) {
  std::vector<AttentionSequence> sequences;
  for (size_t i = 1; i < cu_seqlens.size(); ++i)
    sequences.push_back({cu_seqlens[i - 1], cu_seqlens[i] - cu_seqlens[i - 1], nullptr});
  return sequences;
}

std::vector<AttentionSequence> padded_sequences(int64_t batch_size, int64_t seq_len, const uint8_t* keep,
                                                std::vector<int64_t>& rows) {
  std::vector<AttentionSequence> sequences;
  if (keep == nullptr) {
    for (int64_t i = 0; i < batch_size; ++i) sequences.push_back({i, seq_len, nullptr});
    return sequences;
  }
  rows.resize(static_cast<size_t>(batch_size * seq_len));
  int64_t* next = rows.data();
  for (int64_t i = 0; i < batch_size; ++i) {
    const int64_t* first = next;
    for (int64_t token = 0; token < seq_len; ++token)
      if (keep[i * seq_len + token] != 0) *next++ = token;
    sequences.push_back({i, next - first, first});
  }
  return sequences;
}

std::vector<AttentionTask> attention_tasks(std::vector<AttentionSequence> sequences, int64_t heads,
                                           int64_t queries_per_task) {
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const AttentionSequence& a, const AttentionSequence& b) { return a.length > b.length; });
  std::vector<AttentionTask> tasks;
  for (const AttentionSequence& sequence : sequences)
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t query = 0; query < sequence.length; query += queries_per_task)
        tasks.push_back({sequence, head, query, std::min(query + queries_per_task, sequence.length)});
  return tasks;
}

}  // namespace bert_fast
