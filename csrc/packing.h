// Weights in the order in which products read them (PackedLinear in kernel_table.h), the same for every instruction
// set.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "kernel_table.h"

namespace bert_fast {

inline int64_t round_up_to_panel(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL; }

// Rounded to nearest even; a NaN stays one.
inline bfloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40 : rounded)};
}

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

// Memory that starts at a cache line.
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

// Uninitialised; std::bad_alloc when there is not enough.
template <class T>
Aligned<T> allocate(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  return Aligned<T>(static_cast<T*>(::operator new(bytes, std::align_val_t{64})));
}

// Owns a packed weight matrix and its bias.
class PackedWeight {
 public:
  // Of (out_features, in_features); all zero until packed.
  PackedWeight(Precision precision, int64_t out_features, int64_t in_features);

  // Rows [begin, end) of a source matrix (rows, in_features) become the columns from `column` on; thread-safe for
  // different columns.
  void pack(const float* weight, const float* bias, int64_t begin, int64_t end, int64_t column);

  PackedLinear view() const;
  int64_t panels() const { return out_features_ / PANEL; }
  int64_t bytes() const;

 private:
  Precision precision_;
  int64_t out_features_, in_features_, depth_;  // the first padded to whole panels, the last is in_features padded
  Aligned<uint8_t> panels_;
  Aligned<float> vectors_;  // bias, scales, sums
};

}  // namespace bert_fast
