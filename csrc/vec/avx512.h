// Sixteen lanes of float: AVX-512 F, BW, DQ, VL. The interface is specified in scalar.h.
// BERT_FAST_VNNI and BERT_FAST_BF16 say whether the instruction set has vpdpbusd, and vdpbf16ps beside it.
#pragma once

#include "../kernel_table.h"
#include "../target.h"

namespace bert_fast::BERT_FAST_ISA {

// Not __m512: GCC keeps arrays of that type, which may alias anything, in memory instead of in registers.
typedef float Vec __attribute__((vector_size(64)));
constexpr int LANES = 16;
constexpr int TILE_ROWS = 14;
// Where a dot product takes several instructions, each half of a pair takes registers of its own.
constexpr int TILE_ROWS_DOT2 = BERT_FAST_BF16 ? 14 : 12;
constexpr int TILE_ROWS_DOT4 = BERT_FAST_VNNI ? 14 : 12;
constexpr int TILE_VECTORS = 2;
constexpr bool HAS_DOT2 = BERT_FAST_BF16;

BERT_FAST_INLINE Vec set1(float value) { return _mm512_set1_ps(value); }

// The first `count` lanes.
BERT_FAST_INLINE __mmask16 lane_mask(int64_t count) {
  return static_cast<__mmask16>(count >= LANES ? 0xffff : (1 << count) - 1);
}

BERT_FAST_INLINE Vec widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

BERT_FAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
BERT_FAST_INLINE Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
BERT_FAST_INLINE Vec load(const float* p, int64_t count) {
  return count >= LANES ? load(p) : static_cast<Vec>(_mm512_maskz_loadu_ps(lane_mask(count), p));
}
BERT_FAST_INLINE Vec load(const bfloat16* p, int64_t count) {
  return count >= LANES ? load(p) : widen(_mm256_maskz_loadu_epi16(lane_mask(count), p));
}

BERT_FAST_INLINE __m256i narrow(Vec v) {
#if BERT_FAST_BF16
  return (__m256i)_mm512_cvtneps_pbh(v);  // a denormal becomes zero
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40)));
#endif
}

BERT_FAST_INLINE void prefetch(const void* p) { _mm_prefetch(p, _MM_HINT_T0); }
BERT_FAST_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
BERT_FAST_INLINE void store(bfloat16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
BERT_FAST_INLINE void store(float* p, Vec v, int64_t count) {
  if (count >= LANES) return store(p, v);
  _mm512_mask_storeu_ps(p, lane_mask(count), v);
}
BERT_FAST_INLINE void store(bfloat16* p, Vec v, int64_t count) {
  if (count >= LANES) return store(p, v);
  _mm256_mask_storeu_epi16(p, lane_mask(count), narrow(v));
}

BERT_FAST_INLINE Vec first(Vec v, int64_t count) { return _mm512_maskz_mov_ps(lane_mask(count), v); }
BERT_FAST_INLINE Vec first(Vec v, int64_t count, Vec fill) {
  return count >= LANES ? v : static_cast<Vec>(_mm512_mask_mov_ps(fill, lane_mask(count), v));
}
BERT_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
BERT_FAST_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
BERT_FAST_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
BERT_FAST_INLINE Vec select_ge(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), no, yes);
}
BERT_FAST_INLINE Vec add_exponent(Vec v, Vec n) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), exponent));
}
BERT_FAST_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
BERT_FAST_INLINE float lowest(Vec v) { return _mm512_reduce_min_ps(v); }
BERT_FAST_INLINE float highest(Vec v) { return _mm512_reduce_max_ps(v); }

BERT_FAST_INLINE Vec kept(Vec v, const uint8_t* p, int threshold) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_maskz_mov_ps(_mm_cmpgt_epu8_mask(bytes, _mm_set1_epi8(static_cast<char>(threshold - 1))), v);
}

typedef uint64_t Wide __attribute__((vector_size(64)));
constexpr int WIDE_LANES = 8;

