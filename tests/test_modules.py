"""The fast BERT: any mask, padded or packed, strange tensors, and everything a caller can get wrong."""

import itertools
import os
import re
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast import modules, ops, reference
from bert_fast.config import BertConfig
from bert_fast.ragged import Ragged, pack

CONFIG = BertConfig(
    vocab_size=61,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=80,
    max_position_embeddings=24,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return modules.BertModel(CONFIG).eval()


@pytest.fixture(scope="module")
def plain(model):
    twin = reference.BertModel(CONFIG).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def ids(*shape, seed=0):
    return torch.randint(1, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


MASKS = {
    "right padding": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
    "left padding": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 1]],
    "a row without a token": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
    "no token at all": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    "all kept": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_any_mask(model, plain, mask, dtype):
    tokens, mask = ids(2, 5), torch.tensor(mask, dtype=dtype)
    with torch.no_grad():
        got, expected = model(tokens, mask), plain(tokens, mask)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    assert not got.last_hidden_state[mask == 0].any()
    assert got.last_hidden_state.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_masks_do_not_leak(model, data):
    """The law: what a mask hides, and what stands in other rows, changes no bit of a row."""
    batch_size, seq_len = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=seq_len, max_size=seq_len),
                                           min_size=batch_size, max_size=batch_size)))  # fmt: skip
    tokens = ids(batch_size, seq_len, seed=data.draw(st.integers(0, 999)))
    other = torch.where(mask, tokens, ids(batch_size, seq_len, seed=1000))
    with torch.no_grad():
        got = model(tokens, mask).last_hidden_state
        assert torch.equal(got, model(other, mask).last_hidden_state)
        for row in range(batch_size):
            alone = model(tokens[row : row + 1], mask[row : row + 1]).last_hidden_state
            torch.testing.assert_close(got[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_an_empty_row_changes_no_other(model):
    tokens = ids(3, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    with torch.no_grad():
        with_it = model(tokens, mask).last_hidden_state
        without = model(tokens[[0, 2]]).last_hidden_state
    assert not with_it[1].any()
    assert torch.equal(with_it[[0, 2]], without)


def test_nan_stays_in_its_row(plain):
    """A NaN that row 1 brings in (as a word vector) reaches no other row."""
    fast = modules.BertModel(CONFIG).eval()
    fast.load_state_dict(plain.state_dict())
    with torch.no_grad():
        fast.embeddings.word_embeddings.weight[7] = float("nan")
    tokens = ids(3, 6)
    tokens[tokens == 7] = 8
    tokens[1, 2] = 7
    with torch.no_grad():
        got = fast(tokens)
    assert got.last_hidden_state[1].isnan().all()
    assert got.last_hidden_state[[0, 2]].isfinite().all()
    assert got.pooler_output[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(model, shape):
    output = model(torch.zeros(shape, dtype=torch.long), torch.ones(shape))
    assert output.last_hidden_state.shape == (*shape, CONFIG.hidden_size)
    assert output.pooler_output.shape == (shape[0], CONFIG.hidden_size)


def test_packed_input_equals_padded(model, plain):
    lengths = torch.tensor([3, 7, 0, 1])
    cu_seqlens = torch.tensor([0, 3, 10, 10, 11], dtype=torch.int32)
    tokens = ids(1, 11)
    mask = torch.arange(7) < lengths[:, None]
    padded = torch.zeros(4, 7, dtype=torch.long).masked_scatter(mask, tokens)
    options = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 7, "max_length_k": 7}
    with torch.no_grad():
        expected = plain(padded, mask)
        for package in (model, plain):
            got = package(tokens, **options)
            assert got.last_hidden_state.shape == (1, 11, CONFIG.hidden_size)
            torch.testing.assert_close(got.last_hidden_state[0], expected.last_hidden_state[mask], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
        ragged = Ragged.from_lengths(tokens[0], lengths)
        assert torch.equal(model.encode(ragged), model(tokens, **options).last_hidden_state[0])


def test_odd_tensors(model):
    tokens = ids(4, 10)
    mask = (torch.arange(10) < torch.tensor([[10], [4], [7], [1]])).long()
    with torch.no_grad():
        expected = model(tokens, mask).last_hidden_state
        wide = torch.full((4, 20), -9, dtype=torch.long)
        wide[:, 1::2] = tokens
        variants = {
            "int32": (tokens.int(), mask.int()),
            "strided": (wide[:, 1::2], mask),
            "transposed": (tokens.t().contiguous().t(), mask.t().contiguous().t()),
            "offset": (torch.cat([tokens, tokens])[4:], mask),
        }
        for name, (t, m) in variants.items():
            assert torch.equal(model(t, m).last_hidden_state, expected), name
        assert torch.equal(model(tokens[:1].expand(3, -1))[0][2], model(tokens[:1])[0][0])
        positions = torch.arange(10)[None]
        assert torch.equal(model(tokens, mask, torch.zeros_like(tokens), positions).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[1, 61]])}, r"input_ids 61 at index \(0, 1\) is out of range \[0, 61\)"),
        ({"input_ids": torch.tensor([[1], [-1]])}, r"input_ids -1 at index \(1, 0\)"),
        ({"token_type_ids": torch.full((2, 5), 2)}, r"token_type_ids 2 at index \(0, 0\) is out of range \[0, 2\)"),
        ({"position_ids": torch.full((2, 5), 24)}, r"position_ids 24 at index \(0, 0\) is out of range \[0, 24\)"),
        ({"position_ids": torch.full((2, 5), -3)}, r"position_ids -3"),
        ({"input_ids": torch.ones(1, 25, dtype=torch.long)}, "25 tokens, more than max_position_embeddings 24"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\), expected \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 5, 5)}, r"attention_mask has shape \(2, 5, 5\)"),
        ({"token_type_ids": torch.zeros(1, 4, dtype=torch.long)}, r"token_type_ids has shape \(1, 4\)"),
        ({"position_ids": torch.zeros(4, dtype=torch.long)}, r"position_ids has shape \(4,\)"),
        ({"input_ids": torch.ones(2, 5)}, "input_ids is torch.float32, expected int64 or int32"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, r"input_ids has shape \(5,\)"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.ones(2, 5, 48)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None, "inputs_embeds": torch.ones(2, 5, 47)}, r"inputs_embeds has shape \(2, 5, 47\)"),
        ({"attention_mask": torch.ones(2, 5, device="meta")}, "attention_mask is on meta but the tokens are on cpu"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, r"a packed batch has shape \(1, num_tokens\), got \(2, 5\)"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("package", ["model", "plain"])
def test_bad_input(request, package, arguments, message):
    target = request.getfixturevalue(package)
    with pytest.raises(ValueError, match=message):
        target(**{"input_ids": torch.ones(2, 5, dtype=torch.long), **arguments})


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 4], "runs from 0 to 4, expected 0 to 5"),
        ([1, 5], "runs from 1 to 5"),
        ([0, 4, 2, 5], "falls at index 2"),
        ([], "expected int32"),
    ],
)
def test_bad_packed_input(model, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        model(torch.ones(1, 5, dtype=torch.long), cu_seq_lens_q=torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("masked_lm", {"labels": torch.full((2, 5), 61)}, r"labels 61 at index \(0, 0\) is out of range \[0, 61\)"),
        (
            "sequence_classification",
            {"labels": torch.tensor([0, -1])},
            r"labels -1 at index 1 is out of range \[0, 2\)",
        ),
        ("sequence_classification", {"labels": torch.tensor([0, 1, 1])}, r"labels has shape \(3,\)"),
        ("next_sentence", {"labels": torch.tensor([2, 0])}, "labels 2 at index 0"),
        ("token_classification", {"labels": torch.ones(2, 4, dtype=torch.long)}, r"labels has shape \(2, 4\)"),
    ],
)
def test_bad_labels(head, labels, message):
    target = modules.HEADS[head](CONFIG).eval()
    with pytest.raises(ValueError, match=message):
        target(torch.ones(2, 5, dtype=torch.long), **labels)


