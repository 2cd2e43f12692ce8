"""Models whose parameters are shared out with FSDP2 run on the ops: the same answers, the same gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import bert_fast
from bert_fast.ops import FallbackWarning

CONFIG = transformers.BertConfig(
    vocab_size=100,
    num_labels=100,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
IDS = torch.randint(1, 100, (4, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * length + [0] * (8 - length) for length in (8, 3, 5, 1)])
LABELS = IDS.masked_fill(IDS % 3 > 0, -100).masked_fill(MASK == 0, -100)


@pytest.fixture(autouse=True)
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, whose shards are all there is; two are started in training/test_many_processes.py."""
    monkeypatch.setattr("bert_fast.ops._dispatch._warned", set())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield
    dist.destroy_process_group()


def make(kind: type[Any] = transformers.BertForMaskedLM) -> Any:
    torch.manual_seed(0)
    return kind(CONFIG)


def shard(model: nn.Module, units: tuple[str, ...], **options: Any) -> None:
    mesh = dist.init_device_mesh("cpu", (1,))
    for module in [part for part in model.modules() if type(part).__name__ in units]:
        fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def step(model: Any, **arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients by name."""
    loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, **arguments).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return loss.detach(), {name: getattr(grad, "full_tensor", lambda g=grad: g)() for name, grad in grads.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize(
    ("kind", "units", "arguments"),
    [
        (transformers.BertForMaskedLM, ("BertLayer",), {}),
        (transformers.BertForMaskedLM, ("BertLayer",), {"loss_only": True}),
        (transformers.BertForTokenClassification, ("BertEmbeddings", "BertLayer"), {}),  # its embeddings are not tied
    ],
)
def test_sharded_layers_train_on_the_ops(
    kind: type[Any],
    units: tuple[str, ...],
    arguments: dict[str, Any],
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make(kind)
    expected, grads = step(copy.deepcopy(model))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard(bert_fast.accelerate(model), units)
    layers = {type(part).__bases__[1] for part in model.bert.encoder.layer}
    for kind in layers:
        monkeypatch.setattr(kind, "forward", None)  # the original's is not called
    loss, found = step(model, **arguments)
    torch.testing.assert_close(loss, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_sharded_layers_answer_without_gradients() -> None:
    model = make().eval()
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK).logits
        shard(bert_fast.accelerate(model), ("BertLayer",))
        found = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1])


def test_a_precision_that_shards_cannot_have_is_said_to_be_left_out() -> None:
    model = make().eval()
    shard(bert_fast.accelerate(model, precision="int8"), ("BertLayer",))
    with torch.no_grad(), pytest.warns(FallbackWarning, match="precision 'int8' is left out: the parameters are shar"):
        model(input_ids=IDS, attention_mask=MASK)


def test_sharded_layers_in_mixed_precision() -> None:
    """bfloat16 where FSDP has the layers so: near float32, and not the same."""
    model = make()
    expected, _ = step(copy.deepcopy(model))
    shard(bert_fast.accelerate(model), ("BertLayer",), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    loss, grads = step(model)
    assert 0 < abs(loss.float() - expected) < 0.02 * expected
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


def test_shards_that_the_ops_do_not_bring_together_run_the_plain_path() -> None:
    model = make()
    expected, grads = step(copy.deepcopy(model))
    shard(bert_fast.accelerate(model), ("BertAttention",))
    with pytest.warns(FallbackWarning, match="a FSDPBertAttention stands in it"):
        loss, found = step(model)
    torch.testing.assert_close(loss, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_hooks_of_others_are_kept_at_a_sharded_layer() -> None:
    model = bert_fast.accelerate(make())
    shard(model, ("BertLayer",))
    seen: list[nn.Module] = []
    model.bert.encoder.layer[1].register_forward_hook(lambda module, *call: seen.append(module))
    with pytest.warns(FallbackWarning, match="a FSDPBertLayer in it has a hook"):
        step(model)
    assert seen == [model.bert.encoder.layer[1]]
