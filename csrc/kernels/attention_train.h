// Attention that keeps what its backward wants: the logarithm of the sum that every row of the softmax is divided by.
// Dropout acts on the probabilities, after the softmax: the sum has the dropped ones too.
#pragma once

#include "../training_table.h"
#include "attention.h"
#include "philox.h"

namespace bert_fast::BERT_FAST_ISA {

static_assert(DROPOUT_QUERIES % WIDE_LANES == 0 && DROPOUT_COLUMNS % LANES == 0);

// The probabilities of one query that dropout keeps, by the bytes of its keys: sixteen neighbours, and then those of
// the other queries that were drawn with them.
struct KeepSome {
  const uint8_t* bytes;
  int32_t threshold;

  BERT_FAST_INLINE Vec operator()(Vec v, int64_t key) const {
    const int64_t column = key & (DROPOUT_COLUMNS - 1);
    return kept(v, bytes + (key - column) * DROPOUT_QUERIES + column, threshold);
  }
};

// The random bytes of one head of a sequence, drawn for DROPOUT_QUERIES queries at a time: the calls of short rows fill
// the lanes as those of long ones do.
class AttentionDropout {
 public:
  // bytes: room for those of DROPOUT_QUERIES queries.
  AttentionDropout(const Dropout& dropout, const AttentionRows& rows, const AttentionTask& task, uint8_t* bytes)
      : dropout_(dropout),
        sequence_(task.sequence),
        first_row_(task.sequence.batch * rows.batch_rows),
        plane_(task.head),
        bytes_(bytes) {}

  bool drops() const { return dropout_.threshold > 0; }

  // Of a query that is none before those that were asked for.
  KeepSome of(int64_t query) {
    if (first_ < 0 || query >= first_ + DROPOUT_QUERIES) draw(query);
    return {bytes_ + (query - first_) * DROPOUT_COLUMNS, dropout_.threshold};
  }

 private:
  static constexpr int64_t SIZE = DROPOUT_QUERIES * DROPOUT_COLUMNS;  // bytes of one call

  void draw(int64_t query) {
    first_ = query;
    uint64_t rows[DROPOUT_QUERIES];
    if (sequence_.rows == nullptr) {
      for (int64_t i = 0; i < DROPOUT_QUERIES; ++i) rows[i] = static_cast<uint64_t>(first_row_ + query + i);
      for (int64_t key = 0; key < sequence_.length; key += DROPOUT_COLUMNS)
        call(rows, key / DROPOUT_COLUMNS, bytes_ + key / DROPOUT_COLUMNS * SIZE);
      return;
    }
    for (int64_t i = 0; i < DROPOUT_QUERIES; ++i)
      rows[i] = static_cast<uint64_t>(first_row_ + sequence_.rows[std::min(query + i, sequence_.length - 1)]);
    // Keys that are apart: their columns are brought together.
    uint8_t drawn[SIZE];
    int64_t drawn_block = -1;
    for (int64_t key = 0; key < sequence_.length; ++key) {
      const int64_t column = sequence_.rows[key], block = column / DROPOUT_COLUMNS;
      if (block != drawn_block) call(rows, drawn_block = block, drawn);
      const uint8_t* from = drawn + column % DROPOUT_COLUMNS;
      uint8_t* to = bytes_ + key / DROPOUT_COLUMNS * SIZE + key % DROPOUT_COLUMNS;
      for (int64_t i = 0; i < SIZE; i += DROPOUT_COLUMNS) to[i] = from[i];
    }
  }

  void call(const uint64_t* rows, int64_t block, uint8_t* out) const {
    philox_rows(dropout_.seed, rows, DROPOUT_QUERIES, static_cast<uint64_t>(plane_), block, out);
  }

  Dropout dropout_;
  AttentionSequence sequence_;
  int64_t first_row_, plane_, first_ = -1;
  uint8_t* bytes_;
};

// Where the statistics of a query are.
inline int64_t statistics_index(const AttentionRows& rows, const AttentionTask& task, int64_t query) {
  return (task.sequence.batch * rows.batch_rows + row_of(task.sequence, query)) * rows.heads + task.head;
}

template <class T>
void attention_train(const AttentionTrain<T>& args, const AttentionTask& task, float* scratch) {
  const Attention<T>& forward = args.attention;
  const int64_t length = task.sequence.length;
  float* bytes = scratch + attention_scratch_size(length, forward.head_dim);
  AttentionDropout dropout(args.dropout, args.rows, task, reinterpret_cast<uint8_t*>(bytes));
  with_products<T>(forward.head_dim, forward.scale, [&](auto products) {
    using P = decltype(products);
    const Vec unit = power_unit(forward.scale);
    attend<P>(forward, task, scratch, [&](float* row, int64_t query) {
      typename P::Input* out = reinterpret_cast<typename P::Input*>(row);
      // Exact powers, so that the sum of a single key's is 1, and its gradient zero.
      const RowSums sums = dropout.drops() ? softmax_row<true>(row, length, unit, dropout.of(query), out)
                                           : softmax_row<true>(row, length, unit, KeepAll{}, out);
      args.lse[statistics_index(args.rows, task, query)] =
          sums.highest * std::abs(forward.scale) + std::log(sums.total);
      return args.dropout.scale / sums.total;
    });
  });
}

}  // namespace bert_fast::BERT_FAST_ISA
