"""Has a tree of modules changed since it was looked at?"""

from __future__ import annotations

from typing import Any

from torch import nn

from bert_fast import ops

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fingerprint(bert: nn.Module) -> tuple[int, int]:
    """(structure, parameters) of the tree: two numbers that change when it does; see csrc/bindings/fingerprint.cpp.

    Of parameters on a GPU only what the host knows takes part: which tensor, its version counter, its address. Values
    are not read, so a write through `parameter.data`, which leaves the version counter alone, goes unnoticed there.
    """
    extension = ops.extension()
    return in_python(bert) if extension is None else extension.fingerprint(bert)


def in_python(bert: nn.Module) -> tuple[int, int]:
    """The same without the extension, and without values of any parameter; takes the host several times as long."""
    structure: list[Any] = []
    parameters: list[Any] = []
    for module in bert.modules():
        attributes = vars(module)
        structure += [id(module), id(type(module)), id(attributes.get("forward")), module.training, attributes.get("p")]
        structure += [id(hook) for name in _HOOKS for hook in attributes[name].values()]
        parameters.append(attributes.get("eps"))
        for parameter in attributes["_parameters"].values():
            if parameter is not None:
                version = 0 if parameter.is_inference() else parameter._version
                parameters += [id(parameter), version, parameter.data_ptr(), parameter.shape, parameter.dtype]
    return hash(tuple(structure)), hash(tuple(parameters))
