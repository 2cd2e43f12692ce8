"""The model card of a folder: what it is, what it was made of and how, its scores, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_fast import disk
from bert_fast.data.catalogue import DATASETS
from bert_fast.families import DEFAULT, family
from bert_fast.folders import CONFIG_FILE, DEMO, read_json
from bert_fast.recipes._runs import RESULTS_FILE

CARD_FILE = "README.md"

#: What the Hub calls the checkpoint behind `demo`.
DEMO_ID = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Kind:
    """How the Hub and other libraries call a kind of task.

    Attributes:
        title: what the model is for, in words.
        pipeline_tag: the Hub's name of the task.
        auto_class: of transformers.
    """

    title: str
    pipeline_tag: str
    auto_class: str


KINDS = {
    "classification": Kind("classifying texts", "text-classification", "AutoModelForSequenceClassification"),
    "tokens": Kind("labelling words", "token-classification", "AutoModelForTokenClassification"),
    "question_answering": Kind("finding answers in a text", "question-answering", "AutoModelForQuestionAnswering"),
    "multiple_choice": Kind("choosing among texts", "multiple-choice", "AutoModelForMultipleChoice"),
    "embeddings": Kind("vectors of texts", "sentence-similarity", "AutoModel"),
    "pretraining": Kind("filling masks, and fine-tuning", "fill-mask", "AutoModelForMaskedLM"),
    "discriminator": Kind("finding replaced words, and fine-tuning", "feature-extraction", "AutoModelForPreTraining"),
}

#: Ids on the Hub of the data sets of the catalogue, and the configurations there; all of GLUE has one id.
HUB_DATASETS = {
    "squad": ("rajpurkar/squad", None),
    "squad_v2": ("rajpurkar/squad_v2", None),
    "conll2003": ("eriktks/conll2003", None),
    "swag": ("allenai/swag", "regular"),
    "imdb": ("stanfordnlp/imdb", None),
}
GLUE = "nyu-mll/glue"

#: Metrics that the Hub calls otherwise.
HUB_METRICS = {"mcc": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}

#: Files of a run, by the names of their settings.
DATA_FILES = ("train_file", "validation_file", "test_file", "data_dir")

#: Options that change nothing in the model.
UNTOLD = frozenset({"disable_tqdm", "report_to", "logging_steps", "plot_metrics", "logging_dir"})


def write_card(folder: str | Path, title: str | None = None) -> Path:
    """Write `README.md` from the `results.json` and `config.json` of a folder that `finetune` or `pretrain` left.

    Paths are left out of it but for the names of files, as a card is made to be published.

    Args:
        folder: of the model.
        title: of the card; None for the name of the folder.

    Returns:
        The file.

    Raises:
        ValueError: the folder has no such files, or they do not say what they should.
    """
    folder = Path(folder)
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(f"{folder} has no {RESULTS_FILE} to write a card from")
    results, config = read_json(folder / RESULTS_FILE), read_json(folder / CONFIG_FILE)
    name = results.get("kind", "discriminator" if results.get("objective") == "electra" else "pretraining")
    if name not in KINDS or "settings" not in results:
        raise ValueError(f"{folder / RESULTS_FILE} is not what finetune or pretrain leaves: its kind is {name!r}")
    kind, title = KINDS[name], title or folder.resolve().name
    scores = _scores(results)
    base = results["settings"].get("model_name_or_path")
    sections = [
        f"# {title}",
        _introduction(kind, base, config),
        *_scored(scores, _chosen_by(results)),
        *_data(results),
        *_recipe(results),
        _loading(name, kind, title),
        "## What this card does not say\n\nThe languages of the data, its licence and that of the checkpoint it began "
        "with are not known to the program that wrote this card. Add them before you publish it.",
    ]
    front_matter = _front_matter(results, name, kind, title, base, scores, config.get("model_type", DEFAULT))
    text = f"---\n{front_matter}\n---\n\n" + "\n\n".join(sections) + "\n"
    with disk.written_at_once(folder / CARD_FILE) as file:
        file.write(text.encode())
    return folder / CARD_FILE


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Split -> metric -> value."""
    if "metrics" in results:
        return {split: dict(values) for split, values in results["metrics"].items()}
    held_out = results.get("held_out", {})
    return {f"held out, {when}": dict(held_out[when]) for when in ("before", "after") if held_out.get(when)}


def _front_matter(
    results: Mapping[str, Any],
    name: str,
    kind: Kind,
    title: str,
    base: str | None,
    scores: Mapping[str, Any],
    model_type: str,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = str(results.get("task"))
    hub_id, configuration = HUB_DATASETS.get(task, (GLUE, task) if task in DATASETS else (None, None))
    data_type, data_name = hub_id or name, DATASETS[task].title if task in DATASETS else _own_data(results)
    found = [
        EvalResult(
            task_type=kind.pipeline_tag,
            dataset_type=data_type,
            dataset_name=data_name,
            dataset_config=configuration,
            dataset_split=split,
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=value,
        )
        for split, values in scores.items()
        for metric, value in values.items()
        if metric != "loss"  # which the Hub has no metric for
    ]
    metrics = {HUB_METRICS.get(metric, metric) for values in scores.values() for metric in values} - {"loss"}
    given: dict[str, Any] = {
        "library_name": "sentence-transformers" if name == "embeddings" else "transformers",
        "pipeline_tag": kind.pipeline_tag,
        "tags": [model_type, "bert_fast", *(["sentence-transformers"] if name == "embeddings" else [])],
        "base_model": _hub_id(base),
        "datasets": [hub_id] if hub_id else None,
        "metrics": sorted(metrics) or None,
        "eval_results": found or None,
        "model_name": title,
    }
    return str(ModelCardData(**given).to_yaml())


def _hub_id(base: str | None) -> str | None:
    """The id of the checkpoint that a run began with, if it was one and no folder."""
    if base == DEMO:
        return DEMO_ID
    is_id = base is not None and not base.startswith((".", "/", "~")) and base.count("/") <= 1
    return base if is_id and base is not None and not Path(base).exists() else None


def _own_data(results: Mapping[str, Any]) -> str:
    files = [Path(str(results["settings"][key])).name for key in DATA_FILES if results["settings"].get(key)]
    return ", ".join(files) or "files of its maker"


def _introduction(kind: Kind, base: str | None, config: Mapping[str, Any]) -> str:
    began = "from fresh weights" if base is None else f"from `{_hub_id(base) or Path(base).name}`"
    shape = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}"
    positions = config["max_position_embeddings"]
    title = family(config.get("model_type", DEFAULT)).title
    return (
        f"{title[0].upper()}{title[1:]} for {kind.title}, trained with bert_fast {began}: {shape}, "
        f"{config['vocab_size']:,} tokens in its vocabulary, texts of up to {positions} tokens."
    )


