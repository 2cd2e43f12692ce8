"""Checkpoints: every form of a sound one, every way to be damaged, and saves that survive being killed."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bert_fast import modules, reference
from bert_fast.config import BertConfig
from bert_fast.folders import resolve
from bert_fast.loading import build, from_pretrained, read_state_dict
from bert_fast.saving import save_pretrained

HEADS = {name: cls.__name__ for name, cls in modules.HEADS.items() if hasattr(transformers, cls.__name__)}

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}

pytestmark = pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")


def theirs(head=None):
    """A small random model of transformers, in evaluation mode."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE, num_labels=2 if head == "question_answering" else 3)
    return getattr(transformers, HEADS[head])(config).eval()


def batch(head):
    """A padded batch for the head."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 7) if head == "multiple_choice" else (2, 7)
    input_ids = torch.randint(0, 50, shape, generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[..., 5:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def assert_same_output(ours, oracle, head):
    with torch.inference_mode():
        expected = oracle(**batch(head)).to_tuple()
        got = ours(**batch(head)).to_tuple()
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        keep = batch(head)["attention_mask"].bool() if a.shape[:2] == (2, 7) else ...
        torch.testing.assert_close(a[keep], b[keep], rtol=1e-4, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that transformers saved."""
    theirs().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite(folder, change):
    """Replace the weights of a checkpoint by `change` of them."""
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


# What is sound


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_of_transformers_gives_its_answers(tmp_path, head, recwarn):
    oracle = theirs(head)
    oracle.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, head)
    assert type(ours) is modules.HEADS[head]
    assert not ours.training
    assert_same_output(ours, oracle, head)
    assert [w for w in recwarn if "weights" in str(w.message)] == []


