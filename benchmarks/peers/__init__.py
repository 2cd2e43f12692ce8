"""Other ways to run a BERT encoder: what bert_fast is timed against.

The file of each peer has `build(model, precision)` and imports its library, so that a peer costs nothing, and need not
be installed, until it is chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from benchmarks.cases import build_model
from benchmarks.processes import Spec
from bert_fast.benchmarking import Encode
from bert_fast.config import BertConfig


@dataclass(frozen=True)
class Peer:
    """One way to run an encoder.

    Attributes:
        name: what tables and the command line call it.
        module: its file in this package.
        cpu, cuda: the precisions it has there.
        packages: the distributions it is made of, beside torch and transformers.
        compiles_shapes: each shape is compiled anew, which takes long.
    """

    name: str
    module: str
    cpu: tuple[str, ...]
    cuda: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    compiles_shapes: bool = False

    def precisions(self, device: str) -> tuple[str, ...]:
        """Those it has on a type of device."""
        return self.cuda if device == "cuda" else self.cpu

    def build(self, model: Any, precision: str) -> Encode:
        """The model in this peer, on torch's number of threads at the time of this call.

        Args:
            model: a transformers BertModel in float32 and eval mode; nobody else's, so that it may be changed.
            precision: one of those it has.

        Raises:
            ImportError: the peer is not installed.
            ValueError: it has no such precision.
        """
        known = self.precisions(model.device.type)
        if precision not in known:
            raise ValueError(f"precision is {precision!r}, {self.name} has {', '.join(known)}")
        return import_module(self.path).build(model, precision)

    @property
    def path(self) -> str:
        """The name of its module."""
        return f"benchmarks.peers.{self.module}"

    def missing(self) -> str | None:
        """Why it cannot be imported; None if it can."""
        try:
            import_module(self.path)
        except ImportError as error:
            return f"{self.name} is not installed: {error}"
        return None

    def spec(self, source: str | BertConfig, precision: str, device: str = "cpu") -> Spec:
        """How its process makes it, of a model of `cases.build_model`."""
        libraries = ("transformers.models.bert.modeling_bert", self.path)
        return Spec(partial(_make, self.name, source, precision, device), libraries)


def _make(name: str, source: str | BertConfig, precision: str, device: str) -> Encode:
    return CONTENDERS[name].build(build_model(source).to(device), precision)


FLOATS = ("float32", "bfloat16", "float16")
FP8 = "float8_e4m3fn"

#: What every row starts from: in int8, which transformers has not, in float32; in fp8 in bfloat16.
BASELINE = Peer("transformers", "transformers_sdpa", cpu=(*FLOATS, "int8"), cuda=(*FLOATS, FP8))

SUBJECT = Peer("bert_fast", "accelerated", cpu=("float32", "bfloat16", "int8"), cuda=(*FLOATS, FP8))

#: What else a row can have, by name.
PEERS = {
    peer.name: peer
    for peer in (
        Peer("transformers-eager", "transformers_eager", cpu=FLOATS, cuda=FLOATS),
        Peer("torch.compile", "torch_compile", cpu=FLOATS, cuda=FLOATS, compiles_shapes=True),
        Peer("varlen_attn", "varlen", cpu=(), cuda=FLOATS[1:]),
        Peer("torch-int8", "torch_int8", cpu=("int8",)),
        Peer("onnxruntime", "onnx_runtime", cpu=("float32", "int8"), packages=("onnxruntime", "onnx")),
        Peer("openvino", "open_vino", cpu=("float32", "bfloat16", "int8"), packages=("openvino", "nncf")),
        Peer("ctranslate2", "c_translate2", cpu=("float32", "int8"), packages=("ctranslate2",)),
    )
}

#: All of them, in the order of tables.
CONTENDERS = {peer.name: peer for peer in (BASELINE, *PEERS.values(), SUBJECT)}


def select(names: Sequence[str], device: str = "cpu") -> list[Peer]:
    """The peers of these names, or with "all" among the names every peer that can run; stderr says why others cannot.

    Raises:
        ValueError: a peer asked for by name is unknown, not installed, or does not run on the device.
    """
    if unknown := [name for name in names if name not in PEERS and name != "all"]:
        raise ValueError(f"peer {unknown[0]!r} is not one of all, {', '.join(PEERS)}")
    chosen = []
    for peer in PEERS.values():
        if peer.name not in names and "all" not in names:
            continue
        reason = peer.missing() if peer.precisions(device) else f"{peer.name} does not run on {device}"
        if reason and peer.name in names:
            raise ValueError(reason)
        if reason:
            print(f"left out: {reason}", file=sys.stderr)
        else:
            chosen.append(peer)
    return chosen
