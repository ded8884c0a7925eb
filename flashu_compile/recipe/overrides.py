"""Single parameters of a recipe given as texts, such as `t2i.head_cache=1` on the command line."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from flashu_compile import reading
from flashu_compile.errors import ConfigurationError
from flashu_compile.recipe.config import Shares, T2IConfig, TaskConfig, by_stack
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import TASKS

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number such as 0.3 or 10/34",
    str: "a text",
    tuple: "JSON such as [[0, 0.75], [0.7, 1]]",
    Mapping: 'a number such as 0.3 or 10/34, or JSON such as {"decoder": 0.3}',
}


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return `recipe` with parameters set by texts `TASK.FIELD=VALUE`; the last of several for one field holds.

    A value is parsed by its field's type: a number may be a fraction, `none` takes the model's own, lists are JSON.
    `TASK.FIELD.STACK=VALUE` sets the share of one stack in a field that has shares by stack, and leaves the others.
    The changes are appended to the recipe's name. Decisions that depend on a changed parameter are dropped, so that
    calibration takes them anew: an old choice of neurons says nothing about another ratio.

    Raises `ConfigurationError` that names the setting, and lists its task's fields where it has no such field.
    """
    values: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
    for setting in settings:
        task, field, stack, value = _parse(recipe, setting)
        if stack:
            given = values[task].get(field, getattr(recipe.config(task), field))
            value = {**(given if isinstance(given, Mapping) else by_stack(given)), stack: value}
        values[task][field] = value
    configs: dict[str, Any] = {task: _replaced(recipe.config(task), task, values[task]) for task in TASKS}
    changes = [
        f"{task}.{change}"
        for task, fields in values.items()
        for field in fields
        for change in _changes(field, getattr(recipe.config(task), field), getattr(configs[task], field))
    ]
    if not changes:
        return recipe
    decisions = {
        task: _still_good(decided, recipe.config(task), configs[task])
        for task, decided in recipe.decisions.items()
    }
    return dataclasses.replace(
        recipe, name=f"{recipe.name} with {', '.join(changes)}", decisions=decisions, **configs
    )


def _parse(recipe: Recipe, setting: str) -> tuple[str, str, str, Any]:
    """Split a setting into task, field, stack ("" for all) and parsed value."""
    target, equals, text = (part.strip() for part in setting.partition("="))
    task, dot, place = target.partition(".")
    field, inside, stack = place.partition(".")
    if not equals or not dot or task not in TASKS:
        raise ConfigurationError(
            f"Setting {setting!r} must read TASK.FIELD=VALUE with a task of {', '.join(TASKS)}, "
            "such as t2i.head_cache=1."
        )
    kinds = typing.get_type_hints(type(recipe.config(task)))
    if field not in kinds:
        known = ", ".join(f.name for f in dataclasses.fields(recipe.config(task)))
        raise ConfigurationError(f"Setting {setting!r}: {task} has no field {field!r}; it has: {known}.")
    if not inside:
        return task, field, "", _value(text, kinds[field], setting)
    if kinds[field] != Shares or not stack:
        raise ConfigurationError(
            f"Setting {setting!r}: {task}.{field} {'names no stack' if kinds[field] == Shares else 'has no stacks'}; "
            f"set {task}.{field}{'.STACK' * (kinds[field] == Shares)}=VALUE."
        )
    return task, field, stack, _value(text, float, setting)


def _value(text: str, hint: Any, setting: str) -> Any:
    """Parse `text` as a value of type `hint`."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = types.NoneType in choices
    if optional and text.lower() == "none":
        return None
    kind: Any = (
        Mapping
        if hint == Shares
        else next(typing.get_origin(c) or c for c in choices if c is not types.NoneType)
    )
    try:
        return _READERS[kind](text)
    except (ValueError, ZeroDivisionError, ConfigurationError) as error:
        expected = _KINDS[kind] + (" or none" if optional else "")
        raise ConfigurationError(f"Setting {setting!r}: {text!r} is not {expected}.") from error


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _number(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator) if slash else float(text)


def _list(text: str) -> Any:
    return reading.parse(text, "It", ConfigurationError)


def _shares(text: str) -> Any:
    return _list(text) if text.startswith("{") else _number(text)


_READERS: dict[Any, Any] = {
    bool: _truth,
    int: int,
    float: _number,
    str: str,
    tuple: _list,
    Mapping: _shares,
}


def _replaced(config: TaskConfig, task: str, values: dict[str, Any]) -> TaskConfig:
    """Replace all fields at once, since some parameters are allowed only beside others."""
    try:
        return dataclasses.replace(config, **values)
    except ConfigurationError as error:
        given = ", ".join(f"{task}.{field}" for field in values)
        raise ConfigurationError(f"Setting {given}: {error}") from error


def _still_good(decided: Decisions, old: TaskConfig, new: TaskConfig) -> Decisions:
    """Return the decisions that do not depend on a field in which the two configurations differ."""
    alike = new.width_multiple == old.width_multiple
    same = {
        stack for stack in decided.kept_widths if alike and new.pruned.get(stack) == old.pruned.get(stack)
    }
    phased = {stack for stack in decided.stacks if new.skipping.get(stack) == old.skipping.get(stack)}
    if isinstance(old, T2IConfig) and isinstance(new, T2IConfig):
        phased = phased if new.skipping_interval == old.skipping_interval else set()
    return Decisions(
        {stack: blocks for stack, blocks in decided.kept_neurons.items() if stack in same},
        decided.of_stacks(phased),
        {stack: blocks for stack, blocks in decided.kept_widths.items() if stack in same},
    )


def _changes(field: str, old: Any, new: Any) -> list[str]:
    """Return the settings that make `new` of `old`: none, one, or one for each stack whose share differs."""
    if not isinstance(new, Mapping):
        return [f"{field}={_text(new)}"] if new != old else []
    stacks = sorted({*old, *new})
    return [f"{field}.{s}={new.get(s, 0.0)}" for s in stacks if new.get(s) != old.get(s)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
