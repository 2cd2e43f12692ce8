// The matrix products of training: out = left right + bias, where both matrices change with every call.
//
// `right` is packed into panels (product.h), at most DENSE_COLUMNS columns and DENSE_STEPS steps at a time, which stay
// in the second-level cache while all rows of `left` go through them. `left` is read as it lies where its values lie
// along k, and packed into rows of its own otherwise. Nothing that is packed outlives the caches, so a part of `out`
// needs no other thread.
//
// Sums are float: those of a block of steps in registers, those of the blocks in `out`, or, where it is bfloat16, in
// scratch, so that a result is rounded once. The blocks depend on `depth` only: an element has the same bits whatever
// part of `out` it is made with.
//
// What is packed are units of 32 bits: a float, or a pair of bfloat16 with consecutive k. They move as lanes of a Vec.
#pragma once

#include "product.h"

namespace bert_fast::BERT_FAST_ISA {

// LANES units from a row along k, of which `count` values are there, at least one.
template <class P, class T>
BERT_FAST_INLINE Vec units_along(const T* row, int64_t count) {
  if constexpr (std::is_same_v<P, Fp32>) {
    return load(row, count);
  } else {
    constexpr int64_t size = 2 * LANES;
    if constexpr (std::is_same_v<T, bfloat16>)
      if (count >= size) return from_bits(load_bits(row));
    bfloat16 pairs[size] = {};
    if constexpr (std::is_same_v<T, bfloat16>) {
      std::memcpy(pairs, row, static_cast<size_t>(count) * sizeof(T));
    } else {
      for (int64_t i = 0; i < std::min(count, size); i += LANES) store(pairs + i, load(row + i, count - i));
    }
    return from_bits(load_bits(pairs));
  }
}

// LANES units across rows of k, of which the first `depth` are there, and `count` values of each, at least one.
template <class P, class T>
BERT_FAST_INLINE Vec units_across(const T* rows, int64_t stride, int64_t depth, int64_t count) {
  if constexpr (std::is_same_v<P, Fp32>) {
    return load(rows, count);
  } else {
    return from_bits(pack_pairs(load(rows, count), depth > 1 ? load(rows + stride, count) : set1(0.0f)));
  }
}

// Line `i` of a block: the units along k of its i-th row or column, or of its i-th step across them. `outer` rows or
// columns and `depth` values of k are there, what is not is zero.
template <class P, bool ALONG, class T>
BERT_FAST_INLINE Vec line(const T* from, int64_t stride, int64_t i, int64_t outer, int64_t depth) {
  if constexpr (ALONG) {
    return i < outer ? units_along<P>(from + i * stride, depth) : set1(0.0f);
  } else {
    const int64_t k = i * P::DEPTH;
    return k < depth ? units_across<P>(from + k * stride, stride, depth - k, outer) : set1(0.0f);
  }
}

// A block of LANES x LANES units, transposed or not, of which the first `lines` lines go to memory.
template <class P, bool ALONG, bool TRANSPOSE, class T>
BERT_FAST_INLINE void move_block(const T* from, int64_t stride, int64_t outer, int64_t depth, float* to,
                                 int64_t to_stride, int64_t lines) {
  Vec block[LANES];
  if (outer >= LANES && depth >= LANES * P::DEPTH) {  // in registers from end to end
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) block[i] = line<P, ALONG>(from, stride, i, LANES, LANES * P::DEPTH);
    if constexpr (TRANSPOSE) transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) store(to + i * to_stride, block[i]);
    return;
  }
  Vec part[LANES];
  for (int64_t i = 0; i < LANES; ++i) part[i] = line<P, ALONG>(from, stride, i, outer, depth);
  if constexpr (TRANSPOSE) transpose(part);
  for (int64_t i = 0; i < std::min<int64_t>(LANES, lines); ++i) store(to + i * to_stride, part[i]);
}

// (depth, columns) of the right matrix -> panels (steps, PANEL) of units.
template <class P, class T>
void pack_right(const T* values, int64_t stride, bool along_k, int64_t depth, int64_t columns, float* panels) {
  const int64_t steps = (depth + P::DEPTH - 1) / P::DEPTH, width = (columns + PANEL - 1) / PANEL * PANEL;
  const auto unit = [&](int64_t step, int64_t column) {
    return panels + column / PANEL * PANEL * steps + step * PANEL + column % PANEL;
  };
  if (along_k) {
    for (int64_t column = 0; column < width; column += LANES)
      for (int64_t step = 0; step < steps; step += LANES)
        move_block<P, true, true>(values + column * stride + step * P::DEPTH, stride, columns - column,
                                  depth - step * P::DEPTH, unit(step, column), PANEL, steps - step);
  } else {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t k = step * P::DEPTH;
      for (int64_t column = 0; column < width; column += LANES)
        store(unit(step, column),
              column < columns ? units_across<P>(values + k * stride + column, stride, depth - k, columns - column)
                               : set1(0.0f));
    }
  }
}

