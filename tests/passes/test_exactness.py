"""Weights of which a few channels are much larger than the rest, as those of real models are.

Float32 then rounds by 1e-5 and more. Sound passes are accepted all the same, and faults below that are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx

from flashu_compile.errors import PassError
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.manager import PassManager, relative_error
from flashu_compile.passes.pipelines import denoise as denoise_passes
from flashu_compile.passes.split_rows import SplitRows
from flashu_compile.passes.widening import run_wide
from flashu_compile.program.program import Input, Program, Role
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.tiny import VAE, tiny_model

_aten = torch.ops.aten


@pytest.fixture(scope="module")
def captured() -> Program:
    """A generation step whose weights `draw` may change."""
    return capture_program(capture_specs("t2i", tiny_model(), VAE)[0])


def draw(program: Program, seed: int, scale: float) -> Program:
    """Put random weights in place, with one input channel of every matrix larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in program.exported.state_dict.items():
            if weight.dim() == 2 and "embed" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
                weight[:, torch.randint(weight.shape[1], (), generator=generator)] *= scale
    return program


@pytest.mark.parametrize("seed", range(3))
def test_sound_passes_are_accepted(captured: Program, seed: int) -> None:
    passes = denoise_passes()
    place = [type(step) for step in passes].index(SplitRows)
    _, records = PassManager(passes[: place + 1]).run(draw(captured, seed, 30.0))
    assert records[-1].error is not None
    assert records[-1].error > 1e-7
    assert records[-1].float64_error is not None
    assert records[-1].float64_error < 1e-12
    assert all(record.float64_error is None for record in records if not record.error)


@dataclasses.dataclass(frozen=True)
class Spoil(Pass):
    """Declares itself exact and does `fault`, of a size, to the graph."""

    fault: Callable[[GraphEditor, float], None]
    size: float

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        self.fault(editor, self.size)
        return PassResult((editor.finish(),), ("something",))


def scale_weight(editor: GraphEditor, size: float) -> None:
    """Scale one weight of a linear layer by 1 + size."""
    layer = _linears(editor)[0]
    weight = editor.stored(cast("fx.Node", layer.args[1]))
    assert weight is not None
    editor.narrow(layer, 1, weight.double().mul(1 + size).float())


def leave_residual(editor: GraphEditor, size: float) -> None:
    """Leave that share of one residual out."""
    node = editor.outputs()[Role.VELOCITY]
    addition = next(n for n in reversed(list(_before(node))) if n.target is _aten.add.Tensor and _tensors(n))
    residual = cast("fx.Node", addition.args[0])
    _insert(editor, addition, 0, _aten.mul.Scalar, (residual, 1 - size))


def mix_rows(editor: GraphEditor, size: float) -> None:
    """Give each row of one value that share of its neighbour."""
    layer = _linears(editor)[-1]
    value = cast("fx.Node", layer.args[0])
    with editor.graph.inserting_before(layer):
        rolled = editor.graph.call_function(_aten.roll.default, (value, [1], [1]))
    rolled.meta = dict(value.meta)
    _insert(editor, layer, 0, _aten.lerp.Scalar, (value, rolled, size))


def _linears(editor: GraphEditor) -> list[fx.Node]:
    return [
        node
        for node in _before(editor.outputs()[Role.VELOCITY])
        if node.target is _aten.linear.default and cast("fx.Node", node.args[0]).meta["val"].ndim == 3
    ]


def _before(node: fx.Node) -> list[fx.Node]:
    """Return what `node` follows from, in graph order."""
    found, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return sorted(found)


def _tensors(node: fx.Node) -> bool:
    return all(isinstance(a, fx.Node) and a.meta["val"].ndim == 3 for a in node.args[:2])


def _insert(
    editor: GraphEditor, reader: fx.Node, place: int, target: Any, arguments: tuple[Any, ...]
) -> None:
    with editor.graph.inserting_before(reader):
        made = editor.graph.call_function(target, arguments)
    made.meta = dict(arguments[0].meta)
    reader.update_arg(place, made)


