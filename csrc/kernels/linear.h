// out = act(input weight^T + bias) + residual, over packed weights: the product of product.h and what follows while a
// tile is in registers.
//
// int8: a row of inputs is scale * u + minimum, with u its unsigned bytes, and a row of weights is scale * s, with s
// its signed bytes. So the product is row scale * weight scale * sum(u s) + row minimum * weight scale * sum(s), of
// which the first sum is exact and the second is known when the weights are packed. The outliers, for which s is zero,
// are multiplied as floats (a mixed-precision decomposition as in LLM.int8(), Dettmers et al., 2022, but of channels
// that packing.h chooses from the weights).
#pragma once

#include "../vec/math.h"
#include "product.h"

namespace bert_fast::BERT_FAST_ISA {

// The sums of LANES columns as floats, with the bias. What belongs to the columns is loaded once for all rows of a
// tile, because loads are what an epilogue waits for.
template <class P>
struct Affine {
  const RowCode* codes;
  Vec bias, scales, sums, outliers[OUTLIERS];

  BERT_FAST_INLINE Affine(const Linear& args, int64_t column)
      : codes(args.input_codes), bias(load(args.weight.bias + column)) {
    if constexpr (std::is_same_v<P, Int8>) {
      const PackedLinear& weight = args.weight;
      scales = load(weight.scales + column);
      sums = load(weight.sums + column);
      for (int64_t i = 0; i < OUTLIERS; ++i) outliers[i] = load(weight.outliers + i * weight.out_features + column);
    }
  }

  BERT_FAST_INLINE Vec operator()(typename P::Sum total, int64_t row) const {
    if constexpr (std::is_same_v<P, Int8>) {
      const RowCode& code = codes[row];
      Vec shift = fma(set1(code.minimum), sums, bias);
      for (int64_t i = 0; i < OUTLIERS; ++i) shift = fma(set1(code.outliers[i]), outliers[i], shift);
      return fma(to_float(total) * scales, set1(code.scale), shift);
    } else {
      return total + bias;
    }
  }
};

// To memory of type T.
template <class P, class T>
struct Store {
  const Linear& args;

  template <int M, int N>
  BERT_FAST_INLINE void store(int64_t row, int64_t column, const typename P::Sum (&sums)[M][N]) const {
    T* out = static_cast<T*>(args.out) + row * args.out_stride + column;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Affine<P> affine(args, column + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
        BERT_FAST_ISA::store(out + i * args.out_stride + j * LANES, affine(sums[i][j], row + i));
    }
  }
};

// Plus a residual, to float.
template <class P>
struct StoreResidual {
  const Linear& args;

  template <int M, int N>
  BERT_FAST_INLINE void store(int64_t row, int64_t column, const typename P::Sum (&sums)[M][N]) const {
    float* out = static_cast<float*>(args.out) + row * args.out_stride + column;
    const float* residual = args.residual + row * args.residual_stride + column;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Affine<P> affine(args, column + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
        BERT_FAST_ISA::store(out + i * args.out_stride + j * LANES,
                             affine(sums[i][j], row + i) + load(residual + i * args.residual_stride + j * LANES));
    }
  }
};

// An activation on `rows` rows of PANEL columns or fewer, which are in the first-level cache.
template <bool EXACT, class T>
BERT_FAST_INLINE void activate(Activation activation, const float* values, int64_t count, T* out) {
  switch (activation) {
    case Activation::gelu_erf:
      for (int64_t i = 0; i < count; i += LANES) store(out + i, gelu_erf_absolute<EXACT>(load(values + i)));
      break;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < count; i += LANES) store(out + i, gelu_tanh(load(values + i)));
      break;
    case Activation::relu:
      for (int64_t i = 0; i < count; i += LANES) store(out + i, max(set1(0.0f), load(values + i)));
      break;
    case Activation::none:
      for (int64_t i = 0; i < count; i += LANES) store(out + i, load(values + i));
  }
}

// Through the activation, to memory of type T.
template <class P, class T>
struct StoreActivated {
  const Linear& args;

  template <int M, int N>
  BERT_FAST_INLINE void store(int64_t row, int64_t column, const typename P::Sum (&sums)[M][N]) const {
    alignas(64) float values[M * N * LANES];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Affine<P> affine(args, column + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) BERT_FAST_ISA::store(values + (i * N + j) * LANES, affine(sums[i][j], row + i));
    }
    T* out = static_cast<T*>(args.out) + row * args.out_stride + column;
    for (int i = 0; i < M; ++i)
      activate<std::is_same_v<P, Fp32>>(args.activation, values + i * N * LANES, N * LANES, out + i * args.out_stride);
  }
};

template <class P>
void linear(const Linear& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  using Narrow = std::conditional_t<std::is_same_v<P, Fp32>, float, bfloat16>;  // what attention reads
  using Wide =
      std::conditional_t<std::is_same_v<P, Bf16>, bfloat16, float>;  // what the next product reads or quantises
  const auto run = [&](const auto& epilogue) {
    product<P, Fetch>(static_cast<const typename P::Input*>(args.input), args.input_stride,
                      static_cast<const typename P::Weight*>(args.weight.panels), args.weight.depth / P::DEPTH,
                      row_begin, row_end, panel_begin, panel_end, epilogue);
  };
  if (args.residual != nullptr) {
    run(StoreResidual<P>{args});
  } else if (args.activation == Activation::none) {
    run(Store<P, Narrow>{args});
  } else {
    run(StoreActivated<P, Wide>{args});
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
