// Sums over rows: of the sums of blocks of rows, and of the rows of the tokens that read a row of a table. In float,
// in a fixed order, and in blocks, so that the rounding error does not grow with the number of rows alone.
#pragma once

#include "pooling.h"

namespace bert_fast::BERT_FAST_ISA {

// What an addition rounds off is added at the end (Neumaier, 1974): many blocks lose no more than one does.
template <class T>
void column_sums(const ColumnSums<T>& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += LANES) {
    Vec total = set1(0.0f), lost = set1(0.0f);
    for (int64_t block = 0; block < args.blocks; ++block) {
      const Vec x = load(args.partials + block * args.columns + i, end - i);
      const Vec next = total + x, added = next - total;  // two-sum (Knuth)
      lost = lost + ((total - (next - added)) + (x - added));
      total = next;
    }
    store(args.out + i, select_ge(lost, lost, total + lost, total), end - i);  // after an infinity, lost is NaN
  }
}

// The rows of the tokens from `token` on that share an id, N vectors of them from column i on.
template <int N, class T>
BERT_FAST_INLINE void sum_chain(const TableGradient<T>& args, int64_t token, int64_t i, int64_t left, T* out) {
  constexpr int block_size = 32;
  Vec total[N];
  for (int v = 0; v < N; ++v) total[v] = set1(0.0f);
  while (token >= 0) {
    Vec partial[N];
    for (int v = 0; v < N; ++v) partial[v] = set1(0.0f);
    for (int count = 0; count < block_size && token >= 0; ++count, token = args.next[token]) {
      const float* row = args.rows + token * args.hidden_size + i;
      for (int v = 0; v < N; ++v) partial[v] = partial[v] + load(row + v * LANES, left - v * LANES);
    }
    for (int v = 0; v < N; ++v) total[v] = total[v] + partial[v];
  }
  for (int v = 0; v < N; ++v) store(out + v * LANES, total[v], left - v * LANES);
}

// Task t is block t % pooling_blocks of the columns of row t / pooling_blocks of the table.
template <class T>
void table_gradient(const TableGradient<T>& args, int64_t begin, int64_t end) {
  constexpr int wide = 4;
  const int64_t size = args.hidden_size, blocks = pooling_blocks(size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / blocks, token = args.first[row];
    const int64_t first = task % blocks * POOLING_BLOCK, last = std::min(first + POOLING_BLOCK, size);
    T* out = args.out + row * size;
    if (token < 0) {
      std::memset(static_cast<void*>(out + first), 0, static_cast<size_t>(last - first) * sizeof(T));
      continue;
    }
    int64_t i = first;
    for (; i + wide * LANES <= last; i += wide * LANES) sum_chain<wide>(args, token, i, last - i, out + i);
    for (; i < last; i += LANES) sum_chain<1>(args, token, i, last - i, out + i);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
