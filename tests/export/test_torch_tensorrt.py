from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flashu_compile.errors import BackendUnavailableError, ConfigurationError
from flashu_compile.exporters.torch_tensorrt import import_torch_tensorrt, input_shapes, save_torch_tensorrt
from flashu_compile.runtime.profiles import Range
from tests.export.conftest import unary

RANGES = {"batch": Range(1, 2, 2)}


def works() -> bool:
    try:
        import_torch_tensorrt()
    except BackendUnavailableError:
        return False
    return True


def test_shapes_of_inputs_follow_from_ranges() -> None:
    program = unary("p", nn.Linear(4, 4), torch.rand(2, 4), ("batch", None))
    (shapes,) = input_shapes(program, RANGES)
    assert (shapes.name, shapes.min, shapes.opt, shapes.max) == ("x", (1, 4), (2, 4), (2, 4))
    with pytest.raises(ConfigurationError, match="'batch' cannot be computed"):
        input_shapes(program, {})


def test_what_is_missing_is_said_and_nothing_written(tmp_path: Path) -> None:
    if works():
        pytest.skip("torch-tensorrt works here")
    program = unary("p", nn.Linear(4, 4), torch.rand(2, 4), ("batch", None))
    with pytest.raises(BackendUnavailableError, match=r"(?s)torch-tensorrt.*portable plan"):
        save_torch_tensorrt(program, RANGES, tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())
