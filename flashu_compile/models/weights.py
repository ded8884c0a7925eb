"""Weights on disk, read safely: safetensors or pickled tensors, in one file or in shards.

Nothing here runs code from a file. Pickles are read with `weights_only=True` alone, which builds tensors and
plain containers and refuses the rest. Files are memory-mapped: a tensor whose stored dtype is the wanted one is a view
of its file, and one that is converted lies in a file of its own (`system/mapped.py`), so neither fills memory.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashu_compile import reading
from flashu_compile.bundle.files import HashedFile
from flashu_compile.errors import CheckpointError
from flashu_compile.system.mapped import PIECE, forget_pages, in_file
from flashu_compile.system.paths import absolute

StateDict = dict[str, Tensor]
_Value = TypeVar("_Value")

_SINGLE_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".bin")
_NESTED = "state_dict"
_shapes_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("shapes_alone", default=False)
_WRAPPED = "module."  # what data-parallel training puts before every name


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Read no more of weight files, within this context, than names, shapes, dtypes and the first row of each tensor.

    Tensors that are read have that row in place of all others, which takes no memory; hashes of files are empty.
    """
    token = _shapes_alone.set(True)
    try:
        yield
    finally:
        _shapes_alone.reset(token)


def reads_shapes_alone() -> bool:
    """Tell whether this is within `shapes_alone`."""
    return _shapes_alone.get()


def weight_patterns(suffix: str) -> list[str]:
    """Return patterns of weight files in a format (".safetensors" or ".bin"), as a hub client's `allow_patterns`."""
    return [f"*{suffix}", f"*{suffix}.index.json"]


def find_weights(directory: Path, suffix: str) -> list[Path]:
    """Find the one file of weights in a format (".safetensors" or ".bin"), or its shards; empty if there are none.

    Raises:
        CheckpointError: there are several indices of shards, or one that is damaged.
    """
    for name in _SINGLE_FILES:
        if name.endswith(suffix) and (directory / name).is_file():
            return [directory / name]
    placed = _placed(directory, suffix)
    return [absolute(directory / name) for name in sorted(set(placed.values()))]


def weight_files(directory: Path) -> list[Path]:
    """Find the files of the checkpoint in `directory`, preferring safetensors to pickles and one file to shards.

    Raises:
        CheckpointError: there are none, or `find_weights` raises it.
    """
    for suffix in SUFFIXES:
        if found := find_weights(directory, suffix):
            return found
    names = ", ".join(_SINGLE_FILES)
    indices = " or ".join(f"*{suffix}.index.json" for suffix in SUFFIXES)
    raise CheckpointError(
        f"{directory} holds no weights: expected one of {names}, or shards with an index ({indices})."
    )


def stored_names(directory: Path) -> frozenset[str]:
    """Return the names of the tensors in `directory`, as far as indices and headers tell: a lone pickle's are unknown.

    They are those that `read_weight_files` gives. Raises `CheckpointError` if an index or a header is damaged.
    """
    for suffix in SUFFIXES:
        files = find_weights(directory, suffix)
        if len(files) == 1 and suffix == ".safetensors" and files[0].is_file():
            with _opened(files[0]) as file:
                return frozenset(_unwrapped(dict.fromkeys(file.keys())))
        if placed := _placed(directory, suffix):
            return frozenset(_unwrapped(placed))
    return frozenset()


def hashed(files: Iterable[Path]) -> tuple[HashedFile, ...]:
    """Hash weight files. Done before they are read, it tells afterwards whether they are still what was read.

    Raises `CheckpointError` if one cannot be read.
    """
    found = []
    for path in files:
        _check_exists(path)
        try:
            found.append(HashedFile.unread(path) if reads_shapes_alone() else HashedFile.of(path))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
    return tuple(found)


def read_weights(directory: Path, dtype: torch.dtype | None = None) -> StateDict:
    """Read all tensors of the checkpoint in `directory`, floating ones converted to `dtype` (None: as stored).

    Tensors may be views of memory-mapped files: do not change the files while they are in use.

    Raises:
        CheckpointError: no weights there, a shard is missing, or a file is damaged or more than tensors.
    """
    return read_weight_files(weight_files(directory), dtype)


def read_weight_files(files: Sequence[Path], dtype: torch.dtype | None = None) -> StateDict:
    """Read all tensors of a checkpoint in one file or several shards. Raises as `read_weights` does.

    Of shards, the index says which one a tensor is taken from. Names lose the prefix `module.` where all have it.
    """
    placed = _placed(files[0].parent, files[0].suffix) if len(files) > 1 else {}
    state: StateDict = {}
    for path in files:
        part = read_weight_file(path, dtype)
        for name in [name for name in part if placed.get(name, path.name) != path.name]:
            del part[name]
        if lacking := sorted(
            name for name, shard in placed.items() if shard == path.name and name not in part
        ):
            raise CheckpointError(f"{path} lacks {lacking[0]}, which its index places there; it is damaged.")
        if twice := sorted(state.keys() & part.keys()):
            raise CheckpointError(
                f"{path.parent} stores {twice[0]} in two shards, and its index names neither; it is damaged."
            )
        state |= part
    return _unwrapped(state)


