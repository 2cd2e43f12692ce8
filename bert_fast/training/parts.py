"""Where a parameter stands in a model, from the embeddings to the head."""

from __future__ import annotations

import re

from torch import nn

EMBEDDINGS, POOLER, HEAD = "embeddings", "pooler", "head"

_PLACE = re.compile(r"(?:^|\.)(?:(?P<layer>encoder\.layer\.\d+)|(?P<other>embeddings|pooler)(?:_project)?)\.")


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by the names of a Hugging Face BERT, whatever it is wrapped in.

    Returns:
        "embeddings" (with what projects them, in an ELECTRA), "encoder.layer.0" and so on, "pooler", or for all else
        "head".
    """
    place = _PLACE.search(name)
    return HEAD if place is None else place["layer"] or place["other"]


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each part there is, from the embeddings to the head; a tied one is where its first name is.

    So the decoder of a masked-language-model head is among the embeddings, where it is tied to them.

    Raises:
        ValueError: the model has no embeddings or no layers by these names.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(part_of(name), []).append(parameter)
    layers = sorted((name for name in found if name.startswith("encoder.")), key=lambda name: int(name.split(".")[-1]))
    if not layers or EMBEDDINGS not in found:
        raise ValueError(
            f"a {type(model).__name__} has no parameters under embeddings and encoder.layer.0, as a BERT has; "
            f"it has {', '.join(name for name, _ in model.named_children()) or 'no modules'}"
        )
    return {name: found[name] for name in (EMBEDDINGS, *layers, POOLER, HEAD) if name in found}
