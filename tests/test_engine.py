"""The C++ encoder over packed weights: right in every precision, the same in every batch, and never stale."""

import copy
import gc
import os
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, BertModel

import bert_fast
from bert_fast import engine, ops
from bert_fast.engine import PackedEngine, TorchEngine
from bert_fast.inputs import BertInputs
from bert_fast.ragged import Ragged

pytestmark = pytest.mark.skipif(ops.extension() is None, reason="the C++ extension is not built")

PRECISIONS = engine.PRECISIONS["cpu"]

#: Bounds on the relative error of the last hidden state of a small random model, about twice what is seen.
MAX_ERROR = {"fp32": 2e-6, "bf16": 2e-2, "int8": 5e-2}

SIZES = [
    pytest.param({"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256}, id="whole panels"),
    pytest.param({"hidden_size": 20, "num_attention_heads": 4, "intermediate_size": 37}, id="odd sizes, odd head_dim"),
    pytest.param({"hidden_size": 96, "num_attention_heads": 1, "intermediate_size": 800}, id="wide head, long sums"),
]


def make(cls=BertModel, seed=0, **options):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256} | options
    torch.manual_seed(seed)
    return cls(BertConfig(vocab_size=80, num_hidden_layers=3, max_position_embeddings=600, **sizes)).eval()


def ragged(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 80, (sum(lengths),), generator=generator)
    return Ragged.from_lengths(ids, torch.tensor(lengths, dtype=torch.int64))


def packed(model, precision):
    config = model.config
    return PackedEngine(model, config.hidden_act, config.num_attention_heads, precision)


def plain(model, batch):
    """The rows of transformers, one sequence at a time."""
    texts = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    with torch.no_grad():
        return torch.cat([model(text[None]).last_hidden_state[0] for text in texts if len(text)])


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=ops.extension().available_isas() if ops.extension() else [])
def isa(request):
    """Each instruction set of the machine in turn."""
    before = ops.extension().get_isa()
    ops.extension().set_isa(request.param)
    yield request.param
    ops.extension().set_isa(before)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_answer(sizes, precision, isa):
    model, batch = make(**sizes), ragged(5, 0, 33, 1, 300, 16)
    run = packed(model, precision)
    rows = run.rows(batch)
    assert relative_error(rows, plain(model, batch)) < MAX_ERROR[precision]
    for text, value in zip(
        batch.input_ids.split([5, 0, 33, 1, 300, 16]), rows.split([5, 0, 33, 1, 300, 16]), strict=True
    ):
        assert torch.equal(run.rows(Ragged.from_lengths(text, torch.tensor([len(text)]))), value)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_activations(act):
    model, batch = make(hidden_act=act), ragged(7, 20)
    assert relative_error(packed(model, "fp32").rows(batch), plain(model, batch)) < MAX_ERROR["fp32"]


def test_every_layer_comes_out():
    model, batch = make(), ragged(7, 20)
    states = []
    rows = packed(model, "fp32").rows(batch, states)
    assert torch.equal(states[-1], rows)
    with torch.no_grad():
        expected = model(batch.input_ids[:7][None], output_hidden_states=True).hidden_states
    for state, value in zip(states, expected, strict=True):
        torch.testing.assert_close(state[:7], value[0], rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(), lengths=st.lists(st.integers(0, 70), min_size=1, max_size=12), precision=st.sampled_from(PRECISIONS)
)
def test_a_text_gives_the_same_bits_in_every_batch(data, lengths, precision):
    """Alone, in any batch, in any order, on any number of threads, padded or not."""
    model = make()
    run = packed(model, precision)
    batch = ragged(*lengths)
    texts = list(batch.input_ids.split(lengths))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 4), label="threads"))
        together = run.rows(batch).split(lengths)
        order = data.draw(st.permutations(range(len(lengths))), label="order")
        torch.set_num_threads(data.draw(st.integers(1, 4), label="threads"))
        shuffled = run.rows(
            Ragged.from_lengths(torch.cat([texts[i] for i in order]), torch.tensor([lengths[i] for i in order]))
        ).split([lengths[i] for i in order])
        for place, i in enumerate(order):
            assert torch.equal(shuffled[place], together[i])
        one = data.draw(st.sampled_from(range(len(lengths))), label="alone")
        assert torch.equal(run.rows(Ragged.from_lengths(texts[one], torch.tensor([lengths[one]]))), together[one])
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        padded = torch.zeros(mask.shape, dtype=torch.int64)
        padded[mask] = batch.input_ids
        rows, first, _ = run.padded(BertInputs(padded, mask.int()))
        assert torch.equal(rows[mask], torch.cat(together))
        assert not rows[~mask].any()
        for text, value in zip(together, first, strict=True):
            assert torch.equal(value, text[0] if len(text) else torch.zeros_like(value))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean"])
