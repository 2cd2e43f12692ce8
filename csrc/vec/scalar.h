// One lane of float in plain C++: the specification of the interface that the other files of this folder implement.
//
//   Vec, LANES                    a vector of floats with + - * / and comparisons, and how many it holds
//   load(p), store(p, v)          float or bfloat16 memory, any alignment; bfloat16 rounds to nearest even, NaN stays
//   load(p, count)                the first min(count, LANES) elements; the other lanes are zero
//   store(p, v, count)            writes the first min(count, LANES) lanes
//   first(v, count, fill)         v with the lanes from `count` on taken from `fill`, or zero
//   fma(a, b, c)                  a * b + c, rounded once where the machine can
//   max(a, b), min(a, b)          b where either is NaN
//   select_ge(a, b, yes, no)      per lane: a >= b ? yes : no
//   add_exponent(v, n)            v * 2^k, where k is in the low bits of n's representation; the result must be normal
//   prefetch(p)                   a hint that this cache line is read soon; p may point anywhere
//   sum(v)                        of all lanes, in a fixed order
//   lowest(v), highest(v)         of all lanes; any of them where one is NaN
//   transpose(m)                  of the LANES x LANES matrix held in LANES vectors
//   to_bits(v), from_bits(b)      the same 32 bits per lane as integers, and back
//   kept(v, p, threshold)         lanes whose byte, at p + lane, is `threshold` or more; the others zero; 1 to 256
//
// Wide holds WIDE_LANES numbers of 64 bits, with + ^ << >> &.
//
//   count_up()                    0, 1, 2, ...
//   multiply_low(a, factor)       the products of the low 32 bits, in full
//   store_pairs(p, a, b)          a[0], b[0], a[1], b[1], ... to 16 WIDE_LANES bytes
//
// Products of narrow types. A vector Bits holds in each 32-bit lane a float, two bfloat16 or four bytes, the first in
// the low bits; `a` below is one such lane, which every lane of b meets.
//
//   load_bits(p), set1_bits(p)    LANES lanes from memory of any alignment; one lane, repeated
//   dot2(sum, a, b)               sum + a[0] b[0] + a[1] b[1] on bfloat16; the order is the instruction set's
//   dot4(sum, a, b)               sum + the four products of unsigned bytes of a and signed bytes of b, exactly
//   to_float(sum)                 of integers, rounded to nearest
//   pack_pairs(low, high)         two vectors as bfloat16, rounded to nearest even, side by side in each lane
//   store_bytes(p, v, count)      the first min(count, LANES) lanes, rounded, to bytes; from 0 to 255, any byte for NaN
#pragma once

#include "../kernel_table.h"
#include "../target.h"

namespace bert_fast::BERT_FAST_ISA {

using Vec = float;
constexpr int LANES = 1;
constexpr int TILE_ROWS = 2;       // of a tile of a product of floats
constexpr int TILE_ROWS_DOT2 = 2;  // of bfloat16
constexpr int TILE_ROWS_DOT4 = 2;  // of bytes
constexpr int TILE_VECTORS = 4;    // in each row
constexpr bool HAS_DOT2 = false;   // dot2 is one instruction

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

BERT_FAST_INLINE void prefetch(const void*) {}
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
BERT_FAST_INLINE Vec first(Vec v, int64_t, Vec) { return v; }
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
BERT_FAST_INLINE float lowest(Vec v) { return v; }
BERT_FAST_INLINE float highest(Vec v) { return v; }
BERT_FAST_INLINE void transpose(Vec (&)[LANES]) {}

BERT_FAST_INLINE Vec kept(Vec v, const uint8_t* p, int threshold) { return *p >= threshold ? v : 0.0f; }

using Wide = uint64_t;
constexpr int WIDE_LANES = 1;

BERT_FAST_INLINE Wide count_up() { return 0; }
BERT_FAST_INLINE Wide multiply_low(Wide a, uint32_t factor) { return (a & 0xffffffff) * factor; }
BERT_FAST_INLINE void store_pairs(uint8_t* p, Wide a, Wide b) {
  std::memcpy(p, &a, sizeof a);
  std::memcpy(p + sizeof a, &b, sizeof b);
}

using Bits = uint32_t;
using Ints = int32_t;

BERT_FAST_INLINE Bits to_bits(Vec v) {
  Bits bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
BERT_FAST_INLINE Vec from_bits(Bits bits) {
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
BERT_FAST_INLINE Bits load_bits(const void* p) {
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
BERT_FAST_INLINE Bits set1_bits(const void* p) { return load_bits(p); }
BERT_FAST_INLINE Vec dot2(Vec total, Bits a, Bits b) {
  total = fma(from_bits(a & 0xffff0000u), from_bits(b & 0xffff0000u), total);
  return fma(from_bits(a << 16), from_bits(b << 16), total);
}
BERT_FAST_INLINE Ints dot4(Ints total, Bits a, Bits b) {
  for (int i = 0; i < 4; ++i)
    total += static_cast<int32_t>((a >> (8 * i)) & 0xff) * static_cast<int8_t>((b >> (8 * i)) & 0xff);
  return total;
}
BERT_FAST_INLINE Vec to_float(Ints v) { return static_cast<float>(v); }
BERT_FAST_INLINE Bits pack_pairs(Vec low, Vec high) {
  bfloat16 pair[2];
  store(pair, low);
  store(pair + 1, high);
  return load_bits(pair);
}
BERT_FAST_INLINE void store_bytes(uint8_t* p, Vec v, int64_t) {
  *p = static_cast<uint8_t>(min(max(std::nearbyint(v), 0.0f), 255.0f));
}

BERT_FAST_INLINE Vec add_exponent(Vec v, Vec n) {
  uint32_t bits, exponent;
  std::memcpy(&bits, &v, sizeof bits);
  std::memcpy(&exponent, &n, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&v, &bits, sizeof bits);
  return v;
}

}  // namespace bert_fast::BERT_FAST_ISA
