"""Processes that work in order, and end when they are told to: Ctrl-C, an error, nobody who wants the rest."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from bert_fast.data.workers import map_in_order

#: Longer than any test may take.
FOREVER = 300

INTERRUPTED = """
import sys
from bert_fast.data.workers import map_in_order
from test_workers import begin, work

if __name__ == "__main__":
    for item, said in map_in_order(work, [0, 1, 300, 300], 2, begin, sys.argv[1]):
        print(item, flush=True)
"""


def begin(folder):
    return Path(folder)


def work(folder, item):
    """Sleep so many seconds, and leave one's number."""
    (folder / str(os.getpid())).touch()
    time.sleep(item)
    return item


def gone(folder):
    """Whether all processes that left their number are gone, some time soon."""
    for _ in range(200):
        if not any(Path(f"/proc/{path.name}").exists() for path in folder.iterdir()):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("whom", ["group", pytest.param("parent", marks=pytest.mark.slow)])
def test_an_interrupt_does_not_wait_for_what_is_being_done(tmp_path, whom):
    """Ctrl-C on a terminal goes to all processes of the group, `kill -INT` to one."""
    (tmp_path / "numbers").mkdir()
    (tmp_path / "run.py").write_text(INTERRUPTED)
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "numbers")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, **options) as run:
        assert [run.stdout.readline() for _ in range(2)] == [b"0\n", b"1\n"]
        (os.killpg if whom == "group" else os.kill)(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=FOREVER / 10)
    assert run.returncode == -signal.SIGINT
    assert said.count(b"KeyboardInterrupt") == 1, "a worker complained, too"
    assert gone(tmp_path / "numbers")


def test_nobody_wants_the_rest(tmp_path):
    start = time.monotonic()
    with closing(map_in_order(work, [0, FOREVER, FOREVER], 2, begin, tmp_path)) as results:
        assert next(results) == (0, 0)
    assert time.monotonic() - start < FOREVER / 10
    assert gone(tmp_path)


def test_all_of_it_in_order(tmp_path):
    items = [0.2, 0, 0.1, 0, 0]
    assert list(map_in_order(work, items, 2, begin, tmp_path)) == [(item, item) for item in items]
    assert gone(tmp_path)
