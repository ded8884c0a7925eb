"""Composite operators are taken apart as torch's own decomposition does it, but without tracing again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.program import trace as tracing
from flashu_compile.program.decompose import decomposed
from flashu_compile.program.trace import CaptureSpec
from tests.support.tiny import VAE, tiny_model

_aten = torch.ops.aten


class Written(nn.Module):
    """A module that is one function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, y: Tensor) -> object:
        return self.function(self, x, y)


def parts(module: Written, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, b = F.linear(x, module.weight).chunk(2, dim=-1)
    rows = a.reshape(-1, 3).to(torch.float64).to(torch.float64)
    return (
        rows,
        b.transpose(1, 2).reshape(x.shape[0], -1),
        F.dropout(x, 0.5, training=False).flatten(0, 1),
        y + 1,
    )


def constants(module: Written, x: Tensor, y: Tensor) -> tuple[object, ...]:
    return x.reshape(-1), 3, None, x.shape[0], y


def without_autocast(module: Written, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        inner = x.unflatten(-1, (2, 3)).sum(-1)
    return inner.to(x.dtype).reshape(x.shape[0], -1) * 2


def without_gradients(module: Written, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        inner = F.linear(x, module.weight)
    return (inner + x).reshape(-1)


def in_autocast(module: Written, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x, module.weight)


def in_place(module: Written, x: Tensor, y: Tensor) -> Tensor:
    filled = torch.zeros_like(x)
    kept = filled + 1
    filled += y
    filled.mul_(2).clamp_(min=0)
    return filled.reshape(-1, 6) * kept.sum()


def in_place_of_one_of_several(module: Written, x: Tensor, y: Tensor) -> Tensor:
    ordered, _ = x.sort(-1)
    ordered *= torch.sigmoid(ordered)
    return ordered


def in_place_of_a_part(module: Written, x: Tensor, y: Tensor) -> Tensor:
    both = x + y
    first, _ = both.split([3, 3], dim=-1)
    first *= 2
    return both


def in_place_of_a_view(module: Written, x: Tensor, y: Tensor) -> Tensor:
    filled = torch.zeros_like(x)
    filled.transpose(0, 1).add_(y.transpose(0, 1))
    return filled


def in_place_behind_a_view(module: Written, x: Tensor, y: Tensor) -> Tensor:
    filled = x + y
    first = filled[..., 0]
    filled *= 2
    return first


def in_place_of_another_type(module: Written, x: Tensor, y: Tensor) -> Tensor:
    filled = torch.ones_like(x)
    filled.add_(y.double())
    return filled


def in_place_of_a_view_without_a_name(module: Written, x: Tensor, y: Tensor) -> Tensor:
    filled = x + y
    line = _aten._unsafe_view(filled, [-1])
    line *= 2
    return filled


def in_place_of_another_layout(module: Written, x: Tensor, y: Tensor) -> Tensor:
    turned = torch.zeros_like(x.transpose(0, 1))
    turned.tril_()
    return turned.transpose(0, 1) + y


def in_place_power(module: Written, x: Tensor, y: Tensor) -> Tensor:
    filled = x + y
    filled.pow_(2)
    return filled


def by_index(module: Written, x: Tensor, y: Tensor) -> Tensor:
    filled = x * 2
    filled[:, 0] = 1
    return filled + y


def exported(function: Callable[..., object]) -> ExportedProgram:
    torch.manual_seed(0)
    batch, rows = Dim("batch", min=1, max=64), Dim("rows", min=2, max=64)
    shapes = ({0: batch, 1: rows}, {0: batch, 1: rows})
    return torch.export.export(
        Written(function), (torch.randn(2, 5, 6), torch.randn(2, 5, 6)), dynamic_shapes=shapes, strict=False
    )


def operators(program: ExportedProgram) -> Counter[str]:
    """Count operators on tensors; sizes are read where they are needed, in fewer nodes."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return Counter(str(t) for t in targets if isinstance(t, torch._ops.OpOverload) and "_assert" not in str(t)
                   and t is not _aten.sym_size.int)  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        *(parts, constants, without_autocast, without_gradients, in_autocast, in_place),
        *(
            in_place_of_one_of_several,
            in_place_of_a_part,
            in_place_of_a_view,
            in_place_behind_a_view,
            in_place_of_another_type,
            in_place_of_a_view_without_a_name,
            in_place_power,
            by_index,
        ),
    ],
)
def test_it_is_torch_s_decomposition(function: Callable[..., object]) -> None:
    program = exported(function)
    before = str(program.graph)
    ours, theirs = decomposed(program), program.run_decompositions({})
    assert operators(ours) == operators(theirs)
    assert str(program.graph) == before
    torch.manual_seed(0)
    module, inputs = Written(function), (torch.randn(3, 7, 6), torch.randn(3, 7, 6))
    found, truth = (torch.utils._pytree.tree_leaves(run(*inputs)) for run in (ours.module(), module))
    for one, other in zip(found, truth, strict=True):
        assert one == other if not isinstance(one, Tensor) else torch.equal(one, other)


@pytest.mark.parametrize(
    ("function", "again"),
    [
        *((parts, 0), (without_autocast, 0), (without_gradients, 0), (in_autocast, 1), (in_place, 0)),
        *(
            (in_place_of_one_of_several, 0),
            (in_place_of_a_part, 1),
            (in_place_of_a_view, 1),
            (in_place_behind_a_view, 1),
            (in_place_of_another_type, 1),
            (in_place_of_a_view_without_a_name, 1),
            (in_place_power, 1),
            (in_place_of_another_layout, 1),
            (by_index, 1),
        ),
    ],
)
def test_only_what_it_cannot_do_is_traced_again(
    function: Callable[..., object], again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, whole, calls = exported(function), ExportedProgram.run_decompositions, []

    def counted(self: ExportedProgram, table: object) -> ExportedProgram:
        calls.append(table)
        return whole(self, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    decomposed(program)
    assert len(calls) == again


@pytest.mark.parametrize(("padding", "target"), [("valid", "default"), ("same", "padding")])
def test_a_convolution_without_padding_has_it_in_numbers(padding: str, target: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, dilation=2, bias=False), nn.ReLU())
    pictures = torch.randn(2, 3, 9, 8)
    program = torch.export.export(module, (pictures,))
    written = decomposed(program)
    assert operators(written)[f"aten.conv2d.{target}"] == 1
    (name,) = (node.name for node in written.graph.nodes if "conv2d" in str(node.target))
    assert name in [node.name for node in program.graph.nodes]
    assert torch.equal(written.module()(pictures), module(pictures))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*capture_specs("t2i", tiny_model(), VAE), *capture_specs("mmu", tiny_model(), VAE)],
                         ids=lambda spec: spec.name)  # fmt: skip
def test_captured_programs_too(spec: CaptureSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    for way in (decomposed, lambda program: program.run_decompositions({})):
        monkeypatch.setattr(tracing, "decomposed", way)
        programs.append(tracing.trace(spec.module, spec.inputs, spec.sample))
    ours, theirs = programs
    assert operators(ours) == operators(theirs)
    arguments = tuple(spec.sample[given.role] for given in spec.inputs)
    for one, other in zip(ours.module()(*arguments), theirs.module()(*arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
