"""Checkpoints in: what their files hold, and models with their weights."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bert_fast import families, heads
from bert_fast.config import BertConfig
from bert_fast.folders import CONFIG_FILE, read_json, resolve

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"

#: Files of a checkpoint folder that hold weights: a save replaces them all, so that none of an older model stays.
WEIGHT_PATTERNS = ("model*.safetensors", INDEX_FILE, "pytorch_model*.bin", "pytorch_model.bin.index.json")

#: What a checkpoint's weights may be stored in.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

#: Where the parameters of transformers' BERT live: the part every model needs, and the heads one may leave out.
ENCODER_PREFIXES = ("embeddings.", "embeddings_project.", "encoder.")
HEAD_PREFIXES = (
    "pooler.", "cls.", "classifier.", "qa_outputs.", "sequence_summary.", "discriminator_predictions.",
    "generator_predictions.", "generator_lm_head.",
)  # fmt: skip

#: The weights that have a row for each label, by the names that families give them.
CLASSIFIERS = ("classifier.weight", "classifier.out_proj.weight")

#: What a model with a head puts before the names of its encoder's parameters.
MODEL_PREFIXES = ("bert.", "electra.")


def read_config(folder: Path) -> BertConfig:
    """The `config.json` of a checkpoint; ValueError when there is none, or it is of no family that we have."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}")
    return families.make_config(read_json(folder / CONFIG_FILE))


