// Memory for the intermediate results of an encoder, for a number of rows (tokens).
//
// Rows are a cache line longer than their values, so that a column of them does not fall into few sets of a cache; from
// the values up to a whole PANEL they are zero, because products read whole panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "packing.h"

namespace bert_fast {

// Rows of T, of `size` values each.
template <class T>
class RowBuffer {
 public:
  explicit RowBuffer(int64_t size) : stride_(round_up_to_panel(size) + 64 / static_cast<int64_t>(sizeof(T))) {}

  void reserve(int64_t rows) {
    if (rows <= rows_) return;
    // What was there goes first: its values are of no use, and both at once may not fit.
    memory_.reset();
    rows_ = 0;
    const int64_t count = rows * stride_;
    memory_ = allocate<T>(count);
    std::memset(static_cast<void*>(memory_.get()), 0, static_cast<size_t>(count) * sizeof(T));
    rows_ = rows;
  }

  T* row(int64_t index) const { return memory_.get() + index * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_, rows_ = 0;
  Aligned<T> memory_;
};

// Rows of the type that a precision needs.
class TypedBuffer {
 public:
  TypedBuffer(int64_t size, int64_t element_size)
      : element_size_(element_size), bytes_(round_up_to_panel(size) * element_size) {}

  void reserve(int64_t rows) { bytes_.reserve(rows); }
  void* row(int64_t index) const { return bytes_.row(index); }
  int64_t stride() const { return bytes_.stride() / element_size_; }

 private:
  int64_t element_size_;
  RowBuffer<uint8_t> bytes_;
};

class Workspace {
 public:
  Workspace(Precision precision, int64_t hidden_size, int64_t intermediate_size)
      : hidden(hidden_size),
        product(std::max(hidden_size, int64_t{1})),
        input(hidden_size, input_size(precision)),
        qkv(3 * round_up_to_panel(hidden_size), precision == Precision::fp32 ? 4 : 2),
        context(hidden_size, precision == Precision::fp32 ? 4 : 2),
        wide(intermediate_size, input_size(precision)),
        wide_sums(intermediate_size),
        precision_(precision) {}

  // Room for so many rows, so many of them wide, and so many floats of scratch; std::bad_alloc when there is none.
  void reserve(int64_t rows, int64_t wide_rows, int64_t scratch_size) {
    hidden.reserve(rows);
    product.reserve(rows);
    qkv.reserve(rows);
    context.reserve(rows);
    wide.reserve(wide_rows);
    if (precision_ != Precision::fp32) input.reserve(rows);
    if (precision_ == Precision::int8) {
      wide_sums.reserve(wide_rows);
      grow(codes, codes_size_, rows);
      grow(wide_codes, wide_codes_size_, wide_rows);
    }
    grow(scratch, scratch_size_, scratch_size);
  }

  RowBuffer<float> hidden;     // the residual stream
  RowBuffer<float> product;    // sums before LayerNorm
  TypedBuffer input;           // what a product reads: `hidden` or `context` in the precision's type; not for fp32
  TypedBuffer qkv, context;    // what attention reads and writes: float for fp32, bfloat16 otherwise
  TypedBuffer wide;            // activations of intermediate_size, in the precision's type
  RowBuffer<float> wide_sums;  // int8: the same before they are quantised
  Aligned<RowCode> codes, wide_codes;  // int8: of the rows of `input` and `wide`
  Aligned<float> scratch;

 private:
  static int64_t input_size(Precision precision) {
    return precision == Precision::fp32 ? 4 : precision == Precision::bf16 ? 2 : 1;
  }

  template <class T>
  static void grow(Aligned<T>& memory, int64_t& size, int64_t wanted) {
    if (wanted <= size) return;
    memory.reset();
    size = 0;
    memory = allocate<T>(wanted);
    size = wanted;
  }

  Precision precision_;
  int64_t codes_size_ = 0, wide_codes_size_ = 0, scratch_size_ = 0;
};

}  // namespace bert_fast
