// Weights in the order in which products read them (PackedLinear in kernel_table.h), the same for every instruction
// set.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

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

// Memory for the panels of many weights, one after another, in huge pages where the system has them: a forward reads
// all weights from end to end, and on a short text it would wait for the look-up of each page of 4 KB.
class PanelMemory {
 public:
  // std::bad_alloc when there is not enough.
  explicit PanelMemory(int64_t bytes);
  ~PanelMemory();
  PanelMemory(const PanelMemory&) = delete;
  PanelMemory& operator=(const PanelMemory&) = delete;

  // The next so many bytes; std::bad_alloc when there are no more.
  uint8_t* take(int64_t bytes);

 private:
  int64_t size_, used_ = 0;
  uint8_t* memory_;
};

// int8: the input channels of a product that stay float. A few channels are far larger than the others in some tokens,
// and would leave the others few of a row's 255 steps; their weights tell which, so no text is needed to calibrate.
// Negative for none.
using OutlierChannels = std::array<int64_t, OUTLIERS>;
constexpr OutlierChannels NO_OUTLIERS{-1, -1};

// The channels with the largest strengths, of which there is at least one; the first again where there are too few.
OutlierChannels strongest(const std::vector<float>& strengths);

// Where the input is inside a layer (context, wide activations): the channels with the largest single weights. A neuron
// that is trained to be an outlier is read with weights to match.
OutlierChannels outliers_by_largest_weight(const float* weight, int64_t out_features, int64_t in_features);

// Where the input is the residual stream, a channel of which is the same one in every layer: the strongest ones, over
// the wide matrices of all layers that add to it, each (hidden_size, in_features). Adds the squares of the weights of
// one to `strengths` (hidden_size), except of rows that are not finite.
void add_writing_strengths(const float* weight, int64_t in_features, std::vector<float>& strengths);

// Owns a packed weight matrix and its bias.
class PackedWeight {
 public:
  // Of (out_features, in_features); all zero until packed. Panels in `memory`, or in memory of their own.
  PackedWeight(Precision precision, int64_t out_features, int64_t in_features,
               const OutlierChannels& outliers = NO_OUTLIERS, std::shared_ptr<PanelMemory> memory = nullptr);

  // What the panels of such a weight take.
  static int64_t panel_bytes(Precision precision, int64_t out_features, int64_t in_features);

  // Rows [begin, end) of a source matrix (rows, in_features) become the columns from `column` on; thread-safe for
  // different columns.
  void pack(const float* weight, const float* bias, int64_t begin, int64_t end, int64_t column);

  PackedLinear view() const;
  int64_t panels() const { return out_features_ / PANEL; }
  int64_t bytes() const;

 private:
  enum VectorRow : int64_t { BIAS, SCALES, SUMS, OUTLIER_WEIGHTS, VECTOR_ROWS = OUTLIER_WEIGHTS + OUTLIERS };

  float* vector(VectorRow row) const { return vectors_.get() + row * out_features_; }
  void pack_int8(const float* row, int64_t column);

  Precision precision_;
  int64_t out_features_, in_features_, depth_;  // the first padded to whole panels, the last is in_features padded
  std::shared_ptr<PanelMemory> memory_;
  uint8_t* panels_;
  Aligned<float> vectors_;  // (VECTOR_ROWS, out_features)
  OutlierChannels outliers_;
};

}  // namespace bert_fast
