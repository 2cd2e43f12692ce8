#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "target.h"

namespace bert_fast {
namespace {

std::vector<const KernelTable*> detect() {
  std::vector<const KernelTable*> tables{&scalar_kernels};
#if BERT_FAST_X86
  // These checks include that the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2) tables.push_back(&avx2_kernels);
  if (has_avx2 && has_avx512) tables.push_back(&avx512_kernels);
  const bool has_vnni = has_avx2 && has_avx512 && __builtin_cpu_supports("avx512vnni");
  if (has_vnni) tables.push_back(&avx512_vnni_kernels);
  if (has_vnni && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16_kernels);
#endif
  return tables;
}

const std::vector<const KernelTable*>& available() {
  static const std::vector<const KernelTable*> tables = detect();
  return tables;
}

const KernelTable* find(const std::string& name) {
  std::string names;
  for (const KernelTable* table : available()) {
    if (table->name == name) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available on this machine, which has: " + names);
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available()) names.emplace_back(table->name);
  return names;
}

void set_isa(const std::string& name) { chosen = find(name); }

const KernelTable& kernels() {
  if (const KernelTable* table = chosen) return *table;
  const char* forced = std::getenv("BERT_FAST_ISA");
  const bool is_forced = forced != nullptr && *forced != '\0';
  const KernelTable* table = is_forced ? find(forced) : available().back();
  const KernelTable* unset = nullptr;
  chosen.compare_exchange_strong(unset, table);
  return *chosen;
}

}  // namespace bert_fast
