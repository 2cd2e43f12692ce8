"""The plain BERT against transformers: every head, logits and losses, on random small configurations and on MiniLM."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast import modules, reference
from bert_fast.config import BertConfig
from bert_fast.folders import resolve
from bert_fast.heads import initialize
from bert_fast.loading import from_pretrained

HEADS = [cls.__name__ for cls in modules.HEADS.values() if hasattr(transformers, cls.__name__)]
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def small_config(**changes):
    values = {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 20,
        "initializer_range": 0.2,  # large enough that every part of the model matters to the output
        **changes,
    }
    return BertConfig.from_dict(values), transformers.BertConfig(**values)


def twins(head, package, dtype, **changes):
    """transformers' model and ours with the same parameters, in evaluation."""
    config, hf_config = small_config(**changes)
    hf = getattr(transformers, head)(hf_config).to(dtype).eval()
    ours = getattr(package, head)(config).to(dtype).eval()
    ours.load_state_dict(hf.state_dict(), strict=True)
    return hf, ours


def batch(head, generator, batch_size=3, seq_len=9, vocab_size=61):
    shape = (batch_size, 4, seq_len) if head == "BertForMultipleChoice" else (batch_size, seq_len)
    lengths = torch.randint(1, seq_len + 1, shape[:-1], generator=generator)
    if head == "BertForQuestionAnswering":
        lengths = torch.full_like(lengths, seq_len)
    return {
        "input_ids": torch.randint(0, vocab_size, shape, generator=generator),
        "attention_mask": (torch.arange(seq_len) < lengths[..., None]).long(),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
    }


def labels(head, inputs, generator, num_labels=3):
    shape, kept = inputs["input_ids"].shape, inputs["attention_mask"].bool()

    def integers(high, *size):
        return torch.randint(0, high, size, generator=generator)

    per_token = integers(num_labels if head == "BertForTokenClassification" else 61, *shape).masked_fill(~kept, -100)
    return {
        "BertModel": {},
        "BertForMaskedLM": {"labels": per_token},
        "BertForNextSentencePrediction": {"labels": integers(2, shape[0])},
        "BertForPreTraining": {"labels": per_token, "next_sentence_label": integers(2, shape[0])},
        "BertForSequenceClassification": {"labels": integers(num_labels, shape[0])},
        "BertForTokenClassification": {"labels": per_token},
        # Past the end of a text, where both ignore it; padding itself competes in transformers: see the test of it.
        "BertForQuestionAnswering": {"start_positions": integers(12, shape[0]), "end_positions": integers(3, shape[0])},
        "BertForMultipleChoice": {"labels": integers(4, shape[0])},
    }[head]


def compare(got, expected, kept, bound):
    """Every field of transformers' output, where a token is."""
    fields = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert fields.keys() <= set(got)
    for name, value in fields.items():
        ours = got[name]
        assert ours.shape == value.shape, name
        if value.dim() >= 2 and value.shape[: kept.dim()] == kept.shape:
            ours, value = ours[kept], value[kept]
        assert relative_error(ours, value) <= bound, name


