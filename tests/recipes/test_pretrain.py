"""Pre-training from text to a saved model: its scores, phases, resuming, ELECTRA, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import bert_fast
from bert_fast import BertConfig, modules, ops, reference
from bert_fast.cli import app
from bert_fast.config import ElectraConfig
from bert_fast.data import shards
from bert_fast.data.encoding import TokenizerVocabulary
from bert_fast.data.instances import Options
from bert_fast.data.pretraining import ShardDataset
from bert_fast.loading import read_state_dict
from bert_fast.losses import IGNORED_LABEL
from bert_fast.recipes._pretraining_data import Phase, make_collator, read_corpus
from bert_fast.recipes._pretraining_models import make_model
from bert_fast.recipes.held_out import held_out_scores, padded
from bert_fast.recipes.pretrain import PretrainSettings, pretrain
from bert_fast.training.masking import IndexedDataset
from bert_fast.training.progress import METRICS_FILE, read
from bert_fast.vocabulary.training import train

TEXT = Path(__file__).parent.parent.parent / "examples" / "text"
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
ARGUMENTS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "plot_metrics": False,
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for two
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in documents of five sentences, a tokenizer, a shape, and shards of pairs."""
    place = tmp_path_factory.mktemp("pretrain")
    lines = [line for file in sorted(TEXT.glob("*.txt")) for line in file.read_text().splitlines() if line.strip()]
    documents = ["\n".join(lines[start : start + 5]) for start in range(0, len(lines), 5)]
    (place / "text.txt").write_text("\n\n".join(documents) + "\n")
    train(lines, vocab_size=300, show_progress=False).save(place / "tokenizer")
    (place / "shape.json").write_text(json.dumps(SHAPE))
    for name, options in (
        ("nsp", {"objective": "nsp", "masking": "dynamic"}),
        ("static", {"objective": "none", "masking": "static"}),
    ):
        settings = Options(max_seq_length=32, dupe_factor=1, **options)
        shards.build([place / "text.txt"], str(place / "tokenizer"), place / name, settings, num_workers=1)
    return place


def settings(place: Path, output_dir: Path, **options: Any) -> PretrainSettings:
    """Few steps of a tiny model on the text."""
    arguments = {**ARGUMENTS, **options.pop("arguments", {})}
    if "model_name_or_path" not in options:
        options = {"config_name": str(place / "shape.json"), "tokenizer_name": str(place / "tokenizer"), **options}
    defaults = {"train_file": str(place / "text.txt"), "max_seq_length": 32, "validation_split_percentage": 20}
    return PretrainSettings(str(output_dir), **{**defaults, **options}, arguments=arguments)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read(folder / METRICS_FILE) if "loss" in line]


