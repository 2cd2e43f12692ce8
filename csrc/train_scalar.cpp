// The kernels of training in plain C++, for every machine.
#include "training_table.h"

#define BERT_FAST_ISA scalar
#include "vec/scalar.h"

#include "kernels/training.h"

namespace bert_fast {
const TrainingTable scalar_training = scalar::training_kernels;
}
