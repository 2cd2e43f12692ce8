// out = softmax(q k^T * scale) v for a range of the queries of one head of one sequence.
//
// K and V of the head are packed once per task into panels, as weights are (product.h); then a tile of queries meets
// all the keys, its rows of scores go through the softmax while they are in the first-level cache, and meet V. The
// softmax is exact: all scores of a row, then their maximum, then exponentials; memory grows with the length of the
// sequence, not with its square. The result of a query does not depend on which others share its tile or its task.
//
// bfloat16 is multiplied as such where the instruction set does so, with the probabilities rounded to bfloat16, and as
// float otherwise (or where head_dim is odd or the scale negative). Sums and the softmax are float.
#pragma once

#include "../vec/math.h"
#include "product.h"

namespace bert_fast::BERT_FAST_ISA {

inline int64_t row_of(const AttentionSequence& sequence, int64_t token) {
  return sequence.rows == nullptr ? token : sequence.rows[token];
}

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// LANES columns of a row, from `i` on, as the 32-bit lanes that a product of P reads; zero past the end.
template <class P, class T>
BERT_FAST_INLINE Vec load_group(const T* row, int64_t i, int64_t size) {
  if constexpr (P::DEPTH == 1) {
    return load(row + i, size - i);
  } else {
    return load(reinterpret_cast<const float*>(row + P::DEPTH * i), size / P::DEPTH - i);
  }
}

// Rows of K, times `factor` -> panels (head_dim / DEPTH, PANEL, DEPTH), one for every PANEL keys; zero past the last.
template <class P, class T>
void pack_keys(const T* head, const AttentionSequence& sequence, int64_t stride, int64_t head_dim, float factor,
               typename P::Weight* packed) {
  const int64_t steps = (head_dim + P::DEPTH - 1) / P::DEPTH, step_size = PANEL * P::DEPTH;
  for (int64_t key = 0; key < round_up(sequence.length, PANEL); key += LANES) {
    typename P::Weight* to = packed + key / PANEL * steps * step_size + key % PANEL * P::DEPTH;
    for (int64_t i = 0; i < steps; i += LANES) {
      Vec square[LANES];
      for (int lane = 0; lane < LANES; ++lane) {
        square[lane] = set1(0.0f);
        if (key + lane < sequence.length)
          square[lane] = load_group<P>(head + row_of(sequence, key + lane) * stride, i, head_dim);
      }
      transpose(square);
      for (int64_t k = i; k < std::min<int64_t>(i + LANES, steps); ++k) {
        if constexpr (P::DEPTH == 1) square[k - i] = square[k - i] * set1(factor);
        store(reinterpret_cast<float*>(to + k * step_size), square[k - i]);
      }
    }
  }
}

// `count` rows of V -> panels (count / DEPTH, PANEL, DEPTH), one for every PANEL channels; zero past the last of both.
template <class P, class T>
void pack_values(const T* head, const AttentionSequence& sequence, int64_t first, int64_t count, int64_t stride,
                 int64_t head_dim, typename P::Weight* packed) {
  const int64_t steps = (count + P::DEPTH - 1) / P::DEPTH;
  for (int64_t panel = 0; panel < head_dim; panel += PANEL) {
    for (int64_t k = 0; k < steps; ++k, packed += PANEL * P::DEPTH) {
      const T* row = head + row_of(sequence, first + k * P::DEPTH) * stride + panel;
      const bool has_next = P::DEPTH > 1 && k * P::DEPTH + 1 < count;
      const T* next = has_next ? head + row_of(sequence, first + k * P::DEPTH + 1) * stride + panel : nullptr;
      for (int64_t i = 0; i < PANEL; i += LANES) {
        const int64_t left = std::max<int64_t>(0, head_dim - panel - i);
        const Vec low = left > 0 ? load(row + i, left) : set1(0.0f);
        if constexpr (P::DEPTH == 1) {
          store(packed + i, low);
        } else {
          const Vec high = has_next && left > 0 ? load(next + i, left) : set1(0.0f);
          store(reinterpret_cast<float*>(packed + P::DEPTH * i), from_bits(pack_pairs(low, high)));
        }
      }
    }
  }
}

// Rows as a product of P reads them, `stride` values apart.
template <class P>
struct InputRows {
  const typename P::Input* data;
  int64_t stride;
};

// `count` rows of Q: where they lie, or if they are of another type or apart gathered in `copy`, `channels` apart.
template <class P, class T>
InputRows<P> input_rows(const T* head, const AttentionSequence& sequence, int64_t first, int64_t count, int64_t stride,
                        int64_t head_dim, typename P::Input* copy, int64_t channels) {
  if (std::is_same_v<T, typename P::Input> && sequence.rows == nullptr)
    return {reinterpret_cast<const typename P::Input*>(head + first * stride), stride};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < head_dim; c += LANES)
      store(copy + i * channels + c, load(head + row_of(sequence, first + i) * stride + c, head_dim - c));
  return {copy, channels};
}

// All probabilities as they are.
struct KeepAll {
  BERT_FAST_INLINE Vec operator()(Vec v, int64_t) const { return v; }
};

// What the softmax learns of a row: the largest score, and the sum of the powers of the others' distances from it.
struct RowSums {
  float highest, total;
};

// A row of scores -> keep(probabilities, index of the first), not divided by their sum, of which the dropped ones are
// part. `out` may start at `scores`.
template <bool EXACT, class Keep, class Input>
BERT_FAST_INLINE RowSums softmax_row(const float* scores, int64_t length, Vec unit, const Keep& keep, Input* out) {
  Vec maximum = first(load(scores), length, set1(-std::numeric_limits<float>::infinity()));
  for (int64_t i = LANES; i < length; i += LANES) maximum = max(maximum, first(load(scores + i), length - i, maximum));
  const float top = highest(maximum);
  const Vec shift = set1(top);
  Vec total = set1(0.0f);
  for (int64_t i = 0; i < length; i += LANES) {
    const Vec power = first(exp2<EXACT>((load(scores + i) - shift) * unit), length - i, set1(0.0f));
    total = total + power;
    store(out + i, keep(power, i));
  }
  return {top, sum(total)};
}

