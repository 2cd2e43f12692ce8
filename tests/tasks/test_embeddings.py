"""Sentence vectors as a task: features, batches, training, ranks, and folders that sentence-transformers loads."""

import json
import re

import numpy as np
import pytest
import torch
import word_checkpoints as checkpoints
from scipy import stats
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from bert_fast import reference, sentence_embedding
from bert_fast.data.examples import SentencesExample, TextExample
from bert_fast.embedder import Embedder
from bert_fast.loading import build, from_pretrained
from bert_fast.saving import save_pretrained
from bert_fast.sentence_embedding import POOLING_MODES
from bert_fast.tasks.registry import load_task, make_task, save_task
from bert_fast.tokenization import Tokenizer
from bert_fast.training import Trainer, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pairs(scores=None):
    """Examples of two texts."""
    texts = [tuple(pair.split("|")) for pair in checkpoints.PAIRS]
    return [SentencesExample(str(i), t, None if scores is None else scores[i]) for i, t in enumerate(texts)]


def triplets():
    """The pairs, with the positive read backwards as a negative."""
    return [SentencesExample(e.id, (*e.texts, " ".join(reversed(e.texts[1].split())))) for e in pairs()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    checkpoints.save(place, None)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


def batch_of(task, examples, tokenizer, labelled=True):
    config = checkpoints.config()
    return task.collator(config)(task.features(examples, tokenizer, labelled=labelled).inputs)


def theirs_of(ours, folder):
    """sentence-transformers with the weights of ours, in the same dtype."""
    ours.save_pretrained(folder)
    checkpoints.write_tokenizer(folder)
    return SentenceTransformer(str(folder), device="cpu").to(next(ours.parameters()).dtype)


@pytest.mark.parametrize("examples", [pairs(), triplets()], ids=["pairs", "triplets"])
def test_a_batch_has_each_text_as_a_sequence(examples, tokenizer):
    batch = batch_of(make_task("embeddings"), examples, tokenizer)
    texts = [text for example in examples for text in example.texts]
    tokens = tokenizer(texts)
    assert batch["cu_seq_lens_q"].diff().tolist() == tokens.lengths.tolist()
    assert batch["input_ids"][0].tolist() == tokens.input_ids.tolist()
    assert batch["labels"].tolist() == [1.0] * len(examples)
    ids = batch["text_ids"].flatten().tolist()
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in texts] for a in texts]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("options", "examples"),
    [
        ({"loss": "multiple_negatives_ranking", "pooling_mode": "cls"}, pairs()),
        ({"loss": "multiple_negatives_ranking", "symmetric": True}, triplets()),
        ({"loss": "triplet", "normalize": False, "pooling_mode": "max"}, triplets()),
        ({"loss": "cosine_similarity"}, pairs([i / 11 for i in range(12)])),
        ({"loss": "cosent", "normalize": False}, pairs([i % 3 for i in range(12)])),
    ],
    ids=lambda value: value["loss"] if isinstance(value, dict) else "",
)
def test_the_loss_and_all_gradients_are_those_of_sentence_transformers(options, examples, dtype, tokenizer, tmp_path):
    task = make_task("embeddings", **options)
    task.learn(examples)
    ours = checkpoints.model("sentence_embedding", **task.config()).to(dtype)
    oracle = theirs_of(ours, tmp_path)
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    loss = {
        "multiple_negatives_ranking": lambda: losses.MultipleNegativesRankingLoss(
            oracle, **(both if options.get("symmetric") else {})
        ),
        "triplet": lambda: losses.TripletLoss(oracle, triplet_margin=1.0),
        "cosine_similarity": lambda: losses.CosineSimilarityLoss(oracle),
        "cosent": lambda: losses.CoSENTLoss(oracle),
    }[options["loss"]]()
    got = ours(**batch_of(task, examples, tokenizer), loss_only=True).loss
    columns = [oracle.preprocess(list(column)) for column in zip(*(e.texts for e in examples), strict=True)]
    expected = loss(columns, torch.tensor([e.score or 0.0 for e in examples]))
    got.backward()
    expected.backward()
    bound = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, expected.to(dtype), **bound)
    expected_gradients = {name: p.grad for name, p in oracle[0].auto_model.named_parameters()}
    for name, parameter in ours.bert.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], **bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("layout", ["packed", "padded", "full"])
