"""Fixtures of the C++ kernels of training."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from implementations import Implementation, training_parameters


@pytest.fixture(scope="module", params=training_parameters())
def cpp(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """The C++ kernels at each instruction set that has its own for training, in each dtype."""
    if request.param.isa == "missing":
        pytest.fail("bert_fast._C is not there; build the extension: make dev")
    extension = importlib.import_module("bert_fast._C")
    before = extension.get_isa()
    extension.set_isa(request.param.isa)
    yield request.param
    extension.set_isa(before)


@pytest.fixture(params=[1, 2, 7], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