def test_hidden_size_must_divide():
    with pytest.raises(ValueError, match="hidden_size 50 is not divisible by num_attention_heads 12"):
        BertConfig(hidden_size=50)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_norm_eps", "tiny"),
        ("layer_norm_eps", 0),
        ("hidden_dropout_prob", None),
        ("pad_token_id", "0"),
        ("id2label", ["yes", "no"]),
        ("id2label", {"yes": 0}),
    ],
)
def test_an_impossible_field_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}, expected ")):
        BertConfig.from_dict({field: value})


def test_unknown_keyword(model):
    with pytest.raises(TypeError, match="attention_masks"):
        model(ids(1, 3), attention_masks=torch.ones(1, 3))


def test_dropout_in_training_matches_its_rate():
    """With dropout everywhere at 1 only LayerNorm's biases are left; at 0 training equals evaluation."""
    torch.manual_seed(0)
    quiet = modules.BertModel(BertConfig(**{**CONFIG.__dict__, "hidden_dropout_prob": 0.0,
                                            "attention_probs_dropout_prob": 0.0}))  # fmt: skip
    tokens = ids(2, 6)
    assert torch.equal(quiet.train()(tokens)[0], quiet.eval()(tokens)[0])
    noisy = modules.BertModel(CONFIG).train()
    first, second = noisy(tokens)[0], noisy(tokens)[0]
    assert not torch.equal(first, second)
    noisy.embeddings.dropout.p = 1.0
    for layer in noisy.encoder.layer:
        layer.output.dropout.p = layer.attention.output.dropout.p = 1.0
    assert not noisy(tokens)[0].any()  # dropout(...) = 0, and LayerNorm of a zero residual is its bias, 0