// (rows, depth) of the left matrix -> rows of units, `to_stride` apart, which are whole vectors.
template <class P>
void pack_left(const typename P::Input* values, int64_t stride, bool along_k, int64_t depth, int64_t rows, float* to,
               int64_t to_stride) {
  for (int64_t k = 0; k < depth; k += LANES * P::DEPTH)
    for (int64_t row = 0; row < rows; row += LANES) {
      float* const begin = to + row * to_stride + k / P::DEPTH;
      if (along_k) {
        move_block<P, true, false>(values + row * stride + k, stride, rows - row, depth - k, begin, to_stride,
                                   rows - row);
      } else {
        move_block<P, false, true>(values + k * stride + row, stride, rows - row, depth - k, begin, to_stride,
                                   rows - row);
      }
    }
}

// The sums over k of (depth, rows) values: of 16 at a time, then of those.
template <class T>
void sum_over_k(const T* values, int64_t stride, int64_t depth, int64_t rows, float* sums) {
  constexpr int64_t group = 16;
  std::fill_n(sums, rows, 0.0f);
  for (int64_t first = 0; first < depth; first += group) {
    const int64_t last = std::min(first + group, depth);
    int64_t row = 0;
    for (; row + LANES <= rows; row += LANES) {
      Vec total = set1(0.0f);
      for (int64_t k = first; k < last; ++k) total = total + load(values + k * stride + row);
      store(sums + row, load(sums + row) + total);
    }
    if (row < rows) {
      Vec total = set1(0.0f);
      for (int64_t k = first; k < last; ++k) total = total + load(values + k * stride + row, rows - row);
      store(sums + row, load(sums + row, rows - row) + total, rows - row);
    }
  }
}

// Values [k, k + depth) of every sum, which are added on their own.
struct DenseBlock {
  int64_t k, depth;
};

// f(block) for equal blocks of DENSE_STEPS steps at most.
template <class P, class F>
BERT_FAST_INLINE void each_block(int64_t depth, const F& f) {
  const int64_t steps = (depth + P::DEPTH - 1) / P::DEPTH, blocks = (steps + DENSE_STEPS - 1) / DENSE_STEPS;
  const int64_t size = blocks == 0 ? 0 : (steps + blocks - 1) / blocks * P::DEPTH;
  for (int64_t k = 0; k < depth; k += size) f(DenseBlock{k, std::min(size, depth - k)});
}

// The part of left_sums that a block of k adds, for DENSE_BLOCK_ROWS rows or fewer.
template <class P>
BERT_FAST_INLINE void add_left_sums(const Dense& args, const DenseBlock& block, int64_t row_begin, int64_t row_end) {
  const auto* values = static_cast<const typename P::Input*>(args.left.values);
  float sums[DENSE_BLOCK_ROWS];
  sum_over_k(values + block.k * args.left.stride + row_begin, args.left.stride, block.depth, row_end - row_begin, sums);
  for (int64_t row = row_begin; row < row_end; ++row)
    args.left_sums[row] = sums[row - row_begin] + (block.k > 0 ? args.left_sums[row] : 0.0f);
}

template <class P>
void dense_sums(const Dense& args, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += DENSE_BLOCK_ROWS)
    each_block<P>(args.depth, [&](const DenseBlock& block) {
      add_left_sums<P>(args, block, row, std::min(row + DENSE_BLOCK_ROWS, row_end));
    });
}

// What was there before, plus a tile, to memory of type T. Row and column count from where the pointers are.
template <class T>
struct StoreSum {
  const float* before;
  int64_t before_stride;
  T* out;
  int64_t out_stride;
  int64_t columns;

  template <int M, int N>
  BERT_FAST_INLINE void store(int64_t row, int64_t column, const Vec (&sums)[M][N]) const {
    const float* from = before + row * before_stride + column;
    T* to = out + row * out_stride + column;
    if (column + N * LANES <= columns) {
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
          BERT_FAST_ISA::store(to + i * out_stride + j * LANES,
                               load(from + i * before_stride + j * LANES) + sums[i][j]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const int64_t count = columns - column - j * LANES;
        if (count <= 0) break;
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
          BERT_FAST_ISA::store(to + i * out_stride + j * LANES,
                               load(from + i * before_stride + j * LANES, count) + sums[i][j], count);
      }
    }
  }
};

