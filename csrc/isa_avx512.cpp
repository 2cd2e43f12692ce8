// The kernels for AVX-512.
#include "dispatch.h"
#include "target.h"

#if BERT_FAST_X86
BERT_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#define BERT_FAST_ISA avx512
#define BERT_FAST_VNNI 0
#define BERT_FAST_BF16 0
#include "vec/avx512.h"

#include "kernels/all.h"

BERT_FAST_TARGET_END

namespace bert_fast {
const KernelTable avx512_kernels{"avx512", &avx512_training, BERT_FAST_ALL_KERNELS};
}
#endif
