"""Hashes of what engines depend on: code, libraries, machine, and the traced modules with their weights."""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashu_compile.extras import installed_version
from flashu_compile.program.trace import CaptureSpec

_VERSIONED = (
    *("torch", "transformers", "diffusers", "numpy", "sympy", "networkx", "safetensors"),
    *("onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-gpu"),
)
#: Modules whose code `environment` tells.
_KNOWN = frozenset({"builtins", "flashu_compile", "torch", "transformers", "diffusers"})
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
#: A hash that a configuration of transformers remembers of itself, another one in every process.
_OF_THE_PROCESS = "_original_object_hash"


class UnknownCodeError(Exception):
    """A model contains code or values from elsewhere that no fingerprint can represent."""


@functools.cache
def environment() -> str:
    """Return a hash of everything that is the same for every engine of a process."""
    parts = {
        "versions": {name: installed_version(name) for name in _VERSIONED},
        "source": _source(Path(__file__).parents[1]),
        "python": platform.python_version(),
        # The last bits of what eager PyTorch computes depend on it.
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
    }
    return _hash(parts)


class TensorHashes:
    """Hashes of tensors by type, shape, layout and bytes. Memory that was hashed before is not read again.

    Made anew for every build, since weights may change between two.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], str] = {}

    def __call__(self, tensor: Tensor) -> str:
        """Return the hash of a tensor. Raises `UnknownCodeError` if it is not on the CPU."""
        parts = (str(tensor.dtype), tuple(tensor.shape), tensor.stride())
        if tensor.device.type != "cpu":
            raise UnknownCodeError(f"a tensor is on {tensor.device}")
        place = (tensor.data_ptr(), *parts)
        if place not in self._known:
            digest = hashlib.sha256(repr(parts).encode())
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().data)
            self._known[place] = digest.hexdigest()
        return self._known[place]


def captured_fingerprint(spec: CaptureSpec, hashes: TensorHashes) -> str:
    """Return a hash that is equal for captures of the same modules, settings, weights and sample.

    Raises `UnknownCodeError` if a module or one of its values is of a kind that no fingerprint can represent.
    """
    parts = {
        "name": [spec.name, spec.task],
        "inputs": [[str(given.role), given.axes] for given in spec.inputs],
        "outputs": [str(role) for role in spec.outputs],
        "stacks": dict(spec.stacks),
        "decoder": spec.decoder,
        "sample": {str(role): hashes(tensor) for role, tensor in spec.sample.items()},
        "modules": [[name, _module(module, hashes)] for name, module in spec.module.named_modules()],
        "tensors": _tensors(spec.module, hashes),
    }
    return _hash(parts)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, also those that no state dict holds, each under all of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _tensors(module: nn.Module, hashes: TensorHashes) -> list[list[str]]:
    """List name, first name of the same memory, and hash of each tensor: tied weights are compiled as one."""
    first: dict[int, str] = {}
    return [
        [name, first.setdefault(tensor.data_ptr(), name), hashes(tensor)]
        for name, tensor in named_tensors(module).items()
    ]


def _module(module: nn.Module, hashes: TensorHashes) -> list[Any]:
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return [_code(type(module)), _fingerprint_of(own, hashes)]


def _fingerprint_of(value: Any, hashes: TensorHashes) -> Any:
    """Convert a module's setting to a JSON value, with types included where JSON would lose them."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, Tensor):
        return hashes(value)
    if isinstance(value, torch.dtype | torch.device | enum.Enum):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _fingerprint_of(entry, hashes) for name, entry in sorted(value.items(), key=str)}
    if isinstance(value, list | tuple):
        return [_fingerprint_of(entry, hashes) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_fingerprint_of(entry, hashes)) for entry in value)
    if isinstance(value, functools.partial):
        return [_fingerprint_of(part, hashes) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return _code(value)
    if hasattr(value, "__dict__"):
        own = {name: entry for name, entry in vars(value).items() if name != _OF_THE_PROCESS}
        return [_code(type(value)), _fingerprint_of(own, hashes)]
    raise UnknownCodeError(f"a {type(value).__name__} among the settings of a module has no hash")


def _code(thing: Any) -> str:
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if name is None or (module or "").partition(".")[0] not in _KNOWN or "<" in name:
        raise UnknownCodeError(f"no hash or version identifies the code of {module}.{name}")
    return f"{module}.{name}"


def _source(package: Path) -> str:
    """Hash every Python file of the package: its version number does not identify an edited installation."""
    digest = hashlib.sha256()
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