def weighed(weight: float, plain: bool, **options: Any) -> torch.Tensor:
    """The loss of a head with two tasks, and all its gradients."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, **SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = (reference if plain else modules).BertForPreTraining(config).train()
    model.next_sentence_weight = weight
    ids = torch.arange(4, 24).view(2, 10)
    labels = ids.masked_fill(ids % 3 > 0, IGNORED_LABEL)
    loss = model(ids, labels=labels, next_sentence_label=torch.tensor([0, 1]), **options).loss
    return torch.cat([loss.detach()[None], *(g.flatten() for g in torch.autograd.grad(loss, model.parameters()))])


@pytest.mark.parametrize(("plain", "options"), [(True, {}), (False, {}), (False, {"loss_only": True})])
def test_the_second_loss_is_weighed(plain: bool, options: dict[str, Any]) -> None:
    """loss(w) = loss(0) + w (loss(1) - loss(0)), and so for each gradient."""
    none, one, some = (weighed(weight, plain, **options) for weight in (0.0, 1.0, 0.3))
    torch.testing.assert_close(some, none + 0.3 * (one - none), rtol=1e-4, atol=1e-6)
    assert one[0] - none[0] == pytest.approx(0.69, abs=0.1)


@pytest.mark.parametrize("objective", ["mlm", "nsp", "electra"])
def test_held_out_scores_are_those_of_transformers(place: Path, tmp_path: Path, objective: str) -> None:
    """The same masks, one text after another, through transformers' models; and the saved folder is theirs to load."""
    run = settings(place, tmp_path / "run", objective=objective, arguments={"max_steps": 3})
    result = pretrain(run)
    vocabulary = TokenizerVocabulary.read(run.tokenizer_name)
    texts = ShardDataset(tmp_path / "run" / "data" / "validation-32")
    collate = make_collator(run, texts.manifest["options"], vocabulary, 42, 64)
    rows, sums = IndexedDataset(texts), dict.fromkeys(("nll", "hidden", "right", "second"), 0.0)
    names = {"mlm": ["BertForMaskedLM"], "nsp": ["BertForPreTraining"], "electra": ["ElectraForMaskedLM"]}
    folder = tmp_path / "run" / ("generator" if objective == "electra" else "")
    model = getattr(transformers, names[objective][0]).from_pretrained(folder).eval()
    assert transformers.AutoTokenizer.from_pretrained(folder).vocab_size == vocabulary.size
    for index in range(len(texts)):
        batch = padded(collate([rows[index]]))
        labels, pair = batch.pop("labels"), batch.pop("next_sentence_label", None)
        if objective != "nsp":
            pair = None
        with torch.no_grad():
            output = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
        logits = output.prediction_logits if objective == "nsp" else output.logits
        sums["nll"] += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        sums["hidden"] += (labels != IGNORED_LABEL).sum().item()
        if pair is not None:
            sums["right"] += (output.seq_relationship_logits.argmax(-1) == pair).sum().item()
            sums["second"] += torch.nn.functional.cross_entropy(output.seq_relationship_logits, pair).item()
    after = result.after
    assert after["masked_tokens"] == sums["hidden"] > 50
    assert after["texts"] == len(texts) > 10
    assert after["masked_lm_loss"] == pytest.approx(sums["nll"] / sums["hidden"], rel=1e-5)
    assert after["perplexity"] == pytest.approx(torch.tensor(sums["nll"] / sums["hidden"]).exp().item(), rel=1e-4)
    if objective == "nsp":
        assert after["next_sentence_accuracy"] == sums["right"] / len(texts)
        assert after["next_sentence_loss"] == pytest.approx(sums["second"] / len(texts), rel=1e-4)
    if objective == "electra":
        transformers.ElectraForPreTraining.from_pretrained(tmp_path / "run")
        assert after["loss"] == pytest.approx(after["masked_lm_loss"] + 50 * after["discriminator_loss"], rel=1e-5)
        share = after["masked_tokens"] / texts.lengths[:].sum()
        assert 0 < after["replaced"] < share
    assert json.loads((tmp_path / "run" / "results.json").read_text())["held_out"]["after"] == after
    assert result.before["perplexity"] > after["perplexity"]


def test_held_out_scores_do_not_depend_on_batches_nor_touch_the_run(place: Path, tmp_path: Path) -> None:
    run = settings(place, tmp_path, objective="electra")
    vocabulary = TokenizerVocabulary.read(run.tokenizer_name)
    model = make_model(run, vocabulary).train()
    corpus = read_corpus(run, [Phase(32, 1.0)], place / "tokenizer", vocabulary)
    collate = make_collator(run, corpus.options, vocabulary, 1, 64)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    small, large = (held_out_scores(model, corpus.held_out, collate, max_tokens=most) for most in (40, 400))
    assert torch.equal(torch.rand(3), expected), "the run's random numbers were drawn from"
    assert model.training
    assert small["masked_lm_loss"] == pytest.approx(large["masked_lm_loss"], rel=1e-5)
    assert small["masked_tokens"] == large["masked_tokens"]


PHASES = (Phase(16, 0.5), Phase(32, 0.5))


