"""The GPU's engine: on the GPU where there is one, else its kernels under Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from implementations import HAS_GPU
from numerics import assert_no_worse
from test_graphs import Rerun
from transformers import BertConfig, BertModel

from bert_fast import ops
from bert_fast.engine import fingerprint
from bert_fast.engine.batches import CheckedRagged, DeviceBatch, Inputs, PaddedBatch
from bert_fast.engine.gpu import GpuEngine, _Work, refusal
from bert_fast.engine.graphs import RECORD_AT, Bucket
from bert_fast.inputs import BertInputs, TableSizes
from bert_fast.kernels.packing import FEW_PLACES
from bert_fast.ragged import Ragged

DEVICE = torch.device("cuda:0" if HAS_GPU else "cpu")
#: Triton's interpreter treats bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def make(seed=0, dtype=torch.float32, **options):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2} | options
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=80, max_position_embeddings=600, attn_implementation="eager", **sizes)
    return BertModel(config).eval().to(DEVICE, dtype)


def engine_of(model, precision=None, recorder=None):
    config = model.config
    precision = precision or PRECISIONS[model.dtype]
    return GpuEngine(model, config.hidden_act, config.num_attention_heads, precision, recorder)


def ragged(*lengths, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    ids, types = (torch.randint(0, high, (sum(lengths),), generator=generator).to(device) for high in (80, 2))
    return Ragged.from_lengths(ids, torch.tensor(lengths, dtype=torch.int64, device=device), types)


def plain(model, inputs):
    """The rows of transformers at the tokens there are, and the mask of those."""
    ids, mask = inputs.input_ids, inputs.attention_mask
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    with torch.no_grad():
        hidden = model(ids, mask.long(), inputs.token_type_ids, inputs.position_ids).last_hidden_state
    return hidden[mask], mask


def mask_of(kind, batch_size=4, seq_len=20):
    columns = torch.arange(seq_len)
    mask = {
        "none": torch.ones(batch_size, seq_len),
        "right padding": columns < torch.tensor([20, 7, 1, 13])[:, None],
        "left padding": columns >= torch.tensor([0, 13, 19, 7])[:, None],
        "holes": torch.rand(batch_size, seq_len) < 0.5,
        "rows without a token": torch.tensor([1, 0, 0, 1])[:, None].expand(batch_size, seq_len),
        "no token at all": torch.zeros(batch_size, seq_len),
    }[kind]
    return mask.to(DEVICE)


MASKS = ["none", "right padding", "left padding", "holes", "rows without a token", "no token at all"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_a_padded_batch(kind, dtype):
    model = make(dtype=dtype)
    truth = make().double()
    truth.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    ids, types = (torch.randint(0, high, (4, 20), device=DEVICE) for high in (80, 2))
    inputs = BertInputs(ids, mask_of(kind), types)
    rows, first, states = engine_of(model).padded(inputs)
    expected, mask = plain(model, inputs)
    assert rows.shape == (4, 20, 32)
    assert states == []
    assert_no_worse(rows[mask], expected, plain(truth, inputs)[0])
    assert not rows[~mask].any()
    for row, keep, one in zip(rows, mask, first, strict=True):
        assert torch.equal(one, row[keep][0] if keep.any() else torch.zeros_like(one))


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu", "tanh"])
def test_activations(act):
    model, inputs = make(hidden_act=act), BertInputs(torch.randint(0, 80, (2, 9), device=DEVICE))
    rows = engine_of(model).padded(inputs)[0]
    torch.testing.assert_close(rows.flatten(0, 1), plain(model, inputs)[0], rtol=0, atol=1e-5)


def test_every_layer_comes_out():
    model, mask = make(), mask_of("holes")
    ids = torch.randint(0, 80, (4, 20), device=DEVICE)
    with torch.no_grad():
        expected = model(ids, mask.long(), output_hidden_states=True).hidden_states
    rows, _, states = engine_of(model).padded(BertInputs(ids, mask), want_states=True)
    assert torch.equal(rows, states[-1])
    for state, value in zip(states, expected, strict=True):
        torch.testing.assert_close(state[mask], value[mask], rtol=0, atol=1e-5)
        assert not state[~mask].any()
    run = engine_of(model)
    batch, padding = run.pack(BertInputs(ids, mask))
    packed_states = []
    assert torch.equal(run.rows(batch, packed_states), packed_states[-1])
    for state, value in zip(packed_states, states, strict=True):
        assert torch.equal(padding.pad(state), value)


@pytest.mark.parametrize("kind", MASKS)
def test_pack_is_what_the_cpu_does(kind):
    model = make()
    inputs = BertInputs(torch.randint(0, 80, (4, 20), device=DEVICE), mask_of(kind))
    batch, padding = engine_of(model).pack(inputs)
    expected, expected_padding = inputs.checked(TableSizes.of(model.embeddings)).to_ragged()
    for name in ("input_ids", "position_ids", "token_type_ids", "cu_seqlens"):
        assert getattr(batch, name).tolist() == getattr(expected, name).tolist(), name
    assert batch.max_seqlen == expected.max_seqlen
    places = [p.indices if p.indices is None else p.indices.tolist() for p in (padding, expected_padding)]
    assert places[0] == places[1]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, FEW_PLACES)], ids=str)
def test_sizes_at_the_edge(shape):
    model = make()
    inputs = BertInputs(torch.randint(0, 80, shape, device=DEVICE), torch.zeros(shape, device=DEVICE))
    run = engine_of(model)
    rows, first, states = run.padded(inputs, want_states=True)
    assert rows.shape == (*shape, 32)
    assert first.shape == (shape[0], 32)
    assert len(states) == 3
    assert not rows.any()
    assert not first.any()
    batch, padding = run.pack(inputs)
    assert torch.equal(padding.pad(run.rows(batch)), rows)


@pytest.mark.parametrize("where", ["host", "device", "packed before"])
def test_rows_and_vectors(where):
    model, batch = make(), ragged(5, 0, 33, 1, 16)
    run = engine_of(model)
    texts = batch.input_ids.split([5, 0, 33, 1, 16])
    types = batch.token_type_ids.split([5, 0, 33, 1, 16])
    with torch.no_grad():
        expected = torch.cat(
            [
                model(text[None].to(DEVICE), token_type_ids=kind[None].to(DEVICE)).last_hidden_state[0]
                for text, kind in zip(texts, types, strict=True)
                if len(text)
            ]
        )
    if where != "host":
        on_device = {name: value.to(DEVICE) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        batch = CheckedRagged(**on_device, max_seqlen=batch.max_seqlen)
        if where == "device" and HAS_GPU:
            batch = Ragged(**vars(batch))
    torch.testing.assert_close(run.rows(batch), expected, rtol=0, atol=1e-5)
    modes = ["mean", "cls", "max"]
    offsets = batch.cu_seqlens.to(DEVICE)
    pooled = torch.cat([ops.pooling(expected, offsets, mode=mode, impl="reference") for mode in modes], dim=1)
    torch.testing.assert_close(run.vectors(batch, modes, normalize=False), pooled, rtol=0, atol=1e-5)
    lengths = run.vectors(batch, modes, normalize=True).norm(dim=1)
    torch.testing.assert_close(lengths.cpu(), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))


def test_no_text():
    run = engine_of(make())
    assert run.rows(ragged()).shape == (0, 32)
    assert run.vectors(ragged(), ["mean"], True).shape == (0, 32)
    assert not run.vectors(ragged(0, 0), ["mean"], True).any()


def test_a_batch_that_the_caller_packed():
    model, batch = make(), ragged(5, 3, device=DEVICE)
    inputs = BertInputs(
        batch.input_ids[None], token_type_ids=batch.token_type_ids[None], cu_seq_lens_q=batch.cu_seqlens
    )
    rows, first, states = engine_of(model).padded(inputs, want_states=True)
    expected = engine_of(model).rows(ragged(5, 3))
    torch.testing.assert_close(rows[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(first, rows[0, [0, 5]])
    assert torch.equal(states[-1], rows)


@pytest.mark.parametrize("precision", ["fp16", "fp32", *(["bf16"] if HAS_GPU else [])])
def test_another_precision_than_the_parameters(precision):
    dtype = torch.float16 if precision == "fp32" else torch.float32
    model, batch = make(dtype=dtype), ragged(7, 20)
    rows = engine_of(model, precision).rows(batch)
    exact = engine_of(model.float(), "fp32").rows(batch)
    assert rows.dtype == dtype
    assert 0 < (rows.float() - exact).norm() / exact.norm() < 2e-2
    vectors = engine_of(model, precision).vectors(batch, ["mean"], True)
    assert vectors.dtype == torch.float32


def test_fp8():
    """The products are torch's, the codes come from the kernels."""
    for act in ("gelu", "relu"):
        model = make(dtype=torch.float16, intermediate_size=128, hidden_act=act)
        exact, batch, states = engine_of(model, "fp16").rows(ragged(7, 20)), ragged(7, 20), []
        rows = engine_of(model, "fp8").rows(batch)
        assert rows.dtype == torch.float16
        assert 0 < (rows.float() - exact.float()).norm() / exact.float().norm() < 0.05
        assert torch.equal(engine_of(model, "fp8").rows(batch, states), rows)
        assert len(states) == 3


