"""Where the picture's rows are, in programs that read them in different ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.errors import StructureError
from flashu_compile.passes import pipelines
from flashu_compile.passes.analysis.span import visual_span
from flashu_compile.passes.editing import module_path
from flashu_compile.program.program import Input, Program, Role
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.tiny import CONFIG


def test_the_span_of_a_captured_forward(understand: Program) -> None:
    """The image embeddings are an output; text, then the time token, stand before them."""
    span = visual_span(understand)
    assert (span.axis, span.length) == (1, CONFIG.image_tokens)
    assert span.image is understand.exported.graph.output_node().args[0][1]
    prefix, time = span.before
    assert module_path(prefix).endswith("embed_tokens")
    assert time.meta["val"].shape[1] == 1
    assert [module_path(node) for node in span.after] == [module_path(prefix)]
    assert list(span.rows.args[0]) == [*span.before, span.image, *span.after]


def test_the_span_of_the_language_part(understand: Program) -> None:
    """The image embeddings are an input."""
    language = pipelines.understand()[0].call(understand).programs[1]
    span, whole = visual_span(language), visual_span(understand)
    assert span.image.op == "placeholder"
    assert span.length == whole.length
    assert [node.name for node in (span.rows, *span.before, *span.after)] == [
        node.name for node in (whole.rows, *whole.before, *whole.after)
    ]


def test_the_span_at_the_start(fused: Program) -> None:
    span = visual_span(fused)
    assert span.before == ()
    assert len(span.after) == 2


class Joined(nn.Module):
    """Joins text [b, n, 2] and a picture [b, 3, 2] in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor]:
        match self.way:
            case "nested":
                inner = torch.cat([text[:, :1], image * 2, text], dim=1)
                return (torch.cat([text, inner.double(), text[:, :1]], dim=-2),)
            case "twice":
                return (torch.cat([image, text, image], dim=1),)
            case "aside":
                return (torch.cat([text, image.new_ones(image.shape)], dim=1) + image.sum(),)
            case "across":
                return (torch.cat([text.sum(1, keepdim=True).expand(-1, 3, -1), image], dim=2),)
            case _:
                return (torch.cat([text, image[:, : text.shape[1]]], dim=1),)


def joined(way: str, axes: tuple[str | None, ...] = ("batch", None, None)) -> Program:
    inputs = (Input("text", ("batch", "n", None)), Input(Role.IMAGE_EMBEDS, axes))
    sample = {"text": torch.randn(2, 5, 2), Role.IMAGE_EMBEDS: torch.randn(2, 3, 2)}
    return capture_program(CaptureSpec("joined", "mmu", Joined(way), inputs, ("rows",), {}, sample))


def test_a_span_within_a_span() -> None:
    """The rows are those of the outer concatenation; a scale and a cast on the way change none."""
    program = joined("nested")
    span = visual_span(program)
    assert span.rows is program.exported.graph.output_node().args[0][0]
    assert [str(node.meta["val"].shape[1]) for node in (*span.before, *span.after)][1:2] == ["1"]
    assert (len(span.before), len(span.after), span.length) == (2, 2, 3)
    assert span.image.target is torch.ops.aten.mul.Tensor


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("twice", "the one place of image among the rows of program 'joined' and found several"),
        ("aside", "visual span of program 'joined', a concatenation of .*image_embeds.* and found none"),
        ("across", "other rows along dimension 1, and found none"),
    ],
)
def test_what_was_looked_for_is_said(way: str, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        visual_span(joined(way))


def test_a_span_of_no_fixed_length_is_refused() -> None:
    with pytest.raises(StructureError, match=r"no fixed length: .* must have a static size in dimension 1"):
        visual_span(joined("nested", ("batch", "tokens", None)))


def test_a_program_without_image_embeddings_has_none(denoise: Program) -> None:
    with pytest.raises(
        StructureError, match=r"'denoise' has no visual span: none of its inputs \(prompt_ids"
    ):
        visual_span(denoise)
