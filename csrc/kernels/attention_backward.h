// The gradients of attention, for one head of one sequence. With P the probabilities, recomputed from the logarithms of
// their sums, and D the dropout of each, zero or the factor of those that are kept:
//
//   out = (P D) v,  dv = (P D)^T grad,  dP = (grad v^T) D,  dS = P (dP - delta),  dq = scale dS k,  dk = scale dS^T q
//
// where delta is the sum of P dP over a row, or grad out^T. Where one key has nearly all of P, dP - delta is much
// smaller than both, and their roundings are not: delta is taken as grad out^T, which comes off first, plus the sum of
// P times what is left of dP, which makes up for the roundings of the former. Every product runs over packed panels
// (product.h): K and V are packed once; blocks of ATTENTION_BLOCK queries meet all the keys, their P and dS stay in a
// cache and are read twice, as they lie and transposed. dk and dv add up over the blocks in float, in order: the result
// does not depend on the threads. Memory grows with the length of the sequence, not with its square.
//
// bfloat16 is multiplied as in the forward, with P and dS rounded to bfloat16.
#pragma once

#include "attention_train.h"

namespace bert_fast::BERT_FAST_ISA {

// Sums times a factor to rows of the result, after the last of the parts that add up in `sums`.
template <class T>
struct StoreGradient {
  T* out;
  const AttentionSequence& sequence;
  int64_t stride;
  int64_t head_dim;
  int64_t first_row;
  float factor;
  float* sums = nullptr;  // rows of `channels`
  int64_t channels = 0;
  bool is_first = true, is_last = true;

  template <int M, int N>
  BERT_FAST_INLINE void store(int64_t row, int64_t column, const Vec (&tile)[M][N]) const {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      T* to = out + row_of(sequence, first_row + row + i) * stride + column;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const int64_t index = (row + i) * channels + column + j * LANES;
        const Vec total = is_first ? tile[i][j] : load(sums + index) + tile[i][j];
        const int64_t left = head_dim - column - j * LANES;
        if (!is_last) {
          BERT_FAST_ISA::store(sums + index, total);
        } else if (left > 0) {
          BERT_FAST_ISA::store(to + j * LANES, total * set1(factor), left);
        }
      }
    }
  }
};

// A block of queries: rows of scores and of grad v^T, which become those of P (with the dropped ones zero) and dS.
struct GradientRows {
  float* scores;
  float* grads;
  int64_t stride;
  int64_t length;
};

// What is known of a query: the logarithm of the sum of its powers, and grad out^T without the factor of dropout.
struct RowStatistics {
  float lse, delta;
};

// What belongs to a row of probabilities: one over the sum of what stands for them, and what its statistics' delta is
// short of.
struct RowGradient {
  Vec inverse, rest;
};

// e^x for x <= 87; zero below -87. A NaN stays one. Keys that no query looks at have gradients, too, which in float are
// seen as well as the others': the relative error must not grow with |x|.
BERT_FAST_INLINE Vec exp(Vec x) { return select_ge(x, set1(-87.0f), exp_product(x, set1(1.0f)), max(set1(0.0f), x)); }

// Scores of one query -> P times a number close to one, which the rounding of the logarithm makes, and `inverse`
// undoes; grad v^T -> dP less delta.
template <bool EXACT, class Keep>
BERT_FAST_INLINE RowGradient probabilities_row(const GradientRows& rows, int64_t row, float scale,
                                               const RowStatistics& known, const Keep& keep) {
  float* scores = rows.scores + row * rows.stride;
  float* grads = rows.grads + row * rows.stride;
  const Vec unit = set1(std::abs(scale)), shift = set1(known.lse), delta = set1(known.delta);
  Vec total = set1(0.0f), rest = set1(0.0f);
  for (int64_t i = 0; i < rows.length; i += LANES) {
    // Scaled as the forward does it before the logarithm, so that a single key's is taken off to nothing.
    const Vec power = load(scores + i) * unit - shift;
    const Vec p = first(EXACT ? exp(power) : exp2(power * set1(1.44269504f)), rows.length - i, set1(0.0f));
    const Vec centred = keep(load(grads + i), i) - delta;
    total = total + p;
    rest = fma(p, centred, rest);
    store(scores + i, p);
    store(grads + i, centred);
  }
  const float inverse = 1.0f / sum(total);
  return {set1(inverse), set1(sum(rest) * inverse)};
}

