"""Which parts of a model are trained: the head alone, the last layers, or one more layer in every epoch.

A frozen parameter requires no gradient and has none, so an optimiser neither changes it nor keeps a state for it.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from bert_fast.training.parts import EMBEDDINGS, HEAD, POOLER, parts


def freeze(model: nn.Module, *names: str) -> None:
    """Freeze parts of a model, in place; the others stay as they are.

    Args:
        model: ours, or a transformers one, with the names of a Hugging Face BERT.
        names: of parts, "embeddings" or "encoder.layer.0"; see `parts.parts`. A decoder that is tied to the embeddings
            is frozen with them.

    Raises:
        ValueError: the model has no such part; the message lists those it has.
    """
    present = parts(model)
    if unknown := [name for name in names if name not in present]:
        raise ValueError(f"the model has no part {', '.join(map(repr, unknown))}; it has {', '.join(present)}")
    for name in names:
        _set(present[name], trained=False)


def train_head(model: nn.Module) -> None:
    """Freeze the embeddings and all layers; what is above them, the pooler too, stays as it is.

    Raises:
        ValueError: there is nothing above them.
    """
    if not {HEAD, POOLER} & parts(model).keys():
        raise ValueError(f"a {type(model).__name__} has no head to train, only {', '.join(parts(model))}")
    train_last_layers(model, 0)


def train_last_layers(model: nn.Module, num_layers: int) -> None:
    """Freeze the embeddings and all layers but the last ones.

    Raises:
        ValueError: the model has fewer layers.
    """
    present = parts(model)
    layers = _layers(present)
    if not 0 <= num_layers <= len(layers):
        raise ValueError(f"num_layers is {num_layers}, expected 0 to {len(layers)}, as many as the model has")
    freeze(model, *(name for name in present if name not in (*layers[len(layers) - num_layers :], POOLER, HEAD)))


class GradualUnfreezing:
    """Trains what is above the layers in epoch 0, and one more layer in each epoch, the embeddings last.

    As ULMFiT does (Howard and Ruder, 2018). Parameters that are frozen when this is made stay so. Make the optimiser
    before the first `set_epoch`, so that it knows all parameters: it passes over those without a gradient. A
    `DistributedDataParallel` waits for the gradients of all parameters that were trained when it was made; give it
    `find_unused_parameters=True`, or make it anew after each `set_epoch`.

    Args:
        model: as for `freeze`.
    """

    def __init__(self, model: nn.Module) -> None:
        present = parts(model)
        layers = _layers(present)
        stages = [[POOLER, HEAD], *([name] for name in reversed(layers)), [EMBEDDINGS]]
        trained = {name: [p for p in parameters if p.requires_grad] for name, parameters in present.items()}
        self._stages = [[p for name in stage for p in trained.get(name, [])] for stage in stages]

    @property
    def last_epoch(self) -> int:
        """The first epoch in which everything is trained."""
        return len(self._stages) - 1

    def set_epoch(self, epoch: int) -> None:
        """Train what belongs to an epoch and freeze the rest; epochs may come in any order."""
        for stage, parameters in enumerate(self._stages):
            _set(parameters, trained=stage <= epoch)


def _layers(names: Collection[str]) -> list[str]:
    return [name for name in names if name.startswith("encoder.")]


def _set(parameters: list[nn.Parameter], trained: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trained)
        if not trained:
            parameter.grad = None
