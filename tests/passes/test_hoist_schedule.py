"""What follows from the time point alone runs once for each point, before the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.passes.base import Pass
from flashu_compile.passes.editing import module_path
from flashu_compile.passes.group_heads import GroupHeads
from flashu_compile.passes.hoist_prologue import HoistPrologue
from flashu_compile.passes.hoist_schedule import HoistSchedule
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.manager import PassManager, relative_error
from flashu_compile.passes.merge_duplicates import MergeDuplicates
from flashu_compile.passes.pipelines import reuse, reused
from flashu_compile.passes.split_rows import SplitRows
from flashu_compile.program.program import Input, Program, Role, run_chain
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.row_programs import paths, shape, step_inputs, strided_inputs, working
from tests.support.tiny import CONFIG, VAE, tiny_model

STEP = frozenset({Role.LATENTS, Role.TIMESTEP})
SCHEDULE = HoistSchedule(Role.TIMESTEP)
ONCE: tuple[Pass, ...] = (GroupHeads(), SplitRows(STEP), MergeDuplicates(), HoistPrologue(STEP), SCHEDULE)
POINTS = (0.0, 0.37, 1.0)


@pytest.fixture(scope="module")
def whole() -> Program:
    program = capture_program(capture_specs("t2i", tiny_model(torch.float64), VAE)[0])
    return KeepOutputs((Role.VELOCITY, Role.HEAD_FEATURES)).call(program).programs[0]


@pytest.fixture(scope="module")
def parts(whole: Program) -> tuple[Program, ...]:
    return PassManager(ONCE).run(whole)[0]


def at(point: float) -> dict[str, Tensor]:
    return {Role.TIMESTEP: torch.tensor([point], dtype=torch.float64)}


def test_each_part_takes_what_it_reads(parts: tuple[Program, ...]) -> None:
    prologue, schedule, step = parts
    assert [part.name for part in parts] == ["denoise_prologue", "denoise_schedule", "denoise"]
    assert schedule.input_roles == (Role.TIMESTEP,)
    assert step.input_roles == (Role.LATENTS, *prologue.outputs, *schedule.outputs)
    # The time token, the modulation of every block and of the final layer.
    assert len(schedule.outputs) == 1 + CONFIG.head.num_hidden_layers + 1
    assert {placed.axes for placed in step.inputs if placed.role in schedule.outputs} == {(None, None)}


def test_inputs_are_contiguous_as_they_will_be_given(parts: tuple[Program, ...]) -> None:
    """Compilers that trust a graph's strides read nonsense otherwise."""
    assert [role for part in parts for role in strided_inputs(part)] == []


def test_one_schedule_serves_every_prompt_and_picture(whole: Program, parts: tuple[Program, ...]) -> None:
    prologue, schedule, step = parts
    kept = {point: schedule.run(at(point)) for point in POINTS}
    for size in ((2, 7, 4), (1, 3, 6)):
        values = step_inputs(*size, torch.float64)
        carried = prologue.run(values)
        for point, constants in kept.items():
            found = step.run({**values, **carried, **constants})
            truth = whole.run({**values, **at(point)})
            assert all(relative_error(found[role], truth[role]) < 1e-12 for role in truth)
    wrong = step.run({**values, **carried, **kept[POINTS[0]]})[Role.VELOCITY]
    assert relative_error(wrong, truth[Role.VELOCITY]) > 1e-3


def test_the_step_computes_nothing_of_time(parts: tuple[Program, ...]) -> None:
    _, schedule, step = parts
    assert not any("adaLN" in path or "time_embed" in path for path in paths(step))
    assert not any("adaLN" in name or "time_embed" in name for name in step.exported.state_dict)
    layers = list(working(schedule, "linear"))
    assert len(layers) == 3 + CONFIG.head.num_hidden_layers + 1  # two of the embedding, its projection
    assert {shape(node)[0] for node in layers} == {"1"}


def test_steps_that_reuse_features_have_a_schedule_too(whole: Program) -> None:
    (_, alone), _ = PassManager(reuse()).run(whole)
    declined = SCHEDULE.call(alone)
    assert declined.programs == (alone,)
    assert len(declined.reasons) == 3, "of the embedding two, and the modulation"
    assert all(reason.endswith("has the size of another input") for reason in declined.reasons)
    (schedule, step), _ = PassManager(reused()).run(alone)
    assert (schedule.name, step.name) == ("reuse_schedule", "reuse")
    assert schedule.input_roles == (Role.TIMESTEP,)
    assert step.input_roles == (Role.HEAD_FEATURES, *schedule.outputs)
    (final,) = working(step, "linear")
    assert module_path(final).endswith("diffusion_head_b.linear")
    values = step_inputs(2, 5, 3, torch.float64)
    truth = whole.run(values)
    found = run_chain((schedule, step), {**values, Role.HEAD_FEATURES: truth[Role.HEAD_FEATURES]})
    assert relative_error(found[Role.VELOCITY], truth[Role.VELOCITY]) < 1e-12


class Timed(nn.Module):
    """Two ways from the time: through a layer and a layer behind it, and by itself where `direct`."""

    def __init__(self, *, direct: bool) -> None:
        super().__init__()
        self.first, self.second, self.mixed = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.direct = direct

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        early = self.first(time.expand(4))
        late = self.second(early.sin())
        out = self.mixed(x * early) + late.cos()
        return (out * time if self.direct else out), late


def timed(*, direct: bool) -> Program:
    return capture_program(
        CaptureSpec(
            name="timed",
            task="t2i",
            module=Timed(direct=direct),
            inputs=(Input("x", ("batch", None)), Input("time", (None,))),
            outputs=("out", "late"),
            stacks={},
            sample={"x": torch.randn(2, 4, dtype=torch.float64), "time": torch.rand(1, dtype=torch.float64)},
        )
    )


@pytest.mark.parametrize("direct", [False, True])
def test_layers_are_handed_on_where_something_else_reads_them(*, direct: bool) -> None:
    """Both the layer within and the last, which is an output; and time itself stays where it is read by itself."""
    program = timed(direct=direct)
    (schedule, step), _ = PassManager((HoistSchedule("time"),)).run(program)
    assert schedule.outputs == ("first", "second")
    assert step.input_roles == ("x", *(["time"] if direct else []), "first", "second")
    assert [module_path(node) for node in working(step, "linear")] == ["mixed"]
    values = {"x": torch.randn(3, 4, dtype=torch.float64), "time": torch.rand(1, dtype=torch.float64)}
    found, truth = run_chain((schedule, step), values), program.run(values)
    assert all(relative_error(found[role], truth[role]) < 1e-14 for role in truth)


def test_without_such_layers_a_program_stays_as_it_is(parts: tuple[Program, ...]) -> None:
    prologue, _, step = parts
    assert SCHEDULE.call(prologue).programs == (prologue,)
    assert SCHEDULE.call(step).programs == (step,)


class Averaged(nn.Module):
    """The time is repeated for the batch before the layer, and no longer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor]:
        return (x + self.layer(time.expand(x.shape[0], 4).mean(0)),)


def test_a_layer_that_needs_a_size_of_another_input_stays() -> None:
    inputs = (Input("x", ("batch", None)), Input("time", (None,)))
    sample = {"x": torch.randn(2, 4, dtype=torch.float64), "time": torch.rand(1, dtype=torch.float64)}
    program = capture_program(CaptureSpec("averaged", "none", Averaged(), inputs, ("y",), {}, sample))
    assert HoistSchedule("time").call(program).programs == (program,)
