// What this machine can do: the highest rates of multiply-add in fp32, bf16 and int8, and of copying memory.
//
//   peak THREADS [--quick]
//
// prints JSON: {"threads": n, "instructions": [{"dtype", "instruction", "gops"}], "copy_gbs": x}. One multiply-add is
// two operations; a copied byte is one read and one written. Every loop over an instruction is written in assembly, so
// no compiler adds a spill to it; CPUID and XGETBV say which of them may run.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace {

struct Instruction {
  const char* dtype;
  const char* name;
  double operations;  // per round of its loop
  void (*loop)(long rounds);
};

// Chains per round: latency (4 to 6 cycles) times instructions per cycle (at most 2), so that none waits for itself.
constexpr int kChains = 12;

// Multiply-add on 128-bit vectors, which every CPU has, as the compiler spells it.
void multiply_add_128(long rounds) {
  typedef float Vector __attribute__((vector_size(16)));
  Vector factor = Vector{} + 0.5f, term = Vector{} + 1.0f, chains[kChains] = {};
  asm volatile("" : "+m"(factor), "+m"(term));
  for (; rounds > 0; --rounds) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * factor + term;
  }
  asm volatile("" : : "m"(chains));
}

#ifdef __x86_64__

#define TWELVE(op, v)                                                                                           \
  op(v, "0") op(v, "1") op(v, "2") op(v, "3") op(v, "4") op(v, "5") op(v, "6") op(v, "7") op(v, "8") op(v, "9") \
      op(v, "10") op(v, "11")

// Registers 0 to 11 accumulate; 14 and 15 hold `bits` in every 32-bit lane.
#define VECTOR_LOOP(function, op, v, bits)              \
  void function(long rounds) {                          \
    const uint32_t value = bits;                        \
    asm volatile("vbroadcastss %[value], %%" v "14\n" \
                 "vbroadcastss %[value], %%" v "15\n" TWELVE(CLEAR, v) "1:\n" TWELVE(op, v) \
                 "dec %[rounds]\n" \
                 "jnz 1b\n" \
                 "vzeroupper\n" \
                 : [rounds] "+r"(rounds) \
                 : [value] "m"(value) \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                   "xmm10", "xmm11", "xmm14", "xmm15"); \
  }

#define CLEAR(v, i) "vxorps %%xmm" i ", %%xmm" i ", %%xmm" i "\n"
#define FMA(v, i) "vfmadd231ps %%" v "14, %%" v "15, %%" v i "\n"
#define DPBF16(v, i) "vdpbf16ps %%" v "14, %%" v "15, %%" v i "\n"
#define DPBUSD(v, i) "vpdpbusd %%" v "14, %%" v "15, %%" v i "\n"
#define DPBUSD_VEX(v, i) "%{vex%} vpdpbusd %%" v "14, %%" v "15, %%" v i "\n"

constexpr uint32_t kOneFp32 = 0x3f800000, kOneBf16 = 0x3f803f80, kOneInt8 = 0x01010101;

VECTOR_LOOP(fma_256, FMA, "ymm", kOneFp32)
VECTOR_LOOP(fma_512, FMA, "zmm", kOneFp32)
VECTOR_LOOP(dpbf16_512, DPBF16, "zmm", kOneBf16)
VECTOR_LOOP(dpbusd_256, DPBUSD_VEX, "ymm", kOneInt8)
VECTOR_LOOP(dpbusd_512, DPBUSD, "zmm", kOneInt8)

// Six tiles accumulate; tiles 6 and 7 hold `bits` in every 32-bit lane. The tile configuration belongs to the thread.
constexpr int kTiles = 6;

struct alignas(64) TileConfig {  // the layout that LDTILECFG reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define TILE(op, i) op " %%tmm6, %%tmm7, %%tmm" i "\n"
#define SIX(op) TILE(op, "0") TILE(op, "1") TILE(op, "2") TILE(op, "3") TILE(op, "4") TILE(op, "5")

#define TILE_LOOP(function, op, bits)      \
  void function(long rounds) {             \
    const TileConfig config;               \
    alignas(64) uint32_t data[256];        \
    std::fill_n(data, 256, bits);          \
    asm volatile("ldtilecfg %[config]\n" \
                 "tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n" \
                 "tilezero %%tmm3\n tilezero %%tmm4\n tilezero %%tmm5\n" \
                 "tileloadd (%[data],%[stride],1), %%tmm6\n" \
                 "tileloadd (%[data],%[stride],1), %%tmm7\n" \
                 "1:\n" SIX(op) \
                 "dec %[rounds]\n" \
                 "jnz 1b\n" \
                 "tilerelease\n" \
                 : [rounds] "+r"(rounds) \
                 : [config] "m"(config), [data] "r"(data), [stride] "r"(64L) \
                 : "cc", "memory"); \
  }

TILE_LOOP(tdpbf16, "tdpbf16ps", kOneBf16)
TILE_LOOP(tdpbusd, "tdpbusd", kOneInt8)

bool bit(uint32_t word, int index) { return word >> index & 1; }

// The register states the operating system saves, or 0 where it does not say.
uint64_t saved_states() {
  uint32_t eax, ebx, ecx = 0, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !bit(ecx, 27)) return 0;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return uint64_t(edx) << 32 | eax;
}

bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

std::vector<Instruction> instructions_present() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0, unused, leaf1_ecx = 0, leaf71_eax = 0;
  __get_cpuid(1, &unused, &unused, &leaf1_ecx, &unused);
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && eax >= 1)
    __get_cpuid_count(7, 1, &leaf71_eax, &unused, &unused, &unused);
  const uint64_t states = saved_states();
  const auto saved = [states](uint64_t mask) { return (states & mask) == mask; };
  const bool avx2 = saved(0x6) && bit(ebx, 5), avx512 = saved(0xe6) && bit(ebx, 16);
  const bool tiles = saved(0x60000) && bit(edx, 24) && tiles_permitted();

  std::vector<Instruction> present = {{"float32", "multiply-add, 128 bits", kChains * 4 * 2, multiply_add_128}};
  const auto add = [&](bool exists, Instruction instruction) {
    if (exists) present.push_back(instruction);
  };
  add(avx2 && bit(leaf1_ecx, 12), {"float32", "vfmadd231ps ymm", kChains * 8 * 2, fma_256});
  add(avx512, {"float32", "vfmadd231ps zmm", kChains * 16 * 2, fma_512});
  add(avx512 && bit(leaf71_eax, 5), {"bfloat16", "vdpbf16ps zmm", kChains * 32 * 2, dpbf16_512});
  add(tiles && bit(edx, 22), {"bfloat16", "tdpbf16ps tmm", kTiles * 16 * 16 * 32 * 2, tdpbf16});
  add(avx2 && bit(leaf71_eax, 4), {"int8", "vpdpbusd ymm (vex)", kChains * 32 * 2, dpbusd_256});
  add(avx512 && bit(ecx, 11), {"int8", "vpdpbusd zmm", kChains * 64 * 2, dpbusd_512});
  add(tiles && bit(edx, 25), {"int8", "tdpbusd tmm", kTiles * 16 * 16 * 64 * 2, tdpbusd});
  return present;
}

#else

std::vector<Instruction> instructions_present() {
  return {{"float32", "multiply-add, 128 bits", kChains * 4 * 2, multiply_add_128}};
}

#endif

struct Effort {
  int trials;
  double seconds;     // per trial
  size_t copy_bytes;  // per buffer
};

// Rate per second of all threads together: the best of the trials. `work(thread)` returns how much it did.
double rate(int threads, const Effort& effort, const std::function<double(int)>& work) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int trial = 0; trial < effort.trials; ++trial) {
    std::atomic<int> waiting{threads};
    std::vector<double> rates(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        --waiting;
        while (waiting > 0) {
        }
        const auto start = Clock::now();
        double done = 0, elapsed = 0;
        do {
          done += work(t);
          elapsed = std::chrono::duration<double>(Clock::now() - start).count();
        } while (elapsed < effort.seconds);
        rates[t] = done / elapsed;
      });
    }
    for (auto& thread : pool) thread.join();
    double sum = 0;
    for (double r : rates) sum += r;
    best = std::max(best, sum);
  }
  return best;
}

double copy_rate(int threads, const Effort& effort) {
  const size_t share = effort.copy_bytes / threads;
  const std::unique_ptr<char[]> source(new char[share * threads]), target(new char[share * threads]);
  rate(threads, {1, 0, 0}, [&](int t) {  // memory belongs to the node of the thread that touches it first
    std::memset(source.get() + t * share, 1, share);
    std::memset(target.get() + t * share, 2, share);
    return 1.0;
  });
  return rate(threads, effort, [&](int t) {
    std::memcpy(target.get() + t * share, source.get() + t * share, share);
    return 2.0 * share;
  });
}

// Both buffers together four times the last cache, which then serves little of the copy; each at most an eighth of the
// memory.
size_t copy_bytes() {
  const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  const size_t cache = std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE));
  return std::min(std::max(2 * cache, size_t(256) << 20), memory / 8);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const bool quick = argc > 2 && std::string(argv[2]) == "--quick";
  if (threads < 1 || argc > 3 || (argc == 3 && !quick)) {
    std::fprintf(stderr, "usage: %s THREADS [--quick]\n", argv[0]);
    return 2;
  }
  const Effort effort = quick ? Effort{1, 0.005, size_t(16) << 20} : Effort{5, 0.1, copy_bytes()};

  std::printf("{\"threads\": %d, \"instructions\": [", threads);
  const char* separator = "";
  for (const Instruction& instruction : instructions_present()) {
    constexpr long kRounds = 10000;
    const double operations = rate(threads, effort, [&](int) {
      instruction.loop(kRounds);
      return kRounds * instruction.operations;
    });
    std::printf("%s{\"dtype\": \"%s\", \"instruction\": \"%s\", \"gops\": %.1f}", separator, instruction.dtype,
                instruction.name, operations * 1e-9);
    separator = ", ";
  }
  std::printf("], \"copy_gbs\": %.2f}\n", copy_rate(threads, effort) * 1e-9);
}
