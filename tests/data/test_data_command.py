"""`bert-fast data`: what it prints, and that nothing is lost when it is killed or the disk is full."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpora
import pytest
from typer.testing import CliRunner

from bert_fast.cli import app

ROOT = Path(__file__).parent.parent.parent


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_pretrain_and_inspect(tmp_path):
    text = corpora.write(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("Port Ellen\n")
    given = ["--input", text, "--tokenizer", "demo", "--output", tmp_path / "out", "--max_seq_length", 64]
    given += ["--dupe-factor", 1, "--scheme", "entity", "--entities", names, "--masking", "dynamic", "--num_workers", 1]
    made = run("data", "pretrain", *given)
    assert made.exit_code == 0, made.output
    assert re.search(r"^documents +40$", made.stdout, re.M)
    assert re.search(r"^tokens of each +\d\d\.\d   \(\d\d\.\d% full\)$", made.stdout, re.M)
    assert re.search(r"^label 1, random +\d\d\.\d%$", made.stdout, re.M)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"]["scheme"] == "entity"
    assert manifest["tokenizer"]["vocab_size"] == 30522
    shown = run("data", "inspect", tmp_path / "out", "-n", 2)
    assert shown.exit_code == 0
    assert shown.stdout.startswith(made.stdout)
    assert shown.stdout.count("\ninstance ") == 2
    assert run("data", "inspect", tmp_path / "out", "-n", 0).stdout == made.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "nowhere/at/all"], "there is no folder nowhere/at/all"),
        (["--objective", "mlm"], "objective is 'mlm', expected one of nsp, sop, none"),
        (["--input", "nowhere.txt"], "there is no file or folder nowhere.txt"),
        (["--entities", "nowhere.txt", "--scheme", "entity"], "nowhere.txt: No such file"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    text = corpora.write(tmp_path)
    given = ["--input", text, "--tokenizer", "demo", "--output", tmp_path / "out", "--num_workers", 1, *arguments]
    done = run("data", "pretrain", *given)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_inspect_of_something_else(tmp_path):
    done = run("data", "inspect", tmp_path)
    assert done.exit_code == 2
    assert "holds no finished pre-training data" in done.stderr


#: Children that kill themselves at the n-th file which is put in its place, just before or just after, each after what
#: the one before it left; then one that is left alone. Without torch, so that forks are quick and safe.
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import corpora
from bert_fast import disk
from bert_fast.data.shards import build
assert "torch" not in sys.modules
real = os.replace
def dying(at, after):
    calls = [0]
    def replace(source, target):
        calls[0] += 1
        if calls[0] == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace
ends = []
for at, after in ((1, 0), (2, 1), (3, 0), (3, 1), (5, 0), (4, 1), (6, 0), (9, 1), (99, 1)):
    child = os.fork()
    if child == 0:
        os.replace = dying(at, after)
        build([{text!r}], "demo", {out!r}, corpora.options(), num_workers=1)
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(ends)
"""


def test_a_run_that_is_killed_again_and_again_makes_the_same_bytes(tmp_path):
    text = corpora.write(tmp_path)
    program = KILLED.format(tests=str(Path(__file__).parent), text=str(text), out=str(tmp_path / "killed"))
    program += f'build([{str(text)!r}], "demo", {str(tmp_path / "whole")!r}, corpora.options(), num_workers=1)\n'
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert ends[-1] == 0
    assert ends.count(-signal.SIGKILL) >= 7
    assert corpora.contents(tmp_path / "killed") == corpora.contents(tmp_path / "whole")


def command(text, out, *arguments):
    given = ["--input", text, "--tokenizer", "demo", "--output", out, "--max_seq_length", 48, "--dupe_factor", 2]
    return [sys.executable, "-m", "bert_fast.cli", "data", "pretrain", *map(str, [*given, *arguments])]


@pytest.mark.parametrize(("num_documents", "workers"), [(8000, 1), pytest.param(3000, 2, marks=pytest.mark.slow)])
def test_a_full_disk(tmp_path, num_documents, workers):
    """No file may have more than 500,000 bytes: a shard of 3,000 documents has more, the tokens of 8,000 have, too."""
    text, out = corpora.write(tmp_path, num_documents), tmp_path / "out"
    given = command(text, out, "--num_workers", workers)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, preexec_fn=limited, timeout=120)
    advice = "File too large; what is finished stays, and the same command goes on from there"
    assert done.stderr == f"bert-fast: {out}: {advice}\n"
    assert done.returncode == 2
    assert (out / ".building" / "tokens.json").exists() == (num_documents == 3000)
    assert not [path for path in out.iterdir() if path.name.startswith("shard") or path.name.endswith(".writing")]
    if workers == 2:
        subprocess.run(given, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=120)
        assert {path.name for path in out.iterdir()} == {
            ".lock", "manifest.json", "tokenizer.json", "shard-00000.arrow", "shard-00001.arrow",
        }  # fmt: skip


@pytest.mark.slow
def test_workers_die_with_a_run_that_is_killed_and_another_goes_on(tmp_path):
    text = corpora.write(tmp_path, 3000)
    given = command(text, tmp_path / "killed", "--num_workers", 2, "--shard_tokens", 3000)
    run = subprocess.Popen(
        given, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list((tmp_path / "killed").glob("shard-*")):
        assert run.poll() is None
        time.sleep(0.05)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while any(_group(run.pid)):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.1)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    subprocess.run(given, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=200)
    whole = command(text, tmp_path / "whole", "--num_workers", 1, "--shard_tokens", 3000)
    subprocess.run(whole, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=200)
    assert corpora.contents(tmp_path / "killed") == corpora.contents(tmp_path / "whole")


def _group(group):
    """Processes of a group that still run."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            yield int(path.parent.name)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    program = (
        "import re, sys; from bert_fast.data.shards import build; from bert_fast.data.instances import Options;"
        "build([sys.argv[1]], 'demo', sys.argv[2], Options(dupe_factor=1, shard_tokens=100_000), num_workers=1);"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    peaks = []
    for factor in (1, 10):
        text = tmp_path / f"{factor}.txt"
        with text.open("w") as file:
            for _ in range(factor):
                file.write(corpora.text(4000) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", program, text, tmp_path / f"out{factor}"],
            cwd=ROOT, check=True, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 30e6
