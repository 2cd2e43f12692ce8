// Philox4x32 with seven rounds (Salmon et al., 2011): four random words for a key and a counter of four words.
// The counter of the columns [16 b, 16 b + 16) of a row is (b, row, row >> 32, plane), and their bytes are the words,
// one after another, as they lie in memory.
#pragma once

#include "../target.h"
#include "../training_table.h"

namespace bert_fast::BERT_FAST_ISA {

// Calls that are made side by side.
constexpr int64_t PHILOX_CALLS = 16;

// out[16 i + c]: byte of column c of call i, for the calls [first_block, first_block + PHILOX_CALLS) of a row.
BERT_FAST_INLINE void philox_bytes(uint64_t seed, uint64_t row, uint64_t plane, int64_t first_block, uint8_t* out) {
  constexpr uint64_t multipliers[] = {0xD2511F53, 0xCD9E8D57};
  constexpr uint32_t weyl[] = {0x9E3779B9, 0xBB67AE85};
  constexpr int rounds = 7, n = PHILOX_CALLS;
  uint32_t c0[n], c1[n], c2[n], c3[n];
  for (int i = 0; i < n; ++i) {
    c0[i] = static_cast<uint32_t>(first_block + i);
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(row >> 32);
    c3[i] = static_cast<uint32_t>(plane);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < rounds; ++round, k0 += weyl[0], k1 += weyl[1]) {
    for (int i = 0; i < n; ++i) {
      const uint64_t a = multipliers[0] * c0[i], b = multipliers[1] * c2[i];
      c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(b);
      c3[i] = static_cast<uint32_t>(a);
    }
  }
  uint32_t words[4 * n];
  for (int i = 0; i < n; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
  std::memcpy(out, words, sizeof words);
}

inline void random_bytes(uint64_t seed, int64_t row, int64_t plane, int64_t blocks, uint8_t* out) {
  for (int64_t block = 0; block < blocks; block += PHILOX_CALLS) {
    uint8_t bytes[PHILOX_CALLS * DROPOUT_COLUMNS];
    philox_bytes(seed, static_cast<uint64_t>(row), static_cast<uint64_t>(plane), block, bytes);
    const int64_t count = std::min(PHILOX_CALLS, blocks - block) * DROPOUT_COLUMNS;
    std::memcpy(out + block * DROPOUT_COLUMNS, bytes, static_cast<size_t>(count));
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
