"""Training through the fast path: gradients of the drop-in and of our models, against the plain ones'."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import bert_fast
from bert_fast import modules, ops, reference
from bert_fast.config import BertConfig

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

#: Model -> its labels; the ones that read all tokens, the first one, those with a label, or both of these.
LABELS = ("BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification", "BertForTokenClassification")


@pytest.fixture(autouse=True)
def _no_surprises() -> Iterator[None]:
    """A way to the plain path would make these tests compare it with itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ops.FallbackWarning)
        yield


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.BertConfig(**{**SHAPE, **changes})).train()


def batch(name: str) -> dict[str, Tensor]:
    """Three texts, one with holes in its mask, one of a single token, and an empty one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (4, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1, 0, 1, 1, 0, 1, 0, 0, 0], [1] + [0] * 8, [0] * 9])
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    labels = ids.masked_fill((torch.rand(4, 9, generator=generator) > 0.4) | (mask == 0), -100)
    if name == "BertForSequenceClassification":
        return {**inputs, "labels": torch.tensor([0, 1, 1, 0])}
    if name == "BertForTokenClassification":
        return {**inputs, "labels": labels.clamp(max=1)}
    if name == "BertForPreTraining":
        return {**inputs, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 0, 1])}
    return {**inputs, "labels": labels}


def gradients(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The loss and the gradients of a step, by name."""
    model.zero_grad()
    loss = model(**inputs, **options).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()[None], **found}


def error(got: dict[str, Tensor], truth: dict[str, Tensor], names: list[str]) -> float:
    """Relative error of the gradients of these parameters as one vector."""
    wrong = sum((got[n].double() - truth[n]).square().sum() for n in names)
    return float((wrong / sum(truth[n].square().sum() for n in names)).sqrt())


