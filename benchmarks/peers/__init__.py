"""Other ways to run a BERT encoder: what bert_fast is timed against.

The file of each peer has `build(model, precision)` and imports its library, so that a peer costs nothing, and need not
be installed, until it is chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bert_fast.benchmarking import Encode


@dataclass(frozen=True)
class Peer:
    """One way to run an encoder.

    Attributes:
        name: what tables and the command line call it.
        module: its file in this package.
        precisions: those it has.
        devices: types of the devices it runs on.
        packages: the distributions it is made of, beside torch and transformers.
    """

    name: str
    module: str
    precisions: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    packages: tuple[str, ...] = ()

    def build(self, model: Any, precision: str) -> Encode:
        """The model in this peer, on torch's number of threads at the time of this call.

        Args:
            model: a transformers BertModel in float32 and eval mode; unchanged.
            precision: one of `precisions`.

        Raises:
            ImportError: the peer is not installed.
            ValueError: it has no such precision.
        """
        if precision not in self.precisions:
            raise ValueError(f"precision is {precision!r}, {self.name} has {', '.join(self.precisions)}")
        return self._load().build(model, precision)

    def missing(self) -> str | None:
        """Why it cannot be imported; None if it can."""
        try:
            self._load()
        except ImportError as error:
            return f"{self.name} is not installed: {error}"
        return None

    def _load(self) -> Any:
        return import_module(f"benchmarks.peers.{self.module}")


TORCH = {"precisions": ("float32", "bfloat16", "float16"), "devices": ("cpu", "cuda")}

#: All of them, by name. transformers with SDPA attention is no peer: it is what every row starts from.
PEERS = {
    peer.name: peer
    for peer in (
        Peer("transformers-eager", "transformers_eager", **TORCH),
        Peer("torch.compile", "torch_compile", **TORCH),
        Peer("onnxruntime", "onnx_runtime", ("float32", "int8"), packages=("onnxruntime", "onnx")),
        Peer("openvino", "open_vino", ("float32", "bfloat16"), packages=("openvino",)),
        Peer("ctranslate2", "c_translate2", ("float32", "int8"), packages=("ctranslate2",)),
    )
}


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
        reason = peer.missing() if device in peer.devices else f"{peer.name} does not run on {device}"
        if reason and peer.name in names:
            raise ValueError(reason)
        if reason:
            print(f"left out: {reason}", file=sys.stderr)
        else:
            chosen.append(peer)
    return chosen
