"""What is found in programs, as data and as people read it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.cli import display
from flashu_compile.errors import CheckpointError
from flashu_compile.looking.structure import (
    AttentionFacts,
    FeedForwardFacts,
    HeadFacts,
    ProgramStructure,
    SpanFacts,
    TensorFacts,
    model_structure,
    program_structure,
)
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.fused_lm import (
    DEPTH,
    EYE_HIDDEN,
    GRID,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCABULARY,
    WIDTH,
    fused_capture,
    fused_model,
)
from tests.support.tiny import CONFIG, tiny_model, tokenizer


@pytest.fixture(scope="module")
def fused() -> ProgramStructure:
    return program_structure(capture_program(fused_capture(fused_model())))


def sizes(structure: ProgramStructure) -> dict[str, tuple[int, int | str]]:
    return {stack.name: (len(stack.blocks), stack.width) for stack in structure.stacks}


def test_generation(denoise: Program) -> None:
    found = program_structure(denoise)
    assert sizes(found) == {
        "llm": (CONFIG.llm.num_hidden_layers, CONFIG.llm.hidden_size),
        "semantic": (CONFIG.semantic.num_hidden_layers, CONFIG.semantic.hidden_size),
        "head": (CONFIG.head.num_hidden_layers, CONFIG.head.hidden_size),
    }
    kinds = {stack.name: stack.blocks[0].feed_forward for stack in found.stacks}
    assert kinds == {
        "llm": FeedForwardFacts("gated", CONFIG.llm.intermediate_size, False),
        "semantic": FeedForwardFacts("plain", CONFIG.semantic.intermediate_size, False),
        "head": FeedForwardFacts("gated", CONFIG.head.intermediate_size, False),
    }
    sites = {stack.name: stack.blocks[-1].attention for stack in found.stacks}
    assert sites == {
        "llm": (AttentionFacts(4, 2, 8, masked=True, rotary=True),),
        "semantic": (AttentionFacts(2, 2, 12, masked=False, rotary=False),),
        "head": (AttentionFacts(4, 2, 12, masked=True, rotary=True),),
    }
    assert found.head == HeadFacts("head", ("batch", 9, 48), gives=("velocity",), beside=("timestep",))
    assert found.visual_span is None
    assert [row.what for row in found.not_found] == ["visual span"]


def test_residual_streams_are_chains(denoise: Program) -> None:
    for stack in program_structure(denoise).stacks:
        assert [block.index for block in stack.blocks] == list(range(len(stack.blocks)))
        assert all(a.exit == b.entry for a, b in zip(stack.blocks, stack.blocks[1:], strict=False))


def test_understanding(understand: Program) -> None:
    found = program_structure(understand)
    assert list(sizes(found)) == ["llm", "semantic"]
    assert found.visual_span is not None
    assert dataclasses.replace(found.visual_span, rows="") == SpanFacts(CONFIG.image_tokens, "", 2, 1)
    assert {row.role: row.reads for row in found.outputs} == {
        "logits": ("pixels", "prefix_ids", "suffix_ids"),
        "image_embeds": ("pixels",),
    }
    reasons = {row.what: row.why for row in found.not_found}
    assert list(reasons) == ["stack head", "head features"]
    assert "none of its outputs depends on anything under module" in reasons["stack head"]
    assert reasons["head features"].startswith("Program 'understand' has no output 'head_features'; it gives")


def test_shapes_are_in_the_names_of_the_inputs(denoise: Program) -> None:
    found = program_structure(denoise)
    assert found.inputs[0] == TensorFacts("prompt_ids", ("batch", "prompt"))
    shapes = {row.role: row.shape for row in found.outputs}
    assert shapes["velocity"] == ("batch", *CONFIG.latent_shape)
    batch, rows, vocabulary = shapes["logits"]
    assert (batch, vocabulary) == ("batch", CONFIG.llm.vocab_size)
    assert set(str(rows).split(" + ")) == {"prompt", "tail", str(CONFIG.span_length)}


def test_a_model_of_another_kind(fused: ProgramStructure) -> None:
    assert sizes(fused) == {"llm": (DEPTH, WIDTH), "semantic": (2, 16)}
    trunk, eye = fused.stacks
    assert {block.feed_forward for block in trunk.blocks} == {FeedForwardFacts("gated", HIDDEN, True)}
    assert {block.feed_forward for block in eye.blocks} == {FeedForwardFacts("plain", EYE_HIDDEN, False)}
    site = AttentionFacts(HEADS, KV_HEADS, WIDTH // HEADS, masked=True, rotary=True)
    assert {block.attention for block in trunk.blocks} == {(site,)}
    assert fused.visual_span is not None
    assert (fused.visual_span.length, fused.visual_span.before, fused.visual_span.after) == (
        GRID * GRID,
        0,
        2,
    )
    assert fused.head is None
    assert [row.what for row in fused.not_found] == ["head features"]


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.line(x)


class Wrapped(nn.Module):
    """Residual blocks with one layer each: neither attention nor feed-forward groups."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(Unit(), Unit())

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.units(x),)


def test_what_a_stack_lacks_is_told_apart() -> None:
    spec = CaptureSpec(
        "odd",
        "mmu",
        Wrapped(),
        (Input("x", ("batch", None)),),
        ("y",),
        {"llm": "units"},
        {"x": torch.ones(2, 4)},
    )
    found = program_structure(capture_program(spec))
    (stack,) = found.stacks
    assert [(b.feed_forward, b.attention) for b in stack.blocks] == [(None, ()), (None, ())]
    reasons = {row.what: row.why for row in found.not_found}
    assert "feed-forward group" in reasons["FFN groups of llm"]
    assert "scaled_dot_product_attention in block 0" in reasons["attention of llm"]


def test_a_model_needs_its_vae() -> None:
    with pytest.raises(CheckpointError, match="has no VAE; pass its path as `vae`"):
        model_structure(tiny_model(), ["t2i"], tokenizer=tokenizer())


def test_structure_is_plain_data(fused: ProgramStructure) -> None:
    data = json.loads(json.dumps(dataclasses.asdict(fused)))
    assert data["stacks"][0]["blocks"][0]["feed_forward"] == {"kind": "gated", "width": HIDDEN, "fused": True}


def test_drawing(
    fused: ProgramStructure,
    denoise: Program,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    display.print_structure(fused)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[0] == "understand (mmu)"
    assert f"out logits batch × {VOCABULARY} every input" in rows
    assert "out image_embeds batch × 9 × 32 pixels" in rows
    assert f"llm 0–{DEPTH - 1} gated, fused, {HIDDEN} neurons 4 heads of 8 (2 kv), masked, rotary" in rows
    assert "visual span 9 rows, with 0 segments before and 2 after" in rows
    assert any(row.startswith("head Program 'understand' has no output 'head_features'") for row in rows)

    display.print_structure(program_structure(denoise))
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "head features batch × 9 × 48 from stack head; velocity follows from them with timestep" in rows
