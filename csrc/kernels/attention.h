// out = softmax(q k^T * scale) v for a range of the queries of one head of one sequence, in float.
//
// Queries are laid across the lanes of vectors: a block of N vectors of queries meets the keys one after another, so
// the softmax runs down the columns of the transposed scores, without sums across lanes and without tails. K and V are
// packed to contiguous float once per task. The softmax is exact: all scores of a block, then their maximum, then
// exponentials. The result of a query does not depend on which others share its block or its task.
#pragma once

#include "../kernel_table.h"

namespace bert_fast::BERT_FAST_ISA {

// Keys whose scores, for a block of queries, stay in the first-level cache from the exponential to the product with V.
constexpr int64_t KEY_BLOCK = 64;

// c[i][j] (+)= sum over s < steps of a[i * row_stride + s * step_stride] * b[s][j], for i < M and vectors j < N.
// The sum is taken on its own before it is added to c: a long one, in blocks, rounds less.
template <int M, int N, bool ACCUMULATE>
BERT_FAST_INLINE void tile(const float* a, int64_t row_stride, int64_t step_stride, int64_t steps, const float* b,
                           float* c) {
  Vec sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[i][j] = set1(0.0f);
  for (int64_t s = 0; s < steps; ++s) {
    Vec row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = load(b + (s * N + j) * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec factor = set1(a[i * row_stride + s * step_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[i][j] = fma(factor, row[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* to = c + (i * N + j) * LANES;
      store(to, ACCUMULATE ? load(to) + sums[i][j] : sums[i][j]);
    }
}

// The last rows of a product, M or fewer.
template <int M, int N, bool ACCUMULATE>
BERT_FAST_INLINE void last_tile(int64_t rows, const float* a, int64_t row_stride, int64_t step_stride, int64_t steps,
                                const float* b, float* c) {
  if (rows == M) {
    tile<M, N, ACCUMULATE>(a, row_stride, step_stride, steps, b, c);
  } else if constexpr (M > 1) {
    last_tile<M - 1, N, ACCUMULATE>(rows, a, row_stride, step_stride, steps, b, c);
  }
}

template <int N, bool ACCUMULATE>
BERT_FAST_INLINE void product(int64_t rows, const float* a, int64_t row_stride, int64_t step_stride, int64_t steps,
                              const float* b, float* c) {
  constexpr int M = std::min(8, ACCUMULATORS / N);
  int64_t i = 0;
  for (; i + M <= rows; i += M)
    tile<M, N, ACCUMULATE>(a + i * row_stride, row_stride, step_stride, steps, b, c + i * N * LANES);
  if constexpr (M > 1)
    last_tile<M - 1, N, ACCUMULATE>(rows - i, a + i * row_stride, row_stride, step_stride, steps, b, c + i * N * LANES);
}

inline int64_t row_of(const AttentionSequence& sequence, int64_t token) {
  return sequence.rows == nullptr ? token : sequence.rows[token];
}

// Rows of one head -> (length, head_dim), contiguous.
template <class T>
void pack_rows(const T* head, const AttentionSequence& sequence, int64_t stride, int64_t head_dim, float* packed) {
  for (int64_t token = 0; token < sequence.length; ++token) {
    const T* row = head + row_of(sequence, token) * stride;
    for (int64_t i = 0; i < head_dim; i += LANES)
      store(packed + token * head_dim + i, load(row + i, head_dim - i), head_dim - i);
  }
}

// Queries [first, first + count) of one head, times `factor` -> (head_dim, N vectors); zero past `count`.
template <int N, class T>
void pack_queries(const T* head, const AttentionSequence& sequence, int64_t stride, int64_t head_dim, int64_t first,
                  int64_t count, float factor, float* packed) {
  for (int j = 0; j < N; ++j) {
    for (int64_t i = 0; i < head_dim; i += LANES) {
      Vec square[LANES];
      for (int lane = 0; lane < LANES; ++lane) {
        const int64_t query = j * LANES + lane;
        square[lane] = set1(0.0f);
        if (query < count)
          square[lane] = load(head + row_of(sequence, first + query) * stride + i, head_dim - i) * set1(factor);
      }
      transpose(square);
      for (int64_t row = 0; row < std::min<int64_t>(LANES, head_dim - i); ++row)
        store(packed + ((i + row) * N + j) * LANES, square[row]);
    }
  }
}

// (head_dim, N vectors), times `factors` per query -> rows of queries [first, first + count) of one head.
template <int N, class T>
void unpack_output(const float* packed, const Vec (&factors)[N], T* head, const AttentionSequence& sequence,
                   int64_t stride, int64_t head_dim, int64_t first, int64_t count) {
  for (int j = 0; j < N; ++j) {
    for (int64_t i = 0; i < head_dim; i += LANES) {
      Vec square[LANES];
      for (int64_t row = 0; row < LANES; ++row)
        square[row] = i + row < head_dim ? load(packed + ((i + row) * N + j) * LANES) * factors[j] : set1(0.0f);
      transpose(square);
      for (int64_t lane = 0; lane < std::min<int64_t>(LANES, count - j * LANES); ++lane)
        store(head + row_of(sequence, first + j * LANES + lane) * stride + i, square[lane], head_dim - i);
    }
  }
}

// scores: (keys, N vectors). Becomes 2^((scores - maximum) * unit), of which the columns are added to `sums`.
template <int N>
BERT_FAST_INLINE void exponentials(float* scores, int64_t keys, Vec unit, const Vec (&maximum)[N], Vec (&sums)[N]) {
  Vec partial[N];
  for (int j = 0; j < N; ++j) partial[j] = set1(0.0f);
  for (int64_t key = 0; key < keys; ++key) {
    for (int j = 0; j < N; ++j) {
      float* p = scores + (key * N + j) * LANES;
      const Vec power = exp2((load(p) - maximum[j]) * unit);
      partial[j] = partial[j] + power;
      store(p, power);
    }
  }
  for (int j = 0; j < N; ++j) sums[j] = sums[j] + partial[j];
}

struct AttentionScratch {
  float* keys;     // (length, head_dim)
  float* values;   // (length, head_dim)
  float* queries;  // (head_dim, block)
  float* output;   // (head_dim, block)
  float* scores;   // (length, block)
};

// At most N vectors of queries, from `first` on.
template <int N, class T>
void attend(const Attention<T>& args, const AttentionTask& task, const AttentionScratch& scratch, int64_t first) {
  const AttentionSequence& sequence = task.sequence;
  const int64_t head_dim = args.head_dim, length = sequence.length;
  const int64_t count = std::min<int64_t>(N * LANES, task.end_query - first);
  const T* q = args.q + sequence.batch * args.q_strides.batch + task.head * args.q_strides.head;
  // The size of the scale is applied to differences of scores, which rounds less than scaling the queries; its sign
  // decides which score is the largest.
  const Vec unit = set1(std::abs(args.scale) * 1.44269504f);  // log2(e): powers of e become powers of 2
  const float sign = std::copysign(1.0f, args.scale);
  pack_queries<N>(q, sequence, args.q_strides.token, head_dim, first, count, sign, scratch.queries);

  product<N, false>(length, scratch.keys, head_dim, 1, head_dim, scratch.queries, scratch.scores);
  Vec maximum[N], sums[N];
  for (int j = 0; j < N; ++j) {
    maximum[j] = load(scratch.scores + j * LANES);
    sums[j] = set1(0.0f);
  }
  for (int64_t key = 1; key < length; ++key)
    for (int j = 0; j < N; ++j) maximum[j] = max(maximum[j], load(scratch.scores + (key * N + j) * LANES));

  std::fill_n(scratch.output, head_dim * N * LANES, 0.0f);
  for (int64_t key = 0; key < length; key += KEY_BLOCK) {
    const int64_t keys = std::min(KEY_BLOCK, length - key);
    float* block = scratch.scores + key * N * LANES;
    exponentials<N>(block, keys, unit, maximum, sums);
    product<N, true>(head_dim, scratch.values + key * head_dim, 1, head_dim, keys, block, scratch.output);
  }
  for (int j = 0; j < N; ++j) sums[j] = set1(1.0f) / sums[j];
  T* out = args.out + sequence.batch * args.out_strides.batch + task.head * args.out_strides.head;
  unpack_output<N>(scratch.output, sums, out, sequence, args.out_strides.token, head_dim, first, count);
}

template <int N, class T>
BERT_FAST_INLINE void attend_vectors(int64_t vectors, const Attention<T>& args, const AttentionTask& task,
                                     const AttentionScratch& scratch, int64_t first) {
  if (vectors == N) {
    attend<N>(args, task, scratch, first);
  } else if constexpr (N > 1) {
    attend_vectors<N - 1>(vectors, args, task, scratch, first);
  }
}

template <class T>
void attention(const Attention<T>& args, const AttentionTask& task, float* scratch) {
  const AttentionSequence& sequence = task.sequence;
  const int64_t head_dim = args.head_dim;
  const int64_t packed_size = (sequence.length * head_dim + 15) / 16 * 16;
  constexpr int64_t block = MAX_TILE_COLUMNS * LANES;
  static_assert(block <= MAX_QUERY_BLOCK);
  AttentionScratch parts{};
  parts.keys = scratch;
  parts.values = parts.keys + packed_size;
  parts.queries = parts.values + packed_size;
  parts.output = parts.queries + head_dim * block;
  parts.scores = parts.output + head_dim * block;

  const T* k = args.k + sequence.batch * args.k_strides.batch + task.head * args.k_strides.head;
  const T* v = args.v + sequence.batch * args.v_strides.batch + task.head * args.v_strides.head;
  pack_rows(k, sequence, args.k_strides.token, head_dim, parts.keys);
  pack_rows(v, sequence, args.v_strides.token, head_dim, parts.values);

  // Blocks of nearly equal width: 5 vectors are taken as 3 + 2, not as 4 + 1.
  const int64_t vectors = (task.end_query - task.first_query + LANES - 1) / LANES;
  const int64_t blocks = (vectors + MAX_TILE_COLUMNS - 1) / MAX_TILE_COLUMNS;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t from = vectors * i / blocks, to = vectors * (i + 1) / blocks;
    attend_vectors<MAX_TILE_COLUMNS>(to - from, args, task, parts, task.first_query + from * LANES);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
