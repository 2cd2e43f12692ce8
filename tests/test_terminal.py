"""Whether a person is looking, and what they are shown: on a terminal of this test's own."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from bert_fast.terminal import fitted, is_watched, progress_bar


def on_a_terminal(program: str, columns: int = 80) -> str:
    """What a program shows whose streams are a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    settings = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen([sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env=settings):
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # what Linux says when the other side is closed
            pass
    os.close(ours)
    return shown.decode()


def test_a_terminal_is_watched_and_has_columns():
    program = "from bert_fast.terminal import columns, is_watched; print(is_watched(), columns())"
    assert on_a_terminal(program, 61) == "True 61\r\n"
    assert on_a_terminal(program, 0) == "True 80\r\n", "a terminal that does not say how wide it is"


def test_a_pipe_is_not_watched():
    program = "from bert_fast.terminal import columns, is_watched; print(is_watched(), columns())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False None\n"


def test_a_bar_inside_another_one_goes():
    program = """
from bert_fast.terminal import progress_bar
with progress_bar(total=1, what="outer", show=True) as bar:
    for _ in progress_bar(range(3), what="inner", show=True):
        pass
    bar.update()
"""
    said = on_a_terminal(program)
    assert "inner:   0%" in said
    *_, after = said.split("inner")
    wiped, outer, _ = after.partition("outer: 100%")
    assert outer
    assert " " * 60 in wiped


def test_bars_are_for_terminals_unless_they_are_asked_for(capsys):
    assert not is_watched()
    assert list(progress_bar("ab", what="unseen")) == ["a", "b"]
    assert capsys.readouterr().err == ""
    assert list(progress_bar("ab", what="seen", unit=" letters", show=True)) == ["a", "b"]
    assert "seen: 100%" in capsys.readouterr().err


def test_lines_fit():
    assert fitted("abcdef", 4) == "abc…"
    assert fitted("abcd", 4) == fitted("abcd", None) == "abcd"
