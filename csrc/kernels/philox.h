// Philox4x32 with seven rounds (Salmon et al., 2011): four random words for a key and a counter of four words.
// The counter of the columns [16 b, 16 b + 16) of a row is (b, row, row >> 32, plane), and their bytes are the words,
// one after another, as they lie in memory.
#pragma once

#include "../target.h"
#include "../training_table.h"

namespace bert_fast::BERT_FAST_ISA {

// Calls that are made side by side.
constexpr int64_t PHILOX_CALLS = PHILOX_COLUMNS / DROPOUT_COLUMNS;

// WIDE_LANES calls, from counters of four words to 16 bytes each. A word is the low half of a lane; what is in the high
// half is never read.
BERT_FAST_INLINE void philox(uint64_t seed, Wide c0, Wide c1, Wide c2, Wide c3, uint8_t* out) {
  constexpr uint32_t multipliers[] = {0xD2511F53, 0xCD9E8D57}, weyl[] = {0x9E3779B9, 0xBB67AE85};
  constexpr int rounds = 7;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < rounds; ++round, k0 += weyl[0], k1 += weyl[1]) {
    const Wide a = multiply_low(c0, multipliers[0]), b = multiply_low(c2, multipliers[1]);
    c0 = (b >> 32) ^ c1 ^ uint64_t{k0};
    c2 = (a >> 32) ^ c3 ^ uint64_t{k1};
    c1 = b;
    c3 = a;
  }
  constexpr uint64_t low = 0xffffffff;
  store_pairs(out, (c0 & low) | (c1 << 32), (c2 & low) | (c3 << 32));
}

// out[16 i + c]: byte of column c of call i, for the calls [first_block, first_block + PHILOX_CALLS) of a row.
BERT_FAST_INLINE void philox_bytes(uint64_t seed, uint64_t row, uint64_t plane, int64_t first_block, uint8_t* out) {
  for (int64_t call = 0; call < PHILOX_CALLS; call += WIDE_LANES)
    philox(seed, count_up() + static_cast<uint64_t>(first_block + call), Wide{} + row, Wide{} + (row >> 32),
           Wide{} + plane, out + call * DROPOUT_COLUMNS);
}

// The same for one block of many rows: out[16 i + c] is the byte of column c of the i-th of `count` rows, a multiple of
// WIDE_LANES.
BERT_FAST_INLINE void philox_rows(uint64_t seed, const uint64_t* rows, int64_t count, uint64_t plane, int64_t block,
                                  uint8_t* out) {
  for (int64_t i = 0; i < count; i += WIDE_LANES) {
    Wide row;
    std::memcpy(&row, rows + i, sizeof row);
    philox(seed, Wide{} + static_cast<uint64_t>(block), row, row >> 32, Wide{} + plane, out + i * DROPOUT_COLUMNS);
  }
}

inline void random_bytes(uint64_t seed, int64_t row, int64_t plane, int64_t blocks, uint8_t* out) {
  int64_t block = 0;
  for (; block + PHILOX_CALLS <= blocks; block += PHILOX_CALLS)
    philox_bytes(seed, static_cast<uint64_t>(row), static_cast<uint64_t>(plane), block, out + block * DROPOUT_COLUMNS);
  if (block == blocks) return;
  uint8_t bytes[PHILOX_COLUMNS];
  philox_bytes(seed, static_cast<uint64_t>(row), static_cast<uint64_t>(plane), block, bytes);
  std::memcpy(out + block * DROPOUT_COLUMNS, bytes, static_cast<size_t>((blocks - block) * DROPOUT_COLUMNS));
}

}  // namespace bert_fast::BERT_FAST_ISA