def read_state_dict(folder: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names its files give them, on the CPU.

    Reads `model.safetensors`, else the shards that `model.safetensors.index.json` lists, else, if `allow_pickle`,
    `pytorch_model.bin`.

    Raises:
        ValueError: no such file, or it is damaged; the message names it.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return _read_safetensors(folder / WEIGHTS_FILE)
    if (folder / INDEX_FILE).is_file():
        return _read_shards(folder / INDEX_FILE)
    if not (folder / PICKLE_FILE).is_file():
        raise ValueError(f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    if not allow_pickle:
        raise ValueError(
            f"{folder} has only {PICKLE_FILE}, a pickle; it is not read unless you trust it and pass allow_pickle=True"
        )
    return _read_pickle(folder / PICKLE_FILE)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not an index with a weight_map of names to files: {error!r}") from error
    state: dict[str, Tensor] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} names the file {file!r}, expected one in its own folder")
        state.update(_read_safetensors(index.parent / file))
    if absent := [name for name in weight_map if name not in state]:
        raise ValueError(f"{index} lists weights that its files do not hold: {listed(absent)}")
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise ValueError(f"{path} is not a file of weights: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors")
    return state


def from_pretrained(
    path_or_id: str | Path,
    head: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """The fast BERT or ELECTRA with the weights of a checkpoint, in evaluation mode.

    Args:
        path_or_id: a folder, a Hub id or `demo`, as `resolve` takes it.
        head: None for the encoder alone, or a name of `bert_fast.modules.HEADS`. What the checkpoint lacks of a head is
            initialised afresh, with a warning that lists it.
        config: fields of `config.json` in place of the checkpoint's, as `id2label` or `hidden_dropout_prob`. A
            classifier of another number of labels than these then starts afresh, too, with a warning.
        dtype: of the parameters; None keeps the checkpoint's own.
        device: where they go; None for the CPU.
        allow_pickle: also read a `pytorch_model.bin`, with `weights_only=True`.
        revision, local_files_only: as in `resolve`.

    Returns:
        A `bert_fast.modules.BertModel`, with a pooler if the checkpoint has one, or the head's model; of ELECTRA those
        of `bert_fast.electra`.

    Raises:
        ValueError: the checkpoint is not found, is damaged, is of none of `bert_fast.families`, or does not fit its
            config; or its family has no such head. The message names what.
    """
    folder = resolve(path_or_id, revision=revision, local_files_only=local_files_only, allow_pickle=allow_pickle)
    fields = replaced(read_config(folder), config or {})
    kind = families.model_class(fields, head)
    state = read_state_dict(folder, allow_pickle=allow_pickle)
    return build(kind, fields, state, dtype=dtype, device=device, new_classifier=config is not None)


def replaced(config: BertConfig, fields: Mapping[str, Any]) -> BertConfig:
    """The config with other values of these fields, or with these besides; ValueError for an impossible value."""
    return type(config).from_dict({**config.to_dict(), **fields})


def build(
    model_class: type[Model],
    config: BertConfig,
    state: dict[str, Tensor],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    new_classifier: bool = False,
) -> Model:
    """A model of `bert_fast.modules`, `electra` or `reference` with a copy of the weights `state`, in evaluation mode.

    Names may be those of an older checkpoint (`LayerNorm.gamma`, `position_ids`) or of another model over the same
    encoder: `bert.` or `electra.` is put on or taken off. With `new_classifier`, one that has another number of labels
    than `config` is left out, with a warning.

    Raises:
        ValueError: the encoder's weights are not all there, or one has another shape or is not floating point.
    """
    device = parse_device(device or "cpu")
    state = _renamed(state, model_class.prefix if issubclass(model_class, heads.Head) else "")
    options: dict[str, Any] = {}
    if not issubclass(model_class, heads.Head):
        options["add_pooling_layer"] = any(name.startswith("pooler.") for name in state)
    with torch.device("meta"):
        model = model_class(config, **options)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if new_classifier:
        state = _without_other_classifier(state, parameters)
    _report_unused(state, parameters, model_class.__name__)
    fresh = _missing(state, parameters, model_class.__name__)
    dtype = _common_dtype({name: state[name] for name in parameters if name in state}, _parse_dtype(dtype))
    for aliases in fresh:  # before the others: it may touch the rest of a module, which is then still on meta
        _assign(model, aliases, _initialized(model, aliases[0], config, dtype, device))
    for aliases in names_of_each(parameters):
        source = next((name for name in aliases if name in state), None)
        if source is not None:
            shape = parameters[source].shape
            if state[source].shape != shape:
                raise ValueError(f"{source} has shape {tuple(state[source].shape)}, expected {tuple(shape)}")
            weight = state[source].to(device=device, dtype=dtype, copy=True)
            _assign(model, aliases, nn.Parameter(weight))
    return model.eval()


def _bare(name: str) -> str:
    """A parameter's name without the model's before it."""
    return name.removeprefix(next((prefix for prefix in MODEL_PREFIXES if name.startswith(prefix)), ""))


def _renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Today's names, with the prefix before the encoder's; without the position ids that old versions saved."""
    renamed = {}
    for name, tensor in state.items():
        name = _bare(name)
        if name == "embeddings.position_ids":
            continue
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name.startswith((*ENCODER_PREFIXES, "pooler.")):
            name = f"{prefix}{name}"
        renamed[name] = tensor
    return renamed


def _without_other_classifier(state: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The weights without a classifier of another number of labels."""
    names = [name for name in CLASSIFIERS if name in state and name in parameters]
    others = [name for name in names if state[name].shape != parameters[name].shape]
    if not others:
        return state
    had, has = state[others[0]].shape[0], parameters[others[0]].shape[0]
    warnings.warn(f"the checkpoint's classifier has {had} outputs, but {has} are wanted: it is left out", stacklevel=4)
    return {key: tensor for key, tensor in state.items() if not key.startswith("classifier.")}


def names_of_each(parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    """The names of each parameter; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _report_unused(state: dict[str, Tensor], parameters: dict[str, nn.Parameter], model: str) -> None:
    """Weights of another head are normal and go to the log; any other that has no place is worth a warning."""
    unused = [name for name in state if name not in parameters]
    other_head = [name for name in unused if _bare(name).startswith(HEAD_PREFIXES)]
    if other_head:
        logger.info("%s has no use for these weights of the checkpoint: %s", model, listed(other_head))
    if unknown := [name for name in unused if name not in other_head]:
        warnings.warn(f"{model} has no place for these weights of the checkpoint: {listed(unknown)}", stacklevel=4)


def _missing(state: dict[str, Tensor], parameters: dict[str, nn.Parameter], model: str) -> list[list[str]]:
    """The head's parameters that the checkpoint lacks, each under all its names; ValueError for the encoder's."""
    groups = [aliases for aliases in names_of_each(parameters) if not any(name in state for name in aliases)]
    missing = [aliases[0] for aliases in groups]
    if absent := [name for name in missing if _bare(name).startswith(ENCODER_PREFIXES)]:
        raise ValueError(f"the checkpoint lacks {len(absent)} weights of {model}: {listed(absent)}")
    if missing:
        warnings.warn(
            f"the checkpoint has no weights for this head of {model}, which starts untrained: {listed(missing)}",
            stacklevel=4,
        )
    return groups


def _common_dtype(state: dict[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, or the one that all weights have; ValueError for weights that are not floating point."""
    first: dict[torch.dtype, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.dtype, name)
    for found, name in first.items():
        if found not in DTYPES.values():
            raise ValueError(f"{name} is {dtype_name(found)}, expected one of {', '.join(DTYPES)}")
    if dtype is None and len(first) > 1:
        mixed = ", ".join(f"{name} is {dtype_name(found)}" for found, name in first.items())
        raise ValueError(f"the checkpoint mixes dtypes ({mixed}); pass dtype= to convert them to one")
    return dtype or next(iter(first), torch.float32)


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return cast(torch.dtype | None, dtype)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    return DTYPES[cast(str, dtype)]


def parse_device(device: torch.device | str) -> torch.device:
    """The device of this name; ValueError for one that is not there."""
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: {error}") from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but there is no GPU that torch can use")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but torch can use {torch.cuda.device_count()} GPUs, counted from 0")
    return parsed


def dtype_name(dtype: torch.dtype) -> str:
    """As a config spells it: "float32"."""
    return str(dtype).removeprefix("torch.")


def _initialized(
    model: nn.Module, name: str, config: BertConfig, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """A parameter with the fresh values its module starts from, in place of the one on meta."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    shape = owner.get_parameter(leaf).shape
    _assign(model, [name], nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))
    if isinstance(owner, nn.LayerNorm):
        owner.reset_parameters()
    elif isinstance(owner, nn.Linear):
        heads.initialize(owner, config)
    return owner.get_parameter(leaf)


def _assign(model: nn.Module, names: list[str], parameter: nn.Parameter) -> None:
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)


def listed(names: Iterable[str], limit: int = 12) -> str:
    """The first of some names, and how many there are besides; "nothing" for none."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
