// What the native tests share: CHECK, seeded random cases, memory that ends where a kernel must stop, and tolerances.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "../../csrc/dispatch.h"
#include "../../csrc/kernel_table.h"
#include "../../csrc/packing.h"

namespace bert_fast {

// What is being tested, for the message of a failure.
inline thread_local std::string context;

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n  in %s\n", file, line, what.c_str(), context.c_str());
  std::abort();
}

#define CHECK(condition) \
  if (!(condition)) ::bert_fast::fail(__FILE__, __LINE__, #condition)

// Half the distance between 1 and the next float or bfloat16.
constexpr double FLOAT_EPS = 0x1p-24, BFLOAT16_EPS = 0x1p-8;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  // Of [low, high].
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  template <class T>
  const T& of(const std::vector<T>& values) {
    return values[static_cast<size_t>(integer(0, static_cast<int64_t>(values.size()) - 1))];
  }
  std::vector<float> normals(int64_t count, float scale = 1.0f) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = scale * normal();
    return values;
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// test(random) for one seed after another until the time is over, and for `least` of them however slow the machine is.
template <class Test>
void fuzz(const char* name, double seconds, int64_t least, const Test& test) {
  const auto start = std::chrono::steady_clock::now();
  int64_t seed = 0;
  for (; seed < least || std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds;
       ++seed) {
    context = std::string(name) + ", seed " + std::to_string(seed);
    Random random(static_cast<uint64_t>(seed));
    test(random);
  }
  std::printf("%-28s %lld cases\n", name, static_cast<long long>(seed));
  std::fflush(stdout);
}

// The tables of this machine; the first is scalar, the specification.
inline std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> result;
  for (const std::string& name : available_isas()) {
    set_isa(name);
    result.push_back(&kernels());
  }
  return result;
}

// Memory of its own pages, not readable from its last element on: a sanitizer does not see the masked loads of AVX.
template <class T>
class Fenced {
 public:
  explicit Fenced(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t used = (bytes + page - 1) / page * page;
    mapped_ = used + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_ + used, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + used - bytes);
    std::memset(static_cast<void*>(data_), CANARY, bytes);
  }
  Fenced(const Fenced& other) : Fenced(other.count_) {
    std::memcpy(static_cast<void*>(data_), other.data_, static_cast<size_t>(count_) * sizeof(T));
  }
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(base_, mapped_); }

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

  // Whether element i has the bits that the memory had at first.
  bool is_untouched(int64_t i) const {
    uint8_t fresh[sizeof(T)];
    std::memset(fresh, CANARY, sizeof(T));
    return std::memcmp(data_ + i, fresh, sizeof(T)) == 0;
  }

 private:
  static constexpr int CANARY = 0xff;  // NaN as a float and as a bfloat16

  int64_t count_;
  size_t mapped_;
  uint8_t* base_;
  T* data_;
};

template <class T>
bool same_bits(const Fenced<T>& a, const Fenced<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), static_cast<size_t>(a.size()) * sizeof(T)) == 0;
}

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
T from_float(float value) {
  if constexpr (sizeof(T) == 2) {
    return to_bfloat16(value);
  } else {
    return value;
  }
}

// Rounding to T once, as a part of the value; two results that straddle a boundary differ by twice that.
template <class T>
constexpr double EPS = sizeof(T) == 2 ? BFLOAT16_EPS : FLOAT_EPS;

template <class T>
Fenced<T> random_memory(Random& random, int64_t count, float scale = 1.0f) {
  Fenced<T> memory(count);
  for (int64_t i = 0; i < count; ++i) memory[i] = from_float<T>(scale * random.normal());
  return memory;
}

// Equal up to `tolerance`, or both NaN, or the same infinity.
inline bool is_close(double expected, double actual, double tolerance) {
  if (std::isnan(expected) || std::isnan(actual)) return std::isnan(expected) && std::isnan(actual);
  return expected == actual || std::abs(expected - actual) <= tolerance;
}

inline std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.9g", value);
  return digits;
}

#define CHECK_CLOSE(expected, actual, tolerance)           \
  if (!::bert_fast::is_close(expected, actual, tolerance)) \
  ::bert_fast::fail(__FILE__, __LINE__, text(actual) + ", expected " + text(expected) + " within " + text(tolerance))

void test_linear();
void test_rows();
void test_training_rows();
void test_attention();
void test_encoder();
void test_threads();
void test_memory();
void test_offsets();
void test_attention_training();
void test_dense();

}  // namespace bert_fast
