"""Transfer: text of the domain, then text of the task, then the task itself; and what each of them was worth."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from bert_fast import disk
from bert_fast.data.catalogue import read
from bert_fast.folders import read_json, resolve
from bert_fast.loading import WEIGHTS_FILE, read_state_dict
from bert_fast.recipes._paths import PathResult, TransferResult, transfer_page, transfer_table
from bert_fast.recipes._toml import argument_names, check_known, read_toml
from bert_fast.recipes.finetune import FinetuneSettings, finetune
from bert_fast.recipes.pretrain import PretrainSettings, pretrain

#: Stages of masked language modelling, in the order in which they run.
ADAPTING = ("domain", "task")

#: What a finished stage leaves in its folder, besides its model.
STAGE_FILE = "stage.json"

TABLE_FILE, PAGE_FILE, MODEL = "transfer.md", "transfer.html", "model"

#: Settings that the stages do not get from the file; the last ones are of fresh models, and of ELECTRA's.
_OURS = (
    "model_name_or_path",
    "output_dir",
    "resume",
    "arguments",
    "phases",
    "config_name",
    "tokenizer_name",
    "initialization",
    "embedding_size",
    "disc_weight",
    "generator_name_or_path",
    "generator_hidden_size",
    "generator_layers",
)


@dataclass
class TransferSettings:
    """What a recipe file says; `read_recipe` makes it.

    Attributes:
        model: the checkpoint to start from.
        output_dir: the folder of all stages.
        stages: "domain" and "task", as far as the file has them -> settings of `recipes.pretrain` and arguments of
            training. A task without a `train_file` takes the texts that are fine-tuned on.
        finetune: settings of `recipes.finetune` and arguments of training.
        seeds: of the fine-tunings; a path is judged by their mean.
        ablation: also run the paths that leave stages out.
    """

    model: str
    output_dir: str
    finetune: dict[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (42,)
    ablation: bool = True


def read_recipe(path: str | Path) -> TransferSettings:
    """A recipe from a TOML file.

    Raises:
        ValueError: it is not TOML, or has a table or a key that is none; the message has those that are near.
    """
    values = read_toml(path)
    known = ["model", "output_dir", "seeds", "ablation", *ADAPTING, "finetune"]
    check_known(values, known, str(path))
    if missing := [name for name in ("model", "output_dir", "finetune") if name not in values]:
        raise ValueError(f"{path} has no {', '.join(missing)}")
    for name in (*ADAPTING, "finetune"):
        if not isinstance(values.get(name, {}), dict):
            raise ValueError(f"{path}: {name} is {values[name]!r}, expected a table, [{name}]")
    stages = {name: values[name] for name in ADAPTING if name in values}
    seeds = values.get("seeds", [42])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{path}: seeds is {seeds!r}, expected numbers, as [1, 2, 3]")
    settings = TransferSettings(
        model=values["model"],
        output_dir=values["output_dir"],
        finetune=values["finetune"],
        stages=stages,
        seeds=tuple(seeds),
        ablation=bool(values.get("ablation", True)),
    )
    for name, table in stages.items():
        _stage_settings(PretrainSettings, table, f"{path}, [{name}]")
    _stage_settings(FinetuneSettings, settings.finetune, f"{path}, [finetune]")
    return settings


def _stage_settings(kind: type[Any], table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a stage, those of training under `arguments`; ValueError for a key that is neither."""
    names = [f.name for f in dataclasses.fields(kind) if f.name not in _OURS]
    ours = [name for name in argument_names() if name not in ("output_dir", "resume_from_checkpoint", "seed")]
    check_known(table, [*names, *ours] if kind is FinetuneSettings else [*names, *ours, "seed"], where)
    values = {name: value for name, value in table.items() if name in names}
    return {**values, "arguments": {name: value for name, value in table.items() if name not in names}}


