"""`accelerate` on real transformers and sentence-transformers models: same answers, same object, however used."""

import copy
import functools
import inspect
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch.nn.utils import parametrize
from transformers.models.bert import modeling_bert

import bert_fast
from bert_fast import ops
from bert_fast.drop_in import HOSTS, is_accelerated
from bert_fast.folders import resolve

SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}


def make(name="BertModel", seed=0, **changes):
    torch.manual_seed(seed)
    config = transformers.BertConfig(**{**SMALL, **changes})
    if name.startswith("Electra"):
        config = transformers.ElectraConfig(**{**SMALL, "embedding_size": 20, "summary_last_dropout": 0.0, **changes})
    return getattr(transformers, name)(config).eval()


def batch(name="BertModel", batch_size=3, seq_len=9):
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, 2, seq_len) if "MultipleChoice" in name else (batch_size, seq_len)
    lengths = torch.randint(1, seq_len, shape[:-1], generator=generator)
    lengths[0] = seq_len
    return {
        "input_ids": torch.randint(0, 61, shape, generator=generator),
        "attention_mask": (torch.arange(seq_len) < lengths[..., None]).long(),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
    }


def assert_same(got, expected, kept, tolerance=2e-5):
    """Same class and fields; same values where a token is."""
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    for name, value in expected.items():
        ours = got[name]
        if value.dim() >= 2 and value.shape[: kept.dim()] == kept.shape:
            ours, value = ours[kept], value[kept]
        torch.testing.assert_close(ours, value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(autouse=True)
def _no_surprises():
    """A silent or unexpected way to the plain path would make these tests compare it with itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ops.FallbackWarning)
        warnings.filterwarnings("ignore", ".*has no (dropout|forward-mode derivative).*")
        yield


@pytest.mark.parametrize("name", HOSTS)
def test_every_model(name):
    model, inputs = make(name), batch(name)
    kept = inputs["attention_mask"].bool()
    parameters = dict(model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    signature = inspect.signature(model.forward)
    with torch.no_grad():
        expected = model(**inputs)
        assert bert_fast.accelerate(model) is model
        assert is_accelerated(model)
        got = model(**inputs)
    assert_same(got, expected, kept)
    assert all(p is parameters[k] for k, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert inspect.signature(model.forward) == signature
    assert type(model).__name__ == name
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert bert_fast.accelerate(model) is model  # twice is once
    assert bert_fast.restore(model) is model
    assert not is_accelerated(model)
    with torch.no_grad():
        assert_same(model(**inputs), expected, kept, tolerance=0)


def test_hidden_positions_are_zeros():
    model, inputs = bert_fast.accelerate(make()), batch()
    assert not model(**inputs).last_hidden_state[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_the_ops_do_not_serve_runs_the_plain_path(attention):
    model, inputs = make(), batch()
    model.set_attn_implementation(attention)
    words = model.embeddings.word_embeddings(inputs["input_ids"])
    mask = inputs["attention_mask"]
    calls = [
        {"inputs_embeds": words, "attention_mask": mask},
        {"input_ids": inputs["input_ids"], "attention_mask": mask[:, None, None, :].bool()},
    ]
    if attention == "eager":
        calls.append({**inputs, "output_attentions": True})
    with torch.no_grad():
        expected = [model(**call) for call in calls]
        bert_fast.accelerate(model)
        for call, value in zip(calls, expected, strict=True):
            got = model(**call)
            torch.testing.assert_close(got.to_tuple(), value.to_tuple(), rtol=0, atol=0)
        if attention == "eager":
            assert len(got.attentions) == 2
        # transformers leaves its hooks on the model after such a call; the fast path must come back all the same.
        fast = model(**inputs)
    assert not fast.last_hidden_state[mask == 0].any()


def test_config_flags_are_seen():
    model = bert_fast.accelerate(make())
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(**batch()).attentions) == 2
    model.config.output_attentions = False
    model.config.return_dict = False
    assert isinstance(model(**batch()), tuple)


def test_packed_batch():
    model, inputs = make(), batch()
    kept = inputs["attention_mask"].bool()
    lengths = kept.sum(1)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[kept]
        got = bert_fast.accelerate(model)(
            inputs["input_ids"][kept][None],
            token_type_ids=inputs["token_type_ids"][kept][None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=int(lengths.max()),
            max_length_k=int(lengths.max()),
        )
    torch.testing.assert_close(got.last_hidden_state[0], expected, rtol=2e-5, atol=2e-5)


def test_packed_batch_is_refused_where_the_plain_path_would_mix_the_texts():
    model, ids = bert_fast.accelerate(make()), torch.arange(9)[None]
    with pytest.raises(ValueError, match="sdpa attention does not read cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 9], dtype=torch.int32), output_hidden_states=True)


@pytest.mark.parametrize(
    "name",
    ["BertForSequenceClassification", "BertForMaskedLM", "ElectraForSequenceClassification", "ElectraForMaskedLM"],
)
def test_training_gives_the_plain_gradients(name):
    """Without dropout, whose random numbers differ."""
    inputs = batch(name)
    inputs["input_ids"][0, 2] = 0  # [PAD], which learns nothing even where the mask keeps it
    kept = inputs["attention_mask"].bool()
    per_text = torch.tensor([0, 1, 0])
    labels = per_text if "Sequence" in name else inputs["input_ids"].masked_fill(~kept, -100)
    gradients = []
    for wrap in (lambda m: m, bert_fast.accelerate):
        model = wrap(make(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double().train())
        model(**inputs, labels=labels).loss.backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-8, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


def test_gradients_of_gradients():
    """Of a gradient penalty, as adversarial training adds one: through the definitions, when they are asked for."""
    inputs, kept = batch(), batch()["attention_mask"].bool()

    def penalty(model):
        words = model.embeddings.word_embeddings.weight
        loss = model(**inputs).last_hidden_state[kept].pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, words, create_graph=True)
        gradient.norm().backward()
        return model.encoder.layer[0].output.dense.weight.grad

    model = make()
    model.set_attn_implementation("eager")
    expected = penalty(model)
    fast = bert_fast.accelerate(make())
    with ops.force("reference"):
        found = penalty(fast)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    with pytest.raises(RuntimeError, match=r'within bert_fast\.ops\.force\("reference"\)'):
        penalty(fast)


def test_frozen_parameters_get_no_gradient():
    model = make("BertForSequenceClassification").train()
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    bert_fast.accelerate(model)(**batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert {k for k, p in model.named_parameters() if p.grad is not None} == {"classifier.weight", "classifier.bias"}


def test_training_with_dropout_and_an_optimizer():
    model = bert_fast.accelerate(make("BertForSequenceClassification").train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = model(**batch(), labels=torch.tensor([0, 1, 0])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]
    # The fast path sees the parameters as the optimizer left them.
    model.eval()
    with torch.no_grad():
        fast = model(**batch()).logits
        torch.testing.assert_close(fast, bert_fast.restore(model)(**batch()).logits, rtol=1e-4, atol=1e-5)


def test_autocast():
    """Errors against float64: no more than twice plain autocast's own, and the dtypes it has."""
    model, inputs = make(hidden_size=96, intermediate_size=192), batch(batch_size=8, seq_len=20)
    kept = inputs["attention_mask"].bool()
    truth = copy.deepcopy(model).double()(**inputs).last_hidden_state[kept]

    def run():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**inputs)
        return out.last_hidden_state, out.pooler_output.dtype

    plain, plain_dtype = run()
    bert_fast.accelerate(model)
    fast, fast_dtype = run()
    assert (fast.dtype, fast_dtype) == (plain.dtype, plain_dtype)
    assert (fast[kept] - truth).norm() <= 2 * (plain[kept] - truth).norm()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs).last_hidden_state.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, inputs = make().to(dtype), batch()
    kept = inputs["attention_mask"].bool()
    truth = copy.deepcopy(model).double()(**inputs).last_hidden_state[kept]
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state[kept]
        fast = bert_fast.accelerate(model)(**inputs).last_hidden_state[kept]
    assert fast.dtype == dtype
    assert (fast - truth).norm() <= 2 * (plain - truth).norm() + 1e-12


