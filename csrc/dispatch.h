// Which instruction set runs: the best one the machine has, or the one asked for.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"
#include "training_table.h"

namespace bert_fast {

extern const KernelTable scalar_kernels;
// x86 only
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
extern const KernelTable avx512_vnni_kernels;
extern const KernelTable avx512_bf16_kernels;  // with VNNI

// Names of the instruction sets that this machine has, best last.
std::vector<std::string> available_isas();

// Every later call runs on `name`; std::invalid_argument when the machine does not have it.
void set_isa(const std::string& name);

// The table in use: the last set_isa, else the environment's BERT_FAST_ISA (std::invalid_argument as above), else the
// best one.
const KernelTable& kernels();

}  // namespace bert_fast
