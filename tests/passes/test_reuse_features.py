"""The program that reuses head features holds the final layer and the time embedding, and nothing else."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from flashu_compile.errors import PassError
from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.manager import PassManager, check_graph, compare, relative_error
from flashu_compile.passes.pipelines import CLEAN
from flashu_compile.passes.reuse_features import ReuseFeatures
from flashu_compile.program.program import Program, Role, run_chain
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def step(denoise: Program) -> Program:
    """The step without the logits that nothing reads."""
    return KeepOutputs((Role.VELOCITY, Role.HEAD_FEATURES)).call(denoise).programs[0]


@pytest.fixture(scope="module")
def reuse(step: Program) -> Program:
    return ReuseFeatures().call(step).programs[1]


def test_the_step_stays_and_the_new_program_reads_features_and_time(step: Program, reuse: Program) -> None:
    result = ReuseFeatures().call(step)
    assert result.programs[0] is step
    assert result.changes == ("reuse: timestep, head_features → velocity",)
    assert reuse.name == "reuse"
    assert reuse.input_roles == (Role.TIMESTEP, Role.HEAD_FEATURES)
    assert reuse.inputs[1].axes == ("batch", None, None)
    assert reuse.outputs == (Role.VELOCITY,)
    check_graph(reuse)


def test_nothing_that_computed_the_features_is_left(step: Program, reuse: Program) -> None:
    modules = {name.removeprefix("model.").split(".")[0] for name in reuse.exported.state_dict}
    assert modules == {"time_embed", "diffusion_head_b"}
    paths = {
        path
        for node in reuse.exported.graph.nodes
        for path, _ in node.meta.get("nn_module_stack", {}).values()
    }
    assert any(path.endswith("diffusion_head_b.linear") for path in paths)
    for root in (*step.stacks.values(), "model.image_embedder", "model.fusion_proj", "model.showo"):
        assert not any(path.startswith(root) for path in paths)


def test_the_two_are_exact_together(step: Program) -> None:
    assert compare(step, ReuseFeatures().call(step)) == {Role.VELOCITY: 0.0, Role.HEAD_FEATURES: 0.0}


@pytest.mark.parametrize("batch", [1, 3])
def test_old_features_at_another_time_equal_the_eager_final_layer(reuse: Program, batch: int) -> None:
    model: Showo2 = tiny_model()
    generator = torch.Generator().manual_seed(batch)
    features = torch.randn(
        batch, model.config.image_tokens, model.config.head.hidden_size, generator=generator
    )
    time = torch.rand(1, generator=generator)
    with torch.no_grad():
        truth = model.velocity(features, model.embed_time(time.expand(batch))[0])
        found = reuse.run({Role.HEAD_FEATURES: features, Role.TIMESTEP: time})
    assert relative_error(found[Role.VELOCITY], truth) < 1e-6


def test_outputs_that_do_not_read_the_features_are_no_part_of_it(denoise: Program) -> None:
    """The logits come from the language model, which the new program must not hold."""
    step, reuse = ReuseFeatures(called="again").call(denoise).programs
    assert step is denoise
    assert (reuse.name, reuse.outputs) == ("again", (Role.VELOCITY,))


def test_through_onnx_runtime(step: Program) -> None:
    programs, records = PassManager((ReuseFeatures(), *CLEAN)).run(step)
    assert [program.name for program in programs] == ["denoise", "reuse"]
    assert all(record.error is None or record.error < 1e-6 for record in records)
    model = emit_onnx(programs[1])
    operators = [node.op_type for node in model.graph]
    assert operators.count("Attention") == 0
    assert operators.count("Gemm") == 4  # two of the time embedding, two of the final layer
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert [value.name for value in session.get_inputs()] == [Role.TIMESTEP, Role.HEAD_FEATURES]
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        values = {
            Role.TIMESTEP: torch.rand(1, generator=generator),
            Role.HEAD_FEATURES: torch.randn(
                batch, *step.run(step.sample)[Role.HEAD_FEATURES].shape[1:], generator=generator
            ),
        }
        (velocity,) = session.run(None, {role: value.numpy() for role, value in values.items()})
        with torch.no_grad():
            truth = run_chain(programs[1:], values)[Role.VELOCITY]
        assert relative_error(torch.from_numpy(velocity), truth) < 1e-5


def test_it_declines_with_a_reason(denoise: Program) -> None:
    velocity = KeepOutputs((Role.VELOCITY,)).call(denoise).programs[0]
    with pytest.raises(
        PassError, match=r"ReuseFeatures failed on program 'denoise'.*no output 'head_features'"
    ):
        PassManager((ReuseFeatures(),)).run(velocity)
    with pytest.raises(PassError, match="no other output of program 'denoise' depends on 'logits'"):
        PassManager((dataclasses.replace(ReuseFeatures(), feature=Role.LOGITS),)).run(denoise)
