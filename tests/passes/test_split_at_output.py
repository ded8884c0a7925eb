"""One program cut into two that chain."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.errors import PassError
from flashu_compile.passes.manager import PassManager, check_graph, compare
from flashu_compile.passes.split_at_output import SplitAtOutput
from flashu_compile.program.program import Input, Program, Role
from flashu_compile.program.trace import CaptureSpec, capture_program


def test_split_gives_two_programs_that_chain(understand: Program) -> None:
    result = SplitAtOutput((Role.IMAGE_EMBEDS,), ("vision", "language")).call(understand)
    vision, language = result.programs
    assert vision.input_roles == (Role.PIXELS,)
    assert vision.outputs == (Role.IMAGE_EMBEDS,)
    assert set(language.input_roles) == {Role.PREFIX_IDS, Role.SUFFIX_IDS, Role.IMAGE_EMBEDS}
    assert not any("und_trans" in name for name in language.exported.state_dict)
    assert not any("showo" in name for name in vision.exported.state_dict)
    assert all(error < 1e-6 for error in compare(understand, result).values())


def test_split_declines_with_a_reason(denoise: Program) -> None:
    manager = PassManager((SplitAtOutput((Role.IMAGE_EMBEDS,), ("a", "b")),))
    with pytest.raises(
        PassError, match=r"SplitAtOutput failed on program 'denoise'.*no output 'image_embeds'"
    ):
        manager.run(denoise)


class Reading(nn.Module):
    """Rows of a picture as wide as it is, joined to others; it outputs these rows and what is computed of all."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, pixels: Tensor, ids: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        seen = (pixels.mean(1) > 0).long().flatten(1)
        context = torch.cat([ids, seen], dim=1)
        rows = self.words(torch.cat([context, after], dim=1))
        place = torch.arange(rows.shape[1])[None, :, None]
        return self.linear(rows * place).flatten(1), context


def reading(module: nn.Module | None = None) -> Program:
    generator = torch.Generator().manual_seed(0)
    sample = {
        "pixels": torch.randn(2, 3, 10, 14, generator=generator),
        "ids": torch.randint(10, (2, 5), generator=generator),
        "after": torch.randint(10, (2, 4), generator=generator),
    }
    axes = (("batch", None, "2 * height", "2 * width"), ("batch", "before"), ("batch", "rest"))
    inputs = tuple(Input(role, names) for role, names in zip(sample, axes, strict=True))
    outputs = ("result", Role.CONTEXT_IDS)
    return capture_program(CaptureSpec("toy", "mmu", module or Reading(), inputs, outputs, {}, sample))


def test_what_is_cut_gets_a_size_of_its_own() -> None:
    """Its rows follow from two sizes of another input and that of a third; none of them is needed behind the cut."""
    program = reading()
    result = SplitAtOutput((Role.IMAGE_EMBEDS, Role.CONTEXT_IDS), ("first", "second"), "context").call(
        program
    )
    first, second = result.programs
    assert [one.axes for one in second.inputs] == [("batch", "rest"), ("batch", "context")]
    assert second.input_roles == ("after", Role.CONTEXT_IDS)
    assert all(error == 0 for error in compare(program, result).values())
    check_graph(second)
    file = io.BytesIO()
    torch.export.save(second.exported, file)
    torch.export.load(io.BytesIO(file.getvalue()))  # which needs the bounds of every size
    for height, width, before, rest in ((4, 6, 3, 2), (8, 8, 9, 11), (6, 20, 2, 5)):
        given = {
            "pixels": torch.randn(1, 3, height, width),
            "ids": torch.randint(10, (1, before)),
            "after": torch.randint(10, (1, rest)),
        }
        context = first.run(given)
        assert context[Role.CONTEXT_IDS].shape == (1, before + height * width)
        found = second.run({**given, **context})["result"]
        torch.testing.assert_close(found, program.run(given)["result"])


def test_a_dimension_without_a_name_is_refused() -> None:
    manager = PassManager((SplitAtOutput((Role.CONTEXT_IDS,), ("a", "b")),))
    with pytest.raises(
        PassError, match=r"cannot become an input: its size .* is not the size of any dimension"
    ):
        manager.run(reading())


class Telling(Reading):
    """A reading whose result depends on the height of the picture."""

    def forward(self, pixels: Tensor, ids: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        result, context = super().forward(pixels, ids, after)
        return result + torch.arange(pixels.shape[2]).sum(), context


def test_what_depends_on_a_part_of_the_size_is_refused() -> None:
    manager = PassManager((SplitAtOutput((Role.CONTEXT_IDS,), ("a", "b"), "context"),))
    with pytest.raises(PassError, match=r"the size .* depends on .*, which 'context_ids' does not tell"):
        manager.run(reading(Telling()))
