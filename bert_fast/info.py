"""What a checkpoint is, in words."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from bert_fast.folders import resolve
from bert_fast.loading import read_config, read_state_dict
from bert_fast.sentence_folder import Recipe
from bert_fast.tokenization import Tokenizer


def describe(path_or_id: str | Path) -> str:
    """The report of `bert-fast info`; ValueError when the checkpoint cannot be read."""
    folder = resolve(path_or_id)
    recipe = Recipe.read(folder)
    config = read_config(recipe.transformer)
    state = read_state_dict(recipe.transformer)
    weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    tokenizer = Tokenizer.from_pretrained(recipe.transformer, lowercase=recipe.do_lower_case)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.values())
    num_parameters = sum(math.prod(tensor.shape) for tensor in weights.values())
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    positions = config.max_position_embeddings
    max_length = min(recipe.max_seq_length or tokenizer.model_max_length or positions, positions)
    width = f"hidden_size {config.hidden_size}"
    if config.embedding_size != config.hidden_size:
        width += f" (embeddings {config.embedding_size})"
    facts = [
        ("folder", str(folder)),
        ("architecture", ", ".join(config.extra.get("architectures") or ["not said"])),
        ("layers", f"{config.num_hidden_layers}, {width}, {config.num_attention_heads} heads"),
        ("feed-forward", f"intermediate_size {config.intermediate_size}, {config.hidden_act}"),
        ("vocabulary", f"{config.vocab_size:,} tokens, {positions} positions, {config.type_vocab_size} token types"),
        ("parameters", f"{num_parameters:,} in {len(weights)} tensors, {', '.join(dtypes)}"),
        ("memory", f"{num_bytes / 2**20:.1f} MiB of weights"),
        ("tokenizer", f"WordPiece, {tokenizer.vocab_size:,} tokens, texts cut at {max_length}"),
        ("pooling", " + ".join(recipe.pooling_modes) + (", then length 1" if recipe.normalize else "")),
        ("vector", f"{config.hidden_size * len(recipe.pooling_modes)} components"),
    ]
    if recipe.prompts:
        facts.append(("prompts", ", ".join(f"{name}: {text!r}" for name, text in recipe.prompts.items())))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    lines = [str(path_or_id), *(f"  {name:13} {value}" for name, value in facts), "  files"]
    return "\n".join([*lines, *(f"    {path.stat().st_size:>13,}  {path.relative_to(folder)}" for path in files)])
