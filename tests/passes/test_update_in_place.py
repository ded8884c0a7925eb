"""Decoding on buffers of fixed capacity, batches of different lengths included, against the whole sequence at once."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.bundle.signatures import updated
from flashu_compile.errors import StructureError
from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.operators.write_rows import WRITE_ROWS
from flashu_compile.passes import pipelines
from flashu_compile.passes.cache_rows import new_rows
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.manager import PassManager, relative_error
from flashu_compile.passes.update_in_place import UpdateInPlace
from flashu_compile.program.program import Input, Program, Role
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.passes.conftest import Decoding
from tests.support.row_programs import strided_inputs
from tests.support.tiny import CONFIG

PREFIX = 5
COUNTER = Role.ROWS_BEFORE


def _ids(count: int, seed: int) -> Tensor:
    return torch.randint(CONFIG.llm.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


def _caches(parts: Decoding) -> list[str]:
    return [role for role in parts.language.input_roles if updated(role) in parts.language.outputs]


def test_elements_of_different_lengths_equal_whole_sequences(parts: Decoding) -> None:
    """Two answers to one picture: 2 and 4 new ids, then three more one by one, in buffers full of other things."""
    vision, prologue, language = parts.vision, parts.prologue, parts.language
    embeds = vision.run({Role.PIXELS: vision.sample[Role.PIXELS][:1]})[Role.IMAGE_EMBEDS]
    start = {Role.PREFIX_IDS: _ids(PREFIX, 0), Role.IMAGE_EMBEDS: embeds}
    end = _ids(1, 1)
    context = prologue.run(start | {Role.IMAGE_END_IDS: end})
    most = max(value.shape[2] for value in context.values())
    state = {}
    for role, value in context.items():
        rows = value.expand(2, -1, -1, -1)
        state[role] = torch.nn.functional.pad(rows, (0, 0, 0, 9), value=1e3)
    firsts, more = [_ids(2, 2), _ids(4, 3)], [_ids(3, 4), _ids(3, 5)]
    filler = torch.zeros(1, 2, dtype=torch.int64)
    before = torch.tensor([most, most])
    ids = torch.cat([torch.cat([firsts[0], filler], dim=1), firsts[1]])
    outputs = language.run({Role.SUFFIX_IDS: ids, COUNTER: before, **state})
    whole = [torch.cat([end, first], dim=1) for first in firsts]
    truth = parts.uncut.run(start | {Role.SUFFIX_IDS: whole[1]})[Role.LOGITS]
    assert relative_error(outputs[Role.LOGITS][1:], truth) < 2e-6
    before = before + torch.tensor([2, 4])
    for step in range(3):
        state = {role: outputs[updated(role)] for role in state}
        new = [ids[:, step : step + 1] for ids in more]
        outputs = language.run({Role.SUFFIX_IDS: torch.cat(new), COUNTER: before, **state})
        before = before + 1
        whole = [torch.cat(pair, dim=1) for pair in zip(whole, new, strict=True)]
        for element, suffix in enumerate(whole):
            truth = parts.uncut.run(start | {Role.SUFFIX_IDS: suffix})[Role.LOGITS]
            assert relative_error(outputs[Role.LOGITS][element : element + 1], truth) < 2e-6


def test_every_cache_is_written_and_none_is_joined(parts: Decoding) -> None:
    program = parts.language
    graph, caches = program.exported.graph, _caches(parts)
    assert len(caches) == len([o for o in parts.cached.outputs if o.endswith(".new")]) > 0
    assert not any(new_rows(role) in program.outputs for role in caches)
    written = graph.find_nodes(op="call_function", target=WRITE_ROWS)
    assert len(written) == len(caches)
    capacities = {str(node.meta["val"].shape[2]) for node in written}
    for join in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        assert capacities.isdisjoint(map(str, join.meta["val"].shape))
    axes = {i.role: i.axes for i in program.inputs}
    assert axes[COUNTER] == ("batch",)
    assert all(axes[role][2].startswith("capacity") for role in caches)


def test_layers_behind_token_gather_have_smaller_buffers(parts: Decoding) -> None:
    axes = {i.role: i.axes[2] for i in parts.language.inputs if i.role in _caches(parts)}
    sizes = {role: value.shape[2] for role, value in parts.language.sample.items() if role in axes}
    most = max(sizes.values())
    for role, size in sizes.items():
        assert axes[role] == ("capacity" if size == most else f"capacity - {most - size}")


def test_onnx_scatters(parts: Decoding) -> None:
    model = emit_onnx(parts.language)
    scatters = [node for node in model.graph if node.op_type == "TensorScatter"]
    assert {node.inputs[0].name for node in scatters} == set(_caches(parts))
    assert {node.outputs[0].name for node in scatters} == {updated(role) for role in _caches(parts)}
    assert all(isinstance(node.inputs[2], ir.Value) for node in scatters)


def test_programs_without_rows_of_their_own_are_left_alone(understand: Program) -> None:
    result = UpdateInPlace(COUNTER).call(understand)
    assert result.programs == (understand,)
    assert result.changes == ()


def test_a_mask_that_hides_earlier_rows_is_refused(parts: Decoding) -> None:
    assert UpdateInPlace(COUNTER).call(parts.joined).changes
    editor = GraphEditor(parts.joined)
    open_masks = [
        node
        for node in editor.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
        if node.args[1] is True
    ]
    for node in open_masks:
        node.update_arg(1, False)
    assert open_masks
    hidden = editor.finish()
    with pytest.raises(StructureError, match=r"mask .* is not o"):
        UpdateInPlace(COUNTER).call(hidden)


def test_inputs_are_contiguous_as_they_will_be_given(parts: Decoding) -> None:
    programs = (parts.vision, parts.prologue, parts.language)
    assert [role for program in programs for role in strided_inputs(program)] == []


def test_other_values_that_are_computed_once_are_refused(parts: Decoding) -> None:
    """Nothing would give them: of what a prologue gives, decoding hands on what becomes buffers."""
    joined = parts.joined
    editor = GraphEditor(joined)
    editor.add_input("top.mean", torch.empty(1, 4))
    inputs, sample = (
        (*joined.inputs, Input("top.mean", (None, None))),
        {**joined.sample, "top.mean": torch.ones(1, 4)},
    )
    with pytest.raises(StructureError, match=r"top\.mean is computed once for earlier rows, but is no keys"):
        UpdateInPlace(COUNTER).call(editor.finish(inputs=inputs, sample=sample))


class Turned(nn.Module):
    """Attention whose queries and keys are turned by position, in halves that one operator splits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layers = (
            nn.Embedding(40, 8),
            nn.ModuleList([nn.ModuleList(nn.Linear(8, 8) for _ in range(3))]),
        )

    def forward(self, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor]:
        rows = self.words(torch.cat([prefix_ids, suffix_ids], dim=1))
        index = torch.arange(rows.shape[1])
        angles = index[None, None, :, None].float() * torch.tensor([1.0, 0.1, 1.0, 0.1])
        query, key, value = (layer(rows).unflatten(-1, (2, 4)).transpose(1, 2) for layer in self.layers[0])

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

        mask = (index[:, None] >= index[None])[None, None]
        seen = F.scaled_dot_product_attention(turned(query), turned(key), value, attn_mask=mask)
        return ((rows + seen.transpose(1, 2).flatten(2))[:, -1],)


def test_what_is_split_of_new_rows_is_no_position() -> None:
    torch.manual_seed(0)
    ids = torch.randint(40, (2, 9))
    given = {Role.PREFIX_IDS: ids[:, :5].contiguous(), Role.SUFFIX_IDS: ids[:, 5:].contiguous()}
    inputs = (Input(Role.PREFIX_IDS, ("batch", "prefix")), Input(Role.SUFFIX_IDS, ("batch", "suffix")))
    stacks = {"trunk": "layers"}
    whole = capture_program(CaptureSpec("complete", "text", Turned(), inputs, (Role.LOGITS,), stacks, given))
    (prologue, program), _ = PassManager(pipelines.complete()).run(whole)
    assert COUNTER in program.input_roles
    caches = {
        role: torch.nn.functional.pad(value, (0, 0, 0, 6), value=1e3)
        for role, value in prologue.run(given).items()
    }
    outputs = program.run({Role.SUFFIX_IDS: given[Role.SUFFIX_IDS], COUNTER: torch.tensor([5, 5]), **caches})
    assert relative_error(outputs[Role.LOGITS], whole.run(given)[Role.LOGITS]) < 2e-6
