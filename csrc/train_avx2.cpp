// The kernels of training for AVX2 and FMA.
#include "training_table.h"
#include "target.h"

#if BERT_FAST_X86
BERT_FAST_TARGET_BEGIN("avx2,fma")

#define BERT_FAST_ISA avx2
#include "vec/avx2.h"

#include "kernels/training.h"

BERT_FAST_TARGET_END

namespace bert_fast {
const TrainingTable avx2_training = avx2::training_kernels;
}
#endif
