// The class bert_fast._C.Encoder: an encoder over weights that are packed when it is made.
#include "bindings.h"
#include "../encoder.h"

#include <array>
#include <limits>

namespace py = pybind11;

namespace bert_fast {
namespace {

constexpr const char* OP = "Encoder";

// Tokens below which another thread is not worth waking.
constexpr int64_t MIN_TOKENS_PER_THREAD = 4;

template <size_t N>
int64_t index_of(const char* name, const std::string& value, const std::array<const char*, N>& names) {
  std::string list;
  for (size_t i = 0; i < N; ++i) {
    if (value == names[i]) return static_cast<int64_t>(i);
    list += (i > 0 ? ", " : "") + std::string(names[i]);
  }
  TORCH_CHECK_VALUE(false, OP, ": ", name, " is '", value, "', expected one of ", list);
}

// Contiguous float32, whatever floating-point type it was.
Tensor as_float(const Tensor& tensor) { return contiguous(tensor).to(at::kFloat); }

// A linear module: weight (out_features, in_features) and bias.
struct LinearTensors {
  Tensor weight, bias;
};

LinearTensors checked_linear(const std::string& name, const Tensor& weight, const Tensor& bias, int64_t out_features,
                             int64_t in_features) {
  for (const Tensor& tensor : {weight, bias}) check_kind(OP, name.c_str(), tensor, name.c_str(), weight);
  check_shape(OP, (name + ".weight").c_str(), weight, {out_features, in_features});
  check_shape(OP, (name + ".bias").c_str(), bias, {out_features});
  return {as_float(weight), as_float(bias)};
}

// Output features that one task packs.
constexpr int64_t PACK_ROWS = 64;

void pack(PackedWeight& packed, const LinearTensors& linear, int64_t column) {
  const float *weight = data<float>(linear.weight), *bias = data<float>(linear.bias);
  torch::stable::parallel_for(0, linear.weight.size(0), PACK_ROWS, [&](int64_t begin, int64_t end) {
    packed.pack(weight, bias, begin, end, column + begin);
  });
}

Norm checked_norm(const std::string& name, const Tensor& weight, const Tensor& bias, double eps, int64_t size) {
  Norm norm{{}, static_cast<float>(eps)};
  for (const Tensor& tensor : {weight, bias}) {
    check_kind(OP, name.c_str(), tensor, name.c_str(), weight);
    check_shape(OP, name.c_str(), tensor, {size});
    const Tensor dense = as_float(tensor);
    norm.values.insert(norm.values.end(), data<float>(dense), data<float>(dense) + size);
  }
  return norm;
}

struct PyEncoder {
  EncoderConfig config;
  Tensor word, position, token_type;  // kept alive
  std::unique_ptr<Encoder> encoder;
  int64_t num_layers;
  at::ScalarType out_type;
};

// Tensors of a layer, in the order of `encoder.LAYER_PARAMETERS` in Python.
EncoderLayer pack_layer(const EncoderConfig& config, const std::vector<Tensor>& tensors,
                        const std::pair<double, double>& eps, size_t layer,
                        const std::shared_ptr<PanelMemory>& memory) {
  TORCH_CHECK_VALUE(tensors.size() == 16, OP, ": layer ", layer, " has ", tensors.size(), " tensors, expected 16");
  const int64_t h = config.hidden_size, f = config.intermediate_size;
  const int64_t width = round_up_to_panel(h);
  const std::string prefix = "layer " + std::to_string(layer) + " ";
  const auto linear = [&](const char* name, size_t index, int64_t out_features, int64_t in_features) {
    return checked_linear(prefix + name, tensors[index], tensors[index + 1], out_features, in_features);
  };
  const auto own_outliers = [&](const LinearTensors& tensors) {
    if (config.precision != Precision::int8) return NO_OUTLIERS;
    return outliers_by_largest_weight(data<float>(tensors.weight), tensors.weight.size(0), tensors.weight.size(1));
  };
  const LinearTensors attention_output = linear("attention.output.dense", 6, h, h);
  const LinearTensors output = linear("output.dense", 12, h, f);
  const auto packed = [&](int64_t out_features, int64_t in_features, const OutlierChannels& outliers) {
    return PackedWeight(config.precision, out_features, in_features, outliers, memory);
  };
  EncoderLayer result{packed(3 * width, h, config.residual_outliers),
                      packed(h, h, own_outliers(attention_output)),
                      packed(f, h, config.residual_outliers),
                      packed(h, f, own_outliers(output)),
                      checked_norm(prefix + "attention.output.LayerNorm", tensors[8], tensors[9], eps.first, h),
                      checked_norm(prefix + "output.LayerNorm", tensors[14], tensors[15], eps.second, h)};
  pack(result.qkv, linear("query", 0, h, h), 0);
  pack(result.qkv, linear("key", 2, h, h), width);
  pack(result.qkv, linear("value", 4, h, h), 2 * width);
  pack(result.attention_output, attention_output, 0);
  pack(result.intermediate, linear("intermediate.dense", 10, f, h), 0);
  pack(result.output, output, 0);
  return result;
}

OutlierChannels residual_outliers(const EncoderConfig& config, const std::vector<std::vector<Tensor>>& layers) {
  const int64_t h = config.hidden_size, f = config.intermediate_size;
  std::vector<float> strengths(static_cast<size_t>(h), 0.0f);
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].size() != 16) continue;  // refused when it is packed
    const std::string name = "layer " + std::to_string(i) + " output.dense";
    const LinearTensors output = checked_linear(name, layers[i][12], layers[i][13], h, f);
    add_writing_strengths(data<float>(output.weight), f, strengths);
  }
  return strongest(strengths);
}

