"""Neurons leave every layout of feed-forward group, weights and all."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashu_compile.errors import PassError
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.passes import pipelines
from flashu_compile.passes.analysis.feed_forward import feed_forwards
from flashu_compile.passes.base import PassResult
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.prune_ffn import PruneFFN
from flashu_compile.passes.remove_layers import RemoveLayers
from flashu_compile.program.program import Program, run_chain
from flashu_compile.program.trace import CaptureSpec
from tests.support.fused_lm import DEPTH, EYE_HIDDEN, HIDDEN, fused_capture, fused_model
from tests.support.programs import only
from tests.support.tiny import VAE, tiny_model
from tests.support.toys import HIDDEN as TOY_HIDDEN
from tests.support.toys import Feed, Plain, Sliced, Stack, toy

#: (stack, blocks, width, the layers whose outputs are neurons with how often, the layer that reads them)
_LAYOUT = {
    "denoise": (
        ("llm", 2, 64, {"mlp.gate_proj": 1, "mlp.up_proj": 1}, "mlp.down_proj"),
        ("semantic", 1, 48, {"mlp.fc1": 1}, "mlp.fc2"),
        ("head", 2, 64, {"mlp.gate_proj": 1, "mlp.up_proj": 1}, "mlp.down_proj"),
    ),
    "understand": (
        ("llm", 2, 64, {"mlp.gate_proj": 1, "mlp.up_proj": 1}, "mlp.down_proj"),
        ("semantic", 1, 48, {"mlp.fc1": 1}, "mlp.fc2"),
    ),
    "fused": (
        ("llm", DEPTH, HIDDEN, {"feed.wide": 2}, "feed.narrow"),
        ("semantic", 2, EYE_HIDDEN, {"feed.wide": 1}, "feed.narrow"),
    ),
}


@pytest.fixture(scope="module")
def specs() -> dict[str, CaptureSpec]:
    return {
        "denoise": capture_specs("t2i", tiny_model(), VAE)[0],
        "understand": capture_specs("mmu", tiny_model(), VAE)[0],
        "fused": fused_capture(fused_model()),
    }


def _pruned(spec: CaptureSpec, name: str, kept: dict[str, dict[int, list[int]]]) -> dict[str, Tensor]:
    """Outputs of the eager module with the rows and columns of its layers cut by hand."""
    module = copy.deepcopy(spec.module)
    for stack, blocks, width, ups, down in _LAYOUT[name]:
        for index in range(blocks):
            neurons = kept.get(stack, {}).get(index)
            if neurons is None:
                continue
            block = module.get_submodule(f"{spec.stacks[stack]}.{index}")
            for path, times in ups.items():
                layer = block.get_submodule(path)
                rows = [part * width + neuron for part in range(times) for neuron in neurons]
                layer.weight = nn.Parameter(layer.weight[rows])
                if layer.bias is not None:
                    layer.bias = nn.Parameter(layer.bias[rows])
            layer = block.get_submodule(down)
            layer.weight = nn.Parameter(layer.weight[:, neurons])
    with torch.no_grad():
        results = module(*(spec.sample[i.role] for i in spec.inputs))
    return dict(zip(spec.outputs, results, strict=True))


def _some(width: int) -> st.SearchStrategy[list[int]]:
    return st.sets(st.integers(0, width - 1), min_size=1).map(sorted)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_kept_neurons(
    data: st.DataObject, specs: dict[str, CaptureSpec], denoise: Program, understand: Program, fused: Program
) -> None:
    programs = {"denoise": denoise, "understand": understand, "fused": fused}
    name = data.draw(st.sampled_from(sorted(programs)))
    kept = {
        stack: data.draw(st.dictionaries(st.integers(0, blocks - 1), _some(width)), label=stack)
        for stack, blocks, width, _, _ in _LAYOUT[name]
    }
    after = programs[name]
    for stack, neurons in kept.items():
        after = only(PruneFFN(stack, neurons).call(after))
    check_graph(after)
    truth = _pruned(specs[name], name, kept)
    values = after.run(after.sample)
    assert all(relative_error(values[role], truth[role]) <= 1e-5 for role in truth)
    assert after.exported.state_dict.keys() <= programs[name].exported.state_dict.keys()
    assert after.exported.constants.keys() <= programs[name].exported.constants.keys()
    for stack, blocks, width, ups, down in _LAYOUT[name]:
        assert [g.width for g in feed_forwards(after, stack)] == [
            len(kept[stack].get(index, range(width))) for index in range(blocks)
        ]
        for index, cut in kept[stack].items():
            weight = after.exported.state_dict[f"{after.stacks[stack]}.{index}.{down}.weight"]
            assert weight.shape[1] == len(cut)
            for path, times in ups.items():
                weight = after.exported.state_dict[f"{after.stacks[stack]}.{index}.{path}.weight"]
                assert weight.shape[0] == times * len(cut)


def test_keeping_all_is_no_change(denoise: Program) -> None:
    """That some blocks keep all is normal; that all of them do is not what was asked for."""
    _, (record,) = PassManager((PruneFFN("llm", {0: range(64), 1: np.arange(64)}),)).run(denoise)
    assert record.declined == ("all neurons are kept in every block of stack llm that is to be pruned",)
    assert record.undone
    _, (record,) = PassManager((PruneFFN("llm", {0: range(64), 1: np.arange(32)}),)).run(denoise)
    assert len(record.changes) == 1
    assert not record.declined
    assert PruneFFN("llm", {}).call(denoise) == PassResult.unchanged(denoise)


def test_pruning_leaves_its_program_and_dtype_as_they_are() -> None:
    program = toy(Stack([Feed(Plain()).half()], call=lambda block, x: block(x.half())))
    before = {name: tensor.clone() for name, tensor in program.exported.state_dict.items()}
    after = only(PruneFFN("stack", {0: np.array([1, 4])}).call(program))
    assert {t.dtype for t in after.exported.state_dict.values()} == {torch.float16}
    assert after.exported.state_dict["blocks.0.inner.up.weight"].shape[0] == 2
    assert all(torch.equal(program.exported.state_dict[name], tensor) for name, tensor in before.items())


def test_slices_of_a_fused_layer_are_cut() -> None:
    module = Stack([Feed(Sliced())])
    program = toy(module)
    kept = [0, 3, 9]
    (after,), _ = PassManager((PruneFFN("stack", {0: kept}),)).run(program)
    feed = module.blocks[0].inner
    rows = [*kept, *(TOY_HIDDEN + neuron for neuron in kept)]
    with torch.no_grad():
        feed.both.weight, feed.both.bias = (
            nn.Parameter(feed.both.weight[rows]),
            nn.Parameter(feed.both.bias[rows]),
        )
        feed.down.weight = nn.Parameter(feed.down.weight[:, kept])
        x = program.sample["x"]
        hidden = feed.both(module.blocks[0].norm(x))
        truth = x + feed.down(torch.sigmoid(hidden[..., 3:]) * hidden[..., :3])
    assert relative_error(after.run(after.sample)["y"], truth) <= 1e-6


@pytest.mark.parametrize("kept", [{0: [2, 5]}, {0: [2, 5], 1: [1, 7, 8]}])
def test_shared_weights_are_cut_for_each_reader(kept: dict[int, list[int]]) -> None:
    """Two blocks with one set of weights may keep different neurons; full weights stay only if someone is whole."""
    shared = Plain()
    blocks = [Feed(shared), Feed(shared)]
    program = toy(Stack(blocks))
    after = only(PruneFFN("stack", kept).call(program))
    with torch.no_grad():
        truth = program.sample["x"]
        for index, block in enumerate(blocks):
            neurons = kept.get(index, list(range(TOY_HIDDEN)))
            hidden = torch.relu(block.norm(truth) @ shared.up.weight[neurons].T + shared.up.bias[neurons])
            truth = truth + hidden @ shared.down.weight[:, neurons].T + shared.down.bias
    assert relative_error(after.run(after.sample)["y"], truth) <= 1e-6
    tensors = [*after.exported.state_dict.values(), *after.exported.constants.values()]
    whole = any(tuple(t.shape) == (TOY_HIDDEN, 6) for t in tensors)
    assert whole == (len(kept) == 1)


def test_pruning_removal_and_exact_passes_compose(fused: Program, specs: dict[str, CaptureSpec]) -> None:
    kept = {"llm": {index: [index, 10 + index, 39] for index in range(DEPTH)}}
    steps = (PruneFFN("llm", kept["llm"]), *pipelines.understand())
    programs, _ = PassManager(steps).run(fused)
    truth = _pruned(specs["fused"], "fused", kept)
    values = run_chain(programs, fused.sample)
    assert relative_error(values["logits"], truth["logits"]) <= 1e-5
    fewer, _ = PassManager((PruneFFN("llm", kept["llm"]), RemoveLayers("llm", (1, 2)))).run(fused)
    assert [group.width for group in feed_forwards(fewer[0], "llm")] == [3, 3]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({5: [0]}, r"no block 5 to prune: stack 'llm'.*has 2"),
        ({0: []}, r"kept in block 0 of stack 'llm' are not a list of at least one number"),
        ({1: [3, 2]}, r"kept in block 1 of stack 'llm' are not different numbers from 0 to 63 in ascending"),
        ({1: [2, 2]}, r"kept in block 1 .* ascending"),
        ({0: [0, 64]}, r"kept in block 0 .* from 0 to 63"),
        ({0: [-1, 2]}, r"kept in block 0 .* from 0 to 63"),
    ],
)
def test_impossible_decisions_are_named(denoise: Program, kept: dict[int, list[int]], message: str) -> None:
    with pytest.raises(PassError, match=message):
        PassManager((PruneFFN("llm", kept),)).run(denoise)