@pytest.mark.parametrize("package", [reference, modules], ids=["plain", "fast"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_heads_equal_transformers(head, dtype, package):
    generator = torch.Generator().manual_seed(1)
    changes = {"num_labels": 3} if "Classification" in head else {}
    hf, ours = twins(head, package, dtype, **changes)
    inputs = batch(head, generator)
    targets = labels(head, inputs, generator)
    with torch.no_grad():
        expected, got = hf(**inputs, **targets), ours(**inputs, **targets)
    assert not targets or expected.loss is not None
    compare(got, expected, inputs["attention_mask"].bool(), BOUNDS[dtype])


@pytest.mark.parametrize("package", [reference, modules], ids=["plain", "fast"])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_equal_transformers(head, package):
    generator = torch.Generator().manual_seed(2)
    hf, ours = twins(head, package, torch.float64, **({"num_labels": 3} if "Classification" in head else {}))
    inputs = batch(head, generator)
    targets = labels(head, inputs, generator)
    kept = inputs["attention_mask"].bool()

    def gradients(model):
        output = model(**inputs, **targets)
        loss = output.loss if targets else output.last_hidden_state[kept].square().sum() + output.pooler_output.sum()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, got = gradients(hf), gradients(ours)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("package", [reference, modules], ids=["plain", "fast"])
def test_span_loss_of_a_padded_batch(package):
    """transformers lets padding compete for the answer; here a text's loss is the one it has alone."""
    generator = torch.Generator().manual_seed(6)
    hf, ours = twins("BertForQuestionAnswering", package, torch.float64)
    inputs = batch("BertModel", generator)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    starts, ends = torch.tensor([0, lengths[1] - 1, 0]), torch.tensor([lengths[0] - 1, lengths[1] + 1, 0])
    got = ours(**inputs, start_positions=starts, end_positions=ends)
    of_start, of_end = [], []
    for row, length in enumerate(lengths):
        alone = hf(
            inputs["input_ids"][row : row + 1, :length], token_type_ids=inputs["token_type_ids"][row, None, :length]
        )
        of_start.append(torch.nn.functional.cross_entropy(alone.start_logits, starts[row, None]))
        if ends[row] < length:  # the second row's end lies in its padding: no target
            of_end.append(torch.nn.functional.cross_entropy(alone.end_logits, ends[row, None]))
    assert len(of_end) == 2
    torch.testing.assert_close(got.loss, (torch.stack(of_start).mean() + torch.stack(of_end).mean()) / 2)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_configurations(data):
    """The law: whatever the shape of the model and of the batch, the answers are transformers'."""
    heads = data.draw(st.integers(1, 4))
    changes = {
        "num_attention_heads": heads,
        "hidden_size": heads * data.draw(st.integers(1, 9)),
        "num_hidden_layers": data.draw(st.integers(0, 3)),
        "intermediate_size": data.draw(st.integers(1, 50)),
        "hidden_act": data.draw(st.sampled_from(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"])),
        "type_vocab_size": data.draw(st.integers(2, 4)),
        "layer_norm_eps": data.draw(st.sampled_from([1e-12, 1e-5])),
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    head = data.draw(st.sampled_from(["BertForPreTraining", "BertForQuestionAnswering"]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    inputs = batch(head, generator, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20)))
    package = data.draw(st.sampled_from([reference, modules]))
    hf, ours = twins(head, package, torch.float64, **changes)
    with torch.no_grad():
        compare(ours(**inputs), hf(**inputs), inputs["attention_mask"].bool(), 1e-12)


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "targets"),
    [
        (1, None, torch.tensor([0.5, -1.0, 2.0])),  # one label is a regression
        (1, None, torch.tensor([[0.5], [-1.0], [2.0]])),  # labels as a column
        (3, None, torch.tensor([0, 2, 1])),  # integers are single labels
        (3, None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])),  # floats are several labels
        (3, "regression", torch.randn(3, 3)),  # several numbers per text
        (1, "multi_label_classification", torch.tensor([[1.0], [0.0], [1.0]])),  # said, not inferred
    ],
)
@pytest.mark.parametrize("package", [reference, modules], ids=["plain", "fast"])
def test_problem_types(package, num_labels, problem_type, targets):
    generator = torch.Generator().manual_seed(3)
    hf, ours = twins(
        "BertForSequenceClassification", package, torch.float32, num_labels=num_labels, problem_type=problem_type
    )
    inputs = batch("BertForSequenceClassification", generator)
    expected, got = hf(**inputs, labels=targets), ours(**inputs, labels=targets)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("package", [reference, modules], ids=["plain", "fast"])
def test_hidden_states_attentions_and_tuples(package):
    hf, ours = twins("BertModel", package, torch.float64)
    hf.set_attn_implementation("eager")
    inputs = batch("BertModel", torch.Generator().manual_seed(4))
    kept = inputs["attention_mask"].bool()
    expected = hf(**inputs, output_hidden_states=True, output_attentions=True)
    got = ours(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    assert len(got.attentions) == len(expected.attentions) == 2
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[kept], b[kept])
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[kept], b.transpose(1, 2)[kept])
    as_tuple = ours(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[1], expected.pooler_output)
    states = ours(**inputs, output_hidden_states=True).hidden_states  # on the fast path, without attentions
    torch.testing.assert_close(states[1][kept], expected.hidden_states[1][kept])


@pytest.mark.parametrize("package", [reference, modules], ids=["plain", "fast"])
def test_inputs_embeds(package):
    hf, ours = twins("BertModel", package, torch.float64)
    words = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(inputs_embeds=words).pooler_output, hf(inputs_embeds=words).pooler_output)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS.items(), ids=str)
@pytest.mark.parametrize("package", [reference, modules], ids=["plain", "fast"])
def test_real_checkpoint(package, dtype, bound):
    hf = transformers.AutoModel.from_pretrained(resolve("demo"), dtype=dtype).eval()
    ours = package.BertModel(BertConfig.from_json_file(resolve("demo") / "config.json")).to(dtype).eval()
    ours.load_state_dict(from_pretrained("demo").state_dict())
    inputs = batch("BertModel", torch.Generator().manual_seed(5), 4, 40, vocab_size=30522)
    with torch.no_grad():
        compare(ours(**inputs), hf(**inputs), inputs["attention_mask"].bool(), bound)


def test_parameter_counts_are_those_of_the_paper():
    with torch.device("meta"):
        base = reference.BertModel(BertConfig())
        large = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        large = reference.BertModel(large)
    assert sum(p.numel() for p in base.parameters()) == 109_482_240
    assert sum(p.numel() for p in large.parameters()) == 335_141_888


def test_initialization():
    config, _ = small_config(vocab_size=4000, initializer_range=0.02)
    torch.manual_seed(0)
    plain = reference.BertForMaskedLM(config)
    words = plain.bert.embeddings.word_embeddings.weight
    assert words is plain.cls.predictions.decoder.weight
    assert words[1:].std().item() == pytest.approx(0.02, rel=0.03)
    assert words.abs().max() > 0.05  # a plain normal of 96,000 draws passes 2.5 deviations
    assert not words[config.pad_token_id].any()
    assert not plain.bert.encoder.layer[0].output.dense.bias.any()
    initialize(plain, config, truncated=True)
    assert 0.035 < words.abs().max() <= 0.04
