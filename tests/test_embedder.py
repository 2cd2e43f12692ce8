"""Sentence vectors against SentenceTransformer itself."""

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from bert_fast.embedder import Embedder, TruncationWarning
from bert_fast.folders import resolve
from bert_fast.sentence_folder import Recipe
from bert_fast.verify import shipped_sentences

pytestmark = pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")

SENTENCES = [*shipped_sentences()[::12], "", "   ", "\x00", "naïve 東京 😀", "\ud83d\ude00"]


@pytest.fixture(scope="module")
def demo():
    return Embedder("demo", device="cpu")


@pytest.fixture(scope="module")
def oracle():
    return SentenceTransformer(str(resolve("demo")), device="cpu")


@pytest.fixture
def folder(tmp_path):
    """A small random sentence-transformers folder, without pooling."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**shape, max_position_embeddings=40)).save_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("demo") / name, tmp_path)
    return tmp_path


def describe(folder, pooling=None, types=("models.Transformer", "models.Pooling"), **settings):
    """Write the files that make a folder sentence-transformers'."""
    paths = ["", "1_Pooling", "2_Normalize", "3_Other"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.{t}"} for i, t in enumerate(types)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 16, **(pooling or {"pooling_mode": "mean"})}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))


def assert_close(ours, theirs):
    assert type(ours) is type(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 7},
        {"batch_size": 1000},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False, "convert_to_tensor": True},
        {"truncate_dim": 100},
        {"truncate_dim": 100, "normalize_embeddings": True},
        {"prompt": "query: "},
        {"precision": "float32", "show_progress_bar": False},
    ],
    ids=str,
)
def test_the_answers_of_sentence_transformers(demo, oracle, options):
    texts = SENTENCES[:-1]  # its tokenizer refuses surrogates
    assert_close(demo.encode(texts, **options), oracle.encode(texts, **options))


def test_one_text_and_lists_of_tensors(demo, oracle):
    text = SENTENCES[0]
    assert_close(demo.encode(text), oracle.encode(text))
    assert_close(demo.encode(text, convert_to_tensor=True), oracle.encode(text, convert_to_tensor=True))
    assert_close(demo.encode(text, convert_to_numpy=False), oracle.encode(text, convert_to_numpy=False))
    ours, theirs = demo.encode(SENTENCES[:3], convert_to_numpy=False), oracle.encode(SENTENCES[:3], convert_to_numpy=0)
    assert type(ours) is type(theirs) is list
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_any_iterable(demo):
    expected = demo.encode(SENTENCES)
    assert np.array_equal(demo.encode(text for text in SENTENCES), expected)
    assert np.array_equal(demo.encode(tuple(SENTENCES)), expected)
    assert np.array_equal(demo.encode(np.array(SENTENCES, dtype=object)), expected)


def test_nothing_to_encode(demo):
    assert demo.encode([]).shape == demo.encode(iter([])).shape == (0, 384)
    assert demo.encode([]).dtype == np.float32
    assert demo.encode([], truncate_dim=10).shape == (0, 10)
    assert demo.encode([], convert_to_tensor=True).shape == (0, 384)
    assert demo.encode([], convert_to_numpy=False) == []


def test_long_texts_are_cut_and_counted_once(demo, oracle):
    texts = ["short", "word " * 1000, "x y z " * 500, "short"]
    with pytest.warns(TruncationWarning) as caught:
        ours = demo.encode(texts, batch_size=1)
    assert [str(w.message) for w in caught] == ["2 of 4 texts have more than 256 tokens and were cut"]
    assert_close(ours, oracle.encode(texts))


def test_the_folder_may_allow_more_tokens_than_the_tokenizer(folder):
    describe(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 8}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 30}))
    text = "one two three four five six seven eight nine ten eleven twelve"
    assert_close(Embedder(folder).encode(text), SentenceTransformer(str(folder), device="cpu").encode(text))