def test_the_demo_has_the_weights_of_its_file():
    model = from_pretrained("demo")
    state = load_file(resolve("demo") / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(state) - {"embeddings.position_ids"}
    assert all(torch.equal(parameter, state[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_files_dtype_is_kept(folder, dtype):
    rewrite(folder, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    assert {p.dtype for p in from_pretrained(folder).parameters()} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_dtype_asked_for(folder, dtype):
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in from_pretrained(folder, dtype=dtype).parameters()} == {expected}


def test_the_parameters_are_a_copy(folder):
    """A file overwritten in place must not change a model that was read from it."""
    model = from_pretrained(folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\0" * size)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


OLD_NAMES = {
    "gamma and beta": lambda s: {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in s.items()
    },
    "prefix": lambda s: {f"bert.{n}": t for n, t in s.items()},
    "position_ids": lambda s: {**s, "embeddings.position_ids": torch.arange(20)[None]},
}


@pytest.mark.parametrize("change", OLD_NAMES.values(), ids=OLD_NAMES)
def test_older_names(folder, change, recwarn):
    rewrite(folder, change)
    assert_same_output(from_pretrained(folder), theirs(), None)
    assert [w for w in recwarn if "weights" in str(w.message)] == []


def test_a_bare_encoder_under_a_head(folder):
    with pytest.warns(UserWarning, match="starts untrained: classifier.weight, classifier.bias"):
        model = from_pretrained(folder, "token_classification")
    expected = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[f"bert.{n}"], t) for n, t in expected.items() if not n.startswith("pooler."))
    assert not model.classifier.bias.any()
    assert 0 < model.classifier.weight.std() < 0.1


def test_a_fresh_head_is_whole(folder):
    with pytest.warns(UserWarning, match="starts untrained"):
        model = from_pretrained(folder, "pre_training", dtype="float64")
    assert not any(p.is_meta for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert (model.cls.predictions.transform.LayerNorm.weight == 1).all()
    assert not model.cls.predictions.bias.any()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@pytest.mark.filterwarnings("ignore:the checkpoint has no weights for this head")
def test_fields_in_place_of_the_checkpoints(folder, tmp_path, recwarn):
    labels = {0: "no", 1: "maybe", 2: "yes"}
    fields = {"id2label": labels, "hidden_dropout_prob": 0.3, "problem_type": "single_label_classification"}
    model = from_pretrained(folder, "sequence_classification", config=fields)
    assert (model.config.id2label, model.config.hidden_dropout_prob) == (labels, 0.3)
    assert model.classifier.weight.shape[0] == 3
    save_pretrained(model, tmp_path / "three")
    # As many labels keep the classifier; another number of them starts another one.
    same = from_pretrained(tmp_path / "three", "sequence_classification", config={"id2label": dict(enumerate("abc"))})
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert not [w for w in recwarn if "is left out" in str(w.message)]
    with pytest.warns(UserWarning, match="the checkpoint's classifier has 3 outputs, but 1 are wanted: it is left out"):
        other = from_pretrained(tmp_path / "three", "sequence_classification", config={"id2label": {0: "score"}})
    assert other.classifier.weight.shape[0] == 1
    assert torch.equal(other.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    with pytest.raises(ValueError, match="hidden_dropout_prob is 3, expected a probability"):
        from_pretrained(folder, config={"hidden_dropout_prob": 3})


def test_a_head_under_a_bare_encoder(tmp_path, recwarn, caplog):
    oracle = theirs("masked_lm")
    oracle.save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="bert_fast.loading"):
        model = from_pretrained(tmp_path)
    assert model.pooler is None
    assert "cls.predictions.transform.dense.weight" in caplog.text
    assert [w for w in recwarn if "weights" in str(w.message)] == []


@pytest.mark.parametrize(
    "name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias"]
)
def test_tied_weights_may_be_absent_or_there(tmp_path, name):
    oracle = theirs("masked_lm")
    oracle.save_pretrained(tmp_path)
    everything = {n: t.clone() for n, t in oracle.state_dict().items()}
    rewrite(tmp_path, lambda state: everything)
    assert_same_output(from_pretrained(tmp_path, "masked_lm"), oracle, "masked_lm")
    del everything[name]
    rewrite(tmp_path, lambda state: everything)
    assert_same_output(from_pretrained(tmp_path, "masked_lm"), oracle, "masked_lm")


def test_shards(folder):
    expected = load_file(folder / "model.safetensors")
    oracle = theirs()
    shutil.rmtree(folder)
    oracle.save_pretrained(folder, max_shard_size="4KB")
    assert not (folder / "model.safetensors").exists()
    state = read_state_dict(folder)
    assert state.keys() == expected.keys()
    assert_same_output(from_pretrained(folder), oracle, None)


def test_pickles_are_read_only_on_request(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="allow_pickle=True"):
        from_pretrained(folder)
    assert_same_output(from_pretrained(folder, allow_pickle=True), theirs(), None)


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_a_pickle_cannot_run_code(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"a": Malice()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a file of weights"):
        from_pretrained(folder, allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(), protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a file of weights"):
        from_pretrained(folder, allow_pickle=True)
    assert not (folder / "pwned").exists()


# What is not


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


DAMAGED = {
    "empty": b"",
    "shorter than its length field": b"\x01\x02",
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "header longer than any file": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": struct.pack("<Q", 8) + b"not json",
    "not an object": struct.pack("<Q", 8) + b"[1,2,3] ",
    "no data": header(a=tensor(0, 8)),
    "truncated data": header(a=tensor(0, 8)) + b"\0" * 5,
    "more data than tensors": header(a=tensor(0, 8)) + b"\0" * 12,
    "overlapping": header(a=tensor(0, 8), b=tensor(4, 12)) + b"\0" * 12,
    "a hole": header(a=tensor(0, 4), b=tensor(8, 12)) + b"\0" * 12,
    "backwards": header(a=tensor(8, 0, shape=[2])) + b"\0" * 8,
    "shape and size differ": header(a=tensor(0, 8, shape=[3])) + b"\0" * 8,
    "an unknown dtype": header(a=tensor(0, 8, dtype="X32")) + b"\0" * 8,
    "a huge shape": header(a=tensor(0, 8, shape=[2**40, 2**40])) + b"\0" * 8,
    "invalid UTF-8": struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not a sound safetensors file: "):
        from_pretrained(folder)


def test_a_file_cut_anywhere(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for size in [*range(0, 40), len(whole) // 2, len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is not a sound"):
            from_pretrained(folder)


def without(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def changed(name, change):
    return lambda state: {**state, name: change(state[name])}


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(QUERY), rf"lacks 1 weights of BertModel: {QUERY}"),
        (without("embeddings.LayerNorm.bias"), r"lacks 1 weights of BertModel: embeddings.LayerNorm.bias"),
        (lambda state: {}, r"lacks 37 weights of BertModel: embeddings.*and 25 more"),
        (changed(QUERY, lambda t: t[:8].clone()), rf"{QUERY} has shape \(8, 16\), expected \(16, 16\)"),
        (changed(QUERY, lambda t: t.to(torch.int32)), rf"{QUERY} is int32, expected one of float32, bfloat16"),
        (changed(QUERY, lambda t: t.to(torch.float8_e4m3fn)), rf"{QUERY} is float8_e4m3fn, expected one of"),
        (changed(QUERY, lambda t: t.to(torch.float16)), rf"mixes dtypes .*{QUERY} is float16.*pass dtype="),
    ],
)
def test_weights_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_mixed_dtypes_are_converted_on_request(folder):
    rewrite(folder, changed(QUERY, lambda t: t.to(torch.float16)))
    assert {p.dtype for p in from_pretrained(folder, dtype="float32").parameters()} == {torch.float32}


def test_unknown_weights_are_listed(folder):
    rewrite(folder, lambda state: {**state, "encoder.layer.2.surprise": torch.ones(1)})
    with pytest.warns(UserWarning, match="no place for these weights of the checkpoint: encoder.layer.2.surprise"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index"),
        ("[]", "is not an index"),
        ('{"weight_map": 3}', "is not an index"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "expected one in its own folder"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors is not a sound"),
        ('{"weight_map": {"a": "shard.safetensors"}}', "files do not hold: a"),
    ],
)
def test_bad_indexes(folder, index, message):
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_bad_arguments(folder, tmp_path):
    with pytest.raises(
        ValueError, match="head is 'masked', expected None or, for bert, one of masked_lm, next_sentence"
    ):
        from_pretrained(folder, "masked")
    with pytest.raises(ValueError, match="dtype is int8, expected one of float32"):
        from_pretrained(folder, dtype="int8")
    with pytest.raises(ValueError, match="there is no folder"):
        from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a file, expected the folder"):
        from_pretrained(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no"):
        from_pretrained(folder)


def run_python(code, **environment):
    """Run code in a new process; returns its output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_hub_cache_is_enough_offline(folder, tmp_path):
    snapshot = tmp_path / "home" / "hub" / "models--someone--small-bert" / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    out = run_python(
        """
        from bert_fast.folders import resolve
        print(resolve("someone/small-bert"))
        for model in ("someone/other-bert", "not a/valid id"):
            try:
                resolve(model)
            except ValueError as error:
                print(error)
        """,
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_OFFLINE="1",
    )
    found, absent, invalid = out.splitlines()
    assert found == str(snapshot)
    assert absent.startswith("someone/other-bert: it is neither a folder nor in the Hub cache, and it cannot be")
    assert invalid.startswith("not a/valid id: ")


# Saving


@pytest.mark.parametrize("head", HEADS)
def test_transformers_reads_what_is_saved(tmp_path, head):
    oracle = theirs(head)
    oracle.save_pretrained(tmp_path / "theirs")
    save_pretrained(from_pretrained(tmp_path / "theirs", head), tmp_path / "deep" / "ours")
    loaded = getattr(transformers, HEADS[head]).from_pretrained(tmp_path / "deep" / "ours").eval()
    expected = oracle.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    with torch.inference_mode():  # the last bits of a product depend on where the weights lie in memory
        for a, b in zip(loaded(**batch(head)).to_tuple(), oracle(**batch(head)).to_tuple(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    if head is None:
        assert type(transformers.AutoModel.from_pretrained(tmp_path / "deep" / "ours")) is transformers.BertModel
    assert_same_output(from_pretrained(tmp_path / "deep" / "ours", head), oracle, head)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["ours"]


def test_tied_weights_are_saved_once(tmp_path):
    model = build(modules.BertForMaskedLM, BertConfig(**SHAPE), theirs("masked_lm").state_dict())
    save_pretrained(model, tmp_path / "a")
    saved = load_file(tmp_path / "a" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in model.parameters())


def test_a_save_keeps_other_files_and_replaces_old_weights(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "vocab.txt").write_text("mine")
    for stale in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (folder / stale).write_text("old")
    model = from_pretrained(folder, dtype="bfloat16")
    save_pretrained(model, folder)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names == {"config.json", "model.safetensors", "vocab.txt", "1_Pooling", "1_Pooling/config.json"}
    assert (folder / "vocab.txt").read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_save_through_a_link_and_onto_a_file(folder, tmp_path):
    model = from_pretrained(folder)
    (tmp_path / "link").symlink_to(folder)
    save_pretrained(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    from_pretrained(tmp_path / "link")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        save_pretrained(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_save_into_the_working_folder_leaves_the_process_in_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "dangling").symlink_to("nowhere")
    model = from_pretrained(".")
    with torch.no_grad():
        model.embeddings.LayerNorm.bias += 1
    save_pretrained(model, ".")
    assert os.path.samefile(".", folder)
    assert os.readlink("dangling") == "nowhere"
    assert torch.equal(from_pretrained(".").embeddings.LayerNorm.bias, model.embeddings.LayerNorm.bias)


def test_a_save_that_fails_leaves_the_old_folder(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = from_pretrained(folder)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_file_system_that_cannot_exchange_folders(folder, monkeypatch):
    def refuse(first, second):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("bert_fast.saving._exchange", refuse)
    (folder / "vocab.txt").write_text("mine")
    model = from_pretrained(folder, dtype="float64")
    save_pretrained(model, folder)
    assert {p.dtype for p in from_pretrained(folder).parameters()} == {torch.float64}
    assert (folder / "vocab.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("exists", [True, False], ids=["over a folder", "where nothing was"])
def test_a_killed_save_leaves_the_old_folder_or_the_new_one(tmp_path, exists):
    """A child is killed at every event of the file system in turn, until one save comes through."""
    out = run_python(
        f"""
        import os, shutil, signal, sys
        from pathlib import Path
        import safetensors.torch
        import torch
        from bert_fast import modules
        from bert_fast.config import BertConfig
        from bert_fast.loading import from_pretrained
        from bert_fast.saving import save_pretrained

        old, new = (modules.BertModel(BertConfig(**{SHAPE!r})) for _ in range(2))
        torch.set_num_threads(1)
        root = Path({str(tmp_path)!r})
        folder = root / "checkpoint"

        def same(model, other):
            return all(map(torch.equal, model.parameters(), other.parameters()))

        for survived in range(1000):
            shutil.rmtree(root)
            root.mkdir()
            if {exists}:
                save_pretrained(old, folder)
                (folder / "vocab.txt").write_text("mine")
            child = os.fork()
            if child == 0:
                count = 0
                def hook(event, args):
                    global count
                    if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")):
                        count += 1
                        if count == survived + 1:
                            os.kill(os.getpid(), signal.SIGKILL)
                sys.addaudithook(hook)
                save_pretrained(new, folder)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if folder.exists():
                found = from_pretrained(folder)
                assert same(found, new) or ({exists} and same(found, old)), survived
                assert not {exists} or (folder / "vocab.txt").read_text() == "mine", survived
                print("new" if same(found, new) else "old")
            else:
                assert not {exists}, survived
                print("none")
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        else:
            raise AssertionError("no save came through")
        """
    )
    states = out.split()
    before = "old" if exists else "none"
    assert states[0] == before
    assert states[-1] == "new"
    assert states == sorted(states, key=[before, "new"].index), "once the new folder is there, it stays"
    assert states.count(before) > 8, "the child was killed while the folder was being built"
    assert states.count("new") > 1, "and after it was put in place"


def test_the_plain_definition_loads_and_saves_too(folder, tmp_path):
    state = read_state_dict(folder)
    plain = build(reference.BertModel, BertConfig.from_json_file(folder / "config.json"), state, dtype="float64")
    assert_same_output(plain, theirs().double(), None)
    save_pretrained(plain, tmp_path / "again")
    assert_same_output(from_pretrained(tmp_path / "again", dtype="float32"), theirs(), None)