def assert_no_worse(
    fast: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Twice plain PyTorch's own error over all parameters; and no parameter is far from the truth.

    A single element of a whole model's gradient is a draw of many roundings, so elements are compared in the tests of
    the ops.
    """
    assert fast.keys() == plain.keys() == truth.keys()
    # The bias of the keys moves all scores of a query alike: its gradient is zero but for rounding.
    names = [n for n in truth if "attention.self.key.bias" not in n]
    assert error(fast, truth, names) <= 2 * error(plain, truth, names)
    for name in names:
        assert error(fast, truth, [name]) <= 4 * error(plain, truth, [name]) + 8 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("loss_only", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_gradients_of_the_drop_in(name: str, loss_only: bool) -> None:
    model, inputs = make(name, **NO_DROPOUT), batch(name)
    for key in inputs:  # transformers attends to everything in an empty row, and has it in the loss
        inputs[key] = inputs[key][:3]
    truth = gradients(copy.deepcopy(model).double(), inputs)
    plain = gradients(model, inputs)
    fast = gradients(bert_fast.accelerate(model), inputs, **({"loss_only": True} if loss_only else {}))
    assert_no_worse(fast, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss_only", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_gradients_of_our_models(name: str, loss_only: bool, dtype: torch.dtype) -> None:
    config, inputs = BertConfig(**SHAPE, **NO_DROPOUT), batch(name)
    torch.manual_seed(0)
    plain = getattr(reference, name)(config).train().to(dtype)
    fast = getattr(modules, name)(config).train().to(dtype)
    fast.load_state_dict(plain.state_dict())
    truth = gradients(copy.deepcopy(plain).double(), inputs)
    got = gradients(fast, inputs, loss_only=loss_only)
    assert_no_worse(got, gradients(plain, inputs), truth, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LABELS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        warnings.filterwarnings("ignore", ".*(takes float32, bfloat16, not float16|takes no float16).*")
    model, inputs = make(name, **NO_DROPOUT), batch(name)
    inputs = {key: value[:3] for key, value in inputs.items()}
    truth = gradients(copy.deepcopy(model).double(), inputs)
    with torch.autocast("cpu", dtype):
        plain = gradients(model, inputs)
        bert_fast.accelerate(model)
        fast = gradients(model, inputs)
        alone = gradients(model, inputs, loss_only=True)
    assert {n: g.dtype for n, g in fast.items()} == {n: g.dtype for n, g in plain.items()}
    assert_no_worse(fast, plain, truth, dtype)
    assert_no_worse(alone, plain, truth, dtype)


def test_dropout_has_the_mask_of_the_definition() -> None:
    """The same seeds, through the kernels and through the plain definitions, in the same and in double precision."""
    name = "BertForMaskedLM"
    model, inputs = bert_fast.accelerate(make(name)), batch(name)
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1

    def run(which: Any) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return gradients(which, inputs, loss_only=True)

    fast = run(model)
    with ops.force("reference"):
        plain, truth = run(model), run(copy.deepcopy(model).double())
    assert_no_worse(fast, plain, truth)
    torch.manual_seed(6)
    assert not torch.equal(gradients(model, inputs, loss_only=True)["loss"], fast["loss"])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    """Dropout is on: what is computed again has to drop the same."""
    model, inputs = bert_fast.accelerate(make(name)), batch(name)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(5)
        return gradients(model, inputs, loss_only=True)

    expected = run()
    model.gradient_checkpointing_enable()
    found = run()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_gradient_checkpointing_keeps_less() -> None:
    model, inputs = bert_fast.accelerate(make("BertForMaskedLM", num_hidden_layers=6)), batch("BertForMaskedLM")

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**inputs, loss_only=True)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    without = kept()
    model.gradient_checkpointing_enable()
    assert kept() < without / 2


def test_our_models_checkpoint_gradients() -> None:
    torch.manual_seed(0)
    model, inputs = modules.BertForMaskedLM(BertConfig(**SHAPE)).train(), batch("BertForMaskedLM")

    def run() -> dict[str, Tensor]:
        torch.manual_seed(5)
        return gradients(model, inputs, loss_only=True)

    expected = run()
    model.gradient_checkpointing_enable()
    found = run()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    with pytest.raises(ValueError, match="every_n_layers is 0"):
        model.activation_checkpointing_enable(every_n_layers=0)
    model.gradient_checkpointing_disable()
    assert torch.equal(run()["loss"], expected["loss"])


def test_frozen_parameters_get_none() -> None:
    model, inputs = bert_fast.accelerate(make("BertForMaskedLM", **NO_DROPOUT)), batch("BertForMaskedLM")
    expected = gradients(model, inputs, loss_only=True)
    frozen = [*model.bert.embeddings.parameters(), *model.bert.encoder.layer[0].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    found = gradients(model, inputs, loss_only=True)
    assert all(parameter.grad is None for parameter in frozen)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == {"loss", *trained}
    for name in trained:
        torch.testing.assert_close(found[name], expected[name])


def test_gradients_add_up_over_batches() -> None:
    model, inputs = bert_fast.accelerate(make("BertForMaskedLM", **NO_DROPOUT)), batch("BertForMaskedLM")
    whole = gradients(model, inputs, loss_only=True)
    count = int((inputs["labels"] != -100).sum())
    model.zero_grad()
    losses = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {key: value[rows] for key, value in inputs.items()}
        losses.append(model(**part, loss_only=True, num_items_in_batch=torch.tensor(count)).loss)
        losses[-1].backward()
    torch.testing.assert_close(sum(losses), whole["loss"][0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_a_packed_batch_is_the_padded_one() -> None:
    name = "BertForMaskedLM"
    model, inputs = bert_fast.accelerate(make(name, **NO_DROPOUT)), batch(name)
    padded = gradients(model, inputs, loss_only=True)
    keep = inputs["attention_mask"].bool()
    lengths = keep.sum(1)
    packed = {key: value[keep][None] for key, value in inputs.items() if key != "attention_mask"}
    packed["position_ids"] = torch.arange(9).expand(4, 9)[keep][None]
    packed["cu_seq_lens_q"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    packed["max_length_q"] = int(lengths.max())
    found = gradients(model, packed, loss_only=True)
    for name in padded:
        torch.testing.assert_close(found[name], padded[name])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_no_label_at_all_is_a_loss_of_zero(name: str) -> None:
    model, inputs = bert_fast.accelerate(make(name, **NO_DROPOUT)), batch(name)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    found = gradients(model, inputs, loss_only=True)
    if name == "BertForMaskedLM":
        assert found["loss"] == 0
    assert all(gradient.isfinite().all() for gradient in found.values())
    ours = modules.BertForMaskedLM(BertConfig(**SHAPE)).train()
    inputs.pop("next_sentence_label", None)
    assert gradients(ours, inputs)["loss"] == 0


@pytest.mark.parametrize("loss_only", [False, True])
def test_labels_out_of_range_are_named(loss_only: bool) -> None:
    inputs = batch("BertForMaskedLM")
    inputs["labels"][1, 2] = 61
    ours = modules.BertForMaskedLM(BertConfig(**SHAPE)).train()
    with pytest.raises(ValueError, match=r"labels 61 at index \(1, 2\) is out of range \[0, 61\)"):
        ours(**inputs, loss_only=loss_only)
    if loss_only:
        with pytest.raises(ValueError, match=r"labels 61 at index \(1, 2\) is out of range \[0, 61\)"):
            bert_fast.accelerate(make("BertForMaskedLM"))(**inputs, loss_only=True)


def test_a_loss_alone_needs_labels() -> None:
    inputs = batch("BertForMaskedLM")
    del inputs["labels"]
    with pytest.raises(ValueError, match="loss_only without labels"):
        bert_fast.accelerate(make("BertForMaskedLM"))(**inputs, loss_only=True)
    with pytest.raises(ValueError, match="loss_only without labels"):
        modules.BertForMaskedLM(BertConfig(**SHAPE))(**inputs, loss_only=True)


def test_a_hook_on_the_encoder_sees_every_row() -> None:
    """The head reads the first rows only, and the others are left out, unless somebody else looks at them."""
    model, inputs = bert_fast.accelerate(make("BertForSequenceClassification")), batch("BertForSequenceClassification")
    shapes = []
    model.bert.register_forward_hook(lambda module, args, output: shapes.append(output.last_hidden_state.shape))
    model(**inputs)
    assert shapes == [(4, 9, 48)]
    labels = inputs.pop("labels")
    assert model.bert(**inputs).last_hidden_state.shape == (4, 9, 48)
    assert labels.shape == (4,)


def test_compiled_training() -> None:
    model, inputs = (
        bert_fast.accelerate(make("BertForSequenceClassification", **NO_DROPOUT)),
        batch("BertForSequenceClassification"),
    )
    expected = gradients(model, inputs)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(torch.compile(model, backend="aot_eager"), inputs)
    for name in expected:
        torch.testing.assert_close(found[f"_orig_mod.{name}" if name != "loss" else name], expected[name])


def test_only_what_the_backward_reads_is_kept() -> None:
    """Per token and layer: what the products read, LayerNorm's rows, attention's; no masks, no probabilities."""
    hidden, wide, layers, tokens = 48, 80, 2, 16
    model = bert_fast.accelerate(make("BertModel"))
    ids = torch.randint(1, 61, (1, tokens))
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = sum(size for pointer, size in sizes.items() if pointer not in parameters)
    # A layer: input, q, k, v, context, two normalised rows, the first LayerNorm's result; GELU's input and result.
    rows = layers * (8 * hidden + 2 * wide) + 2 * hidden
    weights = layers * 3 * hidden * hidden  # of the joined product
    assert kept <= 4 * (rows * tokens + weights) * 1.15


def curve(steps: int, how: str | None, dtype: torch.dtype, autocast: bool) -> Tensor:
    """Losses of a tiny BERT that is pre-trained, then fine-tuned, with dropout; masks and batches by the same seed."""
    torch.manual_seed(3)
    config = BertConfig(**{**SHAPE, "initializer_range": 0.02})
    model: Any = modules.BertForMaskedLM(config)
    generator, losses = torch.Generator().manual_seed(4), []

    def train(inputs: Any) -> None:
        model.to(dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(steps):
            with torch.autocast("cpu", enabled=autocast), ops.force(how):
                loss = model(**inputs(), loss_only=True).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().double())

    def texts() -> dict[str, Tensor]:
        lengths = torch.randint(2, 20, (8, 1), generator=generator)
        mask = (torch.arange(20) < lengths).long()
        return {"input_ids": torch.randint(5, 61, (8, 20), generator=generator) * mask, "attention_mask": mask}

    def masked() -> dict[str, Tensor]:
        inputs = texts()
        chosen = (torch.rand(8, 20, generator=generator) < 0.3) & (inputs["attention_mask"] == 1)
        chosen[0, 0] = True
        labels = inputs["input_ids"].masked_fill(~chosen, -100)
        return {**inputs, "input_ids": inputs["input_ids"].masked_fill(chosen, 4), "labels": labels}

    def labelled() -> dict[str, Tensor]:
        inputs = texts()
        return {**inputs, "labels": inputs["input_ids"][:, 0] % 2}

    train(masked)
    encoder = model.bert.state_dict()
    torch.manual_seed(5)
    model = modules.BertForSequenceClassification(config)
    model.bert.load_state_dict(encoder, strict=False)
    train(labelled)
    return torch.stack(losses)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_pre_training_and_fine_tuning_follow_the_plain_curve(autocast: bool) -> None:
    truth = curve(25, "reference", torch.float64, False)
    plain = curve(25, "reference", torch.float32, autocast)
    fast = curve(25, None, torch.float32, autocast)
    assert truth[:5].mean() > truth[20:25].mean()  # it learns
    difference, allowed = ((c - truth).square().mean().sqrt() for c in (fast, plain))
    assert difference <= 2 * allowed + torch.finfo(torch.float32).eps * truth.max()
    assert not torch.equal(fast, plain)
