"""What benchmarks keep on disk: finished rows in one JSON file, so that a rerun goes on where the last one stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from flashu_compile.recipe.recipe import Recipe
from flashu_compile.system.drafts import draft_folder


def digest(*parts: object) -> str:
    """A short name of what JSON values, and arrays, say."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return sha.hexdigest()[:16]


def weights_digest(network: nn.Module) -> str:
    """Names a network by its tensors."""
    tensors = sorted(network.state_dict().items())
    return digest(*(part for name, tensor in tensors for part in (name, tensor.detach().cpu().numpy())))


def recipe_digest(recipe: Recipe, task: str) -> str:
    """Names what a recipe makes of one task: its parameters, and the decisions that these need."""
    decided = recipe.decided(task)
    neurons = [
        part
        for stack, blocks in decided.kept_neurons.items()
        for block, kept in blocks.items()
        for part in ([stack, block], kept)
    ]
    config = {name: getattr(recipe.config(task), name) for name in recipe.config(task).__dataclass_fields__}
    return digest(task, config, [[phase.start, phase.skipped] for phase in decided.phases], *neurons)


class Records:
    """Rows by key in a JSON file, which is replaced as a whole: it is never half-written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            self.about, self.rows = data["about"], data["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        self.save()

    def save(self) -> None:
        text = json.dumps({"about": self.about, "rows": self.rows}, indent=1, default=float) + "\n"
        write_atomically(self.path, lambda draft: draft.write_text(text, encoding="utf-8"))


def save_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    write_atomically(path, lambda draft: np.save(draft, values, allow_pickle=False))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a draft beside `path`, with its suffix, then put it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_folder(path.parent) as draft:
        write(draft / path.name)
        os.replace(draft / path.name, path)


def ratio(value: float | None, of: float | None) -> float | None:
    """value / of, where both are there and the quotient means something."""
    return None if value is None or not of else value / of


def mean_relative_error(values: np.ndarray, truth: np.ndarray) -> float:
    """Mean over rows of the relative L2 error; the longer of the two arrays is cut to the other's length."""
    count = min(len(values), len(truth))
    a, b = values[:count].reshape(count, -1), truth[:count].reshape(count, -1)
    return float(np.mean(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)))


def markdown_table(
    columns: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]], rows: Iterable[Mapping[str, Any]]
) -> str:
    """A Markdown table with a header and the text of each column for each row; all but the first are right-aligned."""
    header = "| " + " | ".join(name for name, _ in columns) + " |"
    rule = "|---|" + "---:|" * (len(columns) - 1)
    body = ["| " + " | ".join(text(row) for _, text in columns) + " |" for row in rows]
    return "\n".join([header, rule, *body]) + "\n"


def number(value: float | None, form: str = ".3f") -> str:
    """A number as the table shows it; nothing where there is none."""
    return "" if value is None else format(value, form)
