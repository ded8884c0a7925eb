"""The sizes that an engine's dynamic dimensions take: smallest, usual and largest, as TensorRT wants to know them.

They follow from the signature and from what the pipeline lets through: a prompt, a question and an answer have
limits; a batch is the prompt with guidance's second branch or without it, or the answers that are decoded side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from flashu_compile import arguments
from flashu_compile.bundle import areas
from flashu_compile.bundle.dimensions import evaluate, symbols
from flashu_compile.bundle.manifest import EngineSpec, Manifest
from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.bundle.settings import (
    DrawingSettings,
    GenerationSettings,
    TextSettings,
    UnderstandingSettings,
)
from flashu_compile.errors import ConfigurationError
from flashu_compile.tasks import DRAW

#: The length of an answer that is timed or judged, where a bundle gives answers as long.
ANSWER_TOKENS = 32
#: So many answers are decoded side by side; more take turns, for each has keys and values of its own.
BATCH = 8
#: Rows that a cache gains when it is full. Attention takes time for all of them, full or not, and a cache that grows is
#: copied: at 1024 rows that costs as much as one token.
ROOM = 64
#: The dimension of caches along which rows lie.
CAPACITY = "capacity"
# So many times as long as the shorter side may be the longer one in TensorRT, whose engines take memory for the largest
# height and the largest width together.
_THINNEST = 4
# A question's prefix is the fixed text before a picture; chat templates have some dozen tokens.
_MAX_PREFIX = 64


@dataclasses.dataclass(frozen=True)
class Range:
    """Sizes of a dimension: `min` ≤ `opt` ≤ `max`; engines are tuned for `opt`."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 < self.min <= self.opt <= self.max:
            raise ConfigurationError(
                f"A dimension's range needs 0 < min ≤ opt ≤ max, not {self.min}, {self.opt}, {self.max}."
            )


@dataclasses.dataclass(frozen=True)
class InputShapes:
    """The smallest, usual and largest shape of one input. Raises `ConfigurationError` if their ranks differ."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ConfigurationError(f"The shapes of input {self.name!r} differ in rank.")


#: The inputs of an engine that have dynamic dimensions; empty if none has.
Profile = tuple[InputShapes, ...]


def dimension_ranges(manifest: Manifest, spec: EngineSpec) -> dict[str, Range]:
    """Return the range of every symbol in the signature's dynamic dimensions.

    Raises `ConfigurationError` on a symbol whose sizes cannot be determined, or if a picture has no number of rows.
    """
    return ranges_of(spec, _ranges(manifest))


def _ranges(manifest: Manifest) -> dict[str, Range]:
    rows = _image_rows(manifest)
    return known_ranges(manifest.generation, manifest.understanding, manifest.text, rows, manifest.drawing)


def known_ranges(
    generation: GenerationSettings | None,
    understanding: UnderstandingSettings | None,
    text: TextSettings | None,
    image_rows: int,
    drawing: DrawingSettings | None = None,
) -> dict[str, Range]:
    """Return the ranges of all dynamic dimensions that a model's engines have.

    `image_rows` is the number of keys and values that a picture takes in caches.
    """
    known = {"batch": Range(1, 2, 2)}
    if generation is not None:
        rows = generation.sequence_length - generation.span_length
        known |= {"prompt": Range(2, min(32, rows), rows), "tail": Range(2, min(32, rows), rows)}
    if understanding is not None:
        question, answer = understanding.max_question_tokens, understanding.max_new_tokens
        cached = _around(understanding) + question + answer
        # While an answer is decoded, one new row meets the keys and values of all rows before it.
        known |= {"prefix": Range(2, min(64, cached), cached), "suffix": Range(1, 1, question + answer)}
        fewest, usual = image_rows, image_rows
        if (cell := understanding.pictures.cell) is not None:
            fewest, usual = 2, min(image_rows, _usual_rows(understanding.pictures, cell))
            longest = _longest_side(understanding, cell)
            for name in ("height", "width"):
                usual_side = getattr(understanding.pictures, name) // cell
                known[name] = Range(2, usual_side, max(usual_side, longest))
            known["context"] = Range(2, usual + min(64, cached), image_rows + cached)
        known[CAPACITY] = Range(fewest, usual + min(64, cached), image_rows + cached + ROOM)
    if text is not None:
        _join_rows(known, _around(text) + text.max_question_tokens + text.max_new_tokens)
    if drawing is not None:
        row = drawing.grid[1] + len(drawing.row_end)
        _join_rows(known, _around(drawing) + drawing.max_prompt_tokens + drawing.grid[0] * row)
    return known


def _join_rows(known: dict[str, Range], rows: int) -> None:
    """Let ranges hold those of an engine whose caches begin empty and take so many rows, one by one."""
    for name, usual, most in (("suffix", 1, rows), (CAPACITY, min(64, rows), rows + ROOM)):
        known[name] = _joined(known.get(name, Range(1, usual, most)), Range(1, usual, most))


def _longest_side(settings: UnderstandingSettings, cell: int) -> int:
    """Return the longest side of a picture in cells, of those that are not too thin for TensorRT."""
    longest = max(areas.bounds(step.height, *step.area)[0] for step in settings.pictures.areas) // cell
    rows = longest**2 if settings.most_rows is None else settings.most_rows
    return min(longest, math.ceil(math.sqrt(_THINNEST * rows)))


def _usual_rows(rules: PictureRules, cell: int) -> int:
    """Return about how many rows a picture of the usual size takes."""
    return (rules.height // cell) * (rules.width // cell + 1) + 2


def _around(settings: TextSettings | DrawingSettings) -> int:
    """Return how many rows a template takes beside its text, at most: letters are no fewer than their tokens."""
    template = settings.template
    return max(_MAX_PREFIX, template.length + template.letters)


def _joined(one: Range, other: Range) -> Range:
    """Return the range that holds two; engines are tuned for what is usual in the first."""
    return Range(min(one.min, other.min), one.opt, max(one.max, other.max))


def fixed_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the dynamic dimensions that have one size in TensorRT, and that size, the largest there is.

    It updates caches in place where they lie, so these cannot grow.
    """
    known = _ranges(manifest)
    return {CAPACITY: known[CAPACITY].max} if CAPACITY in known else {}