def test_vectors(mode):
    run, batch = packed(make(), "fp32"), ragged(5, 0, 33)
    expected = ops.pooling(run.rows(batch), batch.cu_seqlens, mode=mode, impl="reference")
    torch.testing.assert_close(run.vectors(batch, [mode], normalize=False), expected)
    both = run.vectors(batch, [mode, "cls"], normalize=True)
    torch.testing.assert_close(both.norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(both[0, :64] / both[0, :64].norm(), expected[0] / expected[0].norm())


def test_long_sequences():
    model = make()
    model.embeddings.position_embeddings = torch.nn.Embedding(3000, 64)
    ids = torch.randint(0, 80, (3000,))
    batch = Ragged.from_lengths(ids, torch.tensor([3000]))
    with torch.no_grad():
        expected = model(ids[None], position_ids=torch.arange(3000)[None], token_type_ids=torch.zeros_like(ids)[None])
    assert relative_error(packed(model, "fp32").rows(batch), expected.last_hidden_state[0]) < MAX_ERROR["fp32"]


# -------------------------------------------------------------------------------------------- accelerate with precision


def call(model, **options):
    ids = torch.arange(2, 32).reshape(2, 15)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_accelerate_in_a_precision(precision):
    expected = call(make())
    model = bert_fast.accelerate(make(), precision=precision)
    got = call(model)
    assert got.last_hidden_state.dtype == torch.float32
    assert 0 < relative_error(got.last_hidden_state[0], expected.last_hidden_state[0]) < MAX_ERROR[precision]
    states = call(model, output_hidden_states=True)
    assert torch.equal(states.hidden_states[-1], got.last_hidden_state)
    assert len(states.hidden_states) == 4
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(call(again).last_hidden_state, got.last_hidden_state)
    assert torch.equal(call(copy.deepcopy(model)).last_hidden_state, got.last_hidden_state)
    torch.testing.assert_close(call(bert_fast.restore(model)).last_hidden_state, expected.last_hidden_state)


def test_a_precision_is_for_inference_and_training_still_works():
    model = bert_fast.accelerate(make(), precision="int8")
    ids = torch.arange(2, 12)[None]
    assert not model(ids).last_hidden_state.requires_grad
    model.train()
    rows = model(ids).last_hidden_state  # dropout: the definitions run, over the parameters
    (rows * torch.randn(rows.shape)).sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_bf16_by_torch(monkeypatch):
    """What runs where the CPU has AMX."""
    expected = call(make(), output_hidden_states=True)
    monkeypatch.setattr(engine, "prefers_torch", lambda precision: precision == "bf16")
    model = bert_fast.accelerate(make(), precision="bf16", free_originals=True)
    with torch.no_grad():
        assert isinstance(engine.serving(model, "gelu", 2), TorchEngine)
    got = call(model, output_hidden_states=True)
    for state, value in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert state.dtype == torch.float32
        assert 0 < relative_error(state[0], value[0]) < MAX_ERROR["bf16"]
    assert not got.last_hidden_state[1, 9:].any()
    run, batch = TorchEngine(make(), "gelu", 2), ragged(5, 0, 33)
    torch.testing.assert_close(
        run.vectors(batch, ["mean", "cls"], True),
        packed(make(), "bf16").vectors(batch, ["mean", "cls"], True),
        rtol=0,
        atol=0.02,
    )


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(make(seed=1).state_dict()),
    "an optimiser's step": lambda model: step(model),
    "behind autograd's back": lambda model: model.encoder.layer[1].output.dense.weight.data.mul_(1.5),
    "a replaced parameter": lambda model: setattr(
        model.encoder.layer[0].intermediate.dense, "weight", torch.nn.Parameter(torch.randn(256, 64) * 0.02)
    ),
    "a replaced module": lambda model: setattr(
        model.encoder.layer[2].attention.self, "query", make(seed=2).encoder.layer[2].attention.self.query
    ),
    "a table": lambda model: model.embeddings.word_embeddings.weight.data.mul_(2.0),
    "LayerNorm's epsilon": lambda model: setattr(model.embeddings.LayerNorm, "eps", 0.1),
}


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.enable_grad():
        rows = model(torch.arange(2, 12)[None]).last_hidden_state
        (rows * torch.randn(rows.shape)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("precision", [None, "int8"])
def test_weights_are_packed_again_when_they_change(change, precision):
    model = bert_fast.accelerate(make(), precision=precision)
    before = call(model).last_hidden_state
    assert torch.equal(call(model).last_hidden_state, before)
    if change == "an optimiser's step" and precision is not None:
        bert_fast.accelerate(model)  # to get gradients
    CHANGES[change](model)
    bert_fast.accelerate(model, precision=precision)
    after = call(model).last_hidden_state
    plain = call(bert_fast.restore(model)).last_hidden_state
    assert relative_error(after[0], plain[0]) < MAX_ERROR[precision or "fp32"]
    assert not torch.equal(before, after)


def test_the_engine_is_kept_while_nothing_changes():
    model = bert_fast.accelerate(make())
    with torch.no_grad():
        first, second = (engine.serving(model, "gelu", 2) for _ in range(2))
    assert first is second is not None


def test_packed_weights_go_with_the_model():
    model = bert_fast.accelerate(make())
    gc.collect()
    before = len(engine._slots)
    call(model)
    assert len(engine._slots) == before + 1
    del model
    gc.collect()
    assert len(engine._slots) == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_released_originals(precision, tmp_path):
    expected = call(bert_fast.accelerate(make(), precision=precision))
    model = bert_fast.accelerate(make(), precision=precision, free_originals=True)
    size = sum(parameter.untyped_storage().nbytes() for parameter in model.encoder.parameters())
    assert size < 0.05 * sum(parameter.numel() * 4 for parameter in make().encoder.parameters())
    assert model.num_parameters() == make().num_parameters()
    table = model.embeddings.word_embeddings.weight
    assert table.untyped_storage().nbytes() == (80 * 64 * 4 if precision == "fp32" else 4)
    for _ in range(2):
        got = call(model)
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(got.pooler_output, expected.pooler_output)
    for refused in (
        lambda: model.state_dict(),
        lambda: model.save_pretrained(tmp_path),
        lambda: call(model, output_attentions=True),
        lambda: call(copy.deepcopy(model)),
        lambda: call(model.train()),
        lambda: bert_fast.restore(model),
        lambda: bert_fast.accelerate(model, precision="fp32"),
    ):
        with pytest.raises(ValueError, match=r"weights were released \(free_originals=True\)"):
            refused()
    assert torch.equal(call(model.eval()).last_hidden_state, expected.last_hidden_state)


def test_a_table_that_a_head_shares_is_not_released():
    model = make(BertForMaskedLM)
    expected = call(model).logits
    got = call(bert_fast.accelerate(model, precision="bf16", free_originals=True)).logits
    assert relative_error(got[0], expected[0]) < 3 * MAX_ERROR["bf16"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            lambda: make(),
            {"precision": "fp8"},
            "precision is 'fp8', expected one of fp32, bf16, int8 on cpu; it runs on cuda",
        ),
        (lambda: make(), {"precision": "int4"}, "precision is 'int4', expected one of fp32, bf16, int8 on cpu$"),
        (lambda: make(), {"free_originals": True}, "free_originals is True without a precision"),
        (
            lambda: make(hidden_act="silu"),
            {"precision": "int8"},
            "precision is 'int8', but packed weights cannot serve",
        ),
        (lambda: make().half(), {"precision": "bf16"}, "precision is 'bf16', but packed weights cannot serve"),
        (lambda: make().train(), {"precision": "bf16"}, "in eval mode"),
    ],
)
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        bert_fast.accelerate(model(), **options)


