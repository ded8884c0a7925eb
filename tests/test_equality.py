"""What holds tensors or arrays is equal to itself alone: comparing by fields would compare tensors, which raises."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.export import ExportedProgram

import flashu_compile
from flashu_compile.passes.prune_ffn import PruneFFN
from flashu_compile.program.program import Program

HELD = (Tensor, np.ndarray, ExportedProgram)


def _dataclasses() -> Iterator[type]:
    for found in pkgutil.walk_packages(flashu_compile.__path__, "flashu_compile."):
        if found.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(found.name)
        except ImportError:  # of a backend whose library is not here
            continue
        for value in vars(module).values():
            if inspect.isclass(value) and dataclasses.is_dataclass(value) and value.__module__ == found.name:
                yield value


def _holds(annotation: Any) -> bool:
    """Whether a value of this type has tensors or arrays in it."""
    origin = typing.get_origin(annotation) or annotation
    if inspect.isclass(origin) and issubclass(origin, HELD):
        return True
    return any(_holds(part) for part in typing.get_args(annotation))


def _compared(cls: Any) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a name that is imported for type checkers alone
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.compare}


def test_no_dataclass_compares_tensors_by_fields() -> None:
    holding = [cls for cls in _dataclasses() if any(map(_holds, _compared(cls).values()))]
    names = {cls.__name__ for cls in holding}
    assert {"Program", "EngineBuild", "Edits", "OrderedWeight", "PruneFFN", "CalibrationSamples"} <= names
    generated = [cls for cls in holding if cls.__dataclass_params__.eq]  # type: ignore[attr-defined]
    assert generated == []


def test_a_program_is_equal_to_itself_alone(denoise: Program) -> None:
    other = dataclasses.replace(denoise)
    assert denoise != other
    assert denoise == denoise
    assert (denoise,) != (other,)
    assert len({denoise, other, denoise}) == 2


@pytest.mark.parametrize("kept", [[0, 1], np.arange(2)])
def test_passes_with_neurons_can_be_compared(kept: Any) -> None:
    step = PruneFFN("llm", {0: kept})
    assert step == step
    assert step != PruneFFN("llm", {0: np.arange(2)})
    assert len({step, step}) == 1
