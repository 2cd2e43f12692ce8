// The product of rows of activations with panels of packed weights, tile by tile, each tile handed to an epilogue.
//
// A panel holds PANEL columns, for all of k: (steps, PANEL, DEPTH), zero where the matrix has no column or no k. Rows
// go through a panel in blocks that stay in the second-level cache while the panel is read from it. Where a sum is long
// and its type rounds, it is taken in blocks of SUM_STEPS, each on its own: a long sum, in blocks, rounds less.
#pragma once

#include "tile.h"

namespace bert_fast::BERT_FAST_ISA {

// Bytes of activations that a block of rows takes from the second-level cache.
constexpr int64_t ROW_BLOCK_BYTES = 512 * 1024;

// Steps that are summed on their own, of `steps`: all of them, or equal parts of SUM_STEPS at most.
template <class P>
BERT_FAST_INLINE int64_t steps_per_sum(int64_t steps) {
  if constexpr (P::SUM_STEPS == 0) return steps;
  const int64_t blocks = std::max<int64_t>(1, (steps + P::SUM_STEPS - 1) / P::SUM_STEPS);
  return (steps + blocks - 1) / blocks;
}

// GCC does not see that `before` is written before it is read.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// One tile, M rows by N vectors; epilogue.store(row, column, sums) gets it.
template <class P, int M, int N, class Ahead, class Epilogue>
void run_tile(const typename P::Input* a, int64_t stride, const typename P::Weight* b, int64_t steps, int64_t row,
              int64_t column, Ahead ahead, const Epilogue& epilogue) {
  typename P::Sum sums[M][N], before[M][N];
  const int64_t block = steps_per_sum<P>(steps);
  constexpr int64_t step_size = PANEL * P::DEPTH;
  for (int64_t k = 0;;) {
    tile<P, M, N>(a + P::at(0, k, stride), stride, b + k * step_size, step_size, std::min(block, steps - k), ahead,
                  sums);
    if (k > 0)
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) sums[i][j] = before[i][j] + sums[i][j];
    k += block;
    if (k >= steps) break;
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) before[i][j] = sums[i][j];
  }
  epilogue.template store<M, N>(row, column, sums);
}

#pragma GCC diagnostic pop

template <class P, class Ahead, class Epilogue>
using RunTile = void (*)(const typename P::Input*, int64_t, const typename P::Weight*, int64_t, int64_t, int64_t, Ahead,
                         const Epilogue&);

// run_tile for 1 to P::ROWS rows, by the number of rows less one.
template <class P, class Ahead, class Epilogue, int... M>
constexpr std::array<RunTile<P, Ahead, Epilogue>, sizeof...(M)> tile_runners(std::integer_sequence<int, M...>) {
  return {run_tile<P, M + 1, TILE_VECTORS, Ahead, Epilogue>...};
}
template <class P, class Ahead, class Epilogue>
constexpr auto TILE_RUNNERS = tile_runners<P, Ahead, Epilogue>(std::make_integer_sequence<int, P::ROWS>{});

// Part `index` of `parts` of a panel, or if there is no such panel what is fetched already.
template <class P>
BERT_FAST_INLINE Fetch fetch_part(const typename P::Weight* panel, int64_t steps, int64_t index, int64_t parts,
                                  bool exists) {
  constexpr int64_t step_bytes = PANEL * P::DEPTH * static_cast<int64_t>(sizeof(typename P::Weight));
  const int64_t stride = (step_bytes + parts - 1) / parts;
  const char* begin = reinterpret_cast<const char*>(panel);
  return exists ? Fetch{begin + index * steps * stride, stride} : Fetch{begin - steps * step_bytes, 0};
}

// Rows [row_begin, row_end) of `a` by the panels [panel_begin, panel_end) of `weights`; Ahead is Fetch where these come
// from memory, NoFetch where they are in a cache.
template <class P, class Ahead, class Epilogue>
BERT_FAST_INLINE void product(const typename P::Input* a, int64_t stride, const typename P::Weight* weights,
                              int64_t steps, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                              const Epilogue& epilogue) {
  constexpr int64_t width = TILE_VECTORS * LANES;
  static_assert(PANEL % width == 0);
  const int64_t row_bytes = std::max<int64_t>(1, steps * P::DEPTH * static_cast<int64_t>(sizeof(typename P::Input)));
  const int64_t block_tiles = std::clamp<int64_t>(ROW_BLOCK_BYTES / (row_bytes * P::ROWS), 2, 8);
  const int64_t panel_size = steps * PANEL * P::DEPTH;
  const int64_t rows = row_end - row_begin, tiles = (rows + P::ROWS - 1) / P::ROWS;
  for (int64_t first = 0; first < tiles; first += block_tiles) {
    const int64_t last = std::min(first + block_tiles, tiles);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const typename P::Weight* b = weights + panel * panel_size;
      for (int64_t t = first; t < last; ++t) {
        // Tiles of nearly equal height: 16 rows are taken as 8 + 8, not as 14 + 2.
        const int64_t from = row_begin + rows * t / tiles, to = row_begin + rows * (t + 1) / tiles;
        const auto run = TILE_RUNNERS<P, Ahead, Epilogue>[static_cast<size_t>(to - from - 1)];
        for (int64_t column = 0; column < PANEL; column += width) {
          Ahead ahead{};
          if constexpr (std::is_same_v<Ahead, Fetch>) {
            const int64_t index = (t - first) * (PANEL / width) + column / width;
            ahead =
                fetch_part<P>(b + panel_size, steps, index, (last - first) * (PANEL / width), panel + 1 < panel_end);
          }
          run(a + P::at(from, 0, stride), stride, b + column * P::DEPTH, steps, from, panel * PANEL + column, ahead,
              epilogue);
        }
      }
    }
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
