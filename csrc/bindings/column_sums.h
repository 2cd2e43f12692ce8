// The sums over all rows that end a backward.
#pragma once

#include "bindings.h"

namespace bert_fast {

// The columns of `partials` (blocks, columns), added: (columns) in the dtype of `like`.
inline Tensor column_sums(const TrainingTable& table, const Tensor& partials, const Tensor& like) {
  const int64_t blocks = partials.size(0), columns = partials.size(1);
  const Tensor out = at::empty({columns}, like.options());
  with_element_type(like, [&](auto element) {
    using T = decltype(element);
    const ColumnSums<T> args{data<float>(partials), blocks, columns, mutable_data<T>(out)};
    parallel_rows(pooling_blocks(columns), blocks * POOLING_BLOCK, [&](int64_t begin, int64_t end) {
      table.rows(T{}).column_sums(args, begin * POOLING_BLOCK, std::min(end * POOLING_BLOCK, columns));
    });
  });
  return out;
}

}  // namespace bert_fast
