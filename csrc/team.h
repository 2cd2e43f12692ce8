// Threads that go through the steps of a computation together, each step a number of tasks that any of them may take.
//
// No thread waits for one that has not come: whoever is there takes the tasks, a single thread takes them all, and the
// only wait is for tasks that another thread has begun. So the computation is right, and ends, whatever number of
// threads the pool really gives, nested in another parallel region too.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "target.h"

namespace bert_fast {

class Team {
 public:
  explicit Team(int64_t steps) : steps_(static_cast<size_t>(steps)) {}

  // task(i) for every i < count, each once among all threads that make the call; all are done when it returns. Every
  // thread calls the steps in the same order, with the same counts.
  template <class Task>
  void run(int64_t step, int64_t count, const Task& task) {
    claim(step, count, task);
    const Step& state = steps_[static_cast<size_t>(step)];
    for (int64_t spins = 0; state.done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < SPINS) {
        relax();
      } else {
        std::this_thread::yield();  // the one waited for may need this core
      }
    }
  }

  // The same without the wait.
  template <class Task>
  void claim(int64_t step, int64_t count, const Task& task) {
    Step& state = steps_[static_cast<size_t>(step)];
    for (int64_t i = state.next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = state.next.fetch_add(1, std::memory_order_relaxed)) {
      task(i);
      state.done.fetch_add(1, std::memory_order_release);
    }
  }

 private:
  static constexpr int64_t SPINS = 4096;  // some tens of microseconds

  static void relax() {
#if BERT_FAST_X86
    _mm_pause();
#endif
  }

  struct Step {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  std::vector<Step> steps_;
};

}  // namespace bert_fast
