// LayerNorm for training, which keeps the normalised rows (before gain and bias) and 1 / their standard deviation:
//   out = LayerNorm(residual + dropout(x + bias))
//   out = dropout(LayerNorm(word + token type + position))
// computed in float and rounded once. The ids are not checked here.
#pragma once

#include "dropout.h"
#include "layer_norm.h"

namespace bert_fast::BERT_FAST_ISA {

// row, total: as for layer_norm; dropout, bytes: of the result.
template <class T>
BERT_FAST_INLINE void layer_norm_train(const LayerNorm<T>& norm, const float* row, Vec total, T* out, T* normalized,
                                       float* rstd, const Dropout& dropout, const uint8_t* bytes) {
  const int64_t size = norm.hidden_size;
  const Moments m = moments(row, size, total, norm.eps);
  *rstd = m.rstd;
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t left = size - i;
    const Vec normal = (load(row + i, left) - m.mean - m.correction) * set1(m.rstd);
    store(normalized + i, normal, left);
    const Vec result = fma(normal, load(norm.weight + i, left), load(norm.bias + i, left));
    store(out + i, dropped(dropout, result, bytes + i), left);
  }
}

template <class X, class T>
void residual_layer_norm_train(const ResidualLayerNormTrain<X, T>& args, int64_t begin, int64_t end, float* scratch,
                               uint8_t* bytes) {
  const int64_t size = args.norm.hidden_size;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = args.x + row * size;
    const T* residual = args.residual + row * size;
    row_bytes(args.dropout, row, size, bytes);
    Vec total = set1(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
      const int64_t left = size - i;
      const Vec product = load(x + i, left) + load(args.bias + i, left);
      const Vec hidden = dropped(args.dropout, product, bytes + i) + load(residual + i, left);
      total = total + hidden;
      store(scratch + i, hidden, left);
    }
    layer_norm_train(args.norm, scratch, total, args.out + row * size, args.normalized + row * size, args.rstd + row,
                     NO_DROPOUT, bytes);
  }
}

template <class T>
void embedding_layer_norm_train(const EmbeddingLayerNormTrain<T>& args, int64_t begin, int64_t end, float* scratch,
                                uint8_t* bytes) {
  const EmbeddingLayerNorm<T>& tables = args.forward;
  const int64_t size = tables.norm.hidden_size;
  for (int64_t row = begin; row < end; ++row) {
    const T* word = tables.word_embeddings + tables.input_ids[row] * size;
    const T* token_type = tables.token_type_embeddings + tables.token_type_ids[row] * size;
    const T* position = tables.position_embeddings + tables.position_ids[row] * size;
    row_bytes(args.dropout, row, size, bytes);
    Vec total = set1(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
      const int64_t left = size - i;
      const Vec hidden = load(word + i, left) + load(token_type + i, left) + load(position + i, left);
      total = total + hidden;
      store(scratch + i, hidden, left);
    }
    layer_norm_train(tables.norm, scratch, total, tables.out + row * size, args.normalized + row * size,
                     args.rstd + row, args.dropout, bytes);
  }
}

}  // namespace bert_fast::BERT_FAST_ISA