def velocity(program: Program) -> Tensor:
    return run_wide(program, program.sample)[Role.VELOCITY]


@pytest.mark.parametrize("scale", [12.0, 30.0])
@pytest.mark.parametrize("fault", [scale_weight, leave_residual, mix_rows])
def test_faults_ten_times_below_rounding_are_refused(
    captured: Program, fault: Callable[[GraphEditor, float], None], scale: float
) -> None:
    program = draw(captured, 0, scale)
    truth = velocity(program)
    # As much as it may be: in one run it may be small by luck.
    noisy = run_wide(program, program.sample, noisy=True)[Role.VELOCITY]
    own = program.run(program.sample)[Role.VELOCITY]
    rounding = max(relative_error(own, truth), relative_error(noisy, truth))
    size = 1e-3
    for _ in range(3):  # a large fault is not as many times larger as its effect
        (spoilt,) = Spoil(fault, size).call(program).programs
        size *= rounding / 10 / relative_error(velocity(spoilt), truth)
    (spoilt,) = Spoil(fault, size).call(program).programs
    assert 0.02 * rounding < relative_error(velocity(spoilt), truth) < 0.2 * rounding
    with pytest.raises(PassError, match=r"Spoil.*declared exact but changed the outputs .*in float64"):
        PassManager((Spoil(fault, size),)).run(program)


@dataclasses.dataclass(frozen=True)
class Cancel(Pass):
    """Declares itself exact and adds a large number, which it takes away again."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        layer = _linears(editor)[-1]
        value = cast("fx.Node", layer.args[0])
        _insert(editor, layer, 0, _aten.add.Scalar, (value, 1e5))
        _insert(editor, layer, 0, _aten.sub.Scalar, (layer.args[0], 1e5))
        return PassResult((editor.finish(),), ("added and subtracted",))


def test_an_identity_that_rounds_much_more_is_refused(captured: Program) -> None:
    with pytest.raises(PassError, match=r"Cancel.*declared exact but rounds too much"):
        PassManager((Cancel(),)).run(draw(captured, 0, 1.0))


@dataclasses.dataclass(frozen=True)
class ThroughHalf(Pass):
    """Declares itself exact and rounds the output to float16 on its way."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        (node,) = editor.outputs().values()
        with editor.graph.inserting_after(node):
            half = editor.graph.call_function(_aten._to_copy.default, (node,), {"dtype": torch.float16})
        with editor.graph.inserting_after(half):
            back = editor.graph.call_function(_aten._to_copy.default, (half,), {"dtype": torch.float32})
        editor.propagate([half, back])
        editor.set_outputs([back])
        return PassResult((editor.finish(),), ("rounded",))


@pytest.mark.parametrize(
    "more",
    [
        lambda y, table: table[torch.arange(len(y), dtype=torch.float32).long()].sum(),
        lambda y, table: torch.sqrt(1 - torch.cos(y * 0) ** 2),
        lambda y, table: torch.acos(torch.exp(y * 0)),
        lambda y, table: table[(y * 0 + 5).round().long().clamp(0, 5)].sum(),
        lambda y, table: sum((y := y.T) for _ in range(100)).mean(),
    ],
    ids=["integers in floats", "a root of nothing", "the edge of a domain", "rounded to indices", "views"],
)
def test_rounding_that_is_drawn_hides_no_fault(more: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(6, 6, generator=generator))
            self.table = torch.nn.Parameter(torch.randn(6, 6, generator=generator))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            y = x @ self.weight
            return (y + more(y, self.table),)

    given = Input("x", (None, None))
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    program = capture_program(CaptureSpec("net", "t2i", Net(), (given,), ("o",), {}, {"x": x}))
    with pytest.raises(PassError, match=r"declared exact but"):
        PassManager((ThroughHalf(),)).run(program)
