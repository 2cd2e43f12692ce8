// The kernels of training for AVX-512 with BF16.
#include "training_table.h"
#include "target.h"

#if BERT_FAST_X86
BERT_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni,avx512bf16")

#define BERT_FAST_ISA avx512_bf16
#define BERT_FAST_VNNI 1
#define BERT_FAST_BF16 1
#include "vec/avx512.h"

#include "kernels/training.h"

BERT_FAST_TARGET_END

namespace bert_fast {
const TrainingTable avx512_bf16_training = avx512_bf16::training_kernels;
}
#endif
