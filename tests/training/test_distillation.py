"""A student's loss and gradients against their definition; labels or none; what a teacher is asked, and how often."""

import copy
import json

import pytest
import tiny
import torch
import torch.nn.functional as F

from bert_fast import modules, reference
from bert_fast.training.distillation import DistillationTrainer, Weights
from bert_fast.training.progress import METRICS_FILE, read
from bert_fast.training.trainer import Trainer

ALL = Weights(logits=0.7, labels=0.4, hidden=1.3, attention=2.0)
TEMPERATURE = 3.0

KINDS = {
    "single": ("BertForSequenceClassification", {"problem_type": "single_label_classification"}),
    "multi": ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}),
    "regression": ("BertForSequenceClassification", {"problem_type": "regression", "id2label": {0: "score"}}),
    "tokens": ("BertForTokenClassification", {}),
    "spans": ("BertForQuestionAnswering", {}),
    "choices": ("BertForMultipleChoice", {}),
}


def model(kind, seed, **shape):
    name, fields = KINDS[kind]
    torch.manual_seed(seed)
    config = tiny.config(0.0, **fields)
    for field, value in shape.items():
        setattr(config, field, value)
    head = getattr(modules, name)(config)
    with torch.no_grad():  # so that the teacher has opinions
        for parameter in head.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return head


def examples(kind, labelled=True):
    """Twelve; padded where spans or choices need it, else of their own lengths."""
    rows = []
    for index, row in enumerate(tiny.padded()[:12]):
        length = sum(row["attention_mask"])
        if kind in ("spans", "choices"):
            new = {name: row[name] for name in ("input_ids", "attention_mask")}
        else:
            new = {"input_ids": row["input_ids"][:length]}
        if kind == "choices":
            other = tiny.padded()[-1 - index]
            new = {name: [values, other[name]] for name, values in new.items()}
        if labelled:
            new |= {
                "single": {"labels": index % 2},
                "multi": {"labels": [float(index % 2), 1.0]},
                "regression": {"labels": [index / 4]},
                "tokens": {"labels": [-100 if place % 3 else index % 2 for place in range(length)]},
                "spans": {"start_positions": 1, "end_positions": 1 + index % 3},
                "choices": {"labels": index % 2},
            }[kind]
        rows.append(new)
    return rows


def plain(head):
    """The same weights in the plain definition, in float64."""
    twin = getattr(reference, type(head).__name__)(head.config).double()
    twin.load_state_dict(head.state_dict())
    return twin


def answers(head, row):
    """Of one example: logits (rows, classes), hidden states and relations of each of its texts."""
    ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row.get("attention_mask", [1] * len(row["input_ids"])))
    texts = [i[m == 1] for i, m in zip(torch.atleast_2d(ids), torch.atleast_2d(mask), strict=True)]
    layer, states, relations, logits = head.bert.encoder.layer[-1].attention.self, [], [], []
    for text in texts:
        many = text[None, None] if isinstance(head, reference.BertForMultipleChoice) else text[None]
        output = head(many, output_hidden_states=True)
        found = [state[0] for state in output.hidden_states]
        states.append(found)
        relations.append(
            [
                torch.softmax(part @ part.T / part.shape[1] ** 0.5, -1)
                for linear in (layer.query, layer.key, layer.value)
                for part in linear(found[-2]).chunk(2, dim=-1)
            ]
        )
        if isinstance(head, reference.BertForQuestionAnswering):
            logits = [output.start_logits, output.end_logits]
        else:
            logits.append(output.logits.flatten(0, -2))
    return logits, states, relations


def soft(wanted, said):
    return TEMPERATURE**2 * F.kl_div(
        F.log_softmax(said / TEMPERATURE, -1), F.log_softmax(wanted / TEMPERATURE, -1), reduction="sum", log_target=True
    )


