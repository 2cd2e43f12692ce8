#include "packing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

namespace bert_fast {
namespace {

int64_t element_size(Precision precision) {
  return precision == Precision::fp32 ? 4 : precision == Precision::bf16 ? 2 : 1;
}

// One column, its values `group` at a time, PANEL groups apart.
template <class T, class Convert>
void scatter(const float* row, int64_t size, int64_t group, T* to, const Convert& convert) {
  for (int64_t k = 0; k < size; ++k) to[k / group * PANEL * group + k % group] = convert(row[k]);
}

}  // namespace

PackedWeight::PackedWeight(Precision precision, int64_t out_features, int64_t in_features)
    : precision_(precision),
      out_features_(round_up_to_panel(out_features)),
      in_features_(in_features),
      depth_(round_up_to_panel(in_features)),
      panels_(allocate<uint8_t>(out_features_ * depth_ * element_size(precision))),
      vectors_(allocate<float>(3 * out_features_)) {
  constexpr int64_t max_int8_features = (int64_t{1} << 31) / (255 * 128);  // beyond, a sum may not fit 32 bits
  if (precision == Precision::int8 && in_features > max_int8_features)
    throw std::invalid_argument("int8 takes up to " + std::to_string(max_int8_features) + " in_features, not " +
                                std::to_string(in_features));
  std::memset(panels_.get(), 0, static_cast<size_t>(out_features_ * depth_ * element_size(precision)));
  std::fill_n(vectors_.get(), 3 * out_features_, 0.0f);
}

void PackedWeight::pack(const float* weight, const float* bias, int64_t begin, int64_t end, int64_t column) {
  for (int64_t i = begin; i < end; ++i, ++column) {
    const float* row = weight + i * in_features_;
    const int64_t panel = column / PANEL * PANEL * depth_, lane = column % PANEL;
    vectors_[column] = bias[i];
    if (precision_ == Precision::fp32) {
      scatter(row, in_features_, 1, reinterpret_cast<float*>(panels_.get()) + panel + lane,
              [](float value) { return value; });
    } else if (precision_ == Precision::bf16) {
      scatter(row, in_features_, 2, reinterpret_cast<bfloat16*>(panels_.get()) + panel + 2 * lane, to_bfloat16);
    } else {
      float largest = 0.0f;
      bool is_finite = true;
      for (int64_t k = 0; k < in_features_; ++k) {
        largest = std::max(largest, std::abs(row[k]));
        is_finite = is_finite && std::isfinite(row[k]);
      }
      // A column with a NaN or an infinity gives NaN; one so small that the scale has no inverse counts as zero.
      const bool has_scale = largest >= 127.0f * std::numeric_limits<float>::min();
      const float scale = !is_finite ? std::numeric_limits<float>::quiet_NaN() : has_scale ? largest / 127.0f : 1.0f;
      const float inverse = is_finite ? 1.0f / scale : 0.0f;
      int64_t total = 0;
      scatter(row, in_features_, 4, reinterpret_cast<int8_t*>(panels_.get()) + panel + 4 * lane, [&](float value) {
        const auto rounded = static_cast<int8_t>(is_finite ? std::nearbyint(value * inverse) : 0.0f);
        total += rounded;
        return rounded;
      });
      vectors_[out_features_ + column] = scale;
      vectors_[2 * out_features_ + column] = scale * static_cast<float>(total);
    }
  }
}

PackedLinear PackedWeight::view() const {
  const float* vectors = vectors_.get();
  return {panels_.get(), vectors, vectors + out_features_, vectors + 2 * out_features_, depth_};
}

int64_t PackedWeight::bytes() const {
  return out_features_ * depth_ * element_size(precision_) + 3 * out_features_ * static_cast<int64_t>(sizeof(float));
}

}  // namespace bert_fast
