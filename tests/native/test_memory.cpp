// No memory to work in: std::bad_alloc before anything is computed, and the encoder works on.
#include <atomic>
#include <cstddef>

#include "model.h"

namespace {

// How many more allocations succeed; negative: all.
std::atomic<int64_t> left{-1};

void* take(size_t size, size_t alignment) {
  if (left.load() >= 0 && left.fetch_sub(1) <= 0) {
    left = 0;  // from here on, none
    throw std::bad_alloc();
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, size == 0 ? 1 : size) != 0) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t size) { return take(size, alignof(max_align_t)); }
void* operator new(size_t size, std::align_val_t alignment) { return take(size, static_cast<size_t>(alignment)); }
// std::stable_sort asks this way, and makes do without.
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  try {
    return take(size, alignof(max_align_t));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace bert_fast {
namespace {

// Fails at the first allocation, then at the second, ... until a call gets through. Returns how many failed.
int64_t starve(const Model& model, const std::vector<Text>& texts, int64_t threads, const Answer& expected) {
  for (int64_t allowed = 0;; ++allowed) {
    Call call(model, texts);
    const Call fresh(model, texts);
    bool has_started = false, has_failed = false;
    const RunWorkers pool = [&](int64_t, const std::function<void()>& f) {
      has_started = true;
      f();
    };
    left = allowed;
    try {
      model.encoder->forward(call.batch, call.output, threads, pool);
    } catch (const std::bad_alloc&) {
      has_failed = true;
    }
    left = -1;
    if (!has_failed) {
      CHECK(call.answer == expected);
      return allowed;
    }
    CHECK(!has_started);
    CHECK(call.answer == fresh.answer);
    // Still usable, by a smaller call in whatever memory it has now.
    if (allowed % 3 == 0) CHECK(run(model, {texts[0]}, threads, on_one) == run(model, {texts[0]}, 1, on_one));
  }
}

}  // namespace

// Small ones and those in huge pages hold what they promise, and not more.
static void test_panel_memory() {
  for (const int64_t bytes : {int64_t{0}, int64_t{192}, int64_t{5} << 20}) {
    context = "panel memory of " + std::to_string(bytes) + " bytes";
    PanelMemory memory(bytes);
    for (const int64_t part : {bytes / 3 / 64 * 64, bytes - bytes / 3 / 64 * 64}) {
      uint8_t* const taken = memory.take(part);
      CHECK(reinterpret_cast<uintptr_t>(taken) % 64 == 0);
      std::memset(taken, 1, static_cast<size_t>(part));
    }
    bool has_failed = false;
    try {
      memory.take(1);
    } catch (const std::bad_alloc&) {
      has_failed = true;
    }
    CHECK(has_failed);
  }
}

void test_memory() {
  test_panel_memory();
  const std::vector<std::vector<Text>> batches{{{0, 9}, {1, 0}, {2, 4}},                                 // by columns
                                               {{0, 400}, {1, 3}},                                       // by rows
                                               {{0, 20}, {1, 20}, {2, 20}, {3, 19}, {4, 21}, {5, 20}}};  // dealt out
  int64_t failures = 0;
  for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::int8})
    for (const std::vector<Text>& texts : batches) {
      context = "memory, precision " + std::to_string(static_cast<int>(precision));
      Random random(1);
      // One encoder for the answer, and one whose workspaces grow while memory fails.
      const Model expected(random, precision, Activation::gelu_erf, 20, 33, 5, 2);
      Random again(1);
      const Model model(again, precision, Activation::gelu_erf, 20, 33, 5, 2);
      const Answer answer = run(expected, texts, 3, on_one);
      failures += starve(model, texts, 3, answer);
      CHECK(run(model, texts, 3, on_threads) == answer);
    }
  CHECK(failures > 100);
  std::printf("memory: %lld allocations failed\n", static_cast<long long>(failures));
}

}  // namespace bert_fast