# ----------------------------------------------------------------------------------------------------------- bad input

GOOD = torch.arange(40).reshape(2, 20)


def wide(ids, places=FEW_PLACES + 20):
    """As many rows as the host asks about before it runs them."""
    return ids.repeat(places // ids.numel() + 1, 1)


BAD = {
    "an id too large": {"input_ids": GOOD + 41},
    "a negative id": {"input_ids": GOOD - 1},
    "a type": {"token_type_ids": GOOD},
    "a position": {"position_ids": torch.arange(590, 610)},
    "floating ids": {"input_ids": GOOD.float()},
    "one row": {"input_ids": GOOD[0]},
    "another shape of types": {"token_type_ids": GOOD[:, :5]},
    "another shape of the mask": {"attention_mask": GOOD[:, :5]},
    "too long": {"input_ids": torch.zeros(1, 601, dtype=torch.int64)},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("enlarge", [lambda ids: ids, wide], ids=["few", "many"])
@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_bad_batches_are_refused_in_the_words_of_the_cpu(change, enlarge, masked):
    model = make(num_hidden_layers=1)
    run, sizes = engine_of(model), TableSizes.of(model.embeddings)
    given = {"input_ids": GOOD, "attention_mask": torch.ones_like(GOOD) if masked else None} | change
    if given["input_ids"].shape == GOOD.shape and "shape" not in str(change):
        given = {name: ids if ids is None or ids.dim() == 1 else enlarge(ids) for name, ids in given.items()}
    with pytest.raises(ValueError, match=r"\w") as expected:
        BertInputs(**given).checked(sizes)
    on_device = {name: ids if ids is None else ids.to(DEVICE) for name, ids in given.items()}
    for refused in (run.padded, run.pack):
        with pytest.raises(ValueError, match=r"\w") as got:
            refused(BertInputs(**on_device))
        assert str(got.value) == str(expected.value)
    good = BertInputs(GOOD.to(DEVICE))
    assert run.padded(good)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([3, 80])}, r"input_ids 80 at index 1 is out of range \[0, 80\)"),
        ({"input_ids": torch.tensor([-1, 3])}, r"input_ids -1 at index 0 is out of range \[0, 80\)"),
        ({"input_ids": torch.tensor([3, -1], dtype=torch.int32)}, r"input_ids -1 at index 1 is out of range \[0, 80\)"),
        ({"input_ids": torch.tensor([3.0, 4.0])}, "input_ids is torch.float32, expected int64 or int32"),
        ({"position_ids": torch.tensor([0, 600])}, r"position_ids 600 at index 1 is out of range \[0, 600\)"),
        ({"token_type_ids": torch.tensor([2, 0])}, r"token_type_ids 2 at index 0 is out of range \[0, 2\)"),
        ({"token_type_ids": torch.tensor([0])}, r"token_type_ids has shape \(1,\), expected \(2,\)"),
        (
            {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)},
            "cu_seqlens runs from 0 to 3, expected 0 to 2 tokens",
        ),
        ({"cu_seqlens": torch.tensor([0, 3, 2], dtype=torch.int32)}, "cu_seqlens falls from 3 to 2 at index 2"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens is torch.int64 of shape"),
    ],
)
@pytest.mark.parametrize("where", ["host", "device"])
def test_bad_packed_batches(change, message, where):
    ids = torch.tensor([3, 4])
    batch = {"input_ids": ids, "position_ids": ids * 0, "token_type_ids": ids * 0}
    batch |= {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)} | change
    if where == "host":
        run = engine_of(make(num_hidden_layers=1))
        with pytest.raises(ValueError, match=message):
            run.rows(Ragged(**batch, max_seqlen=2))
        return
    if "runs from" in message or "falls" in message:
        return  # offsets on the device are not read
    sizes = TableSizes(80, 2, 600, 32)
    on_device = Ragged(**{name: value.to(DEVICE) for name, value in batch.items()}, max_seqlen=2)

    def run():
        batch = DeviceBatch(on_device, sizes, may_wait=True)
        batch.fill(Inputs(Bucket(16, 1, 2), DEVICE))
        batch.check()

    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("rows", [4, 40])