std::unique_ptr<PyEncoder> make_encoder(const std::string& precision, const std::string& activation, int64_t num_heads,
                                        bool out_bfloat16, const Tensor& word, const Tensor& position,
                                        const Tensor& token_type, const Tensor& norm_weight, const Tensor& norm_bias,
                                        double norm_eps, const std::vector<std::vector<Tensor>>& layers,
                                        const std::vector<std::pair<double, double>>& layer_norm_eps) {
  auto result = std::make_unique<PyEncoder>();
  EncoderConfig& config = result->config;
  constexpr std::array<const char*, 3> precisions{"fp32", "bf16", "int8"};
  constexpr std::array<const char*, 3> activations{"gelu_erf", "gelu_tanh", "relu"};
  config.precision = static_cast<Precision>(index_of("precision", precision, precisions));
  config.activation = static_cast<Activation>(1 + index_of("activation", activation, activations));  // after `none`
  for (const auto& [name, table] : {std::pair<const char*, const Tensor&>{"word_embeddings", word},
                                    {"position_embeddings", position},
                                    {"token_type_embeddings", token_type}}) {
    check_kind(OP, name, table, "word_embeddings", word);
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == word.size(1), OP, ": ", name, " has shape ",
                      shape_text(table.sizes()), ", expected (rows, hidden_size)");
  }
  result->out_type = out_bfloat16 ? at::kBFloat16 : at::kFloat;
  config.hidden_size = word.size(1);
  config.num_heads = num_heads;
  TORCH_CHECK_VALUE(num_heads > 0 && config.hidden_size % num_heads == 0, OP, ": num_heads is ", num_heads,
                    ", which does not divide hidden_size ", config.hidden_size);
  TORCH_CHECK_VALUE(layer_norm_eps.size() == layers.size(), OP, ": layer_norm_eps has ", layer_norm_eps.size(),
                    " pairs, expected ", layers.size());
  config.intermediate_size = layers.empty() || layers[0].size() < 11 ? 1 : layers[0][10].size(0);
  TORCH_CHECK_VALUE(config.hidden_size > 0 && config.intermediate_size > 0, OP, ": hidden_size is ", config.hidden_size,
                    " and intermediate_size ", config.intermediate_size, ", expected at least 1");
  result->word = contiguous(word);
  result->position = contiguous(position);
  result->token_type = contiguous(token_type);
  result->num_layers = static_cast<int64_t>(layers.size());
  if (config.precision == Precision::int8) config.residual_outliers = residual_outliers(config, layers);
  const int64_t h = config.hidden_size, f = config.intermediate_size;
  int64_t layer_bytes = 0;
  for (const auto& [out_features, in_features] :
       {std::pair<int64_t, int64_t>{3 * round_up_to_panel(h), h}, {h, h}, {f, h}, {h, f}})
    layer_bytes += PackedWeight::panel_bytes(config.precision, out_features, in_features);
  const auto memory = std::make_shared<PanelMemory>(layer_bytes * result->num_layers);
  std::vector<EncoderLayer> packed;
  for (size_t i = 0; i < layers.size(); ++i)
    packed.push_back(pack_layer(config, layers[i], layer_norm_eps[i], i, memory));
  const EmbeddingTables tables{result->word.const_data_ptr(), result->position.const_data_ptr(),
                               result->token_type.const_data_ptr(), word.scalar_type() == at::kBFloat16};
  result->encoder = std::make_unique<Encoder>(
      config, std::move(packed), tables,
      checked_norm("embeddings.LayerNorm", norm_weight, norm_bias, norm_eps, config.hidden_size));
  return result;
}

