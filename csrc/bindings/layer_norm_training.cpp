// Training through residual_layer_norm and embedding_layer_norm: forwards that keep what the backwards want.
#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "column_sums.h"

namespace py = pybind11;

namespace bert_fast {
namespace {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// x in the dtype of `lead`, or bfloat16 beside float32.
void check_product_dtype(const char* op, const char* name, at::ScalarType dtype, const char* lead_name,
                         const Tensor& lead) {
  const bool is_mixed = dtype == at::kBFloat16 && lead.scalar_type() == at::kFloat;
  TORCH_CHECK_VALUE(dtype == lead.scalar_type() || is_mixed, op, ": ", name, " is torch.",
                    c10::getDtypeNames(dtype).first, " but ", lead_name, " is ", dtype_text(lead));
}

// f with values of the types of a product and of the parameters beside it.
template <class F>
void with_product_types(at::ScalarType product, const Tensor& parameters, const F& f) {
  if (parameters.scalar_type() == at::kBFloat16) {
    f(bfloat16{}, bfloat16{});
  } else if (product == at::kBFloat16) {
    f(bfloat16{}, float{});
  } else {
    f(float{}, float{});
  }
}

// f(begin, end, scratch, bytes) over the rows.
template <class F>
void parallel_dropout_rows(int64_t rows, int64_t hidden_size, const F& f) {
  parallel_rows(rows, hidden_size, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate<float>(hidden_size);
    const auto bytes = allocate<uint8_t>(dropout_columns(hidden_size));
    f(begin, end, scratch.get(), bytes.get());
  });
}

int64_t row_count(const Tensor& tensor) {
  int64_t rows = 1;
  for (const int64_t size : tensor.sizes().slice(0, static_cast<size_t>(tensor.dim() - 1))) rows *= size;
  return rows;
}

ThreeTensors residual_layer_norm_train(const Tensor& x, const Tensor& bias, const Tensor& residual,
                                       const Tensor& weight, const Tensor& layer_norm_bias, double eps,
                                       double dropout_p, const std::optional<Tensor>& seed) {
  const char* op = "residual_layer_norm";
  check_cpu(op, "x", x);
  check_kind(op, "residual", residual, "residual", residual);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x is a scalar, expected (..., hidden_size)");
  check_product_dtype(op, "x", x.scalar_type(), "residual", residual);
  check_shape(op, "residual", residual, x.sizes());
  check_vector(op, "bias", bias, "residual", residual);
  check_vector(op, "weight", weight, "residual", residual);
  check_vector(op, "layer_norm_bias", layer_norm_bias, "residual", residual);
  const Dropout dropout = checked_dropout(op, dropout_p, seed);
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor dense = contiguous(x), dense_bias = contiguous(bias), dense_residual = contiguous(residual);
  const Tensor gain = contiguous(weight), shift = contiguous(layer_norm_bias);
  const int64_t rows = row_count(x), hidden_size = x.size(-1);
  const Tensor out = at::empty(x.sizes(), residual.options()), normalized = at::empty_like(out);
  const Tensor rstd = at::zeros({rows}, at::kFloat);
  if (out.numel() == 0) return {out, normalized, rstd};
  with_product_types(x.scalar_type(), residual, [&](auto product, auto parameter) {
    using X = decltype(product);
    using T = decltype(parameter);
    const ResidualLayerNormTrain<X, T> args{
        data<X>(dense),
        data<T>(dense_bias),
        data<T>(dense_residual),
        mutable_data<T>(out),
        mutable_data<T>(normalized),
        mutable_data<float>(rstd),
        {data<T>(gain), data<T>(shift), hidden_size, static_cast<float>(eps)},
        dropout,
    };
    parallel_dropout_rows(rows, hidden_size, [&](int64_t begin, int64_t end, float* scratch, uint8_t* bytes) {
      table.residual(X{}, T{}).forward(args, begin, end, scratch, bytes);
    });
  });
  return {out, normalized, rstd};
}

// What the backwards of both ops check: grad and normalized (..., hidden_size), rstd of their rows, weight.
void check_backward(const char* op, const Tensor& grad, const Tensor& normalized, const Tensor& rstd,
                    const Tensor& weight) {
  check_kind(op, "normalized", normalized, "normalized", normalized);
  TORCH_CHECK_VALUE(normalized.dim() >= 1, op, ": normalized is a scalar, expected (..., hidden_size)");
  check_kind(op, "grad", grad, "normalized", normalized);
  check_shape(op, "grad", grad, normalized.sizes());
  check_vector(op, "weight", weight, "normalized", normalized);
  check_cpu(op, "rstd", rstd);
  check_shape(op, "rstd", rstd, {row_count(normalized)});
  TORCH_CHECK_VALUE(rstd.scalar_type() == at::kFloat, op, ": rstd is ", dtype_text(rstd), ", expected torch.float32");
}

// f(begin, end, bytes) over the blocks of rows whose sums are taken together.
template <class F>
void parallel_sum_blocks(int64_t rows, int64_t hidden_size, const F& f) {
  parallel_rows(sum_blocks(rows), SUM_ROWS * hidden_size, [&](int64_t begin, int64_t end) {
    const auto bytes = allocate<uint8_t>(dropout_columns(hidden_size));
    f(begin, end, bytes.get());
  });
}

FiveTensors residual_layer_norm_backward(const Tensor& grad, const Tensor& normalized, const Tensor& rstd,
                                         const Tensor& weight, double dropout_p, const std::optional<Tensor>& seed,
                                         at::ScalarType x_dtype) {
  const char* op = "residual_layer_norm_backward";
  check_backward(op, grad, normalized, rstd, weight);
  check_product_dtype(op, "x_dtype", x_dtype, "normalized", normalized);
  const Dropout dropout = checked_dropout(op, dropout_p, seed);
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor dense = contiguous(grad), normal = contiguous(normalized), deviation = contiguous(rstd);
  const Tensor gain = contiguous(weight);
  const int64_t rows = row_count(grad), hidden_size = grad.size(-1);
  const Tensor dresidual = at::empty(grad.sizes(), grad.options());
  const bool is_shared = dropout_p == 0 && x_dtype == grad.scalar_type();
  const Tensor dx = is_shared ? dresidual : at::empty(grad.sizes(), grad.options().dtype(x_dtype));
  const Tensor sums = at::empty({3, sum_blocks(rows), hidden_size}, at::kFloat);
  if (grad.numel() > 0) {
    with_product_types(x_dtype, grad, [&](auto product, auto parameter) {
      using X = decltype(product);
      using T = decltype(parameter);
      const LayerNormBackward<X, T, T> args{
          data<T>(dense),
          data<T>(normal),
          data<float>(deviation),
          data<T>(gain),
          mutable_data<T>(dresidual),
          is_shared ? nullptr : mutable_data<X>(dx),
          mutable_data<float>(sums[0]),
          mutable_data<float>(sums[1]),
          mutable_data<float>(sums[2]),
          rows,
          hidden_size,
          dropout,
      };
      parallel_sum_blocks(rows, hidden_size, [&](int64_t begin, int64_t end, uint8_t* bytes) {
        table.residual(X{}, T{}).backward(args, begin, end, bytes);
      });
    });
  }
  return {dx, column_sums(table, sums[2], weight), dresidual, column_sums(table, sums[0], weight),
          column_sums(table, sums[1], weight)};
}

ThreeTensors embedding_layer_norm_train(const Tensor& input_ids, const Tensor& position_ids,
                                        const Tensor& token_type_ids, const Tensor& word, const Tensor& position,
                                        const Tensor& token_type, const Tensor& weight, const Tensor& layer_norm_bias,
                                        double eps, double dropout_p, const std::optional<Tensor>& seed) {
  const char* op = "embedding_layer_norm";
  check_kind(op, "word_embeddings", word, "word_embeddings", word);
  const int64_t hidden_size = word.dim() > 0 ? word.size(-1) : 0;
  const auto check_table = [&](const char* name, const Tensor& rows) {
    check_kind(op, name, rows, "word_embeddings", word);
    TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) == hidden_size, op, ": ", name, " has shape ",
                      shape_text(rows.sizes()), ", expected (rows, ", hidden_size, ")");
  };
  check_table("word_embeddings", word);
  check_table("position_embeddings", position);
  check_table("token_type_embeddings", token_type);
  check_vector(op, "weight", weight, "word_embeddings", word);
  check_vector(op, "layer_norm_bias", layer_norm_bias, "word_embeddings", word);
  const Dropout dropout = checked_dropout(op, dropout_p, seed);
  const at::IntArrayRef shape = input_ids.sizes();
  const Tensor words = checked_ids(op, "input_ids", input_ids, shape, word.size(0));
  const Tensor positions = checked_ids(op, "position_ids", position_ids, shape, position.size(0));
  const Tensor token_types = checked_ids(op, "token_type_ids", token_type_ids, shape, token_type.size(0));
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor word_rows = contiguous(word), position_rows = contiguous(position);
  const Tensor token_type_rows = contiguous(token_type);
  const Tensor gain = contiguous(weight), shift = contiguous(layer_norm_bias);
  std::vector<int64_t> out_shape = shape.vec();
  out_shape.push_back(hidden_size);
  const Tensor out = at::empty(out_shape, word.options()), normalized = at::empty_like(out);
  const Tensor rstd = at::zeros({words.numel()}, at::kFloat);
  if (out.numel() == 0) return {out, normalized, rstd};
  with_element_type(word, [&](auto element) {
    using T = decltype(element);
    const EmbeddingLayerNormTrain<T> args{
        {
            data<int64_t>(words),
            data<int64_t>(positions),
            data<int64_t>(token_types),
            data<T>(word_rows),
            data<T>(position_rows),
            data<T>(token_type_rows),
            mutable_data<T>(out),
            {data<T>(gain), data<T>(shift), hidden_size, static_cast<float>(eps)},
        },
        mutable_data<T>(normalized),
        mutable_data<float>(rstd),
        dropout,
    };
    parallel_dropout_rows(words.numel(), hidden_size, [&](int64_t begin, int64_t end, float* scratch, uint8_t* bytes) {
      table.rows(T{}).embedding_layer_norm(args, begin, end, scratch, bytes);
    });
  });
  return {out, normalized, rstd};
}

