"""Rotations by tables of half the width: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.passes.base import PassResult
from flashu_compile.passes.halve_rotary import HalveRotary
from flashu_compile.passes.manager import PassManager
from flashu_compile.passes.pipelines import denoise
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.rotating import HEADS, WIDTH, Rotating, rotated, turned
from tests.support.row_programs import step_inputs
from tests.support.tiny import CONFIG, VAE, tiny_model


def program(module: nn.Module, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    inputs = (Input("rows", ("batch", "length", None)), Input("positions", ("batch", "length")))
    return capture_program(
        CaptureSpec("rotating", "none", module.to(dtype), inputs, ("out",), {}, given(2, 5, dtype))
    )


def given(batch: int, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * length)
    rows = torch.randn(batch, length, HEADS * WIDTH, generator=generator, dtype=dtype)
    return {"rows": rows, "positions": torch.randint(0, 50, (batch, length), generator=generator)}


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Though rotated queries lie in memory in another order than before, which attention's result follows."""
    module = Rotating()
    before = program(module, dtype)
    (after,), (record,) = PassManager((HalveRotary(),)).run(before)
    assert record.changes == ("2 rotations take tables of half the width",)
    for size in [(1, 1), (2, 5), (3, 9)]:
        values = given(*size, dtype)
        assert torch.equal(after.run(values)["out"], before.run(values)["out"])
        assert torch.equal(after.run(values)["out"], module(**values)[0])


def test_each_table_is_made_once_and_half_as_wide() -> None:
    (after,), _ = PassManager((HalveRotary(),)).run(program(Rotating()))
    found = operators(after)
    assert (found.count("aten.cos.default"), found.count("aten.sin.default")) == (1, 1)
    assert "aten.neg.default" not in found
    tables = [
        n for n in after.exported.graph.nodes if str(n.target) in ("aten.cos.default", "aten.sin.default")
    ]
    assert {node.meta["val"].shape[-1] for node in tables} == {WIDTH // 2}


class Backwards(Rotating):
    """Rotates the other way round: the first half is negated."""

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor]:
        cos, sin = self.tables(positions)
        x = self.q(rows).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([second, -first], dim=-1) * sin,)


class OfAnother(Rotating):
    """Adds the turned halves of another value."""

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor]:
        cos, sin = self.tables(positions)
        x, y = (layer(rows).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in (self.q, self.k))
        return (x * cos + turned(y) * sin,)


class OneTable(Rotating):
    """Only the cosines are those of angles that stand there twice."""

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor]:
        cos, sin = self.tables(positions)
        x = self.q(rows).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return (rotated(x, cos, sin * torch.linspace(0, 1, WIDTH)),)


class ByRows(Rotating):
    """Puts the halves one behind the other, and takes them apart where the sequence ends."""

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor]:
        cos, sin = self.tables(positions)
        x = self.q(rows).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        both, length = torch.cat(x.chunk(2, dim=-1), dim=2), rows.shape[1]
        return (x * cos + torch.cat([-both[:, :, length:], both[:, :, :length]], dim=-1) * sin,)


@pytest.mark.parametrize(
    "module",
    [Rotating(WIDTH), Backwards(), OfAnother(), OneTable(), ByRows()],
    ids=lambda m: type(m).__name__,
)
def test_what_only_looks_like_it_is_left_alone(module: nn.Module) -> None:
    """Such as tables whose halves differ."""
    before = program(module)
    result = HalveRotary().call(before)
    assert result.programs == (before,)
    assert result.changes == ()
    if isinstance(module, OneTable):
        (reason,) = result.reasons
        assert reason.endswith("whose halves may differ")


def test_rotations_of_pairs_are_left_alone(fused: Program) -> None:
    assert HalveRotary().call(fused) == PassResult.unchanged(fused)


@pytest.fixture(scope="module")
def whole() -> Program:
    return capture_program(capture_specs("t2i", tiny_model(torch.float64), VAE)[0])


def test_every_rotation_of_the_model(whole: Program) -> None:
    (after,), (record,) = PassManager((HalveRotary(),)).run(whole)
    layers = CONFIG.llm.num_hidden_layers + CONFIG.head.num_hidden_layers
    assert record.changes[0].startswith(f"{2 * layers} rotations")
    assert "aten.neg.default" not in operators(after)
    values = step_inputs(3, 6, 2, torch.float64)
    truth = whole.run(values)
    assert all(torch.equal(value, truth[role]) for role, value in after.run(values).items())


@pytest.mark.slow
def test_half_tables_are_what_a_prologue_hands_on(whole: Program) -> None:
    (prologue, _, step), _ = PassManager(denoise()).run(whole)
    tables = [role for role in prologue.outputs if not role.endswith((".key", ".value", ".mask"))]
    assert len(tables) == 4
    widths = {step.sample[role].shape[-1] for role in tables}
    heads = (
        CONFIG.llm.hidden_size // CONFIG.llm.num_attention_heads,
        CONFIG.head.hidden_size // CONFIG.head.num_attention_heads,
    )
    assert widths == {width // 2 for width in heads}