// What a forward gives; what was not asked for is empty.
struct ForwardResult {
  std::optional<Tensor> rows, pooled;
  std::vector<Tensor> states;
};

// What a caller asks for.
struct Wanted {
  bool rows, states;
  std::vector<PoolingMode> modes;
  bool normalize;
};

// Runs a checked batch. `shape` is that of the rows before hidden_size; `places` says where they go, if not in order.
ForwardResult run(const PyEncoder& self, const EncoderBatch& batch, const Wanted& wanted, std::vector<int64_t> shape,
                  const std::vector<int64_t>* places) {
  const int64_t batch_size = static_cast<int64_t>(batch.cu_seqlens.size()) - 1, num_tokens = batch.cu_seqlens.back();
  const int64_t size = self.config.hidden_size;
  const at::TensorOptions options = at::TensorOptions().dtype(self.out_type);
  chosen_kernels();  // an error of the environment, before anything is computed
  shape.push_back(size);
  const auto fresh = [&] { return places == nullptr ? at::empty(shape, options) : at::zeros(shape, options); };
  ForwardResult result;
  EncoderOutput output;
  output.is_bfloat16 = self.out_type == at::kBFloat16;
  output.places = places == nullptr ? nullptr : places->data();
  if (wanted.rows) {
    result.rows = fresh();
    output.rows = result.rows->mutable_data_ptr();
  }
  for (int64_t i = 0; wanted.states && i <= self.num_layers; ++i) {
    result.states.push_back(fresh());
    output.states.push_back(result.states.back().mutable_data_ptr());
  }
  if (!wanted.modes.empty()) {
    output.modes = wanted.modes;
    output.normalize = wanted.normalize;
    result.pooled = at::empty({batch_size, static_cast<int64_t>(wanted.modes.size()) * size}, at::kFloat);
    output.pooled = mutable_data<float>(*result.pooled);
  }
  const int64_t threads = std::clamp<int64_t>(num_tokens / MIN_TOKENS_PER_THREAD, 1, at::get_num_threads());
  self.encoder->forward(batch, output, threads, [](int64_t workers, const std::function<void()>& f) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { f(); });
  });
  return result;
}

std::vector<PoolingMode> pooling_modes(const std::vector<std::string>& names) {
  std::vector<PoolingMode> modes;
  for (const std::string& name : names) modes.push_back(pooling_mode(name));
  return modes;
}

// A batch without padding: (num_tokens,) ids, (batch_size + 1,) offsets.
ForwardResult forward(const PyEncoder& self, const Tensor& input_ids, const Tensor& position_ids,
                      const Tensor& token_type_ids, const Tensor& cu_seqlens, bool want_rows, bool want_states,
                      const std::vector<std::string>& modes, bool normalize) {
  TORCH_CHECK_VALUE(input_ids.dim() == 1, OP, ": input_ids has shape ", shape_text(input_ids.sizes()),
                    ", expected (num_tokens,)");
  const at::IntArrayRef shape = input_ids.sizes();
  const Tensor words = checked_ids(OP, "input_ids", input_ids, shape, self.word.size(0));
  const Tensor positions = checked_ids(OP, "position_ids", position_ids, shape, self.position.size(0));
  const Tensor types = checked_ids(OP, "token_type_ids", token_type_ids, shape, self.token_type.size(0));
  const EncoderBatch batch{data<int64_t>(words), data<int64_t>(positions), data<int64_t>(types),
                           checked_offsets(OP, cu_seqlens, words.size(0))};
  return run(self, batch, {want_rows, want_states, pooling_modes(modes), normalize}, {words.size(0)}, nullptr);
}

// The ids of a padded batch, or those given for every row of it, checked; null where there are none.
Tensor checked_rows(const char* name, const std::optional<Tensor>& ids, at::IntArrayRef shape, int64_t size) {
  if (!ids.has_value()) return {};
  const bool is_one_row = ids->dim() == 1 || (ids->dim() == 2 && ids->size(0) == 1);
  const Tensor full = is_one_row && ids->size(-1) == shape[1] ? ids->expand(shape) : *ids;
  return checked_ids(OP, name, full, shape, size);
}

