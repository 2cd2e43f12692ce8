// The kernels for AVX2 and FMA.
#include "dispatch.h"
#include "target.h"

#if BERT_FAST_X86
BERT_FAST_TARGET_BEGIN("avx2,fma")

#define BERT_FAST_ISA avx2
#include "vec/avx2.h"

#include "kernels/all.h"

BERT_FAST_TARGET_END

namespace bert_fast {
const KernelTable avx2_kernels{"avx2", &avx2_training, BERT_FAST_ALL_KERNELS};
}
#endif
