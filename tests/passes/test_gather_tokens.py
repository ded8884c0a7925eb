"""Visual tokens go after a layer; what is left is what an eager model without them computes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashu_compile.errors import ConfigurationError, PassError
from flashu_compile.exporters.onnx import MODULE, emit_onnx
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.passes.analysis.attention import attention_sites
from flashu_compile.passes.analysis.blocks import residual_blocks
from flashu_compile.passes.analysis.span import visual_span
from flashu_compile.passes.base import PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.gather_tokens import GatherTokens
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.pipelines import understand
from flashu_compile.passes.prune_ffn import PruneFFN
from flashu_compile.passes.remove_layers import RemoveLayers
from flashu_compile.passes.token_scorers import SCORERS
from flashu_compile.program.program import Program, Role, run_chain
from flashu_compile.program.trace import capture_program
from tests.support.fused_lm import DEPTH, GRID, PATCH, VOCABULARY, FusedLM, fused_capture, fused_model
from tests.support.programs import only
from tests.support.tiny import CONFIG, VAE, tiny_model
from tests.support.token_twin import (
    Twin,
    dropped_tokens,
    gather_fused,
    gather_showo2,
    pivot_cosines,
)

LAYERS, TOKENS = 3, CONFIG.image_tokens
SIZES = [(1, 2, 7), (3, 9, 2)]


@pytest.fixture(scope="module")
def model() -> Showo2:
    return tiny_model(llm=dataclasses.replace(CONFIG.llm, num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def whole(model: Showo2) -> Program:
    """The understanding forward as captured."""
    return capture_program(capture_specs("mmu", model, VAE)[0])


@pytest.fixture(scope="module")
def parts(whole: Program) -> tuple[Program, ...]:
    """What the exact pipeline makes of it: up to the image embeddings, and from there on."""
    return PassManager(understand()).run(whole)[0]


@pytest.fixture(scope="module")
def language(parts: tuple[Program, ...]) -> Program:
    return parts[1]


def inputs(batch: int, prefix: int, suffix: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * prefix + 100 * suffix)
    return {
        Role.IMAGE_EMBEDS: torch.randn(batch, TOKENS, CONFIG.llm.hidden_size, generator=generator),
        Role.PREFIX_IDS: torch.randint(CONFIG.llm.vocab_size, (batch, prefix), generator=generator),
        Role.SUFFIX_IDS: torch.randint(CONFIG.llm.vocab_size, (batch, suffix), generator=generator),
    }


def eager(model: Showo2, values: dict[str, Tensor], **options: Any) -> Callable[..., Twin]:
    """The twin on these inputs, to be called with what is to differ."""
    return partial(gather_showo2, model, *values.values(), **options)


def with_kept_rows(program: Program) -> Program:
    """`program`, also giving the index that its gathers read."""
    editor = GraphEditor(program)
    node = next(n for n in editor.graph.nodes if n.target is torch.ops.aten.gather.default)
    index = node.args[2]
    while index.target is not torch.ops.aten.cat.default:
        index = index.args[0]
    outputs = editor.outputs()
    editor.set_outputs([*outputs.values(), index])
    return editor.finish(outputs=(*program.outputs, "kept"))


def agrees(found: dict[str, Tensor], first: int, twin: Callable[..., Twin]) -> None:
    """The same rows are kept, or others whose scores differ by rounding alone; and then the logits are the same."""
    with torch.no_grad():
        expected = twin()
    kept = found["kept"].tolist()
    for rows, others, scores in zip(kept, expected.kept, expected.scores, strict=True):
        differ = [scores[row - first] for row in set(rows) ^ set(others)]
        assert max(differ, default=0) - min(differ, default=0) < 1e-5
        assert len(rows) == len(others)
    if kept != expected.kept:
        with torch.no_grad():
            expected = twin(kept=kept)
    assert relative_error(found[Role.LOGITS], expected.logits) < 1e-5


@settings(max_examples=6, deadline=None)
@given(layer=st.integers(0, LAYERS - 1), ratio=st.floats(0.12, 0.99).map(lambda r: round(r, 2)))
@example(layer=0, ratio=0.5)
@example(layer=LAYERS - 1, ratio=0.99)
def test_any_layer_and_ratio_equals_the_eager_twin(
    model: Showo2, language: Program, layer: int, ratio: float
) -> None:
    after = with_kept_rows(only(GatherTokens(layer, ratio, "v_norm").call(language)))
    for sizes in SIZES:
        values, first = inputs(*sizes), sizes[1] + 1
        found = after.run(values)
        text = {*range(first), *range(first + TOKENS, first + TOKENS + sizes[2])}
        for rows in found["kept"].tolist():
            assert rows == sorted(set(rows))
            assert text <= set(rows)
            assert len(rows) == len(text) + TOKENS - dropped_tokens(ratio, TOKENS)
        agrees(found, first, eager(model, values, layer=layer, ratio=ratio))


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_duplicates_of_pivots_go_first(model: Showo2, language: Program, ratio: float) -> None:
    after = with_kept_rows(only(GatherTokens(1, ratio, "duplication").call(language)))
    values = inputs(3, 4, 6)
    scores = partial(pivot_cosines, kept=TOKENS - dropped_tokens(ratio, TOKENS))
    agrees(after.run(values), 5, eager(model, values, layer=1, ratio=ratio, scores=scores))


def test_the_random_choice_is_the_same_for_every_picture_and_grows_with_the_ratio(
    model: Showo2, language: Program
) -> None:
    values, lost = inputs(3, 4, 6), [set[int]()]
    for ratio in (0.3, 0.6, 0.9):
        after = with_kept_rows(only(GatherTokens(0, ratio, "random").call(language)))
        found = after.run(values)
        kept = found["kept"].tolist()
        assert kept[0] == kept[1] == kept[2]
        lost.append(set(range(5 + TOKENS + 6)) - set(kept[0]))
        assert lost[-1] > lost[-2]
        with torch.no_grad():
            truth = gather_showo2(model, *values.values(), layer=0, ratio=ratio, kept=kept)
        assert relative_error(found[Role.LOGITS], truth.logits) < 1e-5
    assert sorted(lost[2]) != list(range(min(lost[2]), max(lost[2]) + 1))  # not merely the first or last


@pytest.mark.parametrize(("layer", "skipped"), [(0, (0, 1)), (1, (0,)), (0, (2,))])
def test_where_the_layer_is_skipped_the_next_that_runs_decides(
    model: Showo2, language: Program, layer: int, skipped: tuple[int, ...]
) -> None:
    passes = (GatherTokens(layer, 0.5, "v_norm", {"llm": skipped}), RemoveLayers("llm", skipped))
    (after,), _ = PassManager(passes).run(language)
    assert len(residual_blocks(after, "llm")) == LAYERS - len(skipped)
    values = inputs(2, 5, 3)
    twin = eager(model, values, layer=layer, ratio=0.5, skipped=skipped)
    agrees(with_kept_rows(after).run(values), 6, twin)


def test_gathering_before_a_split_or_after_it_is_one(whole: Program, language: Program) -> None:
    gather, prune = GatherTokens(1, 0.5, "v_norm"), PruneFFN("llm", {0: range(0, 64, 2), 2: range(32)})
    split = understand()[0]
    vision, text = PassManager((gather, prune, split)).run(whole)[0]
    (other,), _ = PassManager((prune, gather)).run(language)
    with torch.no_grad():
        logits = run_chain((vision, text), whole.sample)[Role.LOGITS]
        assert relative_error(run_chain((vision, other), whole.sample)[Role.LOGITS], logits) < 1e-6
        assert relative_error(whole.run(whole.sample)[Role.LOGITS], logits) > 1e-3


@pytest.mark.parametrize("ratio", [0, 0.1])
def test_dropping_nothing_gives_the_same_program(language: Program, ratio: float) -> None:
    assert only(GatherTokens(0, ratio, "v_norm").call(language)) is language


def test_a_ratio_that_drops_nothing_is_declined(language: Program) -> None:
    assert GatherTokens(0, 0).call(language) == PassResult.unchanged(language)
    _, (record,) = PassManager((GatherTokens(0, 0.1, "v_norm"),)).run(language)
    assert (record.changes, record.technique, record.undone) == ((), "token pruning", True)
    (line,) = record.declined
    assert line == "dropped no token: 0.1 of 9 visual tokens is less than one"


def test_tables_are_gathered_once_for_all_layers_and_stay_where_they_were_traced(language: Program) -> None:
    result = GatherTokens(0, 0.5, "v_norm").call(language)
    assert result.changes[0] == "after layer 0 of stack llm, 4 of 9 visual tokens are dropped by v_norm"
    after = only(result)
    check_graph(after)
    found = Counter(str(node.target) for node in after.exported.graph.nodes)
    assert (found["aten.topk.default"], found["aten.sort.default"]) == (1, 0)
    assert found["aten.gather.default"] == 5  # hidden states, cos, sin, and the mask twice
    assert [block.index for block in residual_blocks(after, "llm")] == list(range(LAYERS))
    first, *others = (site.query.meta["val"].shape[2] for site in attention_sites(after, "llm"))
    rows = visual_span(after).rows.meta["val"].shape[1]
    assert str(first) == str(rows)
    assert all(str(other) == str(rows - 4) for other in others)


@pytest.mark.parametrize(("layer", "ratio"), [(0, 0.5), (DEPTH - 1, 0.4)])
def test_the_second_model_with_unbatched_tables_and_the_picture_first(
    fused: Program, layer: int, ratio: float
) -> None:
    result = GatherTokens(layer, ratio, "v_norm").call(fused)
    check_graph(only(result))
    after = with_kept_rows(only(result))
    generator = torch.Generator().manual_seed(3)
    for batch, prefix, suffix in SIZES:
        values = {
            Role.PIXELS: torch.rand(batch, 3, GRID * PATCH, GRID * PATCH, generator=generator),
            Role.PREFIX_IDS: torch.randint(VOCABULARY, (batch, prefix), generator=generator),
            Role.SUFFIX_IDS: torch.randint(VOCABULARY, (batch, suffix), generator=generator),
        }
        found = after.run(values)
        with torch.no_grad():
            truth = gather_fused(fused_model(), *values.values(), layer=layer, ratio=ratio)
        assert found["kept"].tolist() == truth.kept
        assert relative_error(found[Role.LOGITS], truth.logits) < 1e-5


@pytest.mark.parametrize("scorer", SCORERS)
def test_through_onnx_runtime(language: Program, scorer: str) -> None:
    layer = 1
    after = with_kept_rows(only(GatherTokens(layer, 0.5, scorer).call(language)))
    model = emit_onnx(after)
    nodes = list(model.graph)
    assert Counter(node.op_type for node in nodes)["TopK"] == 1
    rows = [str(list(node.inputs[0].shape)[2]) for node in nodes if node.op_type == "Attention"]
    assert rows == ["prefix + suffix + 10"] * (layer + 1) + ["prefix + suffix + 6"] * (LAYERS - layer - 1)
    (top,) = (place for place, node in enumerate(nodes) if node.op_type == "TopK")
    assert nodes[top].metadata_props[MODULE] == "gather_tokens"
    earlier = [node.metadata_props[MODULE] for node in nodes[:top]]
    assert any(f"layers.{layer}." in path for path in earlier)
    assert not any(f"layers.{layer + 1}." in path for path in earlier)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for sizes in SIZES:
        values = inputs(*sizes)
        logits, kept = session.run(None, {role: values[role].numpy() for role in after.input_roles})
        truth = after.run(values)
        assert kept.tolist() == truth["kept"].tolist()
        assert relative_error(torch.from_numpy(logits), truth[Role.LOGITS]) < 1e-5


def reading(read: Callable[[Tensor], Tensor]) -> FusedLM:
    """The second model, cut to one layer, whose last rows go through `read` [b, rows, width]."""
    network = fused_model()
    network.eye, network.trunk = network.eye[:0], network.trunk[:1]
    network.end.register_forward_hook(lambda module, arguments, output: read(output))
    return network


def test_sizes_computed_from_the_number_of_rows_follow() -> None:
    """Rows of the whole batch side by side: their number is a product."""
    network = reading(lambda x: x.reshape(x.shape[0] * x.shape[1], -1)[:, :99].relu().reshape(x.shape))
    program = capture_program(fused_capture(network))
    found = only(GatherTokens(0, 0.5, "v_norm").call(program)).run(program.sample)
    with torch.no_grad():
        truth = gather_fused(network, *program.sample.values(), layer=0, ratio=0.5)
    assert relative_error(found[Role.LOGITS], truth.logits) < 1e-5


@pytest.mark.parametrize(
    ("read", "where"),
    [
        (lambda x: x[:, 3:], r"aten\.slice\.Tensor picks rows by their place"),
        (lambda x: x[:, torch.tensor([0, 2])], r"aten\.index\.Tensor picks rows by their place"),
        (
            lambda x: (x.flatten(0, 1) + torch.arange(x.shape[0] * x.shape[1])[:, None]).reshape(x.shape),
            "its dimension 0 of size .* holds more or less than the rows",
        ),
    ],
)
def test_rows_that_cannot_be_followed_are_refused(read: Callable[[Tensor], Tensor], where: str) -> None:
    """Rows read by their place would be other rows, without any error."""
    program = capture_program(fused_capture(reading(read)))
    with pytest.raises(PassError, match=where):
        PassManager((GatherTokens(0, 0.5, "v_norm"),)).run(program)


def test_rows_numbered_anew_are_refused(language: Program) -> None:
    """Positions made from the number of rows left would not be those the rows had."""
    editor = GraphEditor(language)
    last = editor.outputs()[Role.LOGITS]
    hidden = last.args[0]
    with editor.graph.inserting_before(last):
        size = editor.graph.call_function(torch.ops.aten.sym_size.int, (hidden, 1))
        numbers = editor.graph.call_function(torch.ops.aten.arange.default, (size,))
        column = editor.graph.call_function(torch.ops.aten.unsqueeze.default, (numbers, 1))
        added = editor.graph.call_function(torch.ops.aten.add.Tensor, (hidden, column))
    editor.propagate([size, numbers, column, added])
    last.replace_input_with(hidden, added)
    with pytest.raises(PassError, match=r"aten\.arange\.default makes rows from nothing but their number"):
        PassManager((GatherTokens(0, 0.5, "v_norm"),)).run(editor.finish())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio of visual tokens to drop must be in \[0, 1\), not 1.0"),
        ({"ratio": float("nan")}, "not nan"),
        ({"layer": -1}, "Layers are counted from 0; -1"),
        ({"scorer": "best"}, "Unknown token scorer 'best'; known ones are: v_norm, random, duplication"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GatherTokens(**({"layer": 0, "ratio": 0.5, "scorer": "v_norm"} | options))


@pytest.mark.parametrize(
    ("layer", "skipped"), [(LAYERS, ()), (LAYERS - 1, (LAYERS - 1,)), (1, tuple(range(1, LAYERS)))]
)
def test_a_layer_that_does_not_run_is_refused(
    language: Program, layer: int, skipped: tuple[int, ...]
) -> None:
    with pytest.raises(
        PassError,
        match=rf"GatherTokens failed on program 'language'.*dropped at layer {layer} of stack 'llm'",
    ):
        PassManager((GatherTokens(layer, 0.5, "v_norm", {"llm": skipped}),)).run(language)


def test_a_program_without_a_visual_span_is_refused(parts: tuple[Program, ...]) -> None:
    with pytest.raises(PassError, match=r"GatherTokens failed on program 'vision'.*visual span.* found none"):
        PassManager((GatherTokens(0, 0.5, "v_norm"),)).run(parts[0])


def test_tokens_cannot_be_dropped_twice(language: Program) -> None:
    gather = GatherTokens(0, 0.5, "v_norm")
    with pytest.raises(
        PassError, match=r"number of rows, that of the visual span .* in layer 1 of stack 'llm'"
    ):
        PassManager((gather, dataclasses.replace(gather, layer=1))).run(language)


def test_a_stack_that_does_not_run_on_the_span_is_refused(whole: Program) -> None:
    with pytest.raises(
        PassError, match=r"number of rows, that of the visual span .* in layer 0 of stack 'semantic'"
    ):
        PassManager((GatherTokens(0, 0.5, "v_norm"),)).run(dataclasses.replace(whole, decoder="semantic"))
