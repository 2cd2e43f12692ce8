// Eight lanes of float: AVX2 and FMA. The interface is specified in scalar.h.
#pragma once

#include "../kernel_table.h"
#include "../target.h"

namespace bert_fast::BERT_FAST_ISA {

// Not __m256: GCC keeps arrays of that type, which may alias anything, in memory instead of in registers.
typedef float Vec __attribute__((vector_size(32)));
constexpr int LANES = 8;
constexpr int TILE_ROWS = 6;
constexpr int TILE_ROWS_DOT2 = 4;  // more would be spilt: each half of a pair takes registers of its own
constexpr int TILE_ROWS_DOT4 = 4;
constexpr int TILE_VECTORS = 2;
constexpr bool HAS_DOT2 = false;

BERT_FAST_INLINE Vec set1(float value) { return _mm256_set1_ps(value); }

// All bits set in the first `count` lanes.
BERT_FAST_INLINE __m256i lane_mask(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<int64_t>(count, LANES))), lanes);
}

BERT_FAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
BERT_FAST_INLINE Vec load(const bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
BERT_FAST_INLINE Vec load(const float* p, int64_t count) {
  return count >= LANES ? load(p) : static_cast<Vec>(_mm256_maskload_ps(p, lane_mask(count)));
}
BERT_FAST_INLINE Vec load(const bfloat16* p, int64_t count) {
  if (count >= LANES) return load(p);
  bfloat16 lanes[LANES] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

BERT_FAST_INLINE void prefetch(const void* p) { _mm_prefetch(p, _MM_HINT_T0); }
BERT_FAST_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
BERT_FAST_INLINE void store(bfloat16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
BERT_FAST_INLINE void store(float* p, Vec v, int64_t count) {
  if (count >= LANES) return store(p, v);
  _mm256_maskstore_ps(p, lane_mask(count), v);
}
BERT_FAST_INLINE void store(bfloat16* p, Vec v, int64_t count) {
  if (count >= LANES) return store(p, v);
  bfloat16 lanes[LANES];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

BERT_FAST_INLINE Vec first(Vec v, int64_t count) { return _mm256_and_ps(v, _mm256_castsi256_ps(lane_mask(count))); }
BERT_FAST_INLINE Vec first(Vec v, int64_t count, Vec fill) {
  return count >= LANES ? v : static_cast<Vec>(_mm256_blendv_ps(fill, v, _mm256_castsi256_ps(lane_mask(count))));
}
BERT_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
BERT_FAST_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
BERT_FAST_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
BERT_FAST_INLINE Vec select_ge(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
BERT_FAST_INLINE Vec add_exponent(Vec v, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponent));
}
BERT_FAST_INLINE float sum(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
BERT_FAST_INLINE float lowest(Vec v) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}
BERT_FAST_INLINE float highest(Vec v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

BERT_FAST_INLINE Vec kept(Vec v, const uint8_t* p, int threshold) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(bytes, _mm256_set1_epi32(threshold - 1))));
}

typedef uint64_t Wide __attribute__((vector_size(32)));
constexpr int WIDE_LANES = 4;

BERT_FAST_INLINE Wide count_up() { return Wide{0, 1, 2, 3}; }
BERT_FAST_INLINE Wide multiply_low(Wide a, uint32_t factor) {
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(factor)));
}
BERT_FAST_INLINE void store_pairs(uint8_t* p, Wide a, Wide b) {
  const __m256i left = reinterpret_cast<__m256i>(a), right = reinterpret_cast<__m256i>(b);
  const __m256i even = _mm256_unpacklo_epi64(left, right), odd = _mm256_unpackhi_epi64(left, right);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), _mm256_permute2x128_si256(even, odd, 0x31));
}

typedef int Bits __attribute__((vector_size(32)));
typedef int Ints __attribute__((vector_size(32)));

BERT_FAST_INLINE Bits to_bits(Vec v) { return reinterpret_cast<Bits>(v); }
BERT_FAST_INLINE Vec from_bits(Bits bits) { return reinterpret_cast<Vec>(bits); }
BERT_FAST_INLINE Bits load_bits(const void* p) {
  return reinterpret_cast<Bits>(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
BERT_FAST_INLINE Bits set1_bits(const void* p) {
  int32_t lane;
  std::memcpy(&lane, p, sizeof lane);
  return reinterpret_cast<Bits>(_mm256_set1_epi32(lane));
}
// One bfloat16 of each lane as float. Not with operators: GCC would take apart what it then broadcasts, in other
// registers.
BERT_FAST_INLINE Vec high_half(Bits v) {
  return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_setzero_si256(), reinterpret_cast<__m256i>(v), 0xaa));
}
BERT_FAST_INLINE Vec low_half(Bits v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(reinterpret_cast<__m256i>(v), 16));
}
BERT_FAST_INLINE Vec dot2(Vec total, Bits a, Bits b) {
  total = fma(high_half(a), high_half(b), total);
  return fma(low_half(a), low_half(b), total);
}
// By way of 16-bit products: vpmaddubsw would saturate.
BERT_FAST_INLINE Ints dot4(Ints total, Bits a, Bits b) {
  const __m256i left = reinterpret_cast<__m256i>(a), right = reinterpret_cast<__m256i>(b);
  // Shifts, because a mask would take a register from the sums.
  const __m256i a_even = _mm256_srli_epi16(_mm256_slli_epi16(left, 8), 8), a_odd = _mm256_srli_epi16(left, 8);
  const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(right, 8), 8), b_odd = _mm256_srai_epi16(right, 8);
  total += reinterpret_cast<Ints>(_mm256_madd_epi16(a_even, b_even));
  return total + reinterpret_cast<Ints>(_mm256_madd_epi16(a_odd, b_odd));
}
BERT_FAST_INLINE Vec to_float(Ints v) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(v)); }
BERT_FAST_INLINE Bits pack_pairs(Vec low, Vec high) {
  bfloat16 lows[LANES], highs[LANES], pairs[2 * LANES];
  store(lows, low);
  store(highs, high);
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lows));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(highs));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs), _mm_unpacklo_epi16(a, b));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs + LANES), _mm_unpackhi_epi16(a, b));
  return load_bits(pairs);
}
BERT_FAST_INLINE void store_bytes(uint8_t* p, Vec v, int64_t count) {
  const __m256i lanes = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extractf128_si256(lanes, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  if (count >= LANES) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  uint8_t all[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), bytes);
  for (int64_t i = 0; i < count; ++i) p[i] = all[i];
}

BERT_FAST_INLINE void transpose(Vec (&m)[LANES]) {
  Vec pairs[LANES];  // 2 x 2 blocks, then 4 x 4 blocks, then the halves
  for (int i = 0; i < LANES; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(m[i], m[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
  }
  Vec quads[LANES];
  for (int i = 0; i < LANES; i += 4) {
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    m[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    m[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
