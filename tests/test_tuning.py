"""The table of the products: measured, written, read and obeyed; and what is refused."""

from __future__ import annotations

import json
import pwd
from pathlib import Path

import pytest
import torch
from implementations import HAS_GPU
from test_cli import assert_refused, run

from bert_fast import doctor, tuning
from bert_fast.kernels import linear_gelu, tuned
from bert_fast.timing import Timing

GPU = "NVIDIA Imaginary 1/2"
CONFIG = linear_gelu.CONFIGS[-1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.table.cache_clear()
    yield tmp_path / "bert_fast" / "tuned"
    tuned.table.cache_clear()


def key(rows: int) -> str:
    return tuned.key("linear_gelu", torch.float16, 32, 64, rows)


def chosen(num_rows: int, in_features: int = 32) -> linear_gelu.Config | None:
    return linear_gelu.chosen(GPU, torch.float16, in_features, 64, num_rows)


def timings(**medians: float) -> dict[tuple[int, ...] | None, Timing]:
    configs = {"by_pass": None, "first": tuple(linear_gelu.CONFIGS[0]), "last": tuple(CONFIG)}
    return {configs[name]: Timing((seconds,), 0.0, 1.0) for name, seconds in medians.items()}


@pytest.mark.parametrize(
    ("measured", "config", "ratio"),
    [
        (timings(by_pass=3.0, first=2.5, last=2.0), tuple(CONFIG), 1.5),
        (timings(by_pass=1.0, first=2.0, last=1.25), None, 0.8),
        (timings(by_pass=1.0, last=0.99), None, 1 / 0.99),
    ],
    ids=["the fastest epilogue", "slower than cuBLAS", "too little to tell"],
)
def test_choose(measured: dict, config: tuple[int, ...] | None, ratio: float) -> None:
    choice = tuning.choose("key", measured)
    assert choice.config == config
    assert choice.ratio == pytest.approx(ratio)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192), (10**6, 65536)])
def test_buckets(rows: int, bucket: int) -> None:
    assert tuned.bucket(rows) == bucket


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert chosen(16) is None
    with pytest.raises(ValueError, match="the user has no home; set XDG_CACHE_HOME or pass --output"):
        tuning._user_folder()


def test_a_folder_that_cannot_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + 300 * "x")  # as a folder without permission, which root cannot have
    assert chosen(16) is None


def test_without_a_table_cublas_runs() -> None:
    assert chosen(16) is None


def test_what_was_written_is_obeyed(folder: Path) -> None:
    assert chosen(60) is None
    path = folder / tuned.file_name(GPU)
    tuning.write(path, GPU, [tuning.Choice(key(64), tuple(CONFIG), 1.5), tuning.Choice(key(128), None, 0.9)])
    assert chosen(60) == chosen(64) == chosen(33) == CONFIG
    assert chosen(32) is chosen(65) is chosen(64, in_features=16) is None
    assert path.name == "nvidia-imaginary-1-2.json"
    assert json.loads(path.read_text())["gpu"] == GPU
    assert "2 shapes of linear_gelu measured, an epilogue chosen for 1" in doctor._table(GPU)
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_other_shapes_of_a_table_stay(folder: Path) -> None:
    path = folder / tuned.file_name(GPU)
    tuning.write(path, GPU, [tuning.Choice(key(64), tuple(CONFIG), 1.5), tuning.Choice(key(128), tuple(CONFIG), 1.5)])
    tuning.write(path, GPU, [tuning.Choice(key(64), None, 0.9)])
    assert chosen(64) is None
    assert chosen(128) == CONFIG


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"entries": []}', '{"entries": {"key": 3}}', '{"entries": {"k": {}}}']
)
def test_a_file_that_is_no_table_is_named(folder: Path, text: str) -> None:
    path = folder / tuned.file_name(GPU)
    folder.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"nvidia-imaginary-1-2\.json is not a table of bert-fast tune"):
        chosen(16)
    with pytest.raises(ValueError, match="is not a table"):
        tuning.write(path, GPU, [])
    assert path.read_text() == text


@pytest.mark.parametrize("config", [(1, 2, 3, 4, 5), (64, 32), "fast", 3], ids=str)
def test_a_configuration_of_another_version_is_refused(folder: Path, config: object) -> None:
    tuning.write(folder / tuned.file_name(GPU), GPU, [tuning.Choice(key(16), config, 1.5)])
    with pytest.raises(ValueError, match="measure again: bert-fast tune"):
        chosen(16)


def test_measure_compares_and_times_every_way() -> None:
    """Under the interpreter where there is no GPU: the times mean nothing, but all that leads to them runs."""
    device = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
    choices = list(tuning.measure(device, [(32, 64)], [torch.float16], [16, 32], [CONFIG], repeats=1))
    assert [choice.key for choice in choices] == [key(16), key(32)]
    assert all(choice.config in (None, tuple(CONFIG)) and choice.ratio > 0 for choice in choices)
    assert key(16) in str(choices[0])


def test_shapes_of_models() -> None:
    assert tuning.shapes_of(["demo", "demo"]) == [(384, 1536)]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU, which this would measure")
def test_tune_without_a_gpu_says_so() -> None:
    assert_refused(run("tune"), "tune measures a GPU, and there is none here that torch can use")


def test_tune_of_another_dtype_is_refused() -> None:
    assert_refused(run("tune", "--dtype", "float32"), "dtype is 'float32', expected one of float16, bfloat16")