def test_a_run_is_resumed_in_either_phase(place: Path, tmp_path: Path) -> None:
    """After every step, also at the boundary: the same losses and weights, dropout on."""
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "max_steps": 6}
    options: dict[str, Any] = {"objective": "nsp", "phases": PHASES, "arguments": saving}
    torch.use_deterministic_algorithms(True)
    result = pretrain(settings(place, tmp_path / "whole", **options))
    assert [phase["steps"] for phase in result.phases] == [3, 3]
    expected = losses(tmp_path / "whole")
    weights = read_state_dict(tmp_path / "whole")
    for step in (2, 3, 4):
        folder = tmp_path / f"from-{step}"
        folder.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        pretrain(settings(place, folder, **options, resume=True))
        assert losses(folder) == expected[step:]
        for name, weight in read_state_dict(folder).items():
            assert torch.equal(weight, weights[name]), name


def test_a_run_is_not_resumed_with_other_data(place: Path, tmp_path: Path) -> None:
    """What is hidden and how, the seed, the shards: old and new values are named, of all that changed."""
    options: dict[str, Any] = {"train_file": str(place / "nsp"), "scheme": "subword"}
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    pretrain(settings(place, tmp_path / "run", **options, arguments=arguments))
    (tmp_path / "run" / "results.json").unlink()
    other = Options(max_seq_length=24, dupe_factor=1, objective="nsp", masking="dynamic", scheme="whole_word")
    shards.build([place / "text.txt"], str(place / "tokenizer"), tmp_path / "shards", other, num_workers=1)
    for change, messages in (
        ({"scheme": "span"}, ["scheme was subword and is span"]),
        ({"mlm_probability": 0.2, "max_predictions_per_seq": 9}, ["mlm_probability was 0.15 and is 0.2"]),
        ({"mlm_probability": 0.2, "max_predictions_per_seq": 9}, ["max_predictions was 20 and is 9"]),
        ({"arguments": {"seed": 7}}, ["seed was 42 and is 7; seed of the masks was 42 and is 7"]),
        (
            {"train_file": str(tmp_path / "shards")},
            [
                "max_seq_length of the shards was [32] and is [24]",
                "scheme of the shards was ['subword'] and is ['whole",
            ],
        ),
        ({"phases": PHASES[1:] * 2}, ["steps of the phases was [] and is [1, 1]"]),
    ):
        given = {**options, **change, "arguments": {**arguments, **change.get("arguments", {})}}
        with pytest.raises(ValueError, match="the run cannot go on where it was") as error:
            pretrain(settings(place, tmp_path / "run", **given, resume=True))
        assert all(message in str(error.value) for message in messages), error.value
    pretrain(settings(place, tmp_path / "run", **options, arguments=arguments, resume=True))


def test_phases_have_their_steps_and_lengths(place: Path, tmp_path: Path) -> None:
    phases = (Phase(16, 0.75), Phase(32, 0.25))
    options = {"max_steps": 8, "gradient_accumulation_steps": 2}
    result = pretrain(settings(place, tmp_path, phases=phases, arguments=options))
    lines = [line for line in read(tmp_path / METRICS_FILE) if "loss" in line]
    totals = [line["tokens"] for line in lines]
    steps = [after - before for before, after in zip([0, *totals], totals, strict=False)]
    assert [phase["steps"] for phase in result.phases] == [6, 2]
    assert max(steps[:6]) <= 2 * 4 * 16 < max(steps[6:])
    rates = [line["learning_rate"] for line in lines]
    assert rates[1:] == sorted(rates[1:], reverse=True), "one schedule over both phases"


