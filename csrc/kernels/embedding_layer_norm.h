// out = LayerNorm(word + token type + position), computed in float and rounded once. The ids are not checked here.
#pragma once

#include "layer_norm.h"

namespace bert_fast::BERT_FAST_ISA {

template <class T>
void embedding_layer_norm(const EmbeddingLayerNorm<T>& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t size = args.norm.hidden_size;
  for (int64_t row = begin; row < end; ++row) {
    const T* word = args.word_embeddings + args.input_ids[row] * size;
    const T* token_type = args.token_type_embeddings + args.token_type_ids[row] * size;
    const T* position = args.position_embeddings + args.position_ids[row] * size;
    Vec total = set1(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
      const int64_t left = size - i;
      const Vec hidden = load(word + i, left) + load(token_type + i, left) + load(position + i, left);
      total = total + hidden;
      store(scratch + i, hidden, left);
    }
    layer_norm(args.norm, scratch, total, args.out + row * size);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