def _unwrapped(stored: dict[str, _Value]) -> dict[str, _Value]:
    """Return what is stored by name, without the prefix of data-parallel training where all names have it."""
    if not all(name.startswith(_WRAPPED) for name in stored):
        return stored
    return {name.removeprefix(_WRAPPED): value for name, value in stored.items()}


def read_weight_file(path: Path, dtype: torch.dtype | None = None) -> StateDict:
    """Read the tensors of one file, safetensors or pickled. Raises `CheckpointError` as `read_weights` does."""
    _check_exists(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, dtype)
    return _read_pickle(path, dtype)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"Weight file {path} does not exist.")


def read_config(path: Path) -> dict[str, Any]:
    """Read the JSON object of a model's configuration. Raises `CheckpointError` if there is none."""
    absent = f"{path.parent} has no {path.name}; it is not a model directory."
    return reading.read_json(path, dict[str, Any], CheckpointError, absent=absent)


def convert(state: StateDict, dtype: torch.dtype | None) -> StateDict:
    """Convert floating tensors to `dtype` (None: as they are); tensors that need no change are returned as they are.

    Tensors shared in `state` under two names (tied embeddings) stay shared. Empties `state` as it goes, so that a
    source can be released before the next tensor is converted.
    """
    if dtype is None:
        return state
    converted: StateDict = {}
    shared: dict[tuple[object, ...], Tensor] = {}
    for name in list(state):
        value = state.pop(name)
        if value.is_floating_point() and value.dtype != dtype and not value.is_meta:
            identity = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
            if identity not in shared:
                shared[identity] = _converted(value, dtype)
            value = shared[identity]
        converted[name] = value
    return converted


def _taken(state: StateDict, dtype: torch.dtype | None) -> StateDict:
    """Return what is read of tensors that are mapped from a file."""
    if reads_shapes_alone():
        return {name: _stand_in(tensor, dtype) for name, tensor in state.items()}
    return convert(state, dtype)


def _stand_in(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor of the same shape, in `dtype` if it is floating, that takes the memory of its first row."""
    row = tensor[:1].clone() if tensor.ndim else tensor
    return (row.to(dtype) if row.is_floating_point() else row).expand(tensor.shape)


def _converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` in another dtype, with the same layout, in a file if it is large."""
    if reads_shapes_alone():
        return _stand_in(value, dtype)
    if not value.is_contiguous() or value.device.type != "cpu":
        return value.to(dtype)
    pieces = (piece.to(dtype) for piece in value.detach().reshape(-1).split(PIECE // dtype.itemsize))
    made = in_file(pieces, tuple(value.shape), dtype)
    forget_pages(value)
    return made


@dataclasses.dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def _placed(directory: Path, suffix: str) -> dict[str, str]:
    """Read which shard each tensor is in from the index of a format, by their names; empty if there is no index."""
    indices = sorted(directory.glob(f"*{suffix}.index.json"))
    if len(indices) > 1:
        names = ", ".join(path.name for path in indices)
        raise CheckpointError(f"{directory} has several weight indices ({names}); keep the right one.")
    if not indices:
        return {}
    (index,) = indices
    placed = reading.read_json(index, _Index, CheckpointError, foreign=True).weight_map
    if not placed:
        raise CheckpointError(f"{index} has an empty weight_map; it is not an index of weight shards.")
    for name in set(placed.values()):
        # An index is input like any other: its entries must not lead out of the directory.
        if Path(name).name != name or name in {".", ".."}:
            raise CheckpointError(f"{index} names the shard {name!r}, which is not a file beside it.")
    return placed


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises `CheckpointError` if it cannot be read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error


def _read_safetensors(path: Path, dtype: torch.dtype | None) -> StateDict:
    state: StateDict = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            state |= _taken({name: file.get_tensor(name)}, dtype)
    return state


def _read_pickle(path: Path, dtype: torch.dtype | None) -> StateDict:
    try:
        # Only torch's zip format can be mapped; files of torch < 1.6 are read into memory.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or it holds more than tensors and loading it could run "
            "code. Ask for a safetensors file, or convert it where you trust it."
        ) from error
    except Exception as error:  # of whatever its unpickler stumbles over
        raise CheckpointError(f"{path} cannot be read as PyTorch weights: {error}") from error
    if isinstance(state, dict) and isinstance(state.get(_NESTED), dict):  # beside what resumes a training
        state = state[_NESTED]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors by name.")
    return _taken(state, dtype)