def test_training_reduces_the_loss():
    torch.manual_seed(0)
    trained = modules.BertForSequenceClassification(CONFIG).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    tokens, labels = ids(8, 7), torch.arange(8) % 2
    losses = []
    for _ in range(30):
        loss = trained(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.35 < losses[0]  # a single loss is as noisy as dropout


def test_a_replaced_or_hooked_module_runs_the_plain_path(plain):
    """LoRA, quantisation and hooks work by standing in a module's place: the ops must not overlook them."""
    fast = modules.BertModel(CONFIG).eval()
    fast.load_state_dict(plain.state_dict())
    tokens = ids(2, 6)
    seen = []
    handle = fast.encoder.layer[1].output.dense.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(ops.FallbackWarning, match="Linear in it has a hook"):
        fast(tokens)
    assert seen == [1]
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(tokens)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(48, 48)
    doubled.load_state_dict(fast.encoder.layer[0].attention.self.value.state_dict())
    before = fast(tokens)[0]
    fast.encoder.layer[0].attention.self.value = doubled
    with pytest.warns(ops.FallbackWarning, match="a Doubled stands in it"):
        after = fast(tokens)[0]
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("num_threads", [2, 16])
def test_concurrent_calls_give_the_serial_bits(model, num_threads):
    """Two to sixteen threads share one model."""
    batches = [(ids(3, 12, seed=i), torch.arange(12) < torch.tensor([[12], [5], [1 + i % 12]])) for i in range(32)]
    with torch.no_grad():
        serial = [model(*b).last_hidden_state for b in batches]
    results = [None] * len(batches)
    work = itertools.count()

    def run():
        with torch.no_grad():
            while (i := next(work)) < len(batches):
                results[i] = model(*batches[i]).last_hidden_state

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, serial, strict=True))


def test_fork_after_use_does_not_hang(model):
    """PyTorch alone hangs in a child forked after its thread pool was used."""
    tokens = ids(8, 24)
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
    torch.randn(512, 512) @ torch.randn(512, 512)  # the pool is certainly awake
    pid = os.fork()
    if pid == 0:
        try:
            with torch.no_grad():
                same = torch.allclose(model(tokens).last_hidden_state, expected, atol=1e-5)
            os._exit(0 if same else 3)
        finally:
            os._exit(4)
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.fail("the forked child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_pack_and_pad_are_inverse():
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]])
    ragged, padding = pack(torch.arange(9).view(3, 3), mask)
    assert ragged.input_ids.tolist() == [1, 2, 3]
    assert ragged.position_ids.tolist() == [1, 2, 0]
    assert ragged.cu_seqlens.tolist() == [0, 2, 3, 3]
    assert ragged.max_seqlen == 2
    assert padding.pad(ragged.input_ids[:, None].float())[..., 0].tolist() == [[0, 1, 2], [3, 0, 0], [0, 0, 0]]


def test_compiled_equals_eager(model):
    tokens, mask = ids(3, 9), (torch.arange(9) < torch.tensor([[9], [4], [2]])).long()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, mask)[0], model(tokens, mask)[0])
        torch.testing.assert_close(compiled(tokens[:2])[0], model(tokens[:2])[0])