def test_inference_mode_and_no_grad():
    model, inputs = bert_fast.accelerate(make()), batch()
    with torch.inference_mode():
        first = model(**inputs).last_hidden_state
    with torch.no_grad():
        second = model(**inputs).last_hidden_state
    third = model(**inputs).last_hidden_state
    assert third.requires_grad
    assert torch.equal(first, second)
    torch.testing.assert_close(second, third.detach(), rtol=0, atol=1e-5)  # packed weights, and op by op


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    model, inputs = make("BertForSequenceClassification"), batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(bert_fast.accelerate(model), backend=backend)
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=2e-5, atol=2e-5)
    loss = compiled(**inputs, labels=torch.tensor([0, 1, 0])).loss
    loss.backward()
    got = model.bert.embeddings.word_embeddings.weight.grad.clone()
    model.zero_grad()
    model(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    torch.testing.assert_close(got, model.bert.embeddings.word_embeddings.weight.grad, rtol=1e-4, atol=1e-6)


def test_recorded_programs_hold_for_other_batches():
    """Exported and traced, the plain path is recorded: packing would be fixed to the example's lengths."""
    model, inputs = make("BertForTokenClassification"), batch()
    other = {k: v[:2, :5] for k, v in batch(batch_size=4).items()}
    expected = model(**other).logits
    bert_fast.accelerate(model)
    shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape)).module()
        torch.testing.assert_close(exported(**other).logits, expected)
        ordered = ("input_ids", "attention_mask", "token_type_ids")
        traced = torch.jit.trace(model, tuple(inputs[name] for name in ordered), strict=False)
        torch.testing.assert_close(traced(*(other[name] for name in ordered))["logits"], expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_derivatives(mode):
    """The kernels would drop the tangents in silence: the ops run their definitions."""
    model, inputs = make(), batch()
    weight = model.encoder.layer[0].output.dense.weight
    tangent = torch.randn_like(weight)

    def derivative():
        with mode(), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(weight.detach(), tangent)
            parameters = {"encoder.layer.0.output.dense.weight": dual}
            output = torch.func.functional_call(model, parameters, (), inputs).pooler_output
            return torch.autograd.forward_ad.unpack_dual(output).tangent.detach()

    model.set_attn_implementation("eager")  # transformers' SDPA has no forward-mode derivative
    expected = derivative()
    bert_fast.accelerate(model)
    torch.testing.assert_close(derivative(), expected, rtol=1e-3, atol=1e-5)


def test_functional_gradients():
    model = make("BertForSequenceClassification")
    parameters, inputs = dict(model.named_parameters()), batch()

    def loss(parameters):
        call = {**inputs, "labels": torch.tensor([0, 1, 0])}
        return torch.func.functional_call(model, parameters, (), call).loss

    expected = torch.func.grad(loss)(parameters)
    bert_fast.accelerate(model)
    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), functools.partial(torch.save)],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_are_accelerated_too(duplicate, tmp_path):
    model, inputs = bert_fast.accelerate(make("BertForTokenClassification")), batch()
    if isinstance(duplicate, functools.partial):
        duplicate(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        twin = duplicate(model)
    assert is_accelerated(twin)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    if duplicate is not copy.copy:
        with torch.no_grad():
            twin.bert.embeddings.LayerNorm.bias += 1
        assert not torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_pickle_into_a_fresh_process(tmp_path):
    model, inputs = bert_fast.accelerate(make()), batch()
    torch.save((model, inputs, model(**inputs).last_hidden_state), tmp_path / "model.pt")
    program = f"""
import torch
model, inputs, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
from bert_fast.drop_in import is_accelerated
assert is_accelerated(model)
assert torch.equal(model(**inputs).last_hidden_state, expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_save_pretrained(tmp_path):
    model, inputs = make("BertForMaskedLM"), batch()
    expected = model(**inputs).logits
    bert_fast.accelerate(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.BertForMaskedLM
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
    bare = bert_fast.accelerate(make())
    bare.save_pretrained(tmp_path / "bare")
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "bare")) is transformers.BertModel


def test_changed_parameters_are_seen():
    model, inputs = bert_fast.accelerate(make()), batch()
    other = make(seed=1)
    with torch.no_grad():
        model(**inputs)
        model.load_state_dict(other.state_dict())
        kept = inputs["attention_mask"].bool()
        assert_same(model(**inputs), other(**inputs), kept)
        model.encoder.layer[0].output.dense.weight.data.mul_(2)  # .data hides the change from autograd's counters
        other.encoder.layer[0].output.dense.weight.data.mul_(2)
        assert_same(model(**inputs), other(**inputs), kept)


def test_tables_that_the_config_does_not_know_of():
    model = make()
    model.embeddings.word_embeddings = torch.nn.Embedding(70, 48)
    model.embeddings.position_embeddings = torch.nn.Embedding(40, 48)
    ids = torch.arange(30, 66)[None]
    call = {"token_type_ids": torch.zeros_like(ids), "position_ids": torch.arange(36)[None]}
    with torch.no_grad():
        expected = model(ids, **call)
        assert_same(bert_fast.accelerate(model)(ids, **call), expected, torch.ones(1, 36, dtype=torch.bool))
        del call["position_ids"]
        assert torch.allclose(model(ids, **call).last_hidden_state, expected.last_hidden_state, atol=2e-5)


@pytest.mark.parametrize("shape", [(9,), (1, 9)])
def test_one_row_of_positions_and_types_serves_every_text(shape):
    model, inputs = make(), batch()
    inputs["position_ids"] = torch.arange(1, 10).view(shape)
    inputs["token_type_ids"] = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1, 1]).view(shape)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs)
        assert_same(bert_fast.accelerate(model)(**inputs), expected, kept)


def test_resized_vocabulary():
    model = bert_fast.accelerate(make())
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[69, 1]])).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="input_ids 70 at index"):
        model(torch.tensor([[70, 1]]))


def test_hooks_and_parametrizations_are_honoured():
    model, inputs = bert_fast.accelerate(make()), batch()
    calls = []
    model.encoder.layer[1].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(ops.FallbackWarning, match="BertLayer in it has a hook"):
        model(**inputs)
    assert calls == [1]

    class Halved(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    model, plain = bert_fast.accelerate(make()), make()
    for target in (model, plain):
        parametrize.register_parametrization(target.encoder.layer[0].output.dense, "weight", Halved())
    with pytest.warns(ops.FallbackWarning, match="ParametrizedLinear stands in it"):
        got = model(**inputs).last_hidden_state
    assert torch.equal(got, plain(**inputs).last_hidden_state)


def _wrapped(model):
    class Wrapper(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.inner = layer

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model.encoder.layer[1] = Wrapper(model.encoder.layer[1])


def _own_forward(model):
    output = model.encoder.layer[0].output
    plain = output.forward
    output.forward = lambda hidden, residual: 3 * plain(hidden, residual)


def _own_attention(model):
    def doubled(module, query, key, value, mask, scaling=None, **kwargs):
        return modeling_bert.eager_attention_forward(module, query, key, value, mask, 2 * scaling)

    transformers.AttentionInterface.register("doubled", doubled)
    transformers.AttentionMaskInterface.register("doubled", transformers.masking_utils.eager_mask)
    model.set_attn_implementation("doubled")


def _without_bias(model):
    model.encoder.layer[0].intermediate.dense.bias = None


def _parameter_subclass(model):
    class Doubled(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.linear:
                args = (args[0], 2 * args[1].detach().as_subclass(torch.Tensor), *args[2:])
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    query = model.encoder.layer[0].attention.self.query
    query.weight = query.weight.data.as_subclass(Doubled)


def _several_dtypes(model):
    model.bfloat16()
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.float()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_wrapped, "a Wrapper stands in it"),
        (_own_forward, "a BertOutput in it has a forward of its own"),
        (_own_attention, "its attention is 'doubled'"),
        (_without_bias, "a Linear in it has no bias"),
        (_parameter_subclass, "a Linear in it has a Doubled as weight"),
        (_several_dtypes, "its parameters are of several dtypes: torch.bfloat16, torch.float32"),
    ],
)
def test_what_somebody_changed_inside_is_honoured(change, reason, training, monkeypatch):
    monkeypatch.setattr("bert_fast.ops._dispatch._warned", set())
    model, inputs = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training), batch()
    with torch.no_grad():
        untouched = model(**inputs).last_hidden_state
        change(model)
        expected = model(**inputs).last_hidden_state
        assert change in (_wrapped, _without_bias) or not torch.equal(expected, untouched)
        with pytest.warns(ops.FallbackWarning, match=reason):
            assert torch.equal(bert_fast.accelerate(model)(**inputs).last_hidden_state, expected)


def test_hooks_on_the_model_itself_still_run():
    model, calls = bert_fast.accelerate(make("BertForTokenClassification")), []
    model.bert.register_forward_hook(lambda *_: calls.append("bert"))
    model.register_forward_hook(lambda *_: calls.append("head"))
    model(**batch())
    assert calls == ["bert", "head"]


def test_bad_input_names_the_index_and_the_value():
    model = bert_fast.accelerate(make())
    with pytest.raises(ValueError, match=r"input_ids 61 at index \(0, 1\) is out of range \[0, 61\)"):
        model(torch.tensor([[1, 61]]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), expected \(1, 2\)"):
        model(torch.tensor([[1, 6]]), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            lambda: torch.nn.Linear(2, 2),
            TypeError,
            "does not know torch.nn.modules.linear.Linear; it knows .*BertModel",
        ),
        (
            lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)),
            TypeError,
            "BertLMHeadModel; it knows",
        ),
        (lambda: make(is_decoder=True), ValueError, "is a decoder"),
        (lambda: make(hidden_act="gelu_10"), ValueError, "hidden_act is 'gelu_10', expected one of gelu,"),
    ],
)
def test_unknown_models_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        bert_fast.accelerate(model())


def test_sentence_transformer():
    sentences = ["A short one.", "", "A much longer sentence about nothing in particular, with many words in it.", "x"]
    model = SentenceTransformer(str(resolve("demo")), device="cpu")
    expected = model.encode(sentences)
    assert bert_fast.accelerate(model) is model
    assert is_accelerated(model)
    got = model.encode(sentences)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    tokens = model.encode(sentences, output_value="token_embeddings")
    assert [len(t) for t in tokens] == [6, 2, 17, 3]
    assert np.array_equal(bert_fast.restore(model).encode(sentences), expected)


def test_cross_encoder(tmp_path):
    make("BertForSequenceClassification", num_labels=1, vocab_size=30522).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(resolve("demo")).save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device="cpu", max_length=24)
    pairs = [("a question", "an answer"), ("a question", "something else altogether, and longer")]
    expected = model.predict(pairs)
    np.testing.assert_allclose(bert_fast.accelerate(model).predict(pairs), expected, atol=2e-5)
    assert is_accelerated(model)