def ranges_of(spec: EngineSpec, known: Mapping[str, Range]) -> dict[str, Range]:
    """Return the ranges of the symbols in a signature. Raises `ConfigurationError` on an unknown symbol."""
    named = {
        name
        for tensor in spec.inputs
        for size in tensor.shape
        if isinstance(size, str)
        for name in symbols(size)
    }
    unknown = sorted(named - known.keys())
    if unknown:
        raise ConfigurationError(
            f"Nothing tells how large dimension {unknown[0]!r} of engine {spec.name!r} can be; give its range."
        )
    ranges = {name: known[name] for name in sorted(named)}
    if {"batch", "suffix"} <= named and not spec.name.startswith(DRAW):  # rows of answers
        ranges["batch"] = Range(1, 1, BATCH)
    return ranges


def answer_length(
    name: str, given: int | None, manifests: Sequence[Manifest], tasks: Sequence[str]
) -> int | None:
    """Return the length of answers in tokens: `given`, or `ANSWER_TOKENS`, or the bundles' longest if that is less.

    None if none of the `tasks`, which every bundle has, answers questions. Raises `ConfigurationError`, naming the
    argument, if a bundle gives no answers of that length.
    """
    settings = [manifest.answering(task) for manifest in manifests for task in tasks]
    limits = [found.max_new_tokens for found in settings if found is not None]
    if not limits:
        return None
    if given is None:
        return min(ANSWER_TOKENS, *limits)
    return arguments.integer(name, given, 1, min(limits))


def _image_rows(manifest: Manifest) -> int:
    """Count a picture's rows in key and value caches: its tokens, the time token before and the end token behind."""
    if manifest.understanding is not None and manifest.understanding.most_rows is not None:
        return manifest.understanding.most_rows + 2
    shapes = (t.shape for e in manifest.engines for t in e.inputs if t.name == "image_embeds")
    rows = next(shapes, (0, 0))[1:2]
    if not rows or not isinstance(rows[0], int):
        raise ConfigurationError(
            "The manifest gives input 'image_embeds' no number of rows; build the bundle again."
        )
    return rows[0] + 2


def engine_profile(spec: EngineSpec, ranges: Mapping[str, Range]) -> Profile:
    """Compute the shapes of every input with a dynamic dimension from these ranges of symbols."""
    sizes = {limit: {n: getattr(r, limit) for n, r in ranges.items()} for limit in ("min", "opt", "max")}
    return tuple(
        InputShapes(
            tensor.name,
            **{
                limit: tuple(s if isinstance(s, int) else evaluate(s, values) for s in tensor.shape)
                for limit, values in sizes.items()
            },
        )
        for tensor in spec.inputs
        if any(isinstance(size, str) for size in tensor.shape)
    )


def shapes_text(profile: Profile, limit: str) -> str:
    """Format the `min`, `opt` or `max` shapes as trtexec and ONNX Runtime expect them: `ids:2x5,mask:2x5`."""
    return ",".join(f"{shapes.name}:{'x'.join(map(str, getattr(shapes, limit)))}" for shapes in profile)