def test_max_seq_length(folder):
    assert Embedder("demo").max_seq_length == 256
    assert Embedder("demo", max_seq_length=10).max_seq_length == 10
    describe(folder)
    assert Embedder(folder).max_seq_length == 40
    for written, used in ((12, 12), (512, 40)):
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": written}))
        embedder = Embedder(folder)
        assert embedder.max_seq_length == used
        with pytest.warns(TruncationWarning, match=f"more than {used} tokens"):
            embedder.encode(["word " * 600])
    for length in (2, 0, -1, 41):
        with pytest.raises(ValueError, match=f"max_seq_length is {length}, expected from 3 to 40"):
            Embedder(folder, max_seq_length=length)


@pytest.mark.parametrize(
    ("pooling", "modes"),
    [
        ({"pooling_mode": "mean"}, 1),
        ({"pooling_mode": "cls"}, 1),
        ({"pooling_mode": "max"}, 1),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, 1),
        ({"pooling_mode": "weightedmean"}, 1),
        ({"pooling_mode": ["mean", "cls", "max"]}, 3),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, 1),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, 3),
        ({"pooling_mode_mean_tokens": False}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.filterwarnings("ignore::bert_fast.embedder.TruncationWarning")
def test_pooling(folder, pooling, modes, normalize):
    types = ("models.Transformer", "models.Pooling", "models.Normalize")
    describe(folder, pooling, types if normalize else types[:2])
    embedder = Embedder(folder)
    assert embedder.dimension == 16 * modes
    assert_close(embedder.encode(SENTENCES[:-1]), SentenceTransformer(str(folder), device="cpu").encode(SENTENCES[:-1]))


@pytest.mark.filterwarnings("ignore::bert_fast.embedder.TruncationWarning")
def test_a_plain_checkpoint_is_its_mean(folder):
    assert Recipe.read(folder) == Recipe(transformer=folder, pooling_modes=("mean",), normalize=False)
    ours = Embedder(folder).encode(SENTENCES[:-1])
    assert_close(ours, SentenceTransformer(str(folder), device="cpu").encode(SENTENCES[:-1]))


def test_what_sentence_transformers_writes_is_read(folder, tmp_path):
    oracle = SentenceTransformer(str(folder), device="cpu", prompts={"query": "find: "})
    oracle.save_pretrained(str(tmp_path / "written"))
    embedder = Embedder(tmp_path / "written")
    assert_close(embedder.encode(SENTENCES[:4], prompt_name="query"), oracle.encode(SENTENCES[:4], prompt_name="query"))


def test_prompts(folder):
    describe(folder, prompts={"query": "find this: ", "document": ""}, default_prompt_name="query")
    embedder, oracle = Embedder(folder), SentenceTransformer(str(folder), device="cpu")
    for options in ({}, {"prompt_name": "document"}, {"prompt_name": "query"}, {"prompt": "x"}, {"prompt": ""}):
        assert_close(embedder.encode(SENTENCES[:4], **options), oracle.encode(SENTENCES[:4], **options))
    assert np.abs(embedder.encode(SENTENCES[0]) - embedder.encode(SENTENCES[0], prompt="")).max() > 1e-3
    with pytest.raises(ValueError, match="prompt_name is 'passage', expected one of query, document"):
        embedder.encode("a", prompt_name="passage")


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "mean_sqrt_len_tokens"])
def test_prompts_that_are_not_pooled(folder, mode):
    describe(folder, {"pooling_mode": mode, "include_prompt": False})
    embedder, oracle = Embedder(folder), SentenceTransformer(str(folder), device="cpu")
    for prompt in ("", "represent this sentence: "):
        assert_close(embedder.encode(SENTENCES[:6], prompt=prompt), oracle.encode(SENTENCES[:6], prompt=prompt))