// Uninitialised. What malloc takes from the system afresh at every call, it takes in huge pages where there are some:
// to be given 47 MB page by page takes longer than a backward.
Tensor empty_table(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  const Tensor table = at::empty({rows, columns}, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge_page = uintptr_t{2} << 20;
  constexpr size_t kept_by_malloc = size_t{32} << 20;
  if (table.nbytes() >= kept_by_malloc) {
    const auto start = reinterpret_cast<uintptr_t>(table.mutable_data_ptr());
    const uintptr_t begin = (start + huge_page - 1) / huge_page * huge_page;
    const uintptr_t end = (start + table.nbytes()) / huge_page * huge_page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a system without them refuses
  }
#endif
  return table;
}

// The gradient of a table of `table_rows` embeddings, in the dtype of `like`: of `rows` (num_tokens, hidden_size)
// float, those whose id is not `skipped`. The tokens that share an id are found by a list through them, in their order;
// every row of the table is written once, by the thread that comes to it.
Tensor table_gradient(const TrainingTable& table, const Tensor& rows, const Tensor& ids, int64_t table_rows,
                      int64_t skipped, const Tensor& like) {
  const int64_t num_tokens = rows.size(0), hidden_size = rows.size(1);
  const Tensor out = empty_table(table_rows, hidden_size, like.options());
  if (out.numel() == 0) return out;
  std::vector<int64_t> first(static_cast<size_t>(table_rows), -1), next(static_cast<size_t>(num_tokens));
  const int64_t* id = data<int64_t>(ids);
  for (int64_t token = num_tokens; token-- > 0;) {
    if (id[token] == skipped) continue;
    int64_t& head = first[static_cast<size_t>(id[token])];
    next[static_cast<size_t>(token)] = head;
    head = token;
  }
  with_element_type(like, [&](auto element) {
    using T = decltype(element);
    const TableGradient<T> args{data<float>(rows), first.data(), next.data(), mutable_data<T>(out), hidden_size};
    const int64_t tasks = table_rows * pooling_blocks(hidden_size);
    const int64_t useful = 1 + (table_rows + num_tokens) * hidden_size / ELEMENTS_PER_THREAD;
    const int64_t workers = std::min<int64_t>({at::get_num_threads(), useful, tasks});
    // Few tokens or many may have an id, so the threads take a little at a time.
    const int64_t chunk = std::max<int64_t>(1, tasks / (workers * 64));
    std::atomic<int64_t> taken{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      for (int64_t begin = taken.fetch_add(chunk); begin < tasks; begin = taken.fetch_add(chunk))
        table.rows(T{}).table_gradient(args, begin, std::min(begin + chunk, tasks));
    });
  });
  return out;
}

