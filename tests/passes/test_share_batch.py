"""What all of a batch share is computed once, and repeated only where it meets what differs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.passes.base import PassResult
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.share_batch import ShareBatch
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.programs import only
from tests.support.row_programs import shape, working

WIDTH = 4


class Timed(nn.Module):
    """Values of a batch, moved by what follows from one time through a layer and a sine."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.mixed = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))

    def early(self, x: Tensor, time: Tensor) -> Tensor:
        """The time is expanded before the layer."""
        return self.time(time.expand(x.shape[0], WIDTH)).sin()

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor]:
        return (self.mixed(x * self.early(x, time)),)


class Late(Timed):
    """The time is expanded where nothing is left to do but meet the batch."""

    def early(self, x: Tensor, time: Tensor) -> Tensor:
        return self.time(time.expand(1, WIDTH)).sin().expand(x.shape[0], WIDTH)


class Own(Timed):
    """Every element of the batch has a time of its own."""

    def early(self, x: Tensor, time: Tensor) -> Tensor:
        return self.time((time + x[:, :1]).expand(x.shape[0], WIDTH)).sin()


def program(module: nn.Module) -> Program:
    torch.manual_seed(0)
    sample = {"x": torch.randn(3, WIDTH, dtype=torch.float64), "time": torch.rand(1, 1, dtype=torch.float64)}
    inputs = (Input("x", ("batch", None)), Input("time", (None, None)))
    return capture_program(CaptureSpec("timed", "none", module.eval(), inputs, ("out",), {}, sample))


def leading(program: Program, operator: str) -> list[str]:
    """The batch of every result of an operator, in graph order."""
    return [shape(node)[0] for node in working(program, operator)]


def test_what_is_shared_has_batch_one_and_what_differs_has_not() -> None:
    before = program(Timed())
    batch = leading(before, "linear")[1]
    assert leading(before, "linear") == leading(before, "sin") * 2 == [batch, batch]
    (after,), (record,) = PassManager((ShareBatch(),)).run(before)
    check_graph(after)
    assert leading(after, "linear") == ["1", batch]
    assert leading(after, "sin") == ["1"]
    assert after.input_roles == before.input_roles
    # The expansion to the batch is now one to the layer's width alone.
    assert record.changes == ("3 operations compute once what a batch shares",)
    assert record.error is not None
    assert record.error < 1e-12


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_gives_what_the_module_gives(batch: int) -> None:
    module = Timed()
    before = program(module)
    after = only(ShareBatch().call(before))
    generator = torch.Generator().manual_seed(batch)
    x, time = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((batch, WIDTH), (1, 1))
    )
    with torch.no_grad():
        (truth,) = module(x, time)
        moved = torch.sin(time.repeat(batch, WIDTH) @ module.time.weight.T + module.time.bias)
        by_hand = (x * moved) @ module.mixed.weight.T + module.mixed.bias
    found = after.run({"x": x, "time": time})["out"]
    assert relative_error(found, truth) < 1e-14
    assert relative_error(found, by_hand) < 1e-14


@pytest.mark.parametrize("module", [Late, Own])
def test_where_nothing_is_shared_the_program_stays_as_it_is(module: type[Timed]) -> None:
    before = program(module())
    assert ShareBatch().call(before) == PassResult.unchanged(before)


def test_twice_is_once() -> None:
    after = only(ShareBatch().call(program(Timed())))
    assert ShareBatch().call(after) == PassResult.unchanged(after)
