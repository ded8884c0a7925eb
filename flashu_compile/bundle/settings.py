"""What the loops must know of a model: its templates, sizes and limits, as data of the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from flashu_compile import arguments
from flashu_compile.bundle.preparing import LARGEST_SIDE, PictureRules, check_number
from flashu_compile.bundle.sampling import Sampling
from flashu_compile.errors import BundleError, InputError
from flashu_compile.reading import Count

_LARGEST_LENGTH = 2**20  # far more than any model has


@dataclasses.dataclass(frozen=True)
class Template:
    """What a model reads of a text: the ids `before`, those of `left`, the text and `right` as one, the ids `after`.

    `strip` says on which sides white space around the text is left out. `picture`: how many of the ids `before` and
    `after` precede the rows of a picture, None if there is none; `placeholder` is the id that stands for each of these
    rows where ids are counted. `size`: how many of the ids `before` precede `size_text`, in which its size in cells
    stands for `{height}` and `{width}`, None if there is no such text. Raises `BundleError` if there are fewer ids.
    """

    before: tuple[Count, ...] = ()
    left: str = ""
    right: str = ""
    after: tuple[Count, ...] = ()
    strip: Literal["", "left", "right", "both"] = ""
    picture: Count | None = None
    placeholder: Count | None = None
    size: Count | None = None
    size_text: str = ""

    def __post_init__(self) -> None:
        if self.picture is not None and self.picture > self.length:
            raise BundleError(
                f"The manifest puts a picture behind {self.picture} ids of a template that has {self.length}."
            )
        if self.size is not None and (
            self.picture is None or self.size > min(self.picture, len(self.before))
        ):
            raise BundleError("The manifest's template tells a picture's size where no picture follows.")

    @property
    def length(self) -> int:
        """The number of ids around the text, but for those of a picture and its size."""
        return len(self.before) + len(self.after)

    @property
    def letters(self) -> int:
        """No fewer letters than those have that are encoded with a text, or for a picture's size."""
        return len(self.left.encode()) + len(self.right.encode()) + len(self.size_text.encode())


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What the t2i pipeline must know of a model with latents. Sizes in pixels (width, height), tokens or rows.

    `pad_id` fills sequences up. Raises `BundleError` on sizes of the wrong type, out of range, or that do not go
    together, and on a template without a picture.
    """

    latent_shape: tuple[int, int, int]
    sequence_length: int
    span_length: int
    max_prompt_tokens: int
    picture_size: tuple[int, int]
    template: Template
    pad_id: Count

    def __post_init__(self) -> None:
        for name in ("latent_shape", "picture_size"):
            for size in getattr(self, name):
                arguments.integer(f"A size of the manifest's {name}", size, 1, LARGEST_SIDE, BundleError)
        _check_settings(self, {"sequence_length": _LARGEST_LENGTH})
        _check_settings(
            self, {"span_length": self.sequence_length, "max_prompt_tokens": self.sequence_length}
        )
        if self.template.picture is None or self.template.picture <= len(self.template.before):
            raise BundleError("The manifest's template of t2i has no place for a picture behind the prompt.")
        if self.max_prompt_tokens + self.span_length + self.template.length > self.sequence_length:
            raise BundleError(
                f"The manifest's sequence_length {self.sequence_length} cannot hold a span of {self.span_length} and "
                f"prompts of {self.max_prompt_tokens} tokens."
            )


@dataclasses.dataclass(frozen=True)
class Unprompted:
    """What guidance's second branch reads in place of a prompt: one of the two.

    Attributes:
        text: this text in the prompt's template.
        pad_id: the prompt's own ids, each overwritten by this one, except those in `kept_ids`.

    Raises `BundleError` unless exactly one of them is given.
    """

    text: str | None = None
    pad_id: Count | None = None
    kept_ids: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if (self.text is None) == (self.pad_id is None):
            raise BundleError("The manifest's second branch of guidance needs either a text or a pad_id.")
        if self.text is not None and not isinstance(self.text, str):
            raise BundleError("The manifest's text of guidance's second branch is none.")


@dataclasses.dataclass(frozen=True)
class DrawingSettings:
    """What the t2i pipeline must know of a model that draws a picture code by code.

    Raises `BundleError` on sizes of the wrong type, out of range, or that do not go together, and on a template with a
    picture.

    Attributes:
        template: the ids that a picture's first code follows, around the prompt.
        unprompted: what guidance's second branch reads.
        grid: rows and columns of codes in a picture, which are drawn row by row.
        codes: the number of different codes; that of the engine's logits.
        first_code_id: the id that the engine reads for code 0; the others follow it.
        row_end: ids that follow the codes of each row but the last.
        max_prompt_tokens: the longest prompt.
        picture_size: width and height in pixels.
        temperature, top_k, top_p: how codes are chosen unless a caller says otherwise; see `Sampling`.
    """

    template: Template
    unprompted: Unprompted
    grid: tuple[Count, Count]
    codes: Count
    first_code_id: Count
    row_end: tuple[Count, ...]
    max_prompt_tokens: Count
    picture_size: tuple[Count, Count]
    temperature: float = 1.0
    top_k: Count = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("grid", "picture_size"):
            for size in getattr(self, name):
                check_number(name, size, 1, LARGEST_SIDE)
        for name in ("codes", "max_prompt_tokens"):
            check_number(name, getattr(self, name), 1, _LARGEST_LENGTH)
        if self.length > _LARGEST_LENGTH:
            raise BundleError(f"The manifest's pictures of {self.length:,} codes are too large.")
        if self.template.picture is not None:
            raise BundleError(
                "The manifest's template of t2i has a picture, where codes follow the template."
            )
        try:
            _ = self.sampling
        except InputError as error:
            raise BundleError(f"The manifest's way to choose codes is none: {error}") from error

    @property
    def sampling(self) -> Sampling:
        """How codes are chosen unless a caller says otherwise."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def length(self) -> int:
        """The number of codes of a picture."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What a pipeline that answers must know of the model. Raises `BundleError` on sizes of the wrong type or range.

    `stop_ids` end an answer. `repetition_penalty` divides positive logits of tokens that were there before, and
    multiplies negative ones. `not_used` are settings of the checkpoint that greedy decoding does not follow.
    """

    template: Template
    stop_ids: tuple[Count, ...]
    max_question_tokens: int
    max_new_tokens: int
    repetition_penalty: float = 1.0
    not_used: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_settings(self, dict.fromkeys(("max_question_tokens", "max_new_tokens"), _LARGEST_LENGTH))
        arguments.number(
            "The manifest's repetition_penalty", self.repetition_penalty, 0, 100, BundleError, above=True
        )


