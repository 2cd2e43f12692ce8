// Rows further apart than 2^31 elements, in memory that is reserved but not there: the same bits as rows side by side.
#include <algorithm>

#include "check.h"

namespace bert_fast {
namespace {

constexpr int64_t FAR = (int64_t{1} << 31) + 64;  // elements, more than 32 bits count, from one row to the next

// `count` elements of which only the pages that are touched exist.
template <class T>
class Sparse {
 public:
  explicit Sparse(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
  }
  Sparse(const Sparse&) = delete;
  ~Sparse() { munmap(data_, bytes_); }
  T* data() const { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

// Rows in both places, `stride` apart and FAR apart.
template <class T>
struct Rows {
  int64_t count, size, stride;
  Fenced<T> near;
  Sparse<T> far;

  Rows(Random& random, int64_t rows, int64_t n, float scale = 1.0f)
      : count(rows), size(n), stride(n + 5), near(rows * stride), far((rows - 1) * FAR + stride) {
    for (int64_t i = 0; i < near.size(); ++i) {
      near[i] = from_float<T>(i % stride < n ? scale * random.normal() : 0.0f);
      far.data()[i / stride * FAR + i % stride] = near[i];
    }
  }
  void check() const {
    for (int64_t row = 0; row < count; ++row)
      CHECK(std::memcmp(near.data() + row * stride, far.data() + row * FAR, static_cast<size_t>(size) * sizeof(T)) ==
            0);
  }
};

template <class T>
void check_linear(Random& random, const KernelTable& isa, Precision precision) {
  constexpr int64_t in_features = 64, out_features = 64, rows = 3;
  PackedWeight weight(precision, out_features, in_features);
  const auto values = random.normals(out_features * in_features), bias = random.normals(out_features);
  weight.pack(values.data(), bias.data(), 0, out_features, 0);
  const Rows<T> input(random, rows, in_features);
  const Rows<float> out(random, rows, out_features), residual(random, rows, out_features);
  const Fenced<RowCode> codes(rows);  // no bytes here
  const auto run = [&](const void* x, int64_t x_stride, float* y, int64_t y_stride, const float* r, int64_t r_stride) {
    isa.precisions[static_cast<int>(precision)].linear(
        {weight.view(), x, x_stride, codes.data(), y, y_stride, r, r_stride, Activation::none}, 0, rows, 0,
        weight.panels());
  };
  run(input.near.data(), input.stride, out.near.data(), out.stride, residual.near.data(), residual.stride);
  run(input.far.data(), FAR, out.far.data(), FAR, residual.far.data(), FAR);
  out.check();
}

template <class T>
void check_attention(Random& random, const KernelTable& isa) {
  constexpr int64_t head_dim = 34, length = 3;
  const Rows<T> q(random, length, head_dim), k(random, length, head_dim), v(random, length, head_dim);
  const Rows<T> out(random, length, head_dim), other(random, length, head_dim);
  const Fenced<float> scratch(attention_scratch_size(length, head_dim));
  const auto run = [&](const Rows<T>& to, bool is_far, const int64_t* rows) {
    const auto start = [&](const Rows<T>& from) { return is_far ? from.far.data() : from.near.data(); };
    const int64_t stride = is_far ? FAR : q.stride;
    const AttentionStrides strides{stride, stride, head_dim};
    isa.of<T>().attention({start(q), start(k), start(v), start(to), strides, strides, strides, strides, head_dim, 0.2f},
                          {{0, length, rows}, 0, 0, length}, scratch.data());
  };
  run(out, false, nullptr);
  run(out, true, nullptr);
  out.check();
  const int64_t rows[] = {0, 1, 2};
  run(other, false, rows);
  run(other, true, rows);
  other.check();
}

// Kernels over contiguous rows: the last rows of a region of more than 2^31 elements.
template <class T>
void check_contiguous(Random& random, const KernelTable& isa) {
  constexpr int64_t size = 48, rows = 2, begin = (int64_t{1} << 31) / size + 1;
  const Fenced<T> x = random_memory<T>(random, rows * size), weight = random_memory<T>(random, size);
  const Fenced<T> bias = random_memory<T>(random, size), expected(rows * size);
  const Sparse<T> far_x((begin + rows) * size), far_out((begin + rows) * size);
  const Fenced<float> scratch(size), sums(rows * size), own_sums(rows * size);
  const auto check = [&] {
    CHECK(std::memcmp(expected.data(), far_out.data() + begin * size, static_cast<size_t>(rows * size) * sizeof(T)) ==
          0);
  };
  std::memcpy(static_cast<void*>(far_x.data() + begin * size), x.data(), static_cast<size_t>(rows * size) * sizeof(T));
  const LayerNorm<T> norm{weight.data(), bias.data(), size, 1e-5f};
  isa.of<T>().bias_gelu({x.data(), bias.data(), expected.data(), size, false}, 0, rows);
  isa.of<T>().bias_gelu({far_x.data(), bias.data(), far_out.data(), size, false}, begin, begin + rows);
  check();
  isa.of<T>().residual_layer_norm({x.data(), bias.data(), x.data(), expected.data(), norm}, 0, rows, scratch.data());
  isa.of<T>().residual_layer_norm({far_x.data(), bias.data(), far_x.data(), far_out.data(), norm}, begin, begin + rows,
                                  scratch.data());
  check();
  const int64_t near_ids[] = {0, 1}, far_ids[] = {begin, begin + 1}, zeros[] = {0, 0};
  isa.of<T>().embedding_layer_norm({near_ids, near_ids, zeros, x.data(), x.data(), x.data(), expected.data(), norm}, 0,
                                   rows, scratch.data());
  isa.of<T>().embedding_layer_norm(
      {far_ids, far_ids, zeros, far_x.data(), far_x.data(), x.data(), far_out.data() + begin * size, norm}, 0, rows,
      scratch.data());
  check();
  isa.of<T>().embedding_sum({near_ids, near_ids, zeros, x.data(), x.data(), x.data(), size, sums.data(), size}, 0,
                            rows);
  isa.of<T>().embedding_sum(
      {far_ids, far_ids, zeros, far_x.data(), far_x.data(), x.data(), size, own_sums.data(), size}, 0, rows);
  CHECK(same_bits(sums, own_sums));
}

template <class T>
void check_strided(Random& random, const KernelTable& isa) {
  constexpr int64_t size = 40, rows = 3;
  const Rows<T> x(random, rows, size);
  const int32_t cu_seqlens[] = {0, 1, 3};
  const Fenced<T> pooled(2 * size), own_pooled(2 * size);
  isa.of<T>().pooling({x.near.data(), x.stride, cu_seqlens, pooled.data(), size, PoolingMode::mean}, 0, 2);
  isa.of<T>().pooling({x.far.data(), FAR, cu_seqlens, own_pooled.data(), size, PoolingMode::mean}, 0, 2);
  CHECK(same_bits(pooled, own_pooled));
  const Rows<float> sums(random, rows, size), hidden(random, rows, size);
  const Fenced<RowCode> codes(rows);
  const OutlierChannels outliers{3, size - 1};
  const Fenced<float> weight = random_memory<float>(random, size);
  const Fenced<uint8_t> bytes(rows * size);
  const Sparse<uint8_t> far_bytes((rows - 1) * FAR + size);
  const auto check = [&] {
    for (int64_t row = 0; row < rows; ++row)
      CHECK(std::memcmp(bytes.data() + row * size, far_bytes.data() + row * FAR, size) == 0);
  };
  isa.of<T>().quantize({x.near.data(), x.stride, size, bytes.data(), size, codes.data(), outliers.data()}, 0, rows);
  isa.of<T>().quantize({x.far.data(), FAR, size, far_bytes.data(), FAR, codes.data(), outliers.data()}, 0, rows);
  check();
  const LayerNorm<float> norm{weight.data(), weight.data(), size, 1e-5f};
  isa.precisions[2].normalize({sums.near.data(),
                               sums.stride,
                               norm,
                               {hidden.near.data(), hidden.stride, bytes.data(), size, codes.data(), outliers.data()}},
                              0, rows);
  isa.precisions[2].normalize(
      {sums.far.data(), FAR, norm, {hidden.far.data(), FAR, far_bytes.data(), FAR, codes.data(), outliers.data()}}, 0,
      rows);
  check();
  hidden.check();
}

}  // namespace

void test_offsets() {
  for (const KernelTable* isa : tables()) {
    context = std::string("offsets, ") + isa->name;
    Random random(0);
    check_linear<float>(random, *isa, Precision::fp32);
    check_linear<bfloat16>(random, *isa, Precision::bf16);
    check_attention<float>(random, *isa);
    check_attention<bfloat16>(random, *isa);
    check_contiguous<float>(random, *isa);
    check_contiguous<bfloat16>(random, *isa);
    check_strided<float>(random, *isa);
    check_strided<bfloat16>(random, *isa);
  }
  std::printf("offsets: past 2^31 elements\n");
}

}  // namespace bert_fast
