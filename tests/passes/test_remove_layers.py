"""Layers leave the graph with their weights; the rest computes what an eager model without them does."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashu_compile.errors import PassError
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.passes import pipelines
from flashu_compile.passes.analysis.blocks import residual_blocks
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.remove_layers import RemoveLayers
from flashu_compile.program.program import Program, run_chain
from flashu_compile.program.trace import CaptureSpec
from tests.support.fused_lm import DEPTH, fused_capture, fused_model
from tests.support.programs import only
from tests.support.tiny import VAE, tiny_model
from tests.support.toys import Feed, Plain, Stack, toy

_CASES = [
    ("denoise", "llm", 2),
    ("denoise", "semantic", 1),
    ("denoise", "head", 2),
    ("understand", "llm", 2),
    ("understand", "semantic", 1),
    ("fused", "llm", DEPTH),
    ("fused", "semantic", 2),
]


@pytest.fixture(scope="module")
def specs() -> dict[str, CaptureSpec]:
    """What the programs were captured from, whose modules serve as the eager truth."""
    return {
        "denoise": capture_specs("t2i", tiny_model(), VAE)[0],
        "understand": capture_specs("mmu", tiny_model(), VAE)[0],
        "fused": fused_capture(fused_model()),
    }


def _without(spec: CaptureSpec, removed: dict[str, set[int]]) -> dict[str, torch.Tensor]:
    """Outputs of the eager module with layers taken out of its lists."""
    module = copy.deepcopy(spec.module)
    for stack, layers in removed.items():
        path, _, name = spec.stacks[stack].rpartition(".")
        parent = module.get_submodule(path)
        kept = [layer for index, layer in enumerate(getattr(parent, name)) if index not in layers]
        setattr(parent, name, nn.ModuleList(kept))
    with torch.no_grad():
        results = module(*(spec.sample[i.role] for i in spec.inputs))
    return dict(zip(spec.outputs, results, strict=True))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_subset_of_layers(
    data: st.DataObject, specs: dict[str, CaptureSpec], denoise: Program, understand: Program, fused: Program
) -> None:
    programs = {"denoise": denoise, "understand": understand, "fused": fused}
    name = data.draw(st.sampled_from(sorted(programs)))
    stacks = {stack: count for case, stack, count in _CASES if case == name}
    removed = {
        stack: data.draw(st.sets(st.integers(0, count - 1)), label=stack) for stack, count in stacks.items()
    }
    after = programs[name]
    for stack, layers in removed.items():
        after = only(RemoveLayers(stack, tuple(sorted(layers))).call(after))
    check_graph(after)
    truth = _without(specs[name], removed)
    values = after.run(after.sample)
    assert all(relative_error(values[role], truth[role]) <= 1e-5 for role in truth)
    assert (after is programs[name]) == (not any(removed.values()))
    gone = tuple(f"{after.stacks[stack]}.{layer}." for stack, layers in removed.items() for layer in layers)
    assert not any(weight.startswith(gone) for weight in after.exported.state_dict)


@pytest.mark.parametrize(("name", "stack", "count"), _CASES)
def test_all_layers_can_go(
    name: str, stack: str, count: int, specs: dict[str, CaptureSpec], request: pytest.FixtureRequest
) -> None:
    program: Program = request.getfixturevalue(name)
    (after,), _ = PassManager((RemoveLayers(stack, tuple(range(count))),)).run(program)
    truth = _without(specs[name], {stack: set(range(count))})
    values = after.run(after.sample)
    assert all(relative_error(values[role], truth[role]) <= 1e-5 for role in truth)
    assert not any(weight.startswith(program.stacks[stack]) for weight in after.exported.state_dict)


def test_the_rest_keeps_its_order(fused: Program) -> None:
    after = only(RemoveLayers("llm", (1,)).call(fused))
    expected = [f"trunk.{layer}" for layer in (0, 2, 3)]
    blocks = residual_blocks(after, "llm")
    assert [list(b.exit.meta["nn_module_stack"].values())[-1][0] for b in blocks] == expected


def test_removing_works_at_other_sizes(denoise: Program, specs: dict[str, CaptureSpec]) -> None:
    """Batch and text length stay dynamic."""
    after = only(RemoveLayers("llm", (0,)).call(denoise))
    sample = {role: value[:1] for role, value in denoise.sample.items()}
    for role in ("prompt_ids", "prompt_mask"):
        sample[role] = sample[role][:, :4]
    whole = denoise.run(sample)
    values = after.run(sample)
    assert {role: value.shape for role, value in values.items()} == {r: v.shape for r, v in whole.items()}


def test_exact_pipelines_follow(fused: Program) -> None:
    """Removal composes with the exact passes, before them as after them."""
    (vision, language), _ = PassManager((RemoveLayers("llm", (0, 3)), *pipelines.understand())).run(fused)
    whole, _ = PassManager(pipelines.understand()).run(fused)
    later = only(RemoveLayers("llm", (0, 3)).call(whole[1]))
    first = run_chain((vision, language), fused.sample)["logits"]
    second = run_chain((vision, later), fused.sample)["logits"]
    assert relative_error(second, first) <= 1e-6


def test_nothing_to_remove_is_no_change(denoise: Program) -> None:
    assert only(RemoveLayers("llm", ()).call(denoise)) is denoise


def test_a_layer_that_is_not_there_is_named(denoise: Program) -> None:
    with pytest.raises(PassError, match=r"RemoveLayers failed.*no layer 7 to remove: stack 'llm'.*has 2"):
        PassManager((RemoveLayers("llm", (0, 7)),)).run(denoise)


def test_a_layer_that_others_read_stays() -> None:
    class Reading(Plain):
        def forward(self, x):
            self.seen = self.up(x)
            return self.down(self.seen.relu())

    class Kept(Stack):
        def forward(self, x):
            first, second = self.blocks
            y = first(x)
            seen = first.inner.seen
            first.inner.seen = None
            return (second(y) + seen.sum(-1, keepdim=True),)

    program = toy(Kept([Feed(Reading()), Feed(Plain())]))
    with pytest.raises(
        PassError, match=r"layer 0 of stack 'stack' .*cannot be removed: something outside it reads"
    ):
        RemoveLayers("stack", (0,)).call(program)
    assert len(only(RemoveLayers("stack", (1,)).call(program)).exported.state_dict) < len(
        program.exported.state_dict
    )
