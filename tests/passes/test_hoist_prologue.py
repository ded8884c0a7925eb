"""What stays the same from step to step runs once, before them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.models.showo2.modeling import RowTables, Showo2
from flashu_compile.passes.analysis.dependence import depends_on
from flashu_compile.passes.base import Pass
from flashu_compile.passes.editing import module_path
from flashu_compile.passes.group_heads import GroupHeads
from flashu_compile.passes.hoist_prologue import HoistPrologue
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.manager import PassManager, relative_error
from flashu_compile.passes.merge_duplicates import MergeDuplicates
from flashu_compile.passes.pipelines import denoise as denoise_passes
from flashu_compile.passes.prune_ffn import PruneFFN
from flashu_compile.passes.remove_layers import RemoveLayers
from flashu_compile.passes.separate_first import SeparateFirst
from flashu_compile.passes.split_rows import SplitRows
from flashu_compile.program.program import Input, Program, Role, run_chain
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.fused_lm import DEPTH, GRID, PATCH, VOCABULARY
from tests.support.renamed import rename_modules, renamed_roots
from tests.support.row_programs import paths, placeholder_shape, shape, step_inputs, working
from tests.support.tiny import CONFIG, VAE, tiny_model

STEP = frozenset({Role.LATENTS, Role.TIMESTEP})
SUFFIX = frozenset({Role.SUFFIX_IDS})
ONCE: tuple[Pass, ...] = (GroupHeads(), SplitRows(STEP), MergeDuplicates(), HoistPrologue(STEP))
SHARED = ("image_embedder", "und_trans", "fusion_proj", "time_embed", "adaLN")
SIZES = [(1, 2, 2), (2, 10, 3), (3, 6, 9), (4, 23, 2)]


@pytest.fixture(scope="module")
def whole() -> Program:
    program = capture_program(capture_specs("t2i", tiny_model(torch.float64), VAE)[0])
    return KeepOutputs((Role.VELOCITY,)).call(program).programs[0]


@pytest.fixture(scope="module")
def parts(whole: Program) -> tuple[Program, ...]:
    return PassManager(ONCE).run(whole)[0]


def agrees(whole: Program, parts: tuple[Program, ...], tolerance: float = 1e-12) -> None:
    dtype = whole.sample[Role.LATENTS].dtype
    for size in SIZES:
        values = step_inputs(*size, dtype)
        found, truth = run_chain(parts, values), whole.run(values)
        assert all(relative_error(found[role], truth[role]) < tolerance for role in truth)


def test_both_together_give_the_same_for_ragged_prompts(whole: Program, parts: tuple[Program, ...]) -> None:
    agrees(whole, parts)


def test_one_prologue_serves_all_steps(whole: Program, parts: tuple[Program, ...]) -> None:
    prologue, step = parts
    first, second = step_inputs(2, 7, 4, torch.float64), step_inputs(2, 9, 4, torch.float64)
    carried = prologue.run(first)
    later = first | {role: second[role] for role in STEP}
    velocity = step.run({**carried, **{role: later[role] for role in STEP}})[Role.VELOCITY]
    assert relative_error(velocity, whole.run(later)[Role.VELOCITY]) < 1e-12
    assert relative_error(velocity, whole.run(first)[Role.VELOCITY]) > 1e-3


def test_each_part_takes_what_it_reads(parts: tuple[Program, ...]) -> None:
    prologue, step = parts
    assert (prologue.name, step.name) == ("denoise_prologue", "denoise")
    assert prologue.input_roles == (Role.PROMPT_IDS, Role.PROMPT_MASK)
    assert step.input_roles == (Role.LATENTS, Role.TIMESTEP, *prologue.outputs)
    layers = CONFIG.llm.num_hidden_layers + CONFIG.head.num_hidden_layers
    for use in ("key", "value"):
        assert sum(role.endswith(f".{use}") for role in prologue.outputs) == layers
    key = next(i for i in step.inputs if i.role.endswith(".key"))
    assert key.axes == ("batch", None, "prompt", None)
    assert placeholder_shape(step, key.role)[1] == str(CONFIG.llm.num_key_value_heads)


def test_the_step_runs_no_layer_on_rows_of_the_prompt(parts: tuple[Program, ...]) -> None:
    layers = [shape(node) for node in working(parts[1], "linear", "conv2d")]
    assert len(layers) > 30
    assert all(size.isdigit() for sizes in layers for size in sizes[1:])


def test_what_the_branches_share_runs_once(parts: tuple[Program, ...]) -> None:
    """Everything up to the first attention with text, and what depends on time alone."""
    nodes = list(working(parts[1]))
    attention = [n for n in nodes if "attention" in str(n.target)]
    text = next(n for n in attention if "showo.model.layers.0" in module_path(n))
    before = nodes[: nodes.index(text)]
    shared = before + [n for n in nodes if "adaLN" in module_path(n)]
    assert all(any(name in module_path(node) for node in shared) for name in SHARED)
    assert {shape(node)[0] for node in shared} == {"1"}


def test_the_prologue_has_nothing_of_image_or_time_and_stops_at_the_last_keys(
    parts: tuple[Program, ...],
) -> None:
    prologue, _ = parts
    used = paths(prologue) | set(prologue.exported.state_dict)
    assert not any(name in path for path in used for name in SHARED)
    assert any("showo.model.layers.1.mlp" in path for path in used)
    last = CONFIG.head.num_hidden_layers - 1
    assert any(f"diffusion_head_a.{last - 1}.mlp" in path for path in used)
    assert {p.rsplit(".", 1)[-1] for p in paths(prologue) if f"diffusion_head_a.{last}." in p} == {
        "k_proj",
        "v_proj",
    }


@pytest.mark.slow
def test_pruned_and_skipped_variants_have_prologues_of_their_own(whole: Program) -> None:
    cut: tuple[Pass, ...] = (PruneFFN("llm", {1: range(0, 64, 3)}), RemoveLayers("llm", (0,)))
    (variant,), _ = PassManager(cut).run(whole)
    parts, _ = PassManager((*cut, *ONCE)).run(whole)
    agrees(variant, parts)
    assert not any("showo.model.layers.0." in path for part in parts for path in paths(part))
    for part in parts:
        widths = {shape(n)[-1] for n in working(part, "linear") if "layers.1.mlp.up_proj" in module_path(n)}
        assert widths == {"22"}


@pytest.mark.slow
def test_the_whole_pipeline_in_single_precision(denoise: Program) -> None:
    parts, records = PassManager(denoise_passes(features=True)).run(denoise)
    assert all(record.error is None or record.error < 1e-6 for record in records)
    truth = KeepOutputs((Role.VELOCITY, Role.HEAD_FEATURES)).call(denoise).programs[0]
    agrees(truth, parts, 2e-6)


@pytest.mark.slow
def test_names_of_modules_do_not_matter(parts: tuple[Program, ...]) -> None:
    spec = capture_specs("t2i", tiny_model(torch.float64), VAE)[0]
    names = rename_modules(spec.module)
    renamed = capture_program(dataclasses.replace(spec, stacks=renamed_roots(spec.stacks, names)))
    others, _ = PassManager((KeepOutputs((Role.VELOCITY,)), *ONCE)).run(renamed)
    for part, other in zip(parts, others, strict=True):
        assert called(part) == called(other)


def called(program: Program) -> list[str]:
    return [str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"]


class SeesAll(Showo2):
    """Every row of text sees the image."""

    def tables(
        self,
        span: Bool[Tensor, "b rows"],
        positions: Int[Tensor, "b rows"],
        valid: Bool[Tensor, "b rows"] | None = None,
    ) -> RowTables:
        tables = super().tables(span, positions, valid)
        assert valid is not None
        itself = torch.eye(span.shape[1], dtype=torch.bool)
        return tables._replace(mask=(valid[:, None, :] | itself)[:, None])


def test_where_text_sees_the_image_the_program_is_left_alone() -> None:
    model = tiny_model(torch.float64)
    model.__class__ = SeesAll
    program = capture_program(capture_specs("t2i", model, VAE)[0])
    (seeing,), _ = PassManager((KeepOutputs((Role.VELOCITY,)),)).run(program)
    (after,), records = PassManager(ONCE).run(seeing)
    assert records[-1].changes == ()
    assert "attention lets rows of" in records[-1].declined[0]
    assert "see rows that change" in records[-1].declined[0]
    assert after.name == "denoise"
    agrees(seeing, (after,))


class Relative(Showo2):
    """Positions are shares of the whole length, on which keys depend, and values do not."""

    def tables(self, span: Tensor, positions: Tensor, valid: Tensor | None = None) -> RowTables:
        return super().tables(span, 20 * positions / positions.shape[1], valid)


def test_where_values_stay_but_keys_do_not_the_program_is_left_alone() -> None:
    model = tiny_model(torch.float64)
    model.__class__ = Relative
    program = capture_program(capture_specs("mmu", model, VAE)[0])
    split = (
        SeparateFirst(Role.SUFFIX_IDS, Role.IMAGE_END_IDS),
        GroupHeads(),
        SplitRows(SUFFIX),
        MergeDuplicates(),
    )
    _, records = PassManager((*split, HoistPrologue(SUFFIX))).run(program)
    (reason,) = records[-1].declined
    assert "layers.0.self_attn, keys or values change, but not both" in reason


def test_a_program_that_was_not_split_is_left_alone(whole: Program) -> None:
    result = HoistPrologue(STEP).call(whole)
    assert result.programs == (whole,)
    assert result.changes == ()
    assert result.reasons == ("no keys or values are independent of latents, timestep",)


def test_the_second_model_runs_the_picture_and_what_is_before_the_question_once(fused: Program) -> None:
    passes = (GroupHeads(), SplitRows(SUFFIX), MergeDuplicates(), HoistPrologue(SUFFIX))
    (prologue, step), _ = PassManager(passes).run(fused)
    assert prologue.input_roles == (Role.PIXELS, Role.PREFIX_IDS)
    assert len([role for role in step.input_roles if role.endswith((".key", ".value"))]) == 2 * DEPTH
    suffix = placeholder_shape(step, Role.SUFFIX_IDS)[1]
    assert all(shape(node)[-2] == suffix or len(shape(node)) == 2 for node in working(step))
    assert not any(Role.SUFFIX_IDS in roles for roles in depends_on(prologue).values())
    generator = torch.Generator().manual_seed(3)
    for batch, before, behind in [
        (1, 2, 7),
        (3, 8, 2),
    ]:  # not 9, the picture's length, which its export forbids
        values = {
            Role.PIXELS: torch.rand(batch, 3, GRID * PATCH, GRID * PATCH, generator=generator),
            Role.PREFIX_IDS: torch.randint(VOCABULARY, (batch, before), generator=generator),
            Role.SUFFIX_IDS: torch.randint(VOCABULARY, (batch, behind), generator=generator),
        }
        found, truth = run_chain((prologue, step), values), fused.run(values)
        assert all(relative_error(found[role], truth[role]) < 2e-6 for role in truth)


class Repeating(nn.Module):
    """New rows read a context, and a summary of it that is repeated, and worked on, once for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.past, self.about, self.ask = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

    def forward(self, context: Tensor, new: Tensor) -> tuple[Tensor]:
        past = self.past(context)[:, None]
        repeated = context.mean(1, keepdim=True).expand(-1, new.shape[1], -1)
        query = (self.ask(new) + self.about(repeated))[:, None]
        return (F.scaled_dot_product_attention(query, past, past)[:, 0],)


def test_what_is_as_long_as_what_changes_stays() -> None:
    """No value of the new rows is in it, but a prologue would have to be told how many there are."""
    torch.manual_seed(0)

    def values(context: int, new: int) -> dict[str, Tensor]:
        draw = lambda rows: torch.randn(2, rows, 6, dtype=torch.float64)  # noqa: E731
        return {"context": draw(context), "new": draw(new)}

    inputs = (Input("context", ("batch", "context", None)), Input("new", ("batch", "new", None)))
    program = capture_program(CaptureSpec("repeating", "none", Repeating(), inputs, ("y",), {}, values(4, 3)))
    (prologue, step), _ = PassManager((HoistPrologue(frozenset({"new"})),)).run(program)
    assert prologue.input_roles == ("context",)
    assert paths(prologue) == {"past"}
    assert paths(step) == {"ask", "about", ""}
    given = values(5, 7)
    carried = prologue.run(given)
    for new in (7, 2):
        given["new"] = values(5, new)["new"]
        assert relative_error(step.run({**given, **carried})["y"], program.run(given)["y"]) < 1e-14