def transfer(settings: TransferSettings, say: Callable[[str], object] = print) -> TransferResult:
    """Run the stages of a recipe, and with `ablation` also every path that leaves some of them out.

    A stage that is finished is not repeated, and one that was interrupted goes on, as long as its settings, what it
    reads and the stages before it are the same; otherwise it runs again, and so do those after it.

    Args:
        settings: what to do.
        say: is told what is done, a line at a time.

    Raises:
        ValueError: a setting is impossible, or an input is missing; the message says of which stage.
        FolderBusyError: another run has the folder.
    """
    output_dir = Path(settings.output_dir)
    stages = tuple(name for name in ADAPTING if name in settings.stages)
    paths = [
        chosen for count in range(len(stages), -1, -1) for chosen in itertools.combinations(stages, count)
    ] if settings.ablation else [stages]  # fmt: skip
    _check_inputs(settings)
    with disk.locked(output_dir):
        runner = _Runner(settings, output_dir, say)
        results = [runner.path(path) for path in paths]
        metric = runner.metric
        best = int(np.argmax(results[0].scores))
        disk.point(output_dir / MODEL, runner.folder(stages, f"finetune-{settings.seeds[best]}"))
        result = TransferResult(metric, results, output_dir / MODEL)
        table = transfer_table(result)
        with disk.text_written_at_once(output_dir / TABLE_FILE) as file:
            file.write(f"# Transfer\n\n{table}\n")
        with disk.text_written_at_once(output_dir / PAGE_FILE) as file:
            file.write(transfer_page(result))
    return result


class _Runner:
    """Runs stages, each in a folder of its own, unless they are finished."""

    def __init__(self, settings: TransferSettings, output_dir: Path, say: Callable[[str], object]) -> None:
        self.settings, self.output_dir, self.say = settings, output_dir, say
        self.metric = ""
        self._known: dict[Path, dict[str, Any]] = {}
        self._base = resolve(settings.model)
        self._digest_of_base = _digest_of(self._base)

    def folder(self, stages: tuple[str, ...], last: str) -> Path:
        return self.output_dir / "+".join((*stages, last))

    def path(self, stages: tuple[str, ...]) -> PathResult:
        """Run a path."""
        model, digest = self._base, self._digest_of_base
        perplexities, seconds = {}, 0.0
        for count, name in enumerate(stages):
            folder = self.folder(stages[:count], name)
            table = _stage_settings(PretrainSettings, self.settings.stages[name], name)
            seen = dict(table)
            if not table.get("train_file"):
                whose = ("task", "columns", "read_options", "train_file", "data_dir")
                seen |= {key: value for key, value in self.settings.finetune.items() if key in whose}
            done = self._run(folder, table, seen, model, digest, self._adapt)
            model, digest = folder, done["digest"]
            if done["result"]["after"] is not None:
                perplexities[name] = (done["result"]["before"], done["result"]["after"])
            seconds += done["seconds"]
        scores = []
        for seed in self.settings.seeds:
            table = _stage_settings(FinetuneSettings, self.settings.finetune, "finetune")
            table["arguments"] |= {"seed": seed}
            done = self._run(self.folder(stages, f"finetune-{seed}"), table, table, model, digest, self._finetune)
            self.metric = done["result"]["metric"]
            scores.append(done["result"]["score"])
        return PathResult(stages, scores, perplexities, seconds + done["seconds"])

    def _run(
        self,
        folder: Path,
        table: dict[str, Any],
        seen: dict[str, Any],
        model: Path,
        digest: str,
        run: Callable[[Path, dict[str, Any], Path, bool], dict[str, Any]],
    ) -> dict[str, Any]:
        """What `stage.json` of a stage says, which is run unless that is there and of the same stage.

        `table` is what it is told, `seen` the same with whatever else decides what comes of it; files by their names.
        """
        if folder in self._known:
            return self._known[folder]
        key = _key(seen, digest)
        text = json.dumps(key, sort_keys=True)
        now, file = hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), folder / STAGE_FILE
        before = read_json(file) if file.is_file() else None
        if before is None and folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is no stage of a transfer: choose another output_dir")
        if before is not None and before["digest"] == now and "result" in before:
            self.say(f"{folder.name}: finished before")
            self._known[folder] = before
            return before
        if before is not None and before["digest"] != now:
            self.say(f"{folder.name}: runs again, for {_differences(before['key'], key)}")
            before = None
        if before is None or table["arguments"].get("save_only_model"):  # then what was interrupted cannot go on
            shutil.rmtree(folder, ignore_errors=True)
            before = None
        self.say(f"{folder.name}: {'goes on' if before else 'runs'}")
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_json(file, {"digest": now, "key": key})
        start = time.perf_counter()
        result = run(folder, table, model, before is not None)
        done = {"digest": now, "key": key, "result": result, "seconds": time.perf_counter() - start}
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        disk.write_json(file, done)
        self._known[folder] = done
        return done

    def _adapt(self, folder: Path, table: dict[str, Any], model: Path, resume: bool) -> dict[str, Any]:
        if not table.get("train_file"):
            texts = folder / "texts.txt"
            with disk.text_written_at_once(texts) as file:
                file.writelines(f"{' '.join(text.split())}\n\n" for text in _task_texts(self.settings))
            table = {**table, "train_file": str(texts)}
        result = pretrain(
            PretrainSettings(model_name_or_path=str(model), output_dir=str(folder), resume=resume, **table)
        )
        _keep_pooler(model, folder)
        return {"before": result.before.get("perplexity"), "after": result.after.get("perplexity")}

    def _finetune(self, folder: Path, table: dict[str, Any], model: Path, resume: bool) -> dict[str, Any]:
        settings = FinetuneSettings(model_name_or_path=str(model), output_dir=str(folder), resume=resume, **table)
        result = finetune(settings)
        split = next(iter(result.metrics))
        return {
            "metric": f"{split} {result.main_metric}",
            "score": result.metrics[split][result.main_metric],
            "metrics": result.metrics,
        }