// Scores to memory as they are.
struct StoreScores {
  float* out;
  int64_t stride;

  template <int M, int N>
  BERT_FAST_INLINE void store(int64_t row, int64_t column, const Vec (&sums)[M][N]) const {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) BERT_FAST_ISA::store(out + (row + i) * stride + column + j * LANES, sums[i][j]);
  }
};

// Rows of the result, times a factor of their own.
template <class T>
struct StoreOutput {
  T* out;
  const AttentionSequence& sequence;
  int64_t stride;
  int64_t head_dim;
  int64_t first_query;
  const float* factors;

  template <int M, int N>
  BERT_FAST_INLINE void store(int64_t row, int64_t column, const Vec (&sums)[M][N]) const {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      T* to = out + row_of(sequence, first_query + row + i) * stride + column;
      const Vec factor = set1(factors[row + i]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const int64_t left = head_dim - column - j * LANES;
        if (left > 0) BERT_FAST_ISA::store(to + j * LANES, sums[i][j] * factor, left);
      }
    }
  }
};

// softmax(scores of a query, which query) leaves its probabilities in place of the scores, as P::Input, and returns
// what its row of the result is to be multiplied by; it is called for one query after another.
template <class P, class T, class Softmax>
void attend(const Attention<T>& args, const AttentionTask& task, float* scratch, Softmax&& softmax) {
  using Weight = typename P::Weight;
  using Input = typename P::Input;
  const AttentionSequence& sequence = task.sequence;
  const int64_t head_dim = args.head_dim, length = sequence.length;
  const int64_t keys = round_up(length, PANEL), channels = round_up(head_dim, PANEL);
  const int64_t score_stride = keys + PANEL;  // not a multiple of the cache's period
  Weight* packed_keys = reinterpret_cast<Weight*>(scratch);
  Weight* packed_values = reinterpret_cast<Weight*>(scratch + keys * channels);
  float* scores = scratch + 2 * keys * channels;
  Input* queries = reinterpret_cast<Input*>(scores + P::ROWS * score_stride);

  const T* q = args.q + sequence.batch * args.q_strides.batch + task.head * args.q_strides.head;
  const T* k = args.k + sequence.batch * args.k_strides.batch + task.head * args.k_strides.head;
  const T* v = args.v + sequence.batch * args.v_strides.batch + task.head * args.v_strides.head;
  T* out = args.out + sequence.batch * args.out_strides.batch + task.head * args.out_strides.head;
  pack_keys<P>(k, sequence, args.k_strides.token, head_dim, std::copysign(1.0f, args.scale), packed_keys);
  pack_values<P>(v, sequence, 0, length, args.v_strides.token, head_dim, packed_values);

  const int64_t score_steps = (head_dim + P::DEPTH - 1) / P::DEPTH, value_steps = (length + P::DEPTH - 1) / P::DEPTH;
  const int64_t input_stride = score_stride * static_cast<int64_t>(sizeof(float) / sizeof(Input));
  const int64_t count = task.end_query - task.first_query, tiles = (count + P::ROWS - 1) / P::ROWS;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first_query = task.first_query + count * t / tiles;
    const int64_t rows = task.first_query + count * (t + 1) / tiles - first_query;
    const InputRows<P> a =
        input_rows<P>(q, sequence, first_query, rows, args.q_strides.token, head_dim, queries, channels);
    product<P, NoFetch>(a.data, a.stride, packed_keys, score_steps, 0, rows, 0, keys / PANEL,
                        StoreScores{scores, score_stride});
    float factors[P::ROWS];
    for (int64_t i = 0; i < rows; ++i) factors[i] = softmax(scores + i * score_stride, first_query + i);
    const StoreOutput<T> epilogue{out, sequence, args.out_strides.token, head_dim, first_query, factors};
    product<P, NoFetch>(reinterpret_cast<const Input*>(scores), input_stride, packed_values, value_steps, 0, rows, 0,
                        channels / PANEL, epilogue);
  }
}

// f(Bf16{}) or f(Fp32{}): the kind of the products of attention.
template <class T, class F>
BERT_FAST_INLINE void with_products(int64_t head_dim, float scale, const F& f) {
  if constexpr (HAS_DOT2 && std::is_same_v<T, bfloat16>) {
    if (head_dim % Bf16::DEPTH == 0 && scale >= 0.0f) return f(Bf16{});
  }
  f(Fp32{});
}

// What differences of scores are multiplied by to become powers of 2. The size of the scale is applied to differences,
// which rounds less than scaling the queries; its sign, in the packed keys, decides which score is the largest.
BERT_FAST_INLINE Vec power_unit(float scale) { return set1(std::abs(scale) * 1.44269504f); }  // log2(e)

template <class T>
void attention(const Attention<T>& args, const AttentionTask& task, float* scratch) {
  with_products<T>(args.head_dim, args.scale, [&](auto products) {
    using P = decltype(products);
    const Vec unit = power_unit(args.scale);
    attend<P>(args, task, scratch, [&](float* row, int64_t) {
      typename P::Input* out = reinterpret_cast<typename P::Input*>(row);
      return 1.0f / softmax_row<P::DEPTH == 1>(row, task.sequence.length, unit, KeepAll{}, out).total;
    });
  });
}

}  // namespace bert_fast::BERT_FAST_ISA