def test_where_the_device_may_not_be_asked(rows):
    """While the caller records a graph: the whole batch is run, whatever its mask and its ids."""
    run = engine_of(make())
    ids, mask = torch.randint(0, 80, (rows, 20), device=DEVICE), torch.rand(rows, 20, device=DEVICE) < 0.5
    expected = run.padded(BertInputs(ids, mask))
    batch = PaddedBatch(BertInputs(ids, mask), run._sizes, may_wait=False)
    assert (batch.num_tokens, batch.max_seqlen) == (rows * 20, 20)
    got = run._run(batch, _Work, lambda hidden, shared: run._unpack(batch, hidden))
    for one, other in zip(got, expected, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    bad = PaddedBatch(BertInputs(ids + 1000, mask), run._sizes, may_wait=False)
    assert run._run(bad, _Work, lambda hidden, shared: hidden).shape[1] == 32
    with pytest.raises(ValueError, match="a CUDA graph is being captured, and the host has to know how many tokens"):
        batch.to_ragged()


def test_what_gpus_compute():
    assert refusal("fp32", "T4", (7, 5)) is None
    assert refusal("fp16", "T4", (7, 5)) is None
    assert refusal("bf16", "A100", (8, 0)) is None
    assert refusal("fp8", "H200", (9, 0)) is None
    assert refusal("bf16", "T4", (7, 5)) == (
        "precision is 'bf16', but T4 (sm_75) has no bfloat16 products: use precision='fp16'"
    )
    assert refusal("fp8", "A100", (8, 0)) == (
        "precision is 'fp8', but A100 (sm_80) has no fp8 products: use precision='bf16'"
    )
    assert refusal("fp8", "T4", (7, 5)) == (
        "precision is 'fp8', but T4 (sm_75) has no fp8 products: use precision='fp16'"
    )


# -------------------------------------------------------------------------------------- recorded forwards, in buckets


class PoisonedRerun(Rerun):
    """`Rerun` whose result is NaN before each replay, with all that the forward allocates."""

    def record(self, run):
        replay, result = super().record(run)

        def poisoned():
            result.fill_(torch.nan)
            replay()

        return poisoned, result


@pytest.mark.parametrize("way", ["rows", "vectors", "padded"])
def test_a_bucket_leaks_nothing_from_batch_to_batch(way):
    """One after another through the same memory, larger and smaller: each as if it were alone."""
    model = make(num_hidden_layers=1)
    recorded, eager = engine_of(model, recorder=PoisonedRerun()), engine_of(model)

    def results(run, batch, lengths):
        if way == "rows":
            return [run.rows(batch)]
        if way == "vectors":
            return [run.vectors(batch, ["max", "mean"], True)]
        mask = torch.arange(16) < torch.tensor(lengths)[:, None]
        ids = torch.full(mask.shape, 79)
        ids[mask] = batch.input_ids
        return run.padded(BertInputs(ids.to(DEVICE), mask.to(DEVICE)))[:2]

    for index, lengths in enumerate([(16,), (3,), (0,), (9, 7), (1, 2), (0, 5), (16,), (1,)]):
        batch = ragged(*lengths, seed=index)
        for got, expected in zip(results(recorded, batch, lengths), results(eager, batch, lengths), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_an_engine_goes_with_its_last_reference():
    """Its memory is a GPU's, of which the collector of cycles knows nothing."""
    run = engine_of(make(num_hidden_layers=1), recorder=Rerun())
    for _ in range(RECORD_AT + 1):
        run.rows(ragged(5))
    assert len(run._graphs._cache) == 1
    reference = weakref.ref(run)
    gc.disable()
    try:
        del run
        assert reference() is None
    finally:
        gc.enable()


def test_results_are_the_callers():
    run = engine_of(make(), recorder=Rerun())
    batches = [ragged(5, 9, seed=seed) for seed in range(4)]
    results = [(run.rows(batch), run.vectors(batch, ["mean"], False)) for batch in batches]
    for batch, (rows, vectors) in zip(batches, results, strict=True):
        torch.testing.assert_close(run.rows(batch), rows, rtol=0, atol=1e-5)
        torch.testing.assert_close(run.vectors(batch, ["mean"], False), vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fill", ["host", "padded"])
def test_what_is_past_the_tokens_is_inside_the_tables(fill):
    model = make()
    inputs = Inputs(Bucket(64, 8, 64), DEVICE)
    run, sizes = engine_of(model), TableSizes.of(model.embeddings)
    for lengths in ((30, 20), (3, 0, 1)):
        if fill == "host":
            run._batch(ragged(*lengths)).fill(inputs)
        else:
            mask = torch.arange(30) < torch.tensor(lengths)[:, None]
            run._padded_batch(BertInputs(torch.full(mask.shape, 79).to(DEVICE), mask.to(DEVICE))).fill(inputs)
        for ids, size in zip((inputs.input_ids, inputs.token_type_ids, inputs.position_ids), sizes[:3], strict=True):
            assert ((ids >= 0) & (ids < size)).all()
        offsets = inputs.cu_seqlens.tolist()
        assert offsets == sorted(offsets)
        assert offsets[-1] == sum(lengths)


def test_bad_ids_do_not_harm_what_is_recorded():
    run = engine_of(make(), recorder=Rerun())
    good = BertInputs(GOOD.to(DEVICE))
    expected = [run.padded(good)[0] for _ in range(3)][-1]
    with pytest.raises(ValueError, match="input_ids 80 at index"):
        run.padded(BertInputs(GOOD.to(DEVICE) + 60))
    assert torch.equal(run.padded(good)[0], expected)


def test_inference_mode_and_none_share_an_engine():
    run, batch = engine_of(make(), recorder=Rerun()), ragged(5, 9)
    for _ in range(2):
        with torch.inference_mode():
            inside = run.rows(batch)
        outside = run.rows(batch)
    assert inside.is_inference()
    assert not outside.is_inference()
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- the fingerprint


CHANGES = {
    "a version": lambda model: model.encoder.layer[1].output.dense.weight.mul_(1.5),
    "a parameter": lambda model: setattr(
        model.encoder.layer[0].intermediate.dense, "weight", torch.nn.Parameter(torch.randn(64, 32))
    ),
    "where it lies": lambda model: setattr(
        model.embeddings.LayerNorm.weight, "data", model.embeddings.LayerNorm.weight.clone()
    ),
    "an epsilon": lambda model: setattr(model.embeddings.LayerNorm, "eps", 0.1),
    "a module": lambda model: setattr(model.encoder.layer[1], "output", copy.deepcopy(model.encoder.layer[1].output)),
    "a hook": lambda model: model.encoder.layer[0].register_forward_hook(lambda *args: None),
    "a mode": lambda model: model.encoder.layer[0].train(),
    "a dropout": lambda model: setattr(model.embeddings.dropout, "p", 0.5),
    "a forward": lambda model: setattr(model.pooler, "forward", torch.nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("take", [fingerprint.__globals__["in_python"], fingerprint], ids=["python", "the one in use"])
def test_a_change_is_noticed(change, take):
    model = make()
    before = take(model)
    assert take(model) == before
    kept = [*model.modules(), *model.parameters()]  # so that no address is used again
    with torch.no_grad():
        change(model)
    assert take(model) != before
    assert kept