// A padded batch: (batch_size, seq_len) ids and mask; the rows come back padded with zeros. ValueError for whatever is
// not a plain batch: the caller finds the words for it.
ForwardResult forward_padded(const PyEncoder& self, const Tensor& input_ids, const std::optional<Tensor>& mask,
                             const std::optional<Tensor>& token_type_ids, const std::optional<Tensor>& position_ids,
                             bool want_states, const std::vector<std::string>& modes) {
  TORCH_CHECK_VALUE(input_ids.dim() == 2, OP, ": input_ids has shape ", shape_text(input_ids.sizes()),
                    ", expected (batch_size, seq_len)");
  const at::IntArrayRef shape = input_ids.sizes();
  const int64_t batch_size = shape[0], seq_len = shape[1], positions_there_are = self.position.size(0);
  const Tensor words = checked_ids(OP, "input_ids", input_ids, shape, self.word.size(0));
  const Tensor types = checked_rows("token_type_ids", token_type_ids, shape, self.token_type.size(0));
  const Tensor positions = checked_rows("position_ids", position_ids, shape, positions_there_are);
  TORCH_CHECK_VALUE(positions.defined() || seq_len <= positions_there_are, OP, ": seq_len is ", seq_len,
                    ", expected at most ", positions_there_are);
  Tensor keep;
  if (mask.has_value()) {
    check_cpu(OP, "attention_mask", *mask);
    check_shape(OP, "attention_mask", *mask, shape);
    keep = (mask->scalar_type() == at::kBool ? *mask : mask->ne(0)).contiguous();
  }
  const bool* kept = keep.defined() ? keep.const_data_ptr<bool>() : nullptr;
  const auto id = [](const Tensor& ids, int64_t i) { return ids.const_data_ptr<int64_t>()[i]; };

  std::vector<int32_t> offsets{0};
  std::vector<int64_t> places, word_ids, position_ids_kept, type_ids;
  for (std::vector<int64_t>* ids : {&places, &word_ids, &position_ids_kept, &type_ids})
    ids->reserve(static_cast<size_t>(batch_size * seq_len));
  TORCH_CHECK_VALUE(batch_size * seq_len <= std::numeric_limits<int32_t>::max(), OP, ": input_ids has ",
                    batch_size * seq_len, " elements, expected fewer than 2^31");
  for (int64_t row = 0; row < batch_size; ++row) {
    for (int64_t column = 0; column < seq_len; ++column) {
      const int64_t i = row * seq_len + column;
      if (kept != nullptr && !kept[i]) continue;
      places.push_back(i);
      word_ids.push_back(id(words, i));
      position_ids_kept.push_back(positions.defined() ? id(positions, i) : column);
      type_ids.push_back(types.defined() ? id(types, i) : 0);
    }
    offsets.push_back(static_cast<int32_t>(places.size()));
  }
  const bool is_full = static_cast<int64_t>(places.size()) == batch_size * seq_len;
  const EncoderBatch batch{word_ids.data(), position_ids_kept.data(), type_ids.data(), std::move(offsets)};
  return run(self, batch, {true, want_states, pooling_modes(modes), false}, shape.vec(), is_full ? nullptr : &places);
}

}  // namespace

void bind_encoder(py::module_& module) {
  using torch::wrap_pybind_function_no_gil;
  py::class_<ForwardResult>(module, "ForwardResult")
      .def_readonly("rows", &ForwardResult::rows)
      .def_readonly("pooled", &ForwardResult::pooled)
      .def_readonly("states", &ForwardResult::states);
  py::class_<PyEncoder>(module, "Encoder")
      .def(py::init(wrap_pybind_function_no_gil(make_encoder)), py::arg("precision"), py::arg("activation"),
           py::arg("num_heads"), py::arg("out_bfloat16"), py::arg("word_embeddings"), py::arg("position_embeddings"),
           py::arg("token_type_embeddings"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("norm_eps"),
           py::arg("layers"), py::arg("layer_norm_eps"))
      .def("forward", wrap_pybind_function_no_gil(forward), py::arg("input_ids"), py::arg("position_ids"),
           py::arg("token_type_ids"), py::arg("cu_seqlens"), py::arg("want_rows") = true,
           py::arg("want_states") = false, py::arg("modes") = std::vector<std::string>{}, py::arg("normalize") = false)
      .def("forward_padded", wrap_pybind_function_no_gil(forward_padded), py::arg("input_ids"),
           py::arg("attention_mask"), py::arg("token_type_ids"), py::arg("position_ids"),
           py::arg("want_states") = false, py::arg("modes") = std::vector<std::string>{})
      .def("packed_bytes", [](const PyEncoder& self) { return self.encoder->bytes(); });
}

}  // namespace bert_fast
