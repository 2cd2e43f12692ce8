// One lane of float in plain C++: the specification of the interface that the other files of this folder implement.
//
//   Vec, LANES                    a vector of floats with + - * / and comparisons, and how many it holds
//   load(p), store(p, v)          float or bfloat16 memory, any alignment; bfloat16 rounds to nearest even, NaN stays
//   load(p, count)                the first min(count, LANES) elements; the other lanes are zero
//   store(p, v, count)            writes the first min(count, LANES) lanes
//   first(v, count)               v with the lanes from `count` on set to zero
//   fma(a, b, c)                  a * b + c, rounded once where the machine can
//   max(a, b), min(a, b)          b where either is NaN
//   select_ge(a, b, yes, no)      per lane: a >= b ? yes : no
//   add_exponent(v, n)            v * 2^k, where k is in the low bits of n's representation; the result must be normal
//   sum(v)                        of all lanes, in a fixed order
//   transpose(m)                  of the LANES x LANES matrix held in LANES vectors
#pragma once

#include "../kernel_table.h"
#include "../target.h"

namespace bert_fast::BERT_FAST_ISA {

using Vec = float;
constexpr int LANES = 1;
constexpr int ACCUMULATORS = 8;      // vectors that a register tile may hold
constexpr int MAX_TILE_COLUMNS = 4;  // vectors in a row of it

BERT_FAST_INLINE Vec set1(float value) { return value; }

BERT_FAST_INLINE Vec load(const float* p) { return *p; }
BERT_FAST_INLINE Vec load(const bfloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
BERT_FAST_INLINE Vec load(const T* p, int64_t) {
  return load(p);
}

BERT_FAST_INLINE void store(float* p, Vec v) { *p = v; }
BERT_FAST_INLINE void store(bfloat16* p, Vec v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(v != v ? (bits >> 16) | 0x40 : rounded);
}
template <class T>
BERT_FAST_INLINE void store(T* p, Vec v, int64_t) {
  store(p, v);
}

BERT_FAST_INLINE Vec first(Vec v, int64_t) { return v; }
BERT_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
BERT_FAST_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
BERT_FAST_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
BERT_FAST_INLINE Vec select_ge(Vec a, Vec b, Vec yes, Vec no) { return a >= b ? yes : no; }
BERT_FAST_INLINE float sum(Vec v) { return v; }
BERT_FAST_INLINE void transpose(Vec (&)[LANES]) {}

BERT_FAST_INLINE Vec add_exponent(Vec v, Vec n) {
  uint32_t bits, exponent;
  std::memcpy(&bits, &v, sizeof bits);
  std::memcpy(&exponent, &n, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&v, &bits, sizeof bits);
  return v;
}

}  // namespace bert_fast::BERT_FAST_ISA