@pytest.mark.parametrize("objective", [pytest.param("sop", marks=pytest.mark.slow), "electra"])
def test_the_plain_path_has_the_same_curve(
    place: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded plain modules without dropout, whose masks torch draws otherwise; the ops' definitions with dropout."""
    pretrain(settings(place, tmp_path / "fast", objective=objective))
    with ops.force("reference"):
        pretrain(settings(place, tmp_path / "definition", objective=objective))
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "definition"), rel=1e-4)

    monkeypatch.setattr(ops, "draw_seeds", lambda count: torch.zeros(count, dtype=torch.int64))
    (tmp_path / "dry.json").write_text(
        json.dumps({**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    dry: dict[str, Any] = {"objective": objective, "config_name": str(tmp_path / "dry.json")}
    ours = pretrain(settings(place, tmp_path / "dry", **dry))
    plain = pretrain(settings(place, tmp_path / "plain", **dry, plain=True))
    assert losses(tmp_path / "dry") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    assert ours.after["perplexity"] == pytest.approx(plain.after["perplexity"], rel=1e-3)


@pytest.mark.parametrize("objective", ["nsp", "electra"])
def test_bfloat16(place: Path, tmp_path: Path, objective: str) -> None:
    """Near float32's first loss, though ELECTRA's samples need not be the same."""
    for name, bf16 in (("bf16", True), ("fp32", False)):
        result = pretrain(settings(place, tmp_path / name, objective=objective, arguments={"bf16": bf16}))
        assert result.after["perplexity"] < result.before["perplexity"]
    assert losses(tmp_path / "bf16")[0] == pytest.approx(losses(tmp_path / "fp32")[0], rel=0.02)


def test_runs_go_on_from_checkpoints(place: Path, tmp_path: Path) -> None:
    """Of a model without the second head, and of ELECTRA's two; perplexity begins where it was."""
    first = pretrain(settings(place, tmp_path / "mlm"))
    with pytest.warns(UserWarning, match="starts untrained"):
        more = pretrain(settings(place, tmp_path / "nsp", objective="nsp", model_name_or_path=str(tmp_path / "mlm")))
    assert more.before["perplexity"] != first.before["perplexity"]
    assert more.before["perplexity"] == pytest.approx(first.after["perplexity"], rel=0.3)  # other texts: pairs
    first = pretrain(settings(place, tmp_path / "electra", objective="electra"))
    go_on = {"objective": "electra", "model_name_or_path": str(tmp_path / "electra")}
    more = pretrain(settings(place, tmp_path / "more", **go_on))
    assert more.before == pytest.approx(first.after, rel=1e-5)


def test_shards_say_how_tokens_are_hidden(place: Path, tmp_path: Path) -> None:
    result = pretrain(settings(place, tmp_path / "nsp", train_file=str(place / "nsp"), objective="nsp"))
    assert result.after == {}
    assert "nothing was held out" in str(result)
    files = {"train_file": str(place / "static"), "validation_file": str(place / "static")}
    result = pretrain(settings(place, tmp_path / "static", **files))
    hidden = ShardDataset(place / "static").manifest["statistics"]["num_predictions"]
    assert result.after["masked_tokens"] == hidden


@pytest.mark.parametrize("objective", ["nsp", "electra"])
def test_googles_initialisation_is_cut(place: Path, tmp_path: Path, objective: str) -> None:
    run = settings(place, tmp_path, objective=objective, initialization="truncated_normal")
    model = make_model(run, TokenizerVocabulary.read(run.tokenizer_name))
    weights = [weight for name, weight in model.named_parameters() if weight.dim() == 2]
    assert max(weight.abs().max() for weight in weights) <= 2 * 0.02 + 1e-6
    table = next(weight for name, weight in model.named_parameters() if "word_embeddings" in name)
    assert not table[0].any()
    assert table[1:].std().item() == pytest.approx(0.88 * 0.02, rel=0.05)  # of a normal cut at two deviations


def test_shapes_are_googles(place: Path, tmp_path: Path) -> None:
    vocabulary = TokenizerVocabulary.read(str(place / "tokenizer"))
    tiny = make_model(settings(place, tmp_path, config_name="tiny"), vocabulary)
    assert (tiny.config.num_attention_heads, tiny.config.intermediate_size) == (2, 512)
    small = make_model(settings(place, tmp_path, config_name="electra-small", objective="electra"), vocabulary)
    assert small.config == ElectraConfig(vocab_size=vocabulary.size)
    assert small.generator.config.hidden_size == 64


def refused(place: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pretrain(settings(place, tmp_path / "refused", **options))
    return str(caught.value)


def test_what_is_refused_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "tokenizer", tmp_path / "maskless")
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        file = tmp_path / "maskless" / name
        file.write_text(file.read_text().replace("[MASK]", "[HIDE]"))
    config = json.loads((tmp_path / "maskless" / "tokenizer_config.json").read_text())
    (tmp_path / "maskless" / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": "[MASK]"}))
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "one.txt").write_text("A sentence.\nAnd one more.\n")
    (tmp_path / "wide.json").write_text(json.dumps({**SHAPE, "vocab_size": 999}))
    other = train(["zebra yak xylophone " * 9], vocab_size=99, show_progress=False)
    other.save(tmp_path / "other")
    for options, message in (
        ({"tokenizer_name": str(tmp_path / "maskless")}, "lacks the special tokens [MASK]"),
        ({"config_name": str(tmp_path / "wide.json")}, "tokenizer has 300 tokens, but the table of embeddings"),
        ({"config_name": "huge"}, "config_name is 'huge', expected tiny"),
        ({"config_name": None}, "neither config_name nor model_name_or_path"),
        ({"tokenizer_name": None}, "tokenizer_name is not given"),
        ({"objective": "clm"}, "objective is 'clm', expected one of mlm, nsp, sop, electra"),
        ({"max_seq_length": 65}, "max_seq_length is 65, expected 5 to 64"),
        ({"phases": (Phase(16, 0.5), Phase(128, 0.5))}, "max_seq_length of phase 2 is 128, expected 5 to 64"),
        ({"phases": PHASES, "arguments": {"max_steps": -1}}, "2 phases share the steps of the run: give max_steps"),
        ({"train_file": str(tmp_path / "empty.txt")}, "empty.txt holds no text to pre-train on"),
        ({"train_file": str(tmp_path / "one.txt")}, "has 1 documents, of which 20 percent cannot be held out"),
        ({"train_file": str(tmp_path / "none.txt")}, "there is no file or folder"),
        ({"train_file": str(place / "nsp"), "objective": "sop"}, "made with the objective nsp, and has no pairs"),
        ({"train_file": str(place / "nsp"), "max_seq_length": 16}, "made with max_seq_length 32, more than 16"),
        ({"train_file": str(place / "static"), "objective": "electra"}, "has static masks, and ELECTRA has its own"),
        ({"train_file": str(place / "static"), "scheme": "span"}, "has static masks, which scheme cannot change"),
        ({"train_file": str(place / "nsp"), "tokenizer_name": str(tmp_path / "other")}, "made with another tokenizer"),
        ({"nsp_weight": -1.0}, "nsp_weight is -1.0"),
        ({"initialization": "zeros"}, "initialization is 'zeros'"),
        ({"validation_split_percentage": 100}, "validation_split_percentage is 100"),
        ({"objective": "electra", "generator_layers": 2.0}, "generator_layers is 2.0"),
    ):
        assert message in refused(place, tmp_path, **options)
    pretrain(settings(place, tmp_path / "done", arguments={"max_steps": 1}))
    with pytest.raises(ValueError, match="holds a model that was pre-trained before"):
        pretrain(settings(place, tmp_path / "done"))
    mlm = {"model_name_or_path": str(tmp_path / "done"), "objective": "electra"}
    assert "has no folder `generator`" in refused(place, tmp_path, **mlm)


def test_the_command(place: Path, tmp_path: Path) -> None:
    def run(*args: Any) -> Any:
        fixed = ("--config_name", place / "shape.json", "--tokenizer_name", place / "tokenizer")
        return CliRunner().invoke(app, ["pretrain", *map(str, (*fixed, *args))])

    quick = ("--max_steps", 4, "--disable_tqdm", "true", "--use_cpu", "true", "--plot_metrics", "false")
    files = ("--train_file", place / "text.txt", "--output_dir", tmp_path / "run")
    done = run(*files, *quick, "--objective", "sop", "--phase", "16:0.5", "--phase", "32:0.5")
    assert done.exit_code == 0, done.output
    for words in ("phase 1: ", "texts of up to 16 tokens, 2 steps", "tokens/s", "held-out perplexity: ", "written: "):
        assert words in done.stdout
    assert bert_fast.from_pretrained(tmp_path / "run", head="pre_training").config.hidden_size == 32
    refusal = run(*files, "--phase", "16")
    assert (refusal.exit_code, refusal.stdout) == (2, "")
    assert "phase is '16', expected LENGTH:FRACTION" in refusal.stderr
