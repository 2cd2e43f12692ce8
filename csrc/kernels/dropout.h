// Dropout of a row whose random bytes lie in memory: the same decisions in the forward and in the backward.
#pragma once

#include "philox.h"

namespace bert_fast::BERT_FAST_ISA {

constexpr Dropout NO_DROPOUT{0, 0, 1.0f};

// The bytes of a row of an op over rows, whose plane is 0; none where nothing is dropped.
BERT_FAST_INLINE void row_bytes(const Dropout& dropout, int64_t row, int64_t columns, uint8_t* bytes) {
  if (dropout.threshold > 0) random_bytes(dropout.seed, row, 0, dropout_columns(columns) / DROPOUT_COLUMNS, bytes);
}

// The columns [i, i + LANES), whose bytes are at `bytes`. A NaN that is dropped is zero.
BERT_FAST_INLINE Vec dropped(const Dropout& dropout, Vec v, const uint8_t* bytes) {
  return dropout.threshold > 0 ? kept(v * set1(dropout.scale), bytes, dropout.threshold) : v;
}

}  // namespace bert_fast::BERT_FAST_ISA