def definition(student, teacher, kind, rows, widening=None):
    """The loss of all parts over all examples, one text at a time, over the plain models in float64."""
    student, teacher = plain(student), plain(teacher)
    logits, hidden, attention, num_rows, num_tokens, hard = [], [], [], 0, 0, []
    for row in rows:
        said, states, relations = answers(student, row)
        with torch.no_grad():
            wanted, their_states, their_relations = answers(teacher, row)
        if kind == "spans":
            logits += [(soft(a, b)) / 2 for a, b in zip(wanted, said, strict=True)]
            hard += [
                F.cross_entropy(scores, torch.tensor([row[f"{name}_positions"]])) / 2
                for name, scores in zip(("start", "end"), said, strict=True)
            ]
            num_rows += 1
        elif kind == "tokens":
            labels = torch.tensor(row["labels"])
            logits.append(soft(wanted[0][labels >= 0], said[0][labels >= 0]))
            hard.append(F.cross_entropy(said[0][labels >= 0], labels[labels >= 0], reduction="sum"))
            num_rows += int((labels >= 0).sum())
        else:
            a, b = (torch.cat(parts).view(1, -1) for parts in (wanted, said))
            target = torch.tensor(row["labels"])
            if kind == "regression":
                logits.append(F.mse_loss(b, a))
                hard.append(F.mse_loss(b[0], target.double()))
            elif kind == "multi":
                both = [torch.stack([F.logsigmoid(x / TEMPERATURE), F.logsigmoid(-x / TEMPERATURE)]) for x in (a, b)]
                logits.append(TEMPERATURE**2 * (both[0].exp() * (both[0] - both[1])).sum() / a.numel())
                hard.append(F.binary_cross_entropy_with_logits(b[0], target.double()))
            else:
                logits.append(soft(a, b))
                hard.append(F.cross_entropy(b, target[None]))
            num_rows += 1
        for mine, others in zip(states, their_states, strict=True):
            pairs = [(mine[place], others[2 * place]) for place in range(2)]
            if widening is not None:
                pairs = [(a @ widening.T, b) for a, b in pairs]
            hidden += [(a - b).square().mean(-1).sum() / 2 for a, b in pairs]
            num_tokens += len(mine[0])
        for mine, others in zip(relations, their_relations, strict=True):
            attention += [(b * (b / a).log()).sum() / 6 for a, b in zip(mine, others, strict=True)]
    parts = (sum(logits) / num_rows, sum(hard) / num_rows, sum(hidden) / num_tokens, sum(attention) / num_tokens)
    loss = ALL.logits * parts[0] + ALL.labels * parts[1] + ALL.hidden * parts[2] + ALL.attention * parts[3]
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in student.named_parameters()}


class Watching(DistillationTrainer):
    """Keeps the gradients of the first step."""

    gradients = None

    def _get_grad_norm(self, model, grad_norm=None):
        if self.gradients is None:
            self.gradients = {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}
            self.widening = copy.deepcopy(getattr(self.student, "widening", None))
        return super()._get_grad_norm(model, grad_norm)


