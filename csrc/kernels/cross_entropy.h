// Cross-entropy of rows of logits, forward and backward in one: the losses, and in the logits' place their gradient,
// softmax(logits + bias) - onehot(labels). In float; a row with a NaN or +infinity becomes NaN, and no other does.
#pragma once

#include "../training_table.h"

namespace bert_fast::BERT_FAST_ISA {

// out = logits + bias; returns the largest.
template <class T>
BERT_FAST_INLINE float add_bias(const T* logits, const float* bias, int64_t classes, float* out) {
  constexpr int n = 4;  // maxima side by side: each waits for the one before
  const Vec lowest = set1(-std::numeric_limits<float>::infinity());
  Vec largest[n] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + n * LANES <= classes; i += n * LANES) {
    for (int v = 0; v < n; ++v) {
      const Vec x = load(logits + i + v * LANES) + load(bias + i + v * LANES);
      largest[v] = max(largest[v], x);
      store(out + i + v * LANES, x);
    }
  }
  for (; i < classes; i += LANES) {
    const int64_t left = classes - i;
    const Vec x = load(logits + i, left) + load(bias + i, left);
    largest[0] = max(largest[0], first(x, left, lowest));
    store(out + i, x, left);
  }
  return highest(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// scratch: `classes` floats.
template <class T>
void cross_entropy(const CrossEntropy<T>& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t classes = args.classes;
  for (int64_t row = begin; row < end; ++row) {
    T* const logits = args.logits + row * classes;
    float* values;
    if constexpr (std::is_same_v<T, float>) {
      values = logits;
    } else {
      values = scratch;
    }
    const float largest = add_bias(logits, args.bias, classes, values);
    // The label stands aside: its gradient is minus the sum of the others, which near 0 has more digits than p - 1.
    float& label = values[args.labels[row]];
    const float distance = label - largest, of_label = std::exp(distance);
    label = -std::numeric_limits<float>::infinity();
    Vec total = set1(0.0f);
    constexpr int64_t block_size = 32 * LANES;  // a long sum, in blocks, rounds less
    for (int64_t block = 0; block < classes; block += block_size) {
      Vec partial = set1(0.0f);
      for (int64_t i = block; i < std::min(block + block_size, classes); i += LANES) {
        const int64_t left = classes - i;
        constexpr float log2_e = 1.44269504f;
        const Vec e = exp2((load(values + i, left) - set1(largest)) * set1(log2_e));
        store(values + i, e, left);
        partial = partial + first(e, left);
      }
      total = total + partial;
    }
    const float others = sum(total), inverse = 1.0f / (others + of_label);
    args.losses[row] = std::log1p(others + (of_label - 1.0f)) - distance;
    label = 0.0f - others;
    for (int64_t i = 0; i < classes; i += LANES)
      store(logits + i, load(values + i, classes - i) * set1(inverse), classes - i);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