BERT_FAST_INLINE Wide count_up() { return Wide{0, 1, 2, 3, 4, 5, 6, 7}; }
BERT_FAST_INLINE Wide multiply_low(Wide a, uint32_t factor) {
  return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(factor)));
}
BERT_FAST_INLINE void store_pairs(uint8_t* p, Wide a, Wide b) {
  const __m512i left = reinterpret_cast<__m512i>(a), right = reinterpret_cast<__m512i>(b);
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64(left, low, right));
  _mm512_storeu_si512(p + 64, _mm512_permutex2var_epi64(left, high, right));
}

// Integer vectors of GCC's own, too: an array of __m512i accumulators would be spilt.
typedef int Bits __attribute__((vector_size(64)));
typedef int Ints __attribute__((vector_size(64)));

BERT_FAST_INLINE Bits to_bits(Vec v) { return reinterpret_cast<Bits>(v); }
BERT_FAST_INLINE Vec from_bits(Bits bits) { return reinterpret_cast<Vec>(bits); }
BERT_FAST_INLINE Bits load_bits(const void* p) { return reinterpret_cast<Bits>(_mm512_loadu_si512(p)); }
BERT_FAST_INLINE Bits set1_bits(const void* p) {
  int32_t lane;
  std::memcpy(&lane, p, sizeof lane);
  return reinterpret_cast<Bits>(_mm512_set1_epi32(lane));
}
// One bfloat16 of each lane as float. Not with operators: GCC would take apart what it then broadcasts, in other
// registers.
BERT_FAST_INLINE Vec high_half(Bits v) {
  return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(0xaaaaaaaa, reinterpret_cast<__m512i>(v)));
}
BERT_FAST_INLINE Vec low_half(Bits v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(reinterpret_cast<__m512i>(v), 16));
}
BERT_FAST_INLINE Vec dot2(Vec total, Bits a, Bits b) {
#if BERT_FAST_BF16
  return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
#else
  total = fma(high_half(a), high_half(b), total);
  return fma(low_half(a), low_half(b), total);
#endif
}
BERT_FAST_INLINE Ints dot4(Ints total, Bits a, Bits b) {
  const __m512i left = reinterpret_cast<__m512i>(a), right = reinterpret_cast<__m512i>(b);
#if BERT_FAST_VNNI
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(total), left, right));
#else  // by way of 16-bit products: vpmaddubsw would saturate
  const __m512i a_even = _mm512_maskz_mov_epi8(0x5555555555555555, left), a_odd = _mm512_srli_epi16(left, 8);
  const __m512i b_even = _mm512_srai_epi16(_mm512_slli_epi16(right, 8), 8), b_odd = _mm512_srai_epi16(right, 8);
  total += reinterpret_cast<Ints>(_mm512_madd_epi16(a_even, b_even));
  return total + reinterpret_cast<Ints>(_mm512_madd_epi16(a_odd, b_odd));
#endif
}
BERT_FAST_INLINE Vec to_float(Ints v) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(v)); }
BERT_FAST_INLINE Bits pack_pairs(Vec low, Vec high) {
#if BERT_FAST_BF16
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  return reinterpret_cast<Bits>(_mm512_permutexvar_epi16(order, halves));
#else
  const __m512i a = _mm512_cvtepu16_epi32(narrow(low)), b = _mm512_cvtepu16_epi32(narrow(high));
  return reinterpret_cast<Bits>(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
#endif
}
BERT_FAST_INLINE void store_bytes(uint8_t* p, Vec v, int64_t count) {
  _mm512_mask_cvtusepi32_storeu_epi8(p, lane_mask(count), _mm512_cvtps_epi32(v));
}

BERT_FAST_INLINE void transpose(Vec (&m)[LANES]) {
  Vec pairs[LANES];  // 2 x 2 blocks, then 4 x 4 blocks, then quarters, then halves
  for (int i = 0; i < LANES; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(m[i], m[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 1]);
  }
  Vec quads[LANES];
  for (int i = 0; i < LANES; i += 4) {
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      quads[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const Vec even_low = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const Vec odd_low = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    const Vec even_high = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const Vec odd_high = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    m[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    m[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    m[i + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    m[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