def trainer(folder, student, teacher, rows, weights=ALL, **options):
    arguments = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    if "attention_mask" not in rows[0]:
        arguments["max_tokens_per_batch"] = 1000
    return Watching(
        student,
        tiny.arguments(folder, **{**arguments, **options}),
        teacher=teacher,
        weights=weights,
        temperature=TEMPERATURE,
        train_dataset=rows,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_definition(kind, tmp_path):
    teacher, student = model(kind, 1), model(kind, 2, num_hidden_layers=1)
    rows = examples(kind)
    loss, gradients = definition(student, teacher, kind, rows)
    run = trainer(tmp_path, student, teacher, rows, per_device_train_batch_size=12)
    run.train()
    assert read(tmp_path / METRICS_FILE)[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert run.gradients.keys() == gradients.keys()
    for name, gradient in run.gradients.items():
        torch.testing.assert_close(gradient.double(), gradients[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", ["single", "tokens", "choices"])
def test_micro_batches_do_not_change_the_gradients(kind, tmp_path):
    rows, gradients = [*examples(kind)], []
    sizes = ({"max_tokens_per_batch": 1000}, {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 3})
    if kind == "choices":
        sizes = tuple({"per_device_train_batch_size": 12 // n, "gradient_accumulation_steps": n} for n in (1, 4))
    for index, size in enumerate(sizes):
        run = trainer(tmp_path / str(index), model(kind, 2, num_hidden_layers=1), model(kind, 1), rows, **size)
        run.train()
        gradients.append(run.gradients)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5)


def test_a_narrower_student_learns_the_matrix_that_widens_it_and_gives_it_back(tmp_path):
    teacher, student = model("single", 1), model("single", 2, num_hidden_layers=1, hidden_size=16, intermediate_size=32)
    names = [name for name, _ in student.named_parameters()]
    rows = examples("single")
    run = trainer(tmp_path, student, teacher, rows, save_strategy="steps", save_steps=1)
    run.train()
    loss, gradients = definition(student, teacher, "single", rows, run.widening.weight.double().detach())
    assert read(tmp_path / METRICS_FILE)[0]["loss"] == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(
        run.gradients["bert.embeddings.LayerNorm.weight"].double(),
        gradients["bert.embeddings.LayerNorm.weight"],
        rtol=2e-3,
        atol=2e-4,
    )
    assert float(run.gradients["widening.weight"].abs().max()) > 0
    assert [name for name, _ in student.named_parameters()] == names


@pytest.mark.parametrize("kind", ["single", "tokens", "spans"])
def test_labels_are_not_needed(kind, tmp_path):
    teacher, student = model(kind, 1), model(kind, 2, num_hidden_layers=1)
    weights = Weights(logits=1.0, hidden=1.0)
    rows = examples(kind, labelled=False)
    run = trainer(tmp_path, student, teacher, rows, weights, max_steps=30, learning_rate=3e-3)
    run.train()
    losses = [row["loss_logits"] for row in read(tmp_path / METRICS_FILE) if "loss" in row]
    assert losses[-1] < losses[0] / 3
    with pytest.raises(ValueError, match=r"the batch has no (labels|start_positions)"):
        trainer(tmp_path / "b", student, teacher, rows, ALL).train()


def test_logits_are_kept_from_the_first_epoch_on_and_change_nothing(tmp_path, monkeypatch):
    asked, weights = [], {}
    forward = modules.BertForTokenClassification.forward

    def count(self, *args, **options):
        asked.append(not self.training)
        return forward(self, *args, **options)

    monkeypatch.setattr(modules.BertForTokenClassification, "forward", count)
    for keeps in (True, False):
        asked.clear()
        student = model("tokens", 2, num_hidden_layers=1)
        options = {"max_steps": 8, "learning_rate": 1e-3, "max_tokens_per_batch": 60}
        run = trainer(
            tmp_path / str(keeps), student, model("tokens", 1), examples("tokens"), Weights(1.0, 0.5), **options
        )
        if not keeps:
            run._kept = type("Forgetful", (dict,), {"__ior__": lambda self, other: self})()
        run.train()
        weights[keeps] = student.state_dict()
        assert sum(asked) < 8 if keeps else sum(asked) == 8
    for name, value in weights[True].items():
        assert torch.equal(value, weights[False][name])


def test_a_run_goes_on_bit_for_bit(tmp_path):
    def run(folder, steps):
        student = model("single", 2, num_hidden_layers=1, hidden_size=16, intermediate_size=32)
        student.config.hidden_dropout_prob = 0.1
        done = trainer(
            folder, student, model("single", 1), examples("single"), max_steps=steps, learning_rate=1e-3,
            max_tokens_per_batch=60, save_strategy="steps", save_steps=3, schedule="constant", warmup_steps=0,
        )  # fmt: skip
        torch.manual_seed(5)
        done.train(resume_from_checkpoint=True)
        return student.state_dict()

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    for name, value in run(tmp_path / "parts", 6).items():
        assert torch.equal(value, whole[name]), name


def test_what_cannot_be_taught_says_so(tmp_path):
    student, arguments = model("single", 2), tiny.arguments(tmp_path)

    def refused(match, teacher=None, weights=ALL, temperature=2.0, student=student):
        with pytest.raises(ValueError, match=match):
            DistillationTrainer(
                student, arguments, teacher=teacher or model("single", 1), weights=weights, temperature=temperature
            )

    refused(
        r"student is a BertForSequenceClassification and the teacher a BertForTokenClassification", model("tokens", 1)
    )
    refused(r"teacher is a BertForMaskedLM, expected one of BertForSequence", tiny.masked_lm())
    refused(r"student's vocab_size is \d+, the teacher's 50", model("single", 1, vocab_size=50))
    refused(r"student's num_labels is 2, the teacher's 1", model("regression", 1))
    refused(r"temperature is 0.0, expected above 0", temperature=0.0)
    with pytest.raises(ValueError, match=r"the weight of hidden is -1, expected at least 0"):
        Weights(hidden=-1)
    with pytest.raises(ValueError, match=r"are all 0: there is nothing to learn"):
        Weights(logits=0)


def test_evaluation_is_the_trainers(tmp_path):
    rows = examples("single")
    student = model("single", 2, num_hidden_layers=1)
    run = trainer(tmp_path, student, model("single", 1), rows)
    run.eval_dataset = rows
    other = Trainer(
        copy.deepcopy(student), tiny.arguments(tmp_path / "b", max_tokens_per_batch=1000), eval_dataset=rows
    )
    assert run.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"])
    assert json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[-1])["eval_loss"] > 0