// Whether tiles read `left` in place: not where k ends inside a unit, or where all rows start in one set of the
// first-level cache.
template <class P>
BERT_FAST_INLINE bool reads_in_place(const Dense& args) {
  constexpr int64_t way_bytes = 4096;
  return args.left.along_k && args.depth % P::DEPTH == 0 &&
         args.left.stride * static_cast<int64_t>(sizeof(typename P::Input)) % way_bytes != 0;
}

template <class P>
void dense(const Dense& args, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
           DenseScratch& scratch) {
  using Input = typename P::Input;
  constexpr int64_t max_rows = 8 * P::ROWS, left_stride = DENSE_STEPS + 16;
  static_assert(max_rows <= DENSE_BLOCK_ROWS);
  const DenseOperand &left = args.left, &right = args.right;
  const int64_t rows = row_end - row_begin, columns = column_end - column_begin;
  const int64_t panels = (columns + PANEL - 1) / PANEL;
  const int64_t tiles = (rows + P::ROWS - 1) / P::ROWS, row_blocks = (rows + max_rows - 1) / max_rows;
  const bool in_place = reads_in_place<P>(args);
  const int64_t right_start = column_begin * (right.along_k ? right.stride : 1);
  for (int64_t i = 0; i < columns; ++i) scratch.bias[i] = args.bias == nullptr ? 0.0f : args.bias[column_begin + i];

  each_block<P>(args.depth, [&](const DenseBlock& block) {
    const int64_t steps = (block.depth + P::DEPTH - 1) / P::DEPTH;
    const int64_t right_offset = right_start + block.k * (right.along_k ? 1 : right.stride);
    const auto pack = [&](const auto* values) {
      pack_right<P>(values + right_offset, right.stride, right.along_k, block.depth, columns, scratch.right);
    };
    if constexpr (std::is_same_v<P, Bf16>) {
      if (right.is_bfloat16) {
        pack(static_cast<const bfloat16*>(right.values));
      } else {
        pack(static_cast<const float*>(right.values));
      }
    } else {
      pack(static_cast<const float*>(right.values));
    }
    for (int64_t i = 0; i < row_blocks; ++i) {
      const int64_t begin = row_begin + tiles * i / row_blocks * P::ROWS;
      const int64_t end = std::min(row_begin + tiles * (i + 1) / row_blocks * P::ROWS, row_end);
      if (args.left_sums != nullptr) add_left_sums<P>(args, block, begin, end);
      const Input* a = static_cast<const Input*>(left.values) + begin * (left.along_k ? left.stride : 1) +
                       block.k * (left.along_k ? 1 : left.stride);
      if (!in_place) {
        pack_left<P>(a, left.stride, left.along_k, block.depth, end - begin, scratch.left, left_stride);
        a = reinterpret_cast<const Input*>(scratch.left);
      }
      const auto run = [&](auto* out, int64_t stride, const float* before, int64_t before_stride) {
        using T = std::remove_pointer_t<decltype(out)>;
        const StoreSum<T> epilogue{before, before_stride, out, stride, columns};
        const auto* panel = reinterpret_cast<const typename P::Weight*>(scratch.right);
        product<P, NoFetch>(a, in_place ? left.stride : left_stride * P::DEPTH, panel, steps, 0, end - begin, 0, panels,
                            epilogue);
      };
      // Float results grow in their place, others in scratch until their last block.
      const int64_t at = begin * args.out_stride + column_begin;
      const bool is_first = block.k == 0, is_last = block.k + block.depth == args.depth;
      float* const grown = args.out_is_bfloat16 ? scratch.sums + (begin - row_begin) * DENSE_COLUMNS
                                                : static_cast<float*>(args.out) + at;
      const int64_t grown_stride = args.out_is_bfloat16 ? DENSE_COLUMNS : args.out_stride;
      const float* const before = is_first ? scratch.bias : grown;
      const int64_t before_stride = is_first ? 0 : grown_stride;
      if constexpr (std::is_same_v<P, Bf16>) {
        if (args.out_is_bfloat16 && is_last) {
          run(static_cast<bfloat16*>(args.out) + at, args.out_stride, before, before_stride);
          continue;
        }
      }
      run(grown, grown_stride, before, before_stride);
    }
  });
}

}  // namespace bert_fast::BERT_FAST_ISA