def test_do_lower_case(folder):
    describe(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    embedder = Embedder(folder)
    assert np.array_equal(embedder.encode("LOUD Words"), embedder.encode("loud words"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: describe(f, types=("models.Transformer", "models.Pooling", "models.Dense")),
            r"Dense.*known.*Normalize",
        ),
        (lambda f: describe(f, types=("models.Transformer",)), "has the modules Transformer; expected"),
        (lambda f: describe(f, types=("models.Pooling", "models.Transformer")), "has the modules Pooling, Transformer"),
        (lambda f: describe(f, {"pooling_mode": "lasttoken"}), "pooling 'lasttoken', expected one of cls, mean"),
        (lambda f: describe(f, {"pooling_mode": "weightedmean", "include_prompt": False}), "weightedmean"),
        (lambda f: (f / "modules.json").write_text("{}"), "has the modules"),
        (lambda f: (f / "modules.json").write_text("[1]"), "is not a list of modules"),
        (lambda f: (f / "modules.json").write_text("["), "is not a list of modules"),
        (lambda f: (describe(f), (f / "1_Pooling" / "config.json").write_text("[]")), "holds a list"),
    ],
)
def test_folders_it_does_not_understand(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        Embedder(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 3}, "encode does not take batchsize; it takes sentences, prompt_name.*truncate_dim"),
        ({"precision": "int8"}, "precision is 'int8', expected 'float32'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
        ({"truncate_dim": 385}, "truncate_dim is 385, expected from 1 to 384"),
        ({"prompt_name": "query"}, "prompt_name is 'query'"),
    ],
)
def test_bad_arguments(demo, options, message):
    with pytest.raises(ValueError, match=message):
        demo.encode(["a"], **options)


@pytest.mark.parametrize(
    "sentences", [None, 5, np.array("one")], ids=["None", "a number", "an array without a dimension"]
)
def test_what_holds_no_texts(demo, sentences):
    with pytest.raises(ValueError, match=f"sentences is a {type(sentences).__name__}, expected a str or an iterable"):
        demo.encode(sentences)


def test_what_is_not_a_text(demo):
    with pytest.raises(ValueError, match=r"sentences\[33\] is a int, expected a str"):
        demo.encode([*["a"] * 33, 7], batch_size=32)


def mixed_texts(count):
    """Texts of 0 to 30 words, no two alike, in no order."""
    rng = np.random.default_rng(0)
    return [" ".join([str(i), *["word"] * length]) for i, length in enumerate(rng.integers(0, 30, count))]


def test_rows_are_in_the_callers_order_over_many_chunks_and_batches(folder):
    embedder, texts = Embedder(folder, device="cpu"), mixed_texts(3000)
    expected = np.concatenate([embedder.embed(embedder.tokenizer([text], 40)).numpy() for text in texts])
    for options in ({}, {"batch_size": 1}, {"batch_size": 17}):
        np.testing.assert_allclose(embedder.encode(texts, **options), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(iter(texts)), expected, rtol=1e-5, atol=1e-5)