def test_a_wrong_instruction_set_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="instruction set 'mmx' is not available on this machine, which has: scalar"):
        ops.extension().set_isa("mmx")


# ------------------------------------------------------------------------------------------------ threads and processes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_threads_and_two_engines(precision):
    models = [make(seed=0), make(seed=1)]
    runs = [packed(model, precision) for model in models]
    batches = [ragged(*lengths, seed=i) for i, lengths in enumerate([(3, 40, 9), (64,), (1,), (20, 20, 20, 20)])]
    expected = [[run.rows(batch) for batch in batches] for run in runs]
    wrong = []

    def work(index):
        for turn in range(6):
            run, batch = (index + turn) % 2, (index * 7 + turn) % len(batches)
            if not torch.equal(runs[run].rows(batches[batch]), expected[run][batch]):
                wrong.append((index, turn))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_can_use_it():
    run, batch = packed(make(), "fp32"), ragged(40, 100, 100)
    expected = run.rows(batch)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run.rows(batch), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([3, 80])}, r"input_ids 80 at index 1 is out of range \[0, 80\)"),
        ({"input_ids": torch.tensor([3.0, 4.0])}, "input_ids is torch.float32, expected int64 or int32"),
        ({"position_ids": torch.tensor([0, 600])}, r"position_ids 600 at index 1 is out of range \[0, 600\)"),
        (
            {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)},
            "cu_seqlens runs from 0 to 3, expected 0 to 2 tokens",
        ),
    ],
)
def test_bad_batches(change, message):
    ids = torch.tensor([3, 4])
    batch = {"input_ids": ids, "position_ids": ids * 0, "token_type_ids": ids * 0}
    batch |= {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32), "max_seqlen": 2}
    run = packed(make(), "fp32")
    with pytest.raises(ValueError, match=message):
        run.rows(Ragged(**(batch | change)))
    assert run.rows(Ragged(**batch)).shape == (2, 64)
