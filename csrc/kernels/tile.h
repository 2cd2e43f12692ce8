// The micro-kernel of every matrix product: sums[i][j] = sum over k of a[i][k] b[k][j], for M rows and N vectors of
// columns, held in registers from the first k to the last. Rows of `a` are read as they lie in memory, one lane-sized
// group of DEPTH values at a time; `b` is a panel with the DEPTH values of a column side by side:
//
//   type        a           b           DEPTH  sum
//   Fp32        float       float           1  float
//   Bf16        bfloat16    bfloat16        2  float
//   Int8        uint8_t     int8_t          4  int32, exact
//
// at(row, step, stride) is where `a` has the group of a row and a step. A tile has up to ROWS rows. SUM_STEPS is how
// many steps are summed before they are rounded to join the rest (product.h); 0 is all of them. The sum of an element
// runs over k in order, whatever M and N are, so a row's result does not depend on the rows that share its tile.
#pragma once

#include "../kernel_table.h"

namespace bert_fast::BERT_FAST_ISA {

struct Fp32 {
  using Input = float;
  using Weight = float;
  using Sum = Vec;
  using Right = Vec;
  static constexpr int DEPTH = 1, ROWS = TILE_ROWS;
  static constexpr int64_t SUM_STEPS = 384;
  static BERT_FAST_INLINE int64_t at(int64_t row, int64_t step, int64_t stride) { return row * stride + step * DEPTH; }
  static BERT_FAST_INLINE Right right(const Weight* p) { return load(p); }
  static BERT_FAST_INLINE Sum add(Sum total, const Input* a, Right b) { return fma(set1(*a), b, total); }
};

struct Bf16 {
  using Input = bfloat16;
  using Weight = bfloat16;
  using Sum = Vec;
  using Right = Bits;
  static constexpr int DEPTH = 2, ROWS = TILE_ROWS_DOT2;
  static constexpr int64_t SUM_STEPS = 0;
  static BERT_FAST_INLINE int64_t at(int64_t row, int64_t step, int64_t stride) { return row * stride + step * DEPTH; }
  static BERT_FAST_INLINE Right right(const Weight* p) { return load_bits(p); }
  static BERT_FAST_INLINE Sum add(Sum total, const Input* a, Right b) { return dot2(total, set1_bits(a), b); }
};

struct Int8 {
  using Input = uint8_t;
  using Weight = int8_t;
  using Sum = Ints;
  using Right = Bits;
  static constexpr int DEPTH = 4, ROWS = TILE_ROWS_DOT4;
  static constexpr int64_t SUM_STEPS = 0;
  static BERT_FAST_INLINE int64_t at(int64_t row, int64_t step, int64_t stride) { return row * stride + step * DEPTH; }
  static BERT_FAST_INLINE Right right(const Weight* p) { return load_bits(p); }
  static BERT_FAST_INLINE Sum add(Sum total, const Input* a, Right b) { return dot4(total, set1_bits(a), b); }
};

// The same product with `a` transposed: its steps are `stride` values apart, and the groups of its rows side by side.
template <class P>
struct Transposed : P {
  static BERT_FAST_INLINE int64_t at(int64_t row, int64_t step, int64_t stride) {
    return step * stride + row * P::DEPTH;
  }
};

// What a tile fetches from memory while it multiplies: two cache lines at each step, `stride` bytes further each time.
struct Fetch {
  const char* next;
  int64_t stride;

  BERT_FAST_INLINE void step() {
    prefetch(next);
    prefetch(next + 64);
    next += stride;
  }
};

// Nothing, where all is in the caches.
struct NoFetch {
  BERT_FAST_INLINE void step() {}
};

// a: M rows (or steps), `stride` values apart; b: `steps` rows of groups, `b_stride` values apart.
template <class P, int M, int N, class Ahead>
BERT_FAST_INLINE void tile(const typename P::Input* a, int64_t stride, const typename P::Weight* b, int64_t b_stride,
                           int64_t steps, Ahead& ahead, typename P::Sum (&sums)[M][N]) {
  // A pointer for every three rows: x86 addresses the other two from it, and one for every row would not fit registers.
  constexpr int GROUPS = (M + 2) / 3;
  const typename P::Input* rows[GROUPS];
#pragma GCC unroll 8
  for (int i = 0; i < GROUPS; ++i) rows[i] = a + P::at(3 * i, 0, stride);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[i][j] = typename P::Sum{};
  for (int64_t k = 0; k < steps; ++k) {
    ahead.step();
    typename P::Right right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = P::right(b + j * LANES * P::DEPTH);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[i][j] = P::add(sums[i][j], rows[i / 3] + P::at(i % 3, 0, stride), right[j]);
    b += b_stride;
#pragma GCC unroll 8
    for (int i = 0; i < GROUPS; ++i) rows[i] += P::at(0, 1, stride);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
