"""The families of models that can be compiled here, for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flashu_compile.models.registry import adapters


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models: its adapter's name, what these models are, their tasks, and what options say of them."""

    name: str
    title: str
    tasks: tuple[str, ...]
    options: Mapping[str, str]


def families() -> tuple[Family, ...]:
    """Return every family that has an adapter. Raises `ConfigurationError` if one cannot be loaded."""
    return tuple(Family(a.name, a.title, tuple(a.tasks), dict(a.options)) for a in adapters())