def _chosen_by(results: Mapping[str, Any]) -> str | None:
    """The metric that said which checkpoint is the best: the one asked for, or the task's main one."""
    asked = (results["settings"].get("arguments") or {}).get("metric_for_best_model")
    return results.get("main_metric") if asked is None else str(asked).removeprefix("eval_")


def _scored(scores: Mapping[str, Mapping[str, float]], metric: str | None) -> list[str]:
    if not scores:
        return ["## Scores\n\nNone: nothing was held out to measure it on."]
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    rows = [
        [split, *(f"{values[name]:.4f}" if name in values else "" for name in names)]
        for split, values in scores.items()
    ]
    chosen = f"\n\nThe checkpoint was chosen by {metric}, on the validation examples." if metric else ""
    return ["## Scores\n\n" + _table(["", *names], rows) + (chosen if "validation" in "".join(scores) else "")]


def _data(results: Mapping[str, Any]) -> list[str]:
    train, task = results["train"], str(results.get("task"))
    facts = [f"{key}: `{Path(str(value)).name}`" for key, value in _given(results["settings"], DATA_FILES)]
    if task in DATASETS:
        facts.insert(0, f"data set: {task} ({DATASETS[task].title})")
    for key, words in (("examples", "examples in training"), ("num_truncated", "of them cut at the longest length")):
        if key in train:
            facts.append(f"{words}: {train[key]:,}")
    facts += [f"left out, {reason}: {count:,}" for reason, count in (train.get("skipped") or {}).items()]
    if results.get("labels"):
        facts.append(f"labels: {', '.join(map(str, results['labels']))}")
    return ["## Data\n\n" + _listed(facts)] if facts else []


def _given(settings: Mapping[str, Any], keys: Iterable[str]) -> Iterable[tuple[str, Any]]:
    return ((key, settings[key]) for key in keys if settings.get(key))


def _recipe(results: Mapping[str, Any]) -> list[str]:
    settings, train = results["settings"], results["train"]
    options = {**settings.get("arguments", {}), **settings.get("task_options", {})}
    for key in ("objective", "masking", "mlm_probability", "max_seq_length"):
        if settings.get(key) is not None:
            options[key] = settings[key]
    rows = [[f"`{key}`", f"`{_shown(value)}`"] for key, value in sorted(options.items()) if key not in UNTOLD]
    facts = [f"{train['steps']:,} steps"]
    if "seconds" in train:
        facts[0] += f" in {train['seconds']:,.1f} s, {train['tokens_per_second']:,.0f} tokens per second"
    facts += [f"{name} {version}" for name, version in results.get("versions", {}).items()]
    given = "What was not given has its default.\n\n" + _table(["option", "value"], rows) + "\n\n" if rows else ""
    return [f"## Recipe\n\n{given}{_listed(facts)}"]


def _shown(value: Any) -> str:
    return json.dumps(Path(value).name if isinstance(value, str) and "/" in value else value, ensure_ascii=False)


def _loading(name: str, kind: Kind, title: str) -> str:
    parts = ["## How to load it\n\nWith this folder as the path, or its id where it was published."]
    texts = '["A text.", "Another one."]'
    if name == "embeddings":
        ours = f'from bert_fast import Embedder\n\nvectors = Embedder("{title}").encode({texts})'
        theirs = f'vectors = SentenceTransformer("{title}").encode({texts})'
        theirs = f"from sentence_transformers import SentenceTransformer\n\n{theirs}"
        parts += [_block("bert_fast", "python", ours), _block("sentence-transformers", "python", theirs)]
    else:
        command = f"bert-fast predict {title} FILE --output predictions.jsonl"
        if name == "discriminator":
            command = f"bert-fast finetune --model_name_or_path {title} --task_name classification --train_file FILE"
            command += " --output_dir OUTPUT"
        if name == "pretraining":
            command = f'bert-fast fill {title} "A text with a [MASK]."'
        theirs = f'model = {kind.auto_class}.from_pretrained("{title}")\n'
        theirs += f'tokenizer = AutoTokenizer.from_pretrained("{title}")'
        theirs = f"from transformers import {kind.auto_class}, AutoTokenizer\n\n{theirs}"
        parts += [_block("bert_fast", "console", command), _block("transformers", "python", theirs)]
    return "\n\n".join(parts)


def _block(library: str, language: str, code: str) -> str:
    return f"{library}:\n\n```{language}\n{code}\n```"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _listed(facts: Iterable[str]) -> str:
    return "\n".join(f"- {fact}" for fact in facts)