def test_runs_are_planned_by_tokens(folder, monkeypatch):
    embedder, texts = Embedder(folder, device="cpu"), mixed_texts(1000)
    runs, tokenized = [], []
    embed, tokenizer = embedder.embed, embedder.tokenizer
    monkeypatch.setattr(embedder, "embed", lambda tokens, *rest: runs.append(tokens) or embed(tokens, *rest))
    monkeypatch.setattr(embedder, "tokenizer", lambda texts, *rest: tokenized.append(texts) or tokenizer(texts, *rest))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    embedder.encode(texts)
    assert [len(chunk) for chunk in tokenized] == [64, 256, 680]
    lengths = [tokenizer(chunk, 40).lengths for chunk in tokenized]
    assert len(runs) == sum(-(-int(chunk.sum()) // 4096) for chunk in lengths)
    assert all((np.diff(run.lengths) <= 0).all() for run in runs[-2:]), "longest first"
    for batch_size, limit in ((1000, 4096), (32, 4096), (8, 1024), (1, 128)):
        runs.clear()
        embedder.encode(texts, batch_size=batch_size)
        assert limit / 2 < max(run.lengths.sum() for run in runs) < limit + 40
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100)
    runs.clear()
    embedder.encode(texts)
    assert len(runs) == 3, "many threads need many tokens"


def test_a_stream_comes_in_order_and_reads_no_more_than_two_pieces_ahead(folder):
    embedder, texts, read, done = Embedder(folder, device="cpu"), mixed_texts(3000), [], []
    given = (read.append(text) or text for text in texts)
    options, pieces = {"truncate_dim": 8, "normalize_embeddings": True}, []
    for tokens, vectors in embedder.encode_stream(given, progress=done.append, **options):
        pieces.append(vectors.numpy())
        assert len(tokens.lengths) == len(vectors)
        assert sum(done) == sum(map(len, pieces))
        assert len(read) <= sum(done) + 5 * len(vectors)
    assert [len(piece) for piece in pieces] == [64, 256, 1024, 1656]
    assert np.array_equal(np.concatenate(pieces), embedder.encode(texts, **options))


@pytest.mark.parametrize("sentences", ["one text", None], ids=str)
def test_a_stream_takes_only_iterables_of_texts(demo, sentences):
    with pytest.raises(ValueError, match=r"sentences is a .*, expected a str or an iterable"):
        demo.encode_stream(sentences)


def fails_after(texts, error):
    yield from texts
    raise error


@pytest.mark.parametrize("error", [RuntimeError("the source broke"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("count", [10, 64, 330, 2000])
def test_an_error_of_the_source_ends_encode(folder, error, count):
    with pytest.raises(type(error)):
        Embedder(folder, device="cpu").encode(fails_after(mixed_texts(count), error))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bert_fast")]


def test_what_is_not_a_text_is_found_before_the_chunk_before_it_is_run(folder):
    embedder, done = Embedder(folder, device="cpu"), []
    with pytest.raises(ValueError, match=r"sentences\[330\] is a NoneType"):
        list(embedder.encode_stream([*mixed_texts(330), None], progress=done.append))
    assert sum(done) == 64


def test_an_interrupt_in_the_middle_leaves_no_thread(folder):
    embedder, done = Embedder(folder, device="cpu"), []

    def interrupt(count):
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(embedder.encode_stream(iter(mixed_texts(9000)), progress=interrupt))
    stream = embedder.encode_stream(iter(mixed_texts(9000)))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bert_fast")]


def test_threads_over_many_chunks(folder):
    embedder, texts = Embedder(folder, device="cpu"), mixed_texts(1000)
    expected = embedder.encode(texts)
    with ThreadPoolExecutor(6) as pool:
        for vectors in pool.map(lambda _: embedder.encode(texts), range(12)):
            assert np.array_equal(vectors, expected)


MEMORY = """
import resource, sys
from bert_fast import Embedder
embedder, how = Embedder(sys.argv[1], device="cpu"), sys.argv[2]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def texts(count):
    for i in range(count):
        if i == 15_000:
            peaks.append(peak())
        yield f"{i} " + "word " * 25
peaks = []
if how == "stream":
    size = sum(len(vectors) for _, vectors in embedder.encode_stream(texts(60_000))) * 0
else:
    size = embedder.encode(texts(60_000)).nbytes
print(peak() - peaks[0] - size)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is of POSIX")
@pytest.mark.parametrize("how", ["stream", "array"])
def test_memory_does_not_grow_with_the_number_of_texts(folder, how):
    """Tokens and texts of 45,000 more texts would be 25 MB and more."""
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12e6


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "int8"])
def test_precision(folder, precision):
    assert Embedder(folder, precision=precision).precision == precision


def test_an_unknown_precision(folder):
    with pytest.raises(ValueError, match="precision is 'fp8', expected one of fp32, bf16, int8"):
        Embedder(folder, precision="fp8")


def test_similarity(demo, oracle):
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    torch.testing.assert_close(demo.similarity(a, b), oracle.similarity(a, b))
    torch.testing.assert_close(demo.similarity(a.numpy()[0], b.numpy()), oracle.similarity(a[0], b))


def test_threads(demo):
    expected = [demo.encode(SENTENCES[i : i + 3]) for i in range(0, 24, 3)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: demo.encode(SENTENCES[i : i + 3]), list(range(0, 24, 3)) * 3))
    assert all(np.array_equal(a, b) for a, b in zip(results, expected * 3, strict=True))


def test_bfloat16(demo):
    vectors = Embedder("demo", dtype="bfloat16").encode(SENTENCES)
    assert vectors.dtype == np.float32
    assert ((vectors * demo.encode(SENTENCES)).sum(1) > 0.999).all()


def test_the_progress_bar_is_for_terminals(demo, capsys):
    demo.encode(SENTENCES, batch_size=8)
    assert capsys.readouterr().err == ""
    demo.encode(SENTENCES, batch_size=8, show_progress_bar=True)
    assert f"{len(SENTENCES)}/{len(SENTENCES)}" in capsys.readouterr().err
