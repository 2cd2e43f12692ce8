#include "packing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

namespace {

// What a huge page has on x86-64 and, with pages of 4 KB, on Arm.
constexpr size_t HUGE_PAGE = size_t{2} << 20;

// Less than a huge page would only waste one.
std::align_val_t alignment(int64_t bytes) {
  return std::align_val_t{static_cast<size_t>(bytes) >= HUGE_PAGE ? HUGE_PAGE : 64};
}

}  // namespace

PanelMemory::PanelMemory(int64_t bytes)
    : size_(bytes), memory_(static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), alignment(bytes)))) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole pages only; a system without them refuses, and nothing is lost.
  if (alignment(bytes) == std::align_val_t{HUGE_PAGE})
    madvise(memory_, static_cast<size_t>(bytes) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
}

PanelMemory::~PanelMemory() { ::operator delete(memory_, alignment(size_)); }

uint8_t* PanelMemory::take(int64_t bytes) {
  if (bytes > size_ - used_) throw std::bad_alloc();
  uint8_t* const taken = memory_ + used_;
  used_ += (bytes + 63) / 64 * 64;
  return taken;
}

OutlierChannels strongest(const std::vector<float>& strengths) {
  std::vector<int64_t> channels(strengths.size());
  std::iota(channels.begin(), channels.end(), 0);
  const int64_t count = std::min(OUTLIERS, static_cast<int64_t>(channels.size()));
  std::partial_sort(channels.begin(), channels.begin() + count, channels.end(), [&](int64_t a, int64_t b) {
    const float x = strengths[static_cast<size_t>(a)], y = strengths[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  OutlierChannels result;
  result.fill(channels[0]);
  std::copy_n(channels.begin(), count, result.begin());
  return result;
}

OutlierChannels outliers_by_largest_weight(const float* weight, int64_t out_features, int64_t in_features) {
  std::vector<float> largest(static_cast<size_t>(in_features), 0.0f);
  for (int64_t i = 0; i < out_features; ++i)
    for (int64_t k = 0; k < in_features; ++k) {
      float& value = largest[static_cast<size_t>(k)];
      value = std::max(value, std::abs(weight[i * in_features + k]));  // a NaN is not larger
    }
  return strongest(largest);
}

void add_writing_strengths(const float* weight, int64_t in_features, std::vector<float>& strengths) {
  for (float& strength : strengths) {
    const float square = std::inner_product(weight, weight + in_features, weight, 0.0f);
    if (std::isfinite(square)) strength += square;
    weight += in_features;
  }
}

int64_t PackedWeight::panel_bytes(Precision precision, int64_t out_features, int64_t in_features) {
  return round_up_to_panel(out_features) * round_up_to_panel(in_features) * element_size(precision);
}

PackedWeight::PackedWeight(Precision precision, int64_t out_features, int64_t in_features,
                           const OutlierChannels& outliers, std::shared_ptr<PanelMemory> memory)
    : precision_(precision),
      out_features_(round_up_to_panel(out_features)),
      in_features_(in_features),
      depth_(round_up_to_panel(in_features)),
      memory_(memory != nullptr ? std::move(memory)
                                : std::make_shared<PanelMemory>(panel_bytes(precision, out_features, in_features))),
      panels_(memory_->take(panel_bytes(precision, out_features, in_features))),
      vectors_(allocate<float>(VECTOR_ROWS * out_features_)),
      outliers_(outliers) {
  constexpr int64_t max_int8_features = (int64_t{1} << 31) / (255 * 128);  // beyond, a sum may not fit 32 bits
  if (precision == Precision::int8 && in_features > max_int8_features)
    throw std::invalid_argument("int8 takes up to " + std::to_string(max_int8_features) + " in_features, not " +
                                std::to_string(in_features));
  std::memset(panels_, 0, static_cast<size_t>(panel_bytes(precision, out_features, in_features)));
  std::fill_n(vectors_.get(), VECTOR_ROWS * out_features_, 0.0f);
}

void PackedWeight::pack(const float* weight, const float* bias, int64_t begin, int64_t end, int64_t column) {
  for (int64_t i = begin; i < end; ++i, ++column) {
    const float* row = weight + i * in_features_;
    const int64_t panel = column / PANEL * PANEL * depth_, lane = column % PANEL;
    vector(BIAS)[column] = bias[i];
    if (precision_ == Precision::fp32) {
      scatter(row, in_features_, 1, reinterpret_cast<float*>(panels_) + panel + lane,
              [](float value) { return value; });
    } else if (precision_ == Precision::bf16) {
      scatter(row, in_features_, 2, reinterpret_cast<bfloat16*>(panels_) + panel + 2 * lane, to_bfloat16);
    } else {
      pack_int8(row, column);
    }
  }
}

void PackedWeight::pack_int8(const float* from, int64_t column) {
  std::vector<float> row(from, from + in_features_);
  float* outlier = vector(OUTLIER_WEIGHTS) + column;
  for (const int64_t channel : outliers_) {
    // One that comes twice counts once.
    if (channel >= 0) *outlier = std::exchange(row[static_cast<size_t>(channel)], 0.0f);
    outlier += out_features_;
  }
  float largest = 0.0f;
  bool is_finite = true;
  for (const float value : row) {
    largest = std::max(largest, std::abs(value));
    is_finite = is_finite && std::isfinite(value);
  }
  // A column with a NaN or an infinity gives NaN; one so small that the scale has no inverse counts as zero.
  const bool has_scale = largest >= 127.0f * std::numeric_limits<float>::min();
  const float scale = !is_finite ? std::numeric_limits<float>::quiet_NaN() : has_scale ? largest / 127.0f : 1.0f;
  const float inverse = is_finite ? 1.0f / scale : 0.0f;
  int64_t total = 0;
  int8_t* panel = reinterpret_cast<int8_t*>(panels_) + column / PANEL * PANEL * depth_;
  scatter(row.data(), in_features_, 4, panel + 4 * (column % PANEL), [&](float value) {
    const auto rounded = static_cast<int8_t>(is_finite ? std::nearbyint(value * inverse) : 0.0f);
    total += rounded;
    return rounded;
  });
  vector(SCALES)[column] = scale;
  vector(SUMS)[column] = scale * static_cast<float>(total);
}

PackedLinear PackedWeight::view() const {
  return {panels_,          vector(BIAS),  vector(SCALES), vector(SUMS), vector(OUTLIER_WEIGHTS),
          outliers_.data(), out_features_, depth_};
}

int64_t PackedWeight::bytes() const {
  return panel_bytes(precision_, out_features_, in_features_) +
         VECTOR_ROWS * out_features_ * static_cast<int64_t>(sizeof(float));
}

}  // namespace bert_fast
