// The kernels in plain C++, for every machine.
#include "dispatch.h"

#define BERT_FAST_ISA scalar
#include "vec/scalar.h"

#include "kernels/all.h"

namespace bert_fast {
const KernelTable scalar_kernels{"scalar", &scalar_training, BERT_FAST_ALL_KERNELS};
}