@dataclasses.dataclass(frozen=True)
class UnderstandingSettings(TextSettings):
    """The same of answers about a picture, which `pictures` prepares.

    `most_rows`: the most rows that a picture takes where pictures differ in size; each cell is one, and `line_end` more
    follow each line of cells. Raises `BundleError`, too, on a template that has no picture before its text, or that
    tells a size of pictures that have no cells.
    """

    pictures: PictureRules = dataclasses.field(kw_only=True)
    most_rows: Count | None = dataclasses.field(default=None, kw_only=True)
    line_end: Count = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template.picture is None or self.template.picture > len(self.template.before):
            raise BundleError("The manifest's template of mmu has no picture before the question.")
        if self.template.size is not None and self.pictures.cell is None:
            raise BundleError(
                "The manifest's template of mmu tells a size in cells, which its pictures do not have."
            )
        if (self.most_rows is None) != (self.pictures.cell is None):
            raise BundleError("The manifest does not say how many rows its pictures of any size take.")
        if self.most_rows is not None:
            check_number("most_rows", self.most_rows, 1, _LARGEST_LENGTH)
        check_number("line_end", self.line_end, 0, _LARGEST_LENGTH)

    def rows_of(self, cells: tuple[int, int]) -> int:
        """Count the rows of a picture that is so many cells high and wide."""
        return cells[0] * (cells[1] + self.line_end)

    def check_rows(self, cells: tuple[int, int] | None) -> None:
        """Raise `InputError` if a picture of so many cells takes more rows than there are positions for."""
        if cells is not None and self.most_rows is not None and self.rows_of(cells) > self.most_rows:
            raise InputError(
                f"The picture takes {self.rows_of(cells):,} rows as it is prepared, and the model has positions for "
                f"{self.most_rows:,}; give a smaller one."
            )

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids ahead of the picture's rows."""
        return self.template.before[: self.template.picture]


def _check_settings(settings: GenerationSettings | TextSettings, largest: Mapping[str, int]) -> None:
    for name, high in largest.items():
        check_number(name, getattr(settings, name), 1, high)
