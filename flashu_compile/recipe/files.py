"""The two files of a recipe: its JSON text, and the kept neurons in a safetensors file of the same name beside it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flashu_compile import reading
from flashu_compile.errors import RecipeError
from flashu_compile.system.drafts import draft_folder

_METADATA = {"content": "kept neurons of a flashu_compile recipe"}

Tensors = dict[str, NDArray[np.int64]]


def write_files(path: Path, text: str, tensors: Tensors) -> Path:
    """Write `text` to `path`, and `tensors`, if there are any, to the file beside it; return `path`.

    At no moment do the two files belong to different recipes. Raises `RecipeError` if something cannot be written.
    """
    beside = path.with_suffix(".safetensors")
    try:
        if beside.exists() and not _is_ours(beside):
            raise RecipeError(f"{beside} is not part of a recipe and will not be replaced; save elsewhere.")
        with draft_folder(path.parent) as draft:
            (draft / path.name).write_text(text, encoding="utf-8")
            if tensors:
                (draft / beside.name).write_bytes(save(tensors, _METADATA))
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without its JSON file there is no recipe, so at no moment is there a mixture of two.
            path.unlink(missing_ok=True)
            if tensors:
                os.replace(draft / beside.name, beside)
            else:
                beside.unlink(missing_ok=True)
            os.replace(draft / path.name, path)
    except OSError as error:
        raise RecipeError(f"The recipe could not be written to {path}: {error}.") from error
    return path


def read_tensors(path: Path) -> tuple[Path, Tensors]:
    """Return the path of the file beside the JSON file `path` and its tensors. Raises `RecipeError` if it is absent."""
    beside = path.with_suffix(".safetensors")
    absent = f"{beside} is missing; it holds the neurons that {path.name} keeps."
    return beside, reading.read_tensors(beside, RecipeError, absent=absent)


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() == _METADATA
    except SafetensorError:
        return False
