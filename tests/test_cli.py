"""The command, as a process where that matters: output, exit codes, one clear line for bad input."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bert_fast import benchmarking, timing, verify
from bert_fast.cli import app
from bert_fast.cli._app import PANELS
from bert_fast.embedder import Embedder

pytestmark = pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")

SENTENCES = str(Path(verify.__file__).parent / "data" / "sentences.txt")
COMMAND = [sys.executable, "-c", "from bert_fast.cli import app; app(prog_name='bert-fast')"]


def run(*args, input=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], input=input)


def assert_refused(result, message):
    """Exit code 2, one line on stderr, no traceback, nothing on stdout."""
    assert result.exit_code == 2, result.output
    line = result.stderr.removeprefix("bert-fast: ")
    assert line != result.stderr
    assert line.count("\n") == 1
    assert message in line
    assert result.stdout == ""


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("first text\n\nthe third, 東京\n", encoding="utf-8")
    return path


def test_help_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['--help']\ntry:\n    from bert_fast.cli import app; app()\n"
    code += "finally:\n    print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False False\n")


@pytest.mark.parametrize(
    "command", ["finetune", "pretrain", "distill", "search-hparams", "vocab train", "data pretrain"]
)
def test_help_has_the_names_of_options_in_full(command, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    shown = run(*command.split(), "--help").stdout
    assert "…" not in shown
    words = set(shown.split())
    found = app_command(command)
    assert {name for option in found.params for name in option.opts if name.startswith("--")} <= words


def app_command(command):
    """The click command behind words such as `vocab train`."""
    found = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    return found


def test_version():
    from bert_fast import __version__

    assert run("--version").stdout == f"bert-fast {__version__}\n"


def test_embed(texts, tmp_path):
    result = run("embed", "demo", "--input", texts, "--output", tmp_path / "v.npy")
    assert result.exit_code == 0, result.output
    vectors = np.load(tmp_path / "v.npy")
    expected = Embedder("demo").encode(["first text", "", "the third, 東京"])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert "3 vectors of 384 float32" in result.stdout
    assert "tokens/s; no text has more than 256" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt", "v.npy"]


def test_embed_from_stdin_json_lines_and_windows_lines(tmp_path):
    expected = Embedder("demo").encode(["one", "two"])
    cases = [
        ("-", [], "one\ntwo", "plain"),
        ("-", [], "\ufeffone\r\ntwo\r\n", "windows"),
        ("-", ["--text-field", "body"], '{"body": "one"}\n{"id": 3, "body": "two"}\n', "json"),
    ]
    for source, options, content, name in cases:
        output = tmp_path / f"{name}.npy"
        result = run("embed", "demo", "-i", source, "-o", output, *options, input=content)
        assert result.exit_code == 0, result.output
        np.testing.assert_allclose(np.load(output), expected, atol=1e-6)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert run("embed", "demo", "-i", tmp_path / "a.jsonl", "-o", tmp_path / "j.npy").exit_code == 0
    np.testing.assert_allclose(np.load(tmp_path / "j.npy"), expected, atol=1e-6)


def test_embed_counts_what_was_cut(tmp_path):
    result = run("embed", "demo", "-i", "-", "-o", tmp_path / "v.npy", input="word " * 300 + "\nshort\n")
    assert "cut at 256 tokens: 1 of 2 texts" in result.stdout


def test_embed_normalize(tmp_path, texts):
    """The demo normalises by itself, so a copy of it that does not."""
    import shutil

    from bert_fast.folders import resolve

    folder = tmp_path / "model"
    shutil.copytree(resolve("demo"), folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    for flag, unit in (("--no-normalize", False), ("--normalize", True)):
        assert run("embed", folder, "-i", texts, "-o", tmp_path / "v.npy", flag).exit_code == 0
        lengths = np.linalg.norm(np.load(tmp_path / "v.npy"), axis=1)
        assert np.allclose(lengths, 1, atol=1e-5) == unit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'{"text": "a"}\n\n', "line 2 is not JSON"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no field 'text'; it has: txt"),
        (b'{"text": 3}\n', "line 1: field 'text' is a int, expected a string"),
        (b'["a"]\n', "line 1 is a JSON list, expected an object"),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        (b'{"text": "a"}\n\xff\n', "line 2 is not UTF-8"),
        (b"", "is empty: there is nothing to embed"),
    ],
)
def test_bad_lines_are_named_and_the_old_output_stays(tmp_path, content, message):
    (tmp_path / "in.jsonl").write_bytes(content)
    (tmp_path / "v.npy").write_text("precious")
    assert_refused(run("embed", "demo", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "v.npy"), message)
    assert (tmp_path / "v.npy").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "v.npy"]


def test_other_bad_input(tmp_path, texts):
    output = tmp_path / "v.npy"
    assert_refused(run("embed", "demo", "-i", tmp_path / "absent", "-o", output), "absent: No such file or directory")
    assert_refused(run("embed", "demo", "-i", tmp_path, "-o", output), "Is a directory")
    assert_refused(run("embed", "demo", "-i", texts, "-o", tmp_path / "no" / "v.npy"), "there is no folder")
    assert_refused(run("embed", "demo", "-i", texts, "-o", tmp_path), "is a folder, expected the name of a file")
    assert_refused(run("embed", "demo", "-i", texts, "-o", output, "--dtype", "int3"), "dtype is int3, expected one of")
    for options in (["embed", "-i", texts, "-o", output], ["search", "-c", texts, "-q", "x"], ["verify"]):
        assert_refused(
            run(*options, "demo", "--precision", "fp8"), "precision is 'fp8', expected one of fp32, bf16, int8"
        )
    assert_refused(run("embed", tmp_path / "model", "-i", texts, "-o", output), "there is no folder")
    assert_refused(run("embed", tmp_path, "-i", texts, "-o", output), "has no config.json")
    assert_refused(run("info", texts), "is a file, expected the folder of a checkpoint")
    assert_refused(run("search", "demo", "-c", "-", "-q", "x", input=" \n\n"), "holds no text to search")
    assert_refused(run("bench", "demo", "--case", "nonsense"), "nonsense")
    assert run("embed", "demo").exit_code == 2
    assert run("search", "demo", "-c", texts, "-q", "x", "--top-k", "0").exit_code == 2
    assert not output.exists()


def test_embed_replaces_only_files(texts, tmp_path):
    target, link, pipe = tmp_path / "target.npy", tmp_path / "link.npy", tmp_path / "pipe"
    link.symlink_to(target)
    assert run("embed", "demo", "--input", texts, "--output", link).exit_code == 0
    assert link.is_symlink()
    assert np.load(target).shape == (3, 384)
    os.mkfifo(pipe)
    assert_refused(run("embed", "demo", "--input", texts, "--output", pipe), "pipe is a device or a pipe")
    assert pipe.is_fifo()
    before = texts.read_bytes()
    assert_refused(run("embed", "demo", "--input", texts, "--output", texts), "is the input too")
    assert texts.read_bytes() == before


def test_an_output_that_cannot_be_written_is_found_before_the_work(texts, monkeypatch):
    monkeypatch.setattr("bert_fast.bulk.Embedder", None)
    assert_refused(run("embed", "demo", "--input", texts, "--output", "/proc/vectors.npy"), "No such file or directory")


@pytest.mark.parametrize("device", ["nonsense", "cuda"])
def test_a_device_that_is_not_there(texts, tmp_path, device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("embed", "demo", "--input", texts, "--output", tmp_path / "v.npy", "--device", device)
    assert_refused(result, f"device is '{device}'")


def test_closed_streams(texts, tmp_path):
    def shell(command):
        line = f"{shlex.join(COMMAND)} {command}"
        return subprocess.run(line, shell=True, capture_output=True, text=True, timeout=100)

    result = shell(f"embed demo -i - -o {tmp_path / 'v.npy'} <&-")
    assert (result.returncode, result.stderr) == (2, "bert-fast: stdin is closed\n")
    result = shell(f"embed demo -i {texts} -o {tmp_path / 'v.npy'} >&- 2>&-")
    assert result.returncode == 0
    assert np.load(tmp_path / "v.npy").shape == (3, 384)


def test_search():
    result = run("search", "demo", "-c", SENTENCES, "-q", "planets with rings", "-q", "growing roses", "-k", "2")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.strip().split("\n\n")
    query, header, best, other = first.splitlines()
    assert query == "planets with rings"
    assert header.split() == ["score", "line", "text"]
    score, line, text = best.split(maxsplit=2)
    assert text.startswith("Saturn's rings")
    assert verify.shipped_sentences()[int(line) - 1] == text
    assert 1 >= float(score) >= float(other.split()[0])
    assert second.splitlines()[0] == "growing roses"


def test_search_asks_for_more_than_there_is(texts):
    result = run("search", "demo", "-c", texts, "-q", "text", "-k", "50")
    lines = [row.split()[1] for row in result.stdout.splitlines()[2:]]
    assert sorted(lines) == ["1", "3"], "the blank line is no hit, and the numbers are those of the file"


def test_verify(monkeypatch):
    result = run("verify", "demo", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "bfloat16 on cpu" in result.stdout
    monkeypatch.setattr(verify, "FACTOR", -1.0)
    result = run("verify", "demo")
    assert result.exit_code == 1
    assert "Verdict: FAILED at embeddings" in result.stdout


def test_info():
    out = run("info", "demo").stdout
    for fact in (
        "BertModel",
        "hidden_size 384",
        "22,713,216 in 103 tensors, float32",
        "mean, then length 1",
        "vocab.txt",
    ):
        assert fact in out
    assert "texts cut at 256" in out


def test_doctor():
    out = run("doctor").stdout
    for fact in ("Machine", "Software", "Ops on cpu", "Ops on cuda", "residual_layer_norm", "float64"):
        assert fact in out
    assert "triton: runs on cuda, not on cpu  (attention, attention_probabilities, bias_gelu" in out


def test_doctor_obeys_what_is_forced():
    from bert_fast.ops import force

    with force("reference"):
        out = run("doctor").stdout
    assert "triton: reference is forced" in out
    with force("triton"):
        out = run("doctor").stdout
    assert "attention: triton is forced but runs on cuda, not on cpu" in out


def test_an_instruction_set_that_is_not_there():
    environment = {**os.environ, "BERT_FAST_ISA": "abacus"}
    for arguments in (["doctor"], ["verify", "demo"]):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=100)
        assert done.returncode == 2
        assert "instruction set 'abacus' is not available on this machine, which has: scalar" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_bench(monkeypatch):
    rows = []
    monkeypatch.setattr(benchmarking, "bench_model", lambda *args: rows.append(args) or [])
    monkeypatch.setattr(benchmarking, "format_table", lambda rows: "the table")
    result = run("bench", "demo", "--case", "2x8", "--case", "mix4", "--threads", "1", "--repeats", "3")
    assert result.stdout == "the table\n", result.output
    assert rows == [("demo", ["2x8", "mix4"], "float32", 1, 3)]

    def wrong(*args):
        raise timing.WrongAnswerError("0.5 is too far", "bert_fast")

    monkeypatch.setattr(benchmarking, "bench_model", wrong)
    result = run("bench")
    assert result.exit_code == 1
    assert result.stderr == "bert-fast: not timed, the answers differ: 0.5 is too far\n"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("bench", "demo", "--case", "1x4")
    assert_refused(result, "transformers is not installed; it comes with: pip install")


def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen([*COMMAND, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_ctrl_c_ends_quietly_and_leaves_nothing(texts, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Embedder, "embed", interrupted)
    result = run("embed", "demo", "-i", texts, "-o", tmp_path / "v.npy")
    assert result.exit_code == 128 + signal.SIGINT
    assert result.output == ""
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_a_signal_in_the_middle_ends_quietly_and_leaves_nothing(tmp_path):
    source = tmp_path / "texts.txt"
    source.write_text("some words of a text that is not short\n" * 100_000)
    command = [*COMMAND, "embed", "demo", "-i", str(source), "-o", str(tmp_path / "v.npy")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not any(path.stat().st_size > 1000 for path in tmp_path.glob(".v.npy.*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)
        assert (process.returncode, output) == (128 + signal.SIGINT, (b"", b""))
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_embed_writes_as_it_goes_what_encode_returns(tmp_path):
    texts = [f"{i} words" for i in range(400)]
    result = run("embed", "demo", "-i", "-", "-o", tmp_path / "v.npy", input="\n".join(texts))
    assert result.exit_code == 0, result.output
    vectors = np.load(tmp_path / "v.npy", mmap_mode="r")
    np.testing.assert_allclose(vectors, Embedder("demo").encode(texts), atol=1e-6)


def test_the_help_has_every_command_in_the_panel_where_people_look_for_it():
    shown = run("--help").stdout
    panels = [shown.index(panel) for panel in PANELS]
    assert panels == sorted(panels)
    for panel, names in PANELS.items():
        places = [shown.index(f"│ {name} ") for name in names]
        assert places == sorted(places)
        assert places[0] > shown.index(panel)
    registered = {entry.name for entry in (*app.registered_groups, *app.registered_commands)}
    assert registered == {name for names in PANELS.values() for name in names}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("embed demo --foo 3", "No such option: --foo; see"),
        ("bench demo --repeats x", "Invalid value for '--repeats'"),
        ("fintune", "No such command 'fintune'"),
        ("vocab trai", "vocab --help"),
    ],
)
def test_a_wrong_command_line_is_one_line(line, message):
    done = run(*line.split())
    assert_refused(done, message)


@pytest.mark.parametrize("line", [[], ["vocab"]])
def test_a_name_alone_shows_the_help_once(line):
    done = run(*line)
    assert done.exit_code == 2
    assert (done.stdout + done.stderr).count("Usage:") == 1


def test_an_error_of_ours_has_its_traceback(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("bert_fast.info.describe", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        app(["info", "demo"])