FiveTensors embedding_layer_norm_backward(const Tensor& grad, const Tensor& input_ids, const Tensor& position_ids,
                                          const Tensor& token_type_ids, const Tensor& normalized, const Tensor& rstd,
                                          const Tensor& weight, int64_t vocab_rows, int64_t position_rows,
                                          int64_t token_type_rows, double dropout_p, const std::optional<Tensor>& seed,
                                          std::optional<int64_t> padding_idx) {
  const char* op = "embedding_layer_norm_backward";
  check_backward(op, grad, normalized, rstd, weight);
  for (const auto& [name, rows] : {std::pair<const char*, int64_t>{"vocab_rows", vocab_rows},
                                   {"position_rows", position_rows},
                                   {"token_type_rows", token_type_rows}})
    TORCH_CHECK_VALUE(rows >= 0, op, ": ", name, " is ", rows, ", expected 0 or more");
  TORCH_CHECK_VALUE(!padding_idx.has_value() || (*padding_idx >= 0 && *padding_idx < vocab_rows), op,
                    ": padding_idx is ", padding_idx.value_or(-1), ", expected a row of [0, ", vocab_rows, ")");
  const Dropout dropout = checked_dropout(op, dropout_p, seed);
  const at::IntArrayRef shape = grad.sizes().slice(0, static_cast<size_t>(grad.dim() - 1));
  const Tensor words = checked_ids(op, "input_ids", input_ids, shape, vocab_rows);
  const Tensor positions = checked_ids(op, "position_ids", position_ids, shape, position_rows);
  const Tensor token_types = checked_ids(op, "token_type_ids", token_type_ids, shape, token_type_rows);
  const TrainingTable& table = *chosen_kernels().training;
  const Tensor dense = contiguous(grad), normal = contiguous(normalized), deviation = contiguous(rstd);
  const Tensor gain = contiguous(weight);
  const int64_t rows = row_count(grad), hidden_size = grad.size(-1);
  const Tensor dhidden = at::empty({rows, hidden_size}, at::kFloat);
  const Tensor sums = at::empty({2, sum_blocks(rows), hidden_size}, at::kFloat);
  if (grad.numel() > 0) {
    with_element_type(grad, [&](auto element) {
      using T = decltype(element);
      const LayerNormBackward<float, T, float> args{
          data<T>(dense),
          data<T>(normal),
          data<float>(deviation),
          data<T>(gain),
          mutable_data<float>(dhidden),
          nullptr,
          mutable_data<float>(sums[0]),
          mutable_data<float>(sums[1]),
          nullptr,
          rows,
          hidden_size,
          dropout,
      };
      parallel_sum_blocks(rows, hidden_size, [&](int64_t begin, int64_t end, uint8_t* bytes) {
        table.rows(T{}).embedding_backward(args, begin, end, bytes);
      });
    });
  }
  const Tensor dword = table_gradient(table, dhidden, words, vocab_rows, padding_idx.value_or(-1), grad);
  const Tensor dposition = table_gradient(table, dhidden, positions, position_rows, -1, grad);
  const Tensor dtoken_type = table_gradient(table, dhidden, token_types, token_type_rows, -1, grad);
  return {dword, dposition, dtoken_type, column_sums(table, sums[0], weight), column_sums(table, sums[1], weight)};
}

}  // namespace

void bind_layer_norm_training(py::module_& module) {
  using torch::wrap_pybind_function_no_gil;
  module.def("residual_layer_norm_train", wrap_pybind_function_no_gil(residual_layer_norm_train));
  module.def("residual_layer_norm_backward", wrap_pybind_function_no_gil(residual_layer_norm_backward));
  module.def("embedding_layer_norm_train", wrap_pybind_function_no_gil(embedding_layer_norm_train));
  module.def("embedding_layer_norm_backward", wrap_pybind_function_no_gil(embedding_layer_norm_backward));
}

}  // namespace bert_fast
