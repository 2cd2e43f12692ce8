"""From strings to vectors: `SentenceTransformer.encode` with each of its back ends, and `Embedder.encode`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.accelerated import OPTIONS
from benchmarks.processes import Spec
from bert_fast.benchmarking import parse_case
from bert_fast.folders import resolve
from bert_fast.verify import shipped_sentences

#: The default of both: texts per run in sentence-transformers, the token budget of the device here.
BATCH_SIZE = 32

#: Back end of sentence-transformers -> what it needs beside it.
BACKENDS = {"torch": (), "onnx": ("optimum.onnxruntime",), "openvino": ("optimum.intel",)}

Encode = Callable[[list[str]], Tensor]


def texts(count: int) -> list[str]:
    """`count` texts of mixed lengths, the same on every call: words of the shipped sentences, joined in random order.

    The numbers of words are three quarters of the lengths of `parse_case`'s mix: about as many tokens as those.
    """
    sentences = shipped_sentences()
    rng = np.random.default_rng(0)
    words: list[str] = []
    result: list[str] = []
    for length in parse_case(f"mix{count}").lengths:
        size = -(-3 * length // 4)
        while len(words) < size:
            words += str(rng.choice(sentences)).split()
        result.append(" ".join(words[:size]))
        words = words[size:]
    return result


def specs(path_or_id: str, precisions: list[str], optimum_python: str) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """The back ends of sentence-transformers that can run, by name, and bert_fast by precision; stderr says the rest.

    Args:
        path_or_id: a sentence-transformers folder, as `folders.resolve` takes it.
        precisions: of bert_fast.
        optimum_python: the interpreter that has what the back ends need, where that is another one.
    """
    folder = str(resolve(path_or_id))
    peers = {}
    for backend, needs in BACKENDS.items():
        modules = ("sentence_transformers", *needs)
        python = optimum_python if needs else sys.executable
        name = "sentence-transformers" if backend == "torch" else f"sentence-transformers-{backend}"
        if missing := _missing(python, modules):
            print(f"left out: {name}: {missing}", file=sys.stderr)
        else:
            peers[name] = Spec(partial(_make_peer, folder, backend), modules, python)
    ours = {
        precision: Spec(partial(_make_embedder, folder, precision), ("bert_fast.embedder",)) for precision in precisions
    }
    return peers, ours


def _missing(python: str, modules: tuple[str, ...]) -> str | None:
    """Why an interpreter cannot import these; None if it can."""
    program = "; ".join(f"import {module}" for module in modules)
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def _make_peer(folder: str, backend: Any) -> Encode:
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {}
    if backend == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = torch.get_num_threads()
        options = {"export": True, "provider": "CPUExecutionProvider", "session_options": session}
    if backend == "openvino":
        config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        options = {"export": True, "ov_config": config}
    model = SentenceTransformer(folder, device="cpu", backend=backend, model_kwargs=options)
    return _encode(model)


def _make_embedder(folder: str, precision: str) -> Encode:
    from bert_fast import Embedder

    return _encode(Embedder(folder, device="cpu", **OPTIONS[precision]))


def _encode(model: Any) -> Encode:
    return lambda given: torch.from_numpy(model.encode(given, batch_size=BATCH_SIZE, show_progress_bar=False))
