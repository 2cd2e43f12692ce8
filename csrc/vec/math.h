// Exponentials and GELU, branch-free, written once in terms of the vector interface (scalar.h).
// The polynomials are minimax fits in relative error, found by linear programming over Chebyshev points.
#pragma once

#include "../target.h"

namespace bert_fast::BERT_FAST_ISA {

// Adding it to |x| < 2^22 rounds x to the nearest integer, which is then in the low bits of the sum.
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23

template <int DEGREE>
BERT_FAST_INLINE Vec polynomial(Vec x, const float (&coefficients)[DEGREE + 1]) {
  Vec y = set1(coefficients[DEGREE]);
  for (int i = DEGREE - 1; i >= 0; --i) y = fma(y, x, set1(coefficients[i]));
  return y;
}

// 2^x for |x| a little over 1/2; relative error of the fit on [-1/2, 1/2]: 2.0e-9.
BERT_FAST_INLINE Vec exp2_fraction(Vec x) {
  constexpr float coefficients[] = {
      1.0f, 6.931471825e-1f, 2.402264774e-1f, 5.550332367e-2f, 9.618420154e-3f, 1.339896000e-3f, 1.535777265e-4f};
  return polynomial<6>(x, coefficients);
}

// The same with a relative error of 2.6e-6, for results that are rounded to bfloat16.
BERT_FAST_INLINE Vec exp2_fraction_rough(Vec x) {
  constexpr float coefficients[] = {9.999992614e-01f, 6.931218147e-01f, 2.402474483e-01f, 5.591786032e-02f,
                                    9.570101903e-03f};
  return polynomial<4>(x, coefficients);
}

// 2^x for x <= 127; zero below -126 (no denormals). A NaN stays one.
template <bool EXACT = true>
BERT_FAST_INLINE Vec exp2(Vec x) {
  const Vec n = x + set1(ROUNDER);
  const Vec fraction = x - (n - set1(ROUNDER));
  const Vec y = add_exponent(EXACT ? exp2_fraction(fraction) : exp2_fraction_rough(fraction), n);
  return select_ge(x, set1(-126.0f), y, max(set1(0.0f), x));
}

// e^(x y) for |x y| <= 87. The relative error does not grow with |x y|: the product is not rounded before ln 2 is taken
// off it in two parts, of which the first is exact (Cody & Waite, 1980). A NaN may become a number.
BERT_FAST_INLINE Vec exp_product(Vec x, Vec y) {
  constexpr float log2_e = 1.44269504f;
  constexpr float ln_2_high = 0.693359375f, ln_2_low = -2.12194440e-4f;
  const Vec n = fma(x * y, set1(log2_e), set1(ROUNDER));
  const Vec k = n - set1(ROUNDER);
  const Vec r = fma(k, set1(-ln_2_low), fma(x, y, k * set1(-ln_2_high)));
  return add_exponent(exp2_fraction(r * set1(log2_e)), n);
}

// The tail of the normal distribution: erfc(a / sqrt 2) = bell * ratio * p, where bell = e^(-a^2 / 2).
struct Tail {
  Vec a, bell, ratio, p;
};

// At a = |x|: ratio = 1 / (a + 5/2) and p = P(u) with u = (a - 5/2) / (a + 5/2); relative error of the fit for a <=
// 12.6: 1.5e-8. Beyond, where a / 2 erfc is below 1e-34, a stands still.
BERT_FAST_INLINE Tail normal_tail(Vec x) {
  constexpr float coefficients[] = {1.413313270e+0f,  -8.673840761e-1f, 2.639737725e-1f, 1.847234555e-2f,
                                    -3.277017549e-2f, -3.203865606e-3f, 5.038887262e-3f, 1.368525205e-3f,
                                    -6.119221798e-4f, -3.090852697e-4f};
  const Vec a = min(set1(12.5f), max(x, set1(0.0f) - x));
  const Vec ratio = set1(1.0f) / (a + set1(2.5f));
  const Vec u = fma(set1(-5.0f), ratio, set1(1.0f));
  return {a, exp_product(a * set1(-0.5f), a), ratio, polynomial<9>(u, coefficients)};
}

// x times the normal distribution function, as max(x, 0) - a / 2 erfc(a / sqrt 2) with a = |x|: no cancellation on
// either side.
BERT_FAST_INLINE Vec gelu_erf(Vec x) {
  const Tail tail = normal_tail(x);
  const Vec erfc = tail.bell * tail.ratio * tail.p;
  return fma(tail.a * set1(-0.5f), erfc, max(set1(0.0f), x));
}

// The derivative: at -a it is erfc(a / sqrt 2) / 2 - a e^(-a^2 / 2) / sqrt(2 pi), at a it is one minus that.
BERT_FAST_INLINE Vec gelu_erf_derivative(Vec x) {
  const Tail tail = normal_tail(x);
  const Vec left = tail.bell * fma(tail.a, set1(-0.398942280f), set1(0.5f) * tail.ratio * tail.p);
  return select_ge(x, set1(0.0f), set1(1.0f) - left, left);
}

// GELU with a small absolute error, for sums that have been rounded themselves: x (1/2 + x Q(t)) with t = 2 (x / L)^2 -
// 1 for |x| <= L, and from there on as at L. Error of the fit: 2.3e-7 |x|, at most 9e-8 up to L, where EXACT is asked
// for; otherwise 7.5e-5 |x|, which disappears when the result is rounded to bfloat16 or less.
template <bool EXACT>
BERT_FAST_INLINE Vec gelu_erf_absolute(Vec x) {
  constexpr float exact[] = {1.285519383e-01f, -6.417237406e-02f, 4.773671693e-02f, -3.879081517e-02f,
                             3.208808336e-02f, -2.607769622e-02f, 2.023617805e-02f, -1.481460665e-02f,
                             1.066128273e-02f, -7.392372952e-03f, 3.880491475e-03f, -1.492896711e-03f,
                             1.341658902e-03f, -1.275307233e-03f, 4.288097269e-04f};
  constexpr float rough[] = {1.759477507e-01f, -8.435746965e-02f, 5.605081244e-02f, -3.649538168e-02f,
                             2.162170229e-02f, -1.325997163e-02f, 8.211288028e-03f, -2.729020030e-03f};
  constexpr float limit = EXACT ? 5.5f : 4.0f;
  const Vec inner = max(set1(-limit), min(set1(limit), x));
  const Vec t = fma(inner * inner, set1(2.0f / (limit * limit)), set1(-1.0f));
  Vec q;
  if constexpr (EXACT) {
    q = polynomial<14>(t, exact);
  } else {
    q = polynomial<7>(t, rough);
  }
  return x * fma(inner, q, set1(0.5f));
}

// e^(-2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3), for |x| <= 8.
BERT_FAST_INLINE Vec exp_minus_2_z(Vec x) {
  const Vec cubic = fma(set1(0.044715f) * x * x, x, x);
  const Vec minus_2_z = cubic * set1(-1.59576912f);  // 2 sqrt(2 / pi)
  return exp_product(minus_2_z, set1(1.0f));
}

// x / 2 (1 + tanh z) = x / (1 + e^(-2 z)).
BERT_FAST_INLINE Vec gelu_tanh(Vec x) {
  // From -8 on down the result is below 1e-20, and x stands still; from 8 on up it is x.
  const Vec bounded = max(set1(-8.0f), x);
  return bounded / (set1(1.0f) + exp_minus_2_z(min(set1(8.0f), bounded)));
}

// The derivative s (1 + 2 x z' e^(-2 z) s) with s = 1 / (1 + e^(-2 z)) and 2 z' = 2 sqrt(2 / pi) (1 + 3 * 0.044715
// x^2).
BERT_FAST_INLINE Vec gelu_tanh_derivative(Vec x) {
  const Vec inner = min(set1(8.0f), max(set1(-8.0f), x));  // beyond, it is 1 or below 1e-19
  const Vec e = exp_minus_2_z(inner), s = set1(1.0f) / (set1(1.0f) + e);
  const Vec slope = fma(inner * inner, set1(0.214064448f), set1(1.59576912f));
  return s * fma(inner * slope, e * s, set1(1.0f));
}

}  // namespace bert_fast::BERT_FAST_ISA