def _keep_pooler(source: Path, folder: Path) -> None:
    """Put the pooler of a checkpoint into one that was trained on from it without one: a classifier will read it."""
    trained, before = read_state_dict(folder), read_state_dict(source)
    pooler = {f"bert.{name.removeprefix('bert.')}": value for name, value in before.items() if "pooler." in name}
    if pooler and not pooler.keys() & trained.keys():
        with disk.written_at_once(folder / WEIGHTS_FILE) as file:
            file.write(save({**trained, **pooler}, metadata={"format": "pt"}))


def _task_texts(settings: TransferSettings) -> list[str]:
    """The texts that are fine-tuned on, without what is said of them."""
    table = _stage_settings(FinetuneSettings, settings.finetune, "finetune")
    source = str(table.get("train_file") or table.get("data_dir"))
    options = table.get("read_options", {})
    examples = read(table["task"], source, split="train", columns=table.get("columns"), labelled=False, **options)
    return [text for example in examples.examples for text in _texts(example)]


def _texts(example: Any) -> list[str]:
    values = dataclasses.asdict(example)
    if "words" in values:
        return [" ".join(values["words"])]
    if "choices" in values:
        return [" ".join(filter(None, choice)) for choice in values["choices"]]
    if "texts" in values:
        return list(values["texts"])
    names = ("text", "text_pair", "question", "context")
    return [values[name] for name in names if values.get(name)]


# Inputs


def _is_input(name: str) -> bool:
    return name.endswith("_file") or name == "data_dir"


def _check_inputs(settings: TransferSettings) -> None:
    """ValueError for an input that is missing, before anything runs."""
    tables = {**settings.stages, "finetune": settings.finetune}
    if "task" not in settings.finetune:
        raise ValueError("[finetune] has no task: the name of a data set, or a kind of task")
    if not any(settings.finetune.get(name) for name in ("train_file", "data_dir")):
        raise ValueError("[finetune] has no train_file")
    if not any(settings.finetune.get(name) for name in ("validation_file", "test_file", "data_dir")):
        raise ValueError("[finetune] has no validation_file, which the paths are compared on")
    if "domain" in settings.stages and not settings.stages["domain"].get("train_file"):
        raise ValueError("[domain] has no train_file")
    for name, table in tables.items():
        for key, value in table.items():
            if _is_input(key) and not Path(value).exists():
                raise ValueError(f"[{name}] {key}: there is no {value}")


def _key(seen: dict[str, Any], model: str) -> dict[str, Any]:
    """What decides what comes of a stage: its settings, what its files hold, and the digest of what it starts from."""
    files = {name: _digest_of(Path(value)) for name, value in seen.items() if _is_input(name) and value}
    return json.loads(json.dumps({"settings": seen, "files": files, "model": model}))


def _digest_of(path: Path) -> str:
    """Of what a file holds, or all files of a folder with their names."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path)}:".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What changed between the keys of a stage, in words."""
    flat = []
    for key in (before, now):
        settings = dict(key["settings"])
        flat.append({**settings, **settings.pop("arguments", {})})
        flat[-1].pop("arguments", None)
    names = sorted(flat[0].keys() | flat[1].keys())
    said = [f"{n} was {flat[0].get(n)} and is {flat[1].get(n)}" for n in names if flat[0].get(n) != flat[1].get(n)]
    said += [
        f"what {name} holds has changed"
        for name in sorted(before["files"].keys() & now["files"].keys())
        if before["files"][name] != now["files"][name] and flat[0].get(name) == flat[1].get(name)
    ]
    if before["model"] != now["model"]:
        said.append("the model it starts from is another one")
    return "; ".join(said)