// What probabilities_row leaves of one query, or of two for a product of pairs -> what the products read, in its place:
// `scores` the kept P by columns, `grads` dS by rows, and for pairs, which differ by rows and by columns, dS by columns
// in the second row of `scores`.
template <class Keep>
BERT_FAST_INLINE void gradient_row(const GradientRows& rows, int64_t row, const RowGradient& gradient,
                                   const Keep& keep) {
  float* scores = rows.scores + row * rows.stride;
  float* grads = rows.grads + row * rows.stride;
  for (int64_t i = 0; i < rows.length; i += LANES) {
    const Vec p = load(scores + i) * gradient.inverse;
    store(grads + i, p * (load(grads + i) - gradient.rest));
    store(scores + i, keep(p, i));
  }
}
template <class Keep>
BERT_FAST_INLINE void gradient_pair(const GradientRows& rows, int64_t row, const RowGradient& gradient,
                                    const RowGradient& gradient_next, const Keep& keep, const Keep& keep_next) {
  float* scores = rows.scores + row * rows.stride;
  float* grads = rows.grads + row * rows.stride;
  for (int64_t i = 0; i < rows.length; i += LANES) {
    const Vec p = load(scores + i) * gradient.inverse;
    const Vec p_next = load(scores + rows.stride + i) * gradient_next.inverse;
    const Vec ds = p * (load(grads + i) - gradient.rest);
    const Vec ds_next = p_next * (load(grads + rows.stride + i) - gradient_next.rest);
    store(scores + i, from_bits(pack_pairs(keep(p, i), keep_next(p_next, i))));
    store(scores + rows.stride + i, from_bits(pack_pairs(ds, ds_next)));
    store(reinterpret_cast<bfloat16*>(grads) + i, ds);
    store(reinterpret_cast<bfloat16*>(grads + rows.stride) + i, ds_next);
  }
}

// All rows of a block; keep(i) says what dropout keeps of its query i, known(i) what is known of it.
template <class P, class Keep, class Known>
void softmax_backward(const GradientRows& rows, int64_t count, float scale, const Keep& keep, const Known& known) {
  for (int64_t i = 0; i < count; i += P::DEPTH) {
    const auto kept = keep(i);
    const RowGradient gradient = probabilities_row<P::DEPTH == 1>(rows, i, scale, known(i), kept);
    if constexpr (P::DEPTH == 1) {
      gradient_row(rows, i, gradient, kept);
    } else {
      const auto kept_next = keep(i + 1);
      RowGradient next{set1(0.0f), set1(0.0f)};
      if (i + 1 < count) {
        next = probabilities_row<P::DEPTH == 1>(rows, i + 1, scale, known(i + 1), kept_next);
      } else {  // a pair's second query that is none
        std::fill_n(rows.scores + (i + 1) * rows.stride, rows.stride, 0.0f);
        std::fill_n(rows.grads + (i + 1) * rows.stride, rows.stride, 0.0f);
      }
      gradient_pair(rows, i, gradient, next, kept, kept_next);
    }
  }
}

template <class T>
BERT_FAST_INLINE float dot(const T* a, const T* b, int64_t size) {
  Vec total = set1(0.0f);
  for (int64_t i = 0; i < size; i += LANES) total = fma(load(a + i, size - i), load(b + i, size - i), total);
  return sum(total);
}

