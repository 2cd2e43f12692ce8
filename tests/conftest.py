"""What every test gets: fresh memory full of NaN, seeded random numbers, and the implementations as a parameter."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any is imported

from implementations import Implementation, parameters


def pytest_configure(config: pytest.Config) -> None:
    """A shell's background jobs are deaf to SIGINT, as their children would be, which tests interrupt.

    Triton's interpreter is NumPy, which remarks on every NaN and infinity that a test gives it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return (`at::empty` in C++ too) with NaN, or the largest integer.

    `warn_only`, because ops without a deterministic form are no concern here. Memory that C++ takes from elsewhere
    than ATen (`std::vector`, `malloc`) is not reached.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=parameters())
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """Each fused implementation in each of its dtypes; the C++ one at each instruction set of this machine."""
    chosen: Implementation = request.param
    if chosen.isa is None:
        yield chosen
        return
    if chosen.isa == "missing":
        pytest.fail("bert_fast._C is not there; build the extension: make dev")
    extension = importlib.import_module("bert_fast._C")
    before = extension.get_isa()
    extension.set_isa(chosen.isa)
    yield chosen
    extension.set_isa(before)