def test_the_plain_definition_gives_the_same(mode, layout):
    settings = {"sentence_embedding": {"pooling_mode": mode}}
    ours = checkpoints.model("sentence_embedding", **settings)
    plain = build(reference.BertForSentenceEmbedding, ours.config, ours.state_dict())
    ids = torch.randint(5, 20, (3, 7))
    inputs = {
        "packed": {"input_ids": ids.view(1, -1), "cu_seq_lens_q": torch.tensor([0, 4, 4, 21], dtype=torch.int32)},
        "padded": {"input_ids": ids, "attention_mask": torch.arange(7) < torch.tensor([[7], [0], [3]])},
        "full": {"input_ids": ids},
    }[layout]
    with torch.no_grad():
        got, expected = (model(**inputs).sentence_embedding for model in (ours, plain))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    lengths = got.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(3) if layout == "full" else torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_everybody_loads_the_folder_with_the_same_vectors(mode, normalize, folder, tmp_path, recwarn):
    task = make_task("embeddings", pooling_mode=mode, normalize=normalize, max_seq_length=5)
    ours = from_pretrained(folder, task.head, config=task.config())
    save_pretrained(ours, tmp_path)
    checkpoints.write_tokenizer(tmp_path)
    texts = checkpoints.SENTENCES[:5]
    features = task.features([SentencesExample("0", tuple(texts))], Tokenizer.from_pretrained(tmp_path), labelled=False)
    assert features.num_truncated == 1
    (output,) = task.outputs(ours, task.collator(ours.config)(features.inputs))
    oracle = SentenceTransformer(str(tmp_path), device="cpu")
    assert oracle.max_seq_length == 5
    np.testing.assert_allclose(output[0], oracle.encode(texts), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="5 of 5 texts"):
        np.testing.assert_allclose(output[0], Embedder(tmp_path).encode(texts), rtol=1e-4, atol=1e-5)
    again = from_pretrained(tmp_path, task.head)
    assert again.settings == ours.settings
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]


def test_ranks_are_those_of_sentence_transformers_and_of_the_definition(folder, tokenizer):
    examples = triplets()
    task = make_task("embeddings")
    task.learn(examples)
    ours = from_pretrained(folder, task.head, config=task.config())
    features = task.features(examples, tokenizer, labelled=False)
    outputs = task.outputs(ours, task.collator(ours.config)(features.inputs))
    predictions = task.predictions(examples, features, outputs)
    metrics = task.metrics(examples, predictions)
    queries = {e.id: e.texts[0] for e in examples}
    corpus = {text: text for e in examples for text in e.texts[1:]}
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, {e.id: {e.texts[1]} for e in examples}, accuracy_at_k=[1], mrr_at_k=[len(corpus)],
        precision_recall_at_k=[1], ndcg_at_k=[1], map_at_k=[1],
    )  # fmt: skip
    expected = evaluator(theirs_of(ours, folder / "theirs"))
    assert metrics["accuracy@1"] == pytest.approx(expected["cosine_accuracy@1"])
    assert metrics["mrr"] == pytest.approx(expected[f"cosine_mrr@{len(corpus)}"])
    nearer = [p["similarity"] > p["similarity_to_negative"] for p in predictions]
    assert metrics["triplet_accuracy"] == np.mean(nearer)
    assert 0 < metrics["mrr"] < 1
    assert task.main_metric == "mrr"


def test_what_is_right_as_well_takes_no_rank_away():
    """An anchor with two positives, one text twice among the candidates, and an anchor that is a candidate."""
    examples = [
        SentencesExample("0", ("a", "b")),
        SentencesExample("1", ("a", "c")),
        SentencesExample("2", ("d", "b")),
        SentencesExample("3", ("b", "e")),
    ]
    angle = {"a": 0.0, "b": 0.5, "c": 0.2, "d": 0.9, "e": 1.2}  # nearest to a is c, then b, d, e
    vectors = {text: (np.cos(x), np.sin(x)) for text, x in angle.items()}
    outputs = [(np.array([vectors[text] for text in example.texts], np.float32),) for example in examples]
    task = make_task("embeddings")
    ranks = [prediction["rank"] for prediction in task.predictions(examples, None, outputs)]
    # d: e is nearer than b; b: c is nearer than e, and b itself is not asked
    assert ranks == [1, 1, 2, 2]