template <class P, class T>
void attend_backward(const AttentionBackward<T>& args, const AttentionTask& task, float* scratch) {
  using Weight = typename P::Weight;
  using Input = typename P::Input;
  const AttentionSequence& sequence = task.sequence;
  const int64_t head_dim = args.head_dim, length = sequence.length;
  const int64_t keys = round_up(length, PANEL), channels = round_up(head_dim, PANEL);
  const int64_t stride = keys + PANEL;  // of the rows of a block: not a multiple of the cache's period
  const auto take = [&](int64_t size) { return std::exchange(scratch, scratch + size); };
  Weight* k_columns = reinterpret_cast<Weight*>(take(keys * channels));
  Weight* v_columns = reinterpret_cast<Weight*>(take(keys * channels));
  Weight* k_rows = reinterpret_cast<Weight*>(take(keys * channels));
  Weight* q_rows = reinterpret_cast<Weight*>(take(ATTENTION_BLOCK * channels));
  Weight* grad_rows = reinterpret_cast<Weight*>(take(ATTENTION_BLOCK * channels));
  Input* queries = reinterpret_cast<Input*>(take(ATTENTION_BLOCK * channels));
  Input* grads = reinterpret_cast<Input*>(take(ATTENTION_BLOCK * channels));
  const GradientRows rows{take(ATTENTION_BLOCK * stride), take(ATTENTION_BLOCK * stride), stride, length};
  AttentionDropout dropout(args.dropout, args.rows, task, reinterpret_cast<uint8_t*>(take(keys * DROPOUT_QUERIES / 4)));
  float* dk_sums = scratch;
  float* dv_sums = scratch + keys * channels;

  const auto head = [&](auto* data, const AttentionStrides& strides) {
    return data + sequence.batch * strides.batch + task.head * strides.head;
  };
  const T* q = head(args.q, args.q_strides);
  const T* k = head(args.k, args.k_strides);
  const T* v = head(args.v, args.v_strides);
  const T* grad = head(args.grad, args.grad_strides);
  const T* out = head(args.out, args.out_strides);
  pack_keys<P>(k, sequence, args.k_strides.token, head_dim, std::copysign(1.0f, args.scale), k_columns);
  pack_keys<P>(v, sequence, args.v_strides.token, head_dim, 1.0f, v_columns);
  pack_values<P>(k, sequence, 0, length, args.k_strides.token, head_dim, k_rows);

  const auto steps = [](int64_t size) { return (size + P::DEPTH - 1) / P::DEPTH; };
  const float kept = args.dropout.scale;
  const int64_t blocks = (length + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK;
  // Blocks of nearly equal size start at even queries: a pair shares the bytes of one draw.
  const auto first_of = [&](int64_t b) { return std::min(length, round_up(length * b / blocks, 2)); };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = first_of(b), count = first_of(b + 1) - first;
    const InputRows<P> a = input_rows<P>(q, sequence, first, count, args.q_strides.token, head_dim, queries, channels);
    const InputRows<P> g =
        input_rows<P>(grad, sequence, first, count, args.grad_strides.token, head_dim, grads, channels);
    product<P, NoFetch>(a.data, a.stride, k_columns, steps(head_dim), 0, count, 0, keys / PANEL,
                        StoreScores{rows.scores, stride});
    product<P, NoFetch>(g.data, g.stride, v_columns, steps(head_dim), 0, count, 0, keys / PANEL,
                        StoreScores{rows.grads, stride});
    const auto known = [&](int64_t i) -> RowStatistics {
      const int64_t row = row_of(sequence, first + i);
      const float delta = dot(grad + row * args.grad_strides.token, out + row * args.out_strides.token, head_dim);
      return {args.lse[statistics_index(args.rows, task, first + i)], kept > 0.0f ? delta / kept : 0.0f};
    };
    if (dropout.drops()) {
      softmax_backward<P>(rows, count, args.scale, [&](int64_t i) { return dropout.of(first + i); }, known);
    } else {
      softmax_backward<P>(rows, count, args.scale, [](int64_t) { return KeepAll{}; }, known);
    }

    StoreGradient<T> epilogue{head(args.dq, args.gradient_strides),
                              sequence,
                              args.gradient_strides.token,
                              head_dim,
                              first,
                              args.scale * kept};
    const int64_t row_stride = stride * static_cast<int64_t>(sizeof(float) / sizeof(Input));
    const int64_t step_stride = P::DEPTH * row_stride;
    const Input* ds = reinterpret_cast<const Input*>(rows.grads);
    product<P, NoFetch>(ds, row_stride, k_rows, steps(length), 0, count, 0, channels / PANEL, epilogue);

    pack_values<P>(q, sequence, first, count, args.q_strides.token, head_dim, q_rows);
    pack_values<P>(grad, sequence, first, count, args.grad_strides.token, head_dim, grad_rows);
    epilogue.first_row = 0;
    epilogue.channels = channels;
    epilogue.is_first = b == 0;
    epilogue.is_last = b + 1 == blocks;
    epilogue.out = head(args.dk, args.gradient_strides);
    epilogue.sums = dk_sums;
    const Input* ds_columns = P::DEPTH == 1 ? ds : reinterpret_cast<const Input*>(rows.scores + stride);
    product<Transposed<P>, NoFetch>(ds_columns, step_stride, q_rows, steps(count), 0, length, 0, channels / PANEL,
                                    epilogue);
    epilogue.out = head(args.dv, args.gradient_strides);
    epilogue.sums = dv_sums;
    epilogue.factor = kept;
    product<Transposed<P>, NoFetch>(reinterpret_cast<const Input*>(rows.scores), step_stride, grad_rows, steps(count),
                                    0, length, 0, channels / PANEL, epilogue);
  }
}

template <class T>
void attention_backward(const AttentionBackward<T>& args, const AttentionTask& task, float* scratch) {
  with_products<T>(args.head_dim, args.scale,
                   [&](auto products) { attend_backward<decltype(products)>(args, task, scratch); });
}

}  // namespace bert_fast::BERT_FAST_ISA
