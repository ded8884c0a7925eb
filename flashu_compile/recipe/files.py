"""Recipes on disk: a JSON file, and the kept neurons in a safetensors file of the same name beside it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from flashu_compile.errors import RecipeError
from flashu_compile.recipe.recipe import Decisions, Recipe

_METADATA = {"content": "kept neurons of a flashu_compile recipe"}

Tensors = dict[str, NDArray[np.int64]]


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """See `Recipe.save`. `path` is the JSON file's."""
    for task, decisions in recipe.decisions.items():
        if not decisions.complete:
            raise RecipeError(
                f"Recipe {recipe.name!r} cannot be saved: the neurons it keeps for {task} were not read with it."
            )
    beside = path.with_suffix(".safetensors")
    tensors = {
        _key(task, stack, block): neurons
        for task, decisions in recipe.decisions.items()
        for stack, blocks in decisions.kept_neurons.items()
        for block, neurons in blocks.items()
    }
    drafts = [p.with_name(f".{p.name}.{os.getpid()}") for p in (path, beside)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if beside.exists() and not _is_ours(beside):
            raise RecipeError(f"{beside} is not part of a recipe and will not be replaced; save elsewhere.")
        drafts[0].write_text(recipe.to_json(), encoding="utf-8")
        if tensors:
            drafts[1].write_bytes(save(tensors, _METADATA))
        # Without its JSON file there is no recipe, so at no moment is there a mixture of two.
        path.unlink(missing_ok=True)
        if tensors:
            os.replace(drafts[1], beside)
        else:
            beside.unlink(missing_ok=True)
        os.replace(drafts[0], path)
    except OSError as error:
        raise RecipeError(f"The recipe could not be written to {path}: {error}.") from error
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    return path


def read_recipe(path: Path) -> Recipe:
    """See `Recipe.load`. `path` is the JSON file's."""
    try:
        recipe = Recipe.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe at {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    if all(decisions.complete for decisions in recipe.decisions.values()):
        return recipe
    beside = path.with_suffix(".safetensors")
    try:
        tensors: Tensors = load(beside.read_bytes())
    except FileNotFoundError:
        raise RecipeError(f"{beside} is missing; it holds the neurons that {path.name} keeps.") from None
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{beside} cannot be read: {error}.") from error
    try:
        return _complete(recipe, tensors)
    except RecipeError as error:
        raise RecipeError(f"{beside} does not belong to {path.name}: {error}") from error


def _complete(recipe: Recipe, tensors: Tensors) -> Recipe:
    """The recipe with its kept neurons. Raises `RecipeError` unless `tensors` has these, in the widths it names."""
    left = dict(tensors)
    decisions = {}
    for task, part in recipe.decisions.items():
        kept: dict[str, dict[int, NDArray[np.int64]]] = {}
        for stack, blocks in part.kept_widths.items():
            absent = [block for block in blocks if _key(task, stack, block) not in left]
            if absent:
                raise RecipeError(
                    f"it has no neurons for block {absent[0]} of stack {stack!r} in the task {task}."
                )
            kept[stack] = {block: left.pop(_key(task, stack, block)) for block in blocks}
        decisions[task] = Decisions(kept, part.phases, part.kept_widths)
    if left:
        raise RecipeError(f"it has {min(left)}, of which the recipe knows nothing.")
    return dataclasses.replace(recipe, decisions=decisions)


def _key(task: str, stack: str, block: int) -> str:
    return f"{task}/{stack}/{block}"


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() == _METADATA
    except SafetensorError:
        return False