def test_equal_vectors_are_no_success():
    outputs = [(np.ones((2, 4), np.float32),)] * 12
    task = make_task("embeddings")
    predictions = task.predictions(pairs(), None, outputs)
    assert [prediction["rank"] for prediction in predictions] == [12] * 12


def test_scores_are_correlations_with_the_cosine():
    scores = [((7 * i) % 12) / 11 for i in range(12)]
    examples = pairs(scores)
    vectors = np.random.default_rng(0).normal(size=(12, 2, 5)).astype(np.float32)
    task = make_task("embeddings")
    task.learn(examples)
    predictions = task.predictions(examples, None, [(v,) for v in vectors])
    cosines = torch.cosine_similarity(*torch.from_numpy(vectors).unbind(1)).numpy()
    metrics = task.metrics(examples, predictions)
    assert task.loss == "cosine_similarity"
    assert task.main_metric == "spearman"
    assert metrics["spearman"] == pytest.approx(stats.spearmanr(scores, cosines).statistic)
    assert metrics["pearson"] == pytest.approx(stats.pearsonr(scores, cosines).statistic)


def train(task, examples, tokenizer, output_dir, **arguments):
    task.learn(examples)
    model = checkpoints.model(task.head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **task.config())
    settings = {"max_steps": 60, "learning_rate": 2e-3, "save_strategy": "no", "report_to": "none", "use_cpu": True,
                "disable_tqdm": True, "plot_metrics": False, "logging_steps": 10}  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(str(output_dir), **{**settings, **arguments}),
        train_dataset=task.features(examples, tokenizer, labelled=True).inputs,
        data_collator=task.collator(model.config),
    )
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("layout", [{"per_device_train_batch_size": 6}, {"max_tokens_per_batch": 120}], ids=str)
@pytest.mark.parametrize("kind", ["pairs", "triplets", "scores"])
def test_training_learns_what_it_is_shown(kind, layout, tokenizer, tmp_path):
    if kind == "scores":
        examples = [*pairs([1.0] * 12), *(
            SentencesExample(f"wrong {e.id}", (e.texts[0], e.texts[2]), 0.0) for e in triplets()
        )]  # fmt: skip
    else:
        examples = pairs() if kind == "pairs" else triplets()
    task = make_task("embeddings")
    model, logged = train(task, examples, tokenizer, tmp_path, **layout)
    features = task.features(examples, tokenizer, labelled=False)
    model.eval()
    outputs = task.outputs(model, task.collator(model.config)(features.inputs))
    metrics = task.metrics(examples, task.predictions(examples, features, outputs))
    assert metrics[task.main_metric] > (0.8 if kind == "scores" else 0.95)
    assert logged[-1] < logged[0] / 2


def test_gradients_do_not_depend_on_how_scored_pairs_are_cut(tokenizer, tmp_path):
    """One batch of 12, or 3 of 4 in one step."""
    examples = pairs([i / 11 for i in range(12)])
    whole = {"per_device_train_batch_size": 12, "max_steps": 2}
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 2}
    first, second = (
        train(make_task("embeddings"), examples, tokenizer, tmp_path, **layout, logging_steps=1)
        for layout in (whole, parts)
    )
    assert first[1] == pytest.approx(second[1], rel=1e-4)


def test_the_task_comes_back_from_its_file(tmp_path):
    task = make_task("embeddings", loss="cosent", pooling_mode="cls", scale=10.0)
    save_task(task, tmp_path)
    assert load_task(tmp_path) == task


