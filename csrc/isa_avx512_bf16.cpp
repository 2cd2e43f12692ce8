// The kernels for AVX-512 with VNNI and BF16.
#include "dispatch.h"
#include "target.h"

#if BERT_FAST_X86
BERT_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni,avx512bf16")

#define BERT_FAST_ISA avx512_bf16
#define BERT_FAST_VNNI 1
#define BERT_FAST_BF16 1
#include "vec/avx512.h"

#include "kernels/all.h"

BERT_FAST_TARGET_END

namespace bert_fast {
const KernelTable avx512_bf16_kernels{"avx512_bf16", &avx512_bf16_training, BERT_FAST_ALL_KERNELS};
}
#endif
