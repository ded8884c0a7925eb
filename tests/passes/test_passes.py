"""Each clean-up pass on captured programs: what is left in the graph, and that the numbers are the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashu_compile.errors import PassError
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.canonical_names import CanonicalNames
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.fold_constants import FoldConstants
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.manager import PassManager, compare, relative_error
from flashu_compile.passes.pipelines import EXACT
from flashu_compile.passes.remove_dead_code import RemoveDeadCode
from flashu_compile.passes.split_at_output import SplitAtOutput
from flashu_compile.program import Program, Role, run_chain
from tests.tiny import CONFIG, tiny_model


def targets(program: Program) -> set[str]:
    return {str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"}


def only(result: PassResult) -> Program:
    (program,) = result.programs
    return program


def test_capture_equals_the_published_step(denoise: Program) -> None:
    """The aligned rows of the captured step give the velocity of the published padded layout."""
    from flashu_compile.models.showo2.reference import GenerationReference

    model, sample = tiny_model(), denoise.sample
    rows, offsets = [], []
    for ids, mask, tail in zip(
        sample[Role.PROMPT_IDS], sample[Role.PROMPT_MASK], sample[Role.TAIL_IDS], strict=True
    ):
        span = torch.zeros(CONFIG.span_length, dtype=torch.long)
        padding = torch.zeros(int((~mask).sum()), dtype=torch.long)
        rows.append(torch.cat([ids[mask], span, tail, padding]))
        offsets.append(int(mask.sum()))
    reference = GenerationReference(model, torch.stack(rows), torch.tensor(offsets))
    truth = reference.step(sample[Role.LATENTS], sample[Role.TIMESTEP])
    values = denoise.run(sample)
    assert relative_error(values[Role.VELOCITY], truth.velocity) < 1e-6
    assert relative_error(values[Role.HEAD_FEATURES], truth.head_features) < 1e-6


@pytest.mark.parametrize(("prompt", "batch"), [(2, 1), (5, 3), (11, 2)])
def test_captured_step_is_dynamic(denoise: Program, prompt: int, batch: int) -> None:
    tail = CONFIG.sequence_length - CONFIG.span_length - prompt
    inputs = {
        Role.PROMPT_IDS: torch.randint(512, (batch, prompt)),
        Role.PROMPT_MASK: torch.ones(batch, prompt, dtype=torch.bool),
        Role.TAIL_IDS: torch.randint(512, (batch, tail)),
        Role.LATENTS: torch.randn(batch, *CONFIG.latent_shape),
        Role.TIMESTEP: torch.rand(batch),
    }
    assert denoise.run(inputs)[Role.VELOCITY].shape == (batch, *CONFIG.latent_shape)


def test_keep_outputs_drops_what_is_not_asked_for(denoise: Program) -> None:
    result = KeepOutputs((Role.VELOCITY,)).call(denoise)
    assert only(result).outputs == (Role.VELOCITY,)
    assert set(result.dropped) == {Role.LOGITS, Role.HEAD_FEATURES}
    assert compare(denoise, result) == {Role.VELOCITY: 0.0}


def test_keeping_every_output_changes_nothing(denoise: Program) -> None:
    assert only(KeepOutputs(denoise.outputs).call(denoise)) is denoise


def test_dead_code_takes_its_weights_along(denoise: Program) -> None:
    kept = only(KeepOutputs((Role.VELOCITY,)).call(denoise))
    result = RemoveDeadCode().call(kept)
    after = only(result)
    assert not any("lm_head" in name for name in after.exported.state_dict)
    assert not any("_assert" in target for target in targets(after))
    assert any("lm_head" in name for name in denoise.exported.state_dict)
    assert compare(kept, result) == {Role.VELOCITY: 0.0}


def test_dead_code_is_removed_once(denoise: Program) -> None:
    after = only(RemoveDeadCode().call(denoise))
    assert only(RemoveDeadCode().call(after)) is after


def test_constants_fold_to_the_interpolated_positions(understand: Program) -> None:
    """At another resolution the position table is interpolated: at compile time, and only there."""
    assert any("bicubic" in target for target in targets(understand))
    result = FoldConstants().call(understand)
    after = only(result)
    assert not any("bicubic" in target for target in targets(after))
    assert "model.position_embedding.weight" not in after.exported.state_dict
    assert all(error < 1e-6 for error in compare(understand, result).values())


def test_the_fixed_time_token_folds_with_its_mlp(understand: Program) -> None:
    after = only(FoldConstants().call(understand))
    assert any("time_embed" in name for name in understand.exported.state_dict)
    assert not any("time_embed" in name for name in after.exported.state_dict)


def test_folding_never_inflates(understand: Program) -> None:
    """A result larger than the limit and than what it comes from is left in the graph."""
    result = FoldConstants(max_bytes=0).call(understand)

    def stored(program: Program) -> int:
        tensors = [*program.exported.state_dict.values(), *program.exported.constants.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    assert stored(only(result)) <= stored(understand)


def test_split_gives_two_programs_that_chain(understand: Program) -> None:
    result = SplitAtOutput(Role.IMAGE_EMBEDS, ("vision", "language"), ("batch", None, None)).call(understand)
    vision, language = result.programs
    assert vision.input_roles == (Role.PIXELS,)
    assert vision.outputs == (Role.IMAGE_EMBEDS,)
    assert set(language.input_roles) == {Role.PREFIX_IDS, Role.SUFFIX_IDS, Role.IMAGE_EMBEDS}
    assert not any("und_trans" in name for name in language.exported.state_dict)
    assert not any("showo" in name for name in vision.exported.state_dict)
    assert all(error < 1e-6 for error in compare(understand, result).values())


def test_split_declines_with_a_reason(denoise: Program) -> None:
    manager = PassManager((SplitAtOutput(Role.IMAGE_EMBEDS, ("a", "b"), ("batch", None, None)),))
    with pytest.raises(
        PassError, match=r"SplitAtOutput failed on program 'denoise'.*no output 'image_embeds'"
    ):
        manager.run(denoise)


def test_names_say_where_nodes_come_from(denoise: Program) -> None:
    after = only(CanonicalNames().call(denoise))
    names = [node.name for node in after.exported.graph.nodes]
    assert "model_showo_model_layers_1_mlp_down_proj__linear" in names
    assert len(names) == len(set(names))
    assert only(CanonicalNames().call(after)) is after


@pytest.mark.parametrize("name", ["denoise", "understand", "understand64"])
def test_exact_pipelines_are_exact(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name)
    programs, records = PassManager(EXACT[program.name]).run(program)
    truth = program.run(program.sample)
    values = run_chain(programs, program.sample)
    limit = 1e-12 if program.name.endswith("64") else 1e-6
    for role in (r for r in truth if r in values):
        assert relative_error(values[role], truth[role]) < limit
    assert all(record.error is None or record.error < 1e-6 for record in records)


@dataclasses.dataclass(frozen=True)
class Break(Pass):
    """Declares itself exact and doubles an output."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        node = editor.outputs()[Role.VELOCITY]
        with editor.graph.inserting_after(node):
            doubled = editor.graph.call_function(torch.ops.aten.mul.Scalar, (node, 2.0))
        doubled.meta = dict(node.meta)
        editor.set_outputs([doubled, *list(editor.outputs().values())[1:]])
        return PassResult((editor.finish(),), ("doubled the velocity",))


def test_manager_catches_a_pass_that_lies(denoise: Program) -> None:
    with pytest.raises(
        PassError, match=r"Break failed on program 'denoise'.*declared exact.*before it: RemoveDeadCode"
    ):
        PassManager((RemoveDeadCode(), Break())).run(denoise)


@dataclasses.dataclass(frozen=True)
class BreakShapes(Break):
    """Changes a dtype behind the back of the metadata."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        node = editor.outputs()[Role.VELOCITY]
        with editor.graph.inserting_after(node):
            cast = editor.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float64))
        cast.meta = dict(node.meta)
        editor.set_outputs([cast, *list(editor.outputs().values())[1:]])
        return PassResult((editor.finish(),), ("cast",))


def test_manager_propagates_shapes_and_dtypes_again(denoise: Program) -> None:
    with pytest.raises(PassError, match=r"left node .* as torch.float64"):
        PassManager((BreakShapes(),)).run(denoise)