@pytest.mark.parametrize(
    ("options", "examples", "message"),
    [
        ({}, [], "there are no examples"),
        ({}, [TextExample("7", "a", "b", "c")], "example 7 is a TextExample, expected a SentencesExample"),
        ({}, [SentencesExample("7", ("a",))], "example 7 is a single text, expected two texts or more"),
        ({}, [*pairs(), *triplets()], "example 0 has 3 texts, but the first one has 2"),
        ({}, [*pairs(), *pairs([1.0] * 12)], "example 0 has a score, but the first one has none"),
        ({}, [*pairs([1.0] * 12), *pairs()], "example 0 has no score, but the first one has one"),
        ({}, pairs([2.5] * 12), "example 0 has the score 2.5, expected from -1 to 1"),
        (
            {},
            [SentencesExample("7", ("a", "b", "c"), 0.5)],
            "'cosine_similarity' compares two texts, but example 7 has 3",
        ),
        ({"loss": "triplet"}, pairs(), "'triplet' needs a negative, but example 0 has 2 texts"),
        ({"loss": "triplet"}, pairs([1.0] * 12), "'triplet' needs no scores, but example 0 has one"),
        ({"loss": "cosent"}, pairs(), "'cosent' needs scores, but example 0 has none"),
    ],
)
def test_examples_that_do_not_fit(options, examples, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task("embeddings", **options).learn(examples)


def test_a_batch_of_examples_that_differ_is_refused(tokenizer):
    task = make_task("embeddings")
    features = [*task.features(pairs(), tokenizer, labelled=True).inputs[:2]]
    features += task.features(triplets(), tokenizer, labelled=True).inputs[:1]
    with pytest.raises(ValueError, match="feature 2 has 3 texts, not as many as those before it"):
        task.collator(checkpoints.config())(features)


def gradients(model, batch):
    """Of the loss, and the loss; dropout draws the same numbers on every call."""
    torch.manual_seed(11)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_mini_batches_change_memory_and_nothing_else(tokenizer, monkeypatch, size):
    """GradCache: no activations are kept over the whole batch, and the gradients are the same."""
    task = make_task("embeddings", mini_batch_size=size)
    task.learn(triplets())
    batch = batch_of(task, triplets(), tokenizer)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    cached = checkpoints.model("sentence_embedding", **task.config(), **quiet).double().train()
    whole = checkpoints.model("sentence_embedding", **make_task("embeddings").config(), **quiet).double().train()
    for got, expected in zip(gradients(cached, batch), gradients(whole, batch), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    # With dropout: the second pass has the masks of the first one, as one pass that keeps everything has.
    with_dropout = checkpoints.model("sentence_embedding", **task.config()).train()
    twice = gradients(with_dropout, batch)
    monkeypatch.setattr(sentence_embedding, "checkpoint", lambda function, part, **_: function(part))
    for got, expected in zip(twice, gradients(with_dropout, batch), strict=True):
        assert torch.equal(got, expected)
    assert not torch.equal(twice[1], gradients(whole.float(), batch)[1])


def test_mini_batches_keep_the_activations_of_one(tokenizer):
    """Bytes that the forward pass keeps for the backward."""
    kept = {}
    for size in (None, 2):
        task = make_task("embeddings", mini_batch_size=size)
        model = checkpoints.model("sentence_embedding", **task.config()).train()
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch_of(task, triplets(), tokenizer))
        weights = {p.data_ptr() for p in model.parameters()}
        kept[size] = sum(n for place, n in sizes.items() if place not in weights)
    assert kept[2] < kept[None] / 4


def test_impossible_ways_to_contrast(tokenizer):
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"mini_batch_size is {size}, expected a whole number of at least 1"):
            make_task("embeddings", mini_batch_size=size)
    with pytest.raises(ValueError, match="gather_across_devices is 'yes', expected true or false"):
        make_task("embeddings", gather_across_devices="yes")
    with pytest.raises(ValueError, match="gather_across_devices is for multiple_negatives_ranking, but the loss is tr"):
        make_task("embeddings", loss="triplet", gather_across_devices=True)
    model = checkpoints.model("sentence_embedding", **make_task("embeddings", mini_batch_size=2).config()).train()
    padded = {"input_ids": torch.ones(4, 6, dtype=torch.int64), "labels": torch.ones(2)}
    with pytest.raises(ValueError, match="mini_batch_size is 2, but the batch is padded"):
        model(**padded, text_ids=torch.arange(4).view(2, 2))


def test_targets_of_another_shape_are_refused(tokenizer):
    task = make_task("embeddings")
    batch = batch_of(task, pairs(), tokenizer)
    model = checkpoints.model("sentence_embedding")
    with pytest.raises(ValueError, match=r"labels has shape \(12,\) and text_ids \(8, 3\)"):
        model(**{**batch, "text_ids": torch.arange(24).view(8, 3)})


def test_a_config_with_an_unknown_setting():
    with pytest.raises(ValueError, match=r"sentence_embedding of the config has \['pooling'\]"):
        checkpoints.model("sentence_embedding", sentence_embedding={"pooling": "mean"})
