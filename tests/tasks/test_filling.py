"""Words for masks against transformers' own pipeline, and text from them."""

import re

import numpy as np
import pytest
import torch
import transformers
import word_checkpoints as checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.tasks.filling import MaskFiller
from bert_fast.tasks.generation import METHODS, generate

pytestmark = pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")

ONE = ["the [MASK] sleeps by the stove", "rain [MASK] all night", "[MASK]"]
SEVERAL = ["the [MASK] leaves at [MASK]", "[MASK] [MASK] [MASK]"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("masked")
    checkpoints.save(place, "masked_lm")
    return place


@pytest.fixture(scope="module")
def filler(folder):
    return MaskFiller(folder, device="cpu")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that has learnt the sentences of the tests by heart."""
    place = tmp_path_factory.mktemp("taught")
    checkpoints.save(place, None)
    model = checkpoints.model("masked_lm", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    tokens = checkpoints.Tokenizer.from_pretrained(place)
    batch = tokens(checkpoints.SENTENCES).to_ragged()
    generator = torch.Generator().manual_seed(0)
    inside = batch.input_ids > 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(220):
        share = 0.15 + 0.5 * (step % 3) / 2
        hidden = inside & (torch.rand(inside.shape, generator=generator) < share)
        loss = model(
            batch.input_ids.masked_fill(hidden, 4)[None],
            cu_seq_lens_q=batch.cu_seqlens,
            labels=batch.input_ids.masked_fill(~hidden, -100)[None],
            loss_only=True,
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(place)
    return place


def pipeline(folder, top_k):
    return transformers.pipeline("fill-mask", model=str(folder), device="cpu", top_k=top_k)


def test_words_and_scores_are_those_of_transformers(folder, filler):
    for text, filled, expected in zip(ONE, filler.fill(ONE, 7), pipeline(folder, 7)(ONE), strict=True):
        (ways,) = filled.masks
        assert [way.tokens[0] for way in ways] == [way["token_str"].replace(" ", "") for way in expected], text
        np.testing.assert_allclose([way.score for way in ways], [way["score"] for way in expected], rtol=1e-4)
        assert [way.text for way in ways] == [way["sequence"] for way in expected]
        assert filled.together == ()


def test_several_masks_are_those_of_transformers(folder, filler):
    theirs = pipeline(folder, 4)
    for text, filled in zip(SEVERAL, filler.fill(SEVERAL, 4), strict=True):
        expected = theirs(text)
        assert len(filled.masks) == len(expected) == text.count("[MASK]")
        for ways, mask in zip(filled.masks, expected, strict=True):
            assert [way.tokens[0] for way in ways] == [way["token_str"].replace(" ", "") for way in mask]
            np.testing.assert_allclose([way.score for way in ways], [way["score"] for way in mask], rtol=1e-4)


def test_filling_together_is_a_product_of_what_each_word_has_after_those_before(filler):
    (filled,) = filler.fill([SEVERAL[0]], 3)
    for way in filled.together:
        text, product = SEVERAL[0], 1.0
        for token in way.tokens:
            (each,) = filler.fill([text], len(checkpoints.VOCAB))
            product *= {w.tokens[0]: w.score for w in each.masks[0]}[token]
            text = text.replace("[MASK]", token, 1)
        assert way.score == pytest.approx(product, rel=1e-4)
        assert way.text == text
    scores = [way.score for way in filled.together]
    assert scores == sorted(scores, reverse=True)


def test_many_texts_are_run_in_batches_and_come_in_order(filler):
    words = checkpoints.WORDS
    texts = [" ".join(words[i % 9 : i % 9 + i % 30]) + " [MASK]" for i in range(400)]
    together = filler.fill(texts, 1)
    for index in range(0, 400, 57):
        (alone,) = filler.fill([texts[index]], 1)
        assert alone.masks[0][0].tokens == together[index].masks[0][0].tokens
        assert alone.masks[0][0].score == pytest.approx(together[index].masks[0][0].score, rel=1e-4)


def test_a_model_that_knows_the_text_fills_it(taught):
    filler = MaskFiller(taught, device="cpu")
    texts = ["a cat [MASK] by the stove", "the [MASK] stopped at [MASK]"]
    one, two = filler.fill(texts, 3)
    assert one.masks[0][0].text == "a cat sleeps by the stove"
    assert two.together[0].tokens == ("clock", "ten")
    for method in METHODS:
        assert generate(filler, "the ferry leaves", 2, method=method, temperature=0) == ["the ferry leaves at dawn"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_writes_the_same_and_samples_are_their_own(filler, method):
    def write(num_samples, seed):
        return generate(filler, "the cat", 9, method=method, num_samples=num_samples, seed=seed)

    three = write(3, 5)
    assert three == write(3, 5)
    assert three == [write(1, seed)[0] for seed in (5, 6, 7)]
    assert len(set(three)) == 3


@settings(deadline=None, max_examples=30)
@given(
    method=st.sampled_from(list(METHODS)),
    length=st.integers(1, 12),
    top_k=st.none() | st.integers(1, 200),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 50.0]),
    seed=st.integers(0, 9),
)
def test_what_is_written_are_so_many_words(filler, method, length, top_k, temperature, seed):
    (text,) = generate(
        filler, "a cat", length, method=method, top_k=top_k, temperature=temperature, suffix="the stove", seed=seed,
        steps=None if method == "left_to_right" else 2,
    )  # fmt: skip
    ids = filler.encode([text])[0][1:-1]
    assert text.startswith("a cat")
    assert text.endswith("the stove")
    assert not set(ids.tolist()) & set(filler.special_token_ids)
    pieces = text.replace("s the stove", " the stove")  # "##s" was attached
    assert len(text.split()) <= 4 + length
    assert pieces


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, 6)])
@pytest.mark.parametrize("method", METHODS)
def test_words_are_drawn_as_often_as_they_are_probable(filler, method, temperature, top_k):
    """Of a text with one mask every method draws from the same distribution, which the model gives."""
    (filled,) = filler.fill(["the cat [MASK]"], len(checkpoints.VOCAB))
    words = {way.text: way.score ** (1 / temperature) for way in filled.masks[0] if way.tokens[0][0] != "["}
    kept = sorted(words, key=words.get, reverse=True)[:top_k]
    total, drawn = sum(words[text] for text in kept), 1500
    texts = generate(filler, "the cat", 1, method=method, temperature=temperature, top_k=top_k, num_samples=drawn)
    assert set(texts) <= set(kept)
    expected = {text: words[text] / total for text in kept}
    distance = sum(abs(texts.count(text) / drawn - probability) for text, probability in expected.items()) / 2
    # the mean of the distance of that many draws, by the half-normal distribution, and half as much again
    chance = sum((p * (1 - p) / drawn / (2 * np.pi)) ** 0.5 for p in expected.values())
    assert distance < 1.5 * chance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "beam"}, "method is 'beam', expected one of gibbs, mask_predict, left_to_right"),
        ({"method": "left_to_right", "steps": 3}, "steps is 3, but left_to_right takes none"),
        ({"length": 0}, "length is 0, expected at least 1"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0, expected at least 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected at least 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"length": 46}, "prompt, 46 tokens and suffix are 49, more than the 48 that the model reads"),
        ({"suffix": "[MASK]"}, "a [MASK] is in the prompt or the suffix"),
    ],
)
def test_impossible_arguments(filler, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(filler, **{"prompt": "cat", "length": 3, **options})


def test_texts_that_cannot_be_filled(filler):
    with pytest.raises(ValueError, match=re.escape("text 1 has no [MASK]: 'the cat'")):
        filler.fill(["[MASK]", "the cat"])
    with pytest.raises(ValueError, match="text 0 has more than the 48 tokens that the model reads"):
        filler.fill(["[MASK] " * 60])
    with pytest.raises(ValueError, match="top_k is 0"):
        filler.fill(ONE, 0)
    assert filler.fill([]) == []
    assert len(filler.fill(ONE[:1], 10**6)[0].masks[0]) == len(checkpoints.VOCAB)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_commands(taught):
    done = run("fill", taught, "a cat [MASK] by the stove", "the [MASK] stopped at [MASK]", "-k", 2)
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout.split("\n\n")
    assert re.match(r"a cat \[MASK\] by the stove\n +0\.\d{4}  sleeps +a cat sleeps by the stove\n", first)
    assert [line.strip() for line in second.splitlines() if "0." not in line][1:] == ["mask 1", "mask 2", "together"]
    done = run(
        "generate",
        taught,
        "--prompt",
        "the ferry leaves",
        "--length",
        2,
        "--temperature",
        0,
        "--method",
        "mask-predict",
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "the ferry leaves at dawn\n"


def test_a_checkpoint_without_the_head_is_refused():
    done = run("fill", "demo", "a [MASK]")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "bert-fast: demo has no masked-language-model head (no weights cls.predictions.transform or "
    )
    assert done.stderr.count("\n") == 1
