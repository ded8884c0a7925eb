"""Answers to questions about one picture or none, token by token: a batch of them on cached keys and values, or one by
one without.

Every answer has rows of its own in the caches, which begin as those of the picture, or empty. Answers that differ in
length share a batch, since an engine is told for each how many rows there are before; one that has ended makes room for
the last.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashu_compile import arguments
from flashu_compile.bundle.finite import Source, is_broken
from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.bundle.profiles import BATCH, ROOM
from flashu_compile.bundle.sampling import GREEDY, Draws, Sampling
from flashu_compile.bundle.settings import TextSettings
from flashu_compile.bundle.signatures import state_of
from flashu_compile.errors import BundleError, InputError, NotFiniteError
from flashu_compile.runtime.engine import Engine, Engines, State, Tensors, keep, update, zeros_like
from flashu_compile.tasks import COMPLETE, LANGUAGE, VISION

ROWS_BEFORE = "rows_before"
PREFIX_IDS, IMAGE_END_IDS = "prefix_ids", "image_end_ids"


class Answers(Protocol):
    """Answers being decoded, all to questions about one picture or none."""

    def first(self) -> NDArray[np.float32]:
        """Return the logits [answers, vocab] of each answer's first token."""
        ...

    def after(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append one token to each answer, and return the logits [answers, vocab] of the next ones."""
        ...

    def drop(self, place: int) -> None:
        """Remove the answer at `place`; the last one takes its place."""
        ...


class Asked(Protocol):
    """What questions are asked of: a picture, or nothing but the questions."""

    def answers(self, suffixes: Sequence[list[int]]) -> Answers:
        """Begin answers to questions, each of which is given by the ids that its answer follows."""
        ...

    def greedy(self, logits: NDArray[np.float32]) -> list[int]:
        """Choose the next token of every answer. Raises `NotFiniteError` if the largest logit is not finite."""
        ...


class Nothing:
    """No picture: answers begin on empty caches."""

    def __init__(self, engines: Engines) -> None:
        self._engines, self._engine = engines, engines.engine(COMPLETE)

    def answers(self, suffixes: Sequence[list[int]]) -> Answers:
        """Begin answers to questions; see `Asked`."""
        return _CachedForward(self._engine, empty_caches(self._engine.spec), suffixes)

    def greedy(self, logits: NDArray[np.float32]) -> list[int]:
        """Choose the next token of every answer; see `Asked`."""
        return Source.engine(self._engines, COMPLETE).greedy(logits)


def empty_caches(spec: EngineSpec) -> Tensors:
    """Return the caches of an engine, each [1, heads, 0, width], in which nothing is."""
    return {t.name: _no_rows(t) for t in spec.inputs if t.name in state_of(spec)}


def _no_rows(cache: TensorSpec) -> NDArray[Any]:
    _, heads, _, width = cache.shape
    return np.zeros((1, int(heads), 0, int(width)), cache.dtype)


class Picture:
    """A picture that questions are asked about: whatever its answers share is computed once."""

    def __init__(self, engines: Engines, rows: Tensors) -> None:
        """Take the rows up to the picture's last, as the language engine does: embedded in part, or all as ids."""
        self._engines, self._engine = engines, engines.engine(LANGUAGE)
        self._inputs = rows
        self._context: Mapping[str, Any] | None = None

    @classmethod
    def seen(cls, engines: Engines, prefix: Sequence[int], pixels: NDArray[np.float32]) -> Picture:
        """Encode a picture; `prefix` holds the ids ahead of it. Raises `NotFiniteError` if its rows are not finite."""
        vision, ids = engines.engine(VISION), {PREFIX_IDS: np.array([prefix], dtype=np.int64)}
        if PREFIX_IDS in {tensor.name for tensor in vision.spec.inputs}:
            return cls(engines, vision.run({"pixels": pixels, **ids}))
        embeds = vision.run({"pixels": pixels})["image_embeds"]
        Source.engine(engines, VISION).check("image_embeds", embeds)
        return cls(engines, {**ids, "image_embeds": embeds})

    def answers(self, suffixes: Sequence[list[int]]) -> Answers:
        """Begin answers to questions; each suffix holds the ids behind the image.

        All begin alike where the picture's rows see the first id, which is part of the context then.
        """
        if self._engine.spec.prologue is None:
            return _FullForward(self._engine, self._inputs, suffixes)
        prologue = self._engines.engine(self._engine.spec.prologue)
        count = int(takes_image_end(prologue.spec))
        if self._context is None:
            given = {IMAGE_END_IDS: np.array([suffixes[0][:1]], dtype=np.int64)} if count else {}
            self._context = keep(prologue, {**self._inputs, **given})
        return _CachedForward(self._engine, self._context, [suffix[count:] for suffix in suffixes])

    def greedy(self, logits: NDArray[np.float32]) -> list[int]:
        """Choose the next token of every answer; see `Source.greedy`.

        Raises `NotFiniteError`, naming the engine at fault, if the largest logit is not finite.
        """
        try:
            return Source.engine(self._engines, LANGUAGE).greedy(logits)
        except NotFiniteError:
            prologue = self._engine.spec.prologue
            if prologue is None or not any(map(is_broken, (self._context or {}).values())):
                raise
            source = Source.engine(self._engines, prologue)
            raise source.error("gave keys or values that are no numbers") from None


def takes_image_end(spec: EngineSpec) -> bool:
    """Tell whether an engine takes the first id behind a picture by itself, as one that the picture's rows see."""
    return IMAGE_END_IDS in {tensor.name for tensor in spec.inputs}


def tokens(
    asked: Asked,
    suffixes: Sequence[list[int]],
    ends: Collection[int],
    limit: int,
    penalty: float = 1.0,
    before: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] = (),
) -> Iterator[tuple[int, int]]:
    """Yield the tokens of answers, each with the index of its suffix: up to `limit` per answer, before one of `ends`.

    `penalty` is that on tokens which were there before, in an answer, its suffix or `before`; 1 is none. `seeds` are
    those of the answers, where `sampling` is not greedy.
    """
    for start in range(0, len(suffixes), BATCH):
        group = slice(start, start + BATCH)
        draws = [] if sampling.is_greedy else [Draws(seed) for seed in seeds[group]]
        for number, token in _batch(asked, suffixes[group], ends, limit, penalty, before, sampling, draws):
            yield start + number, token


def penalised(
    logits: NDArray[np.float32], seen: Sequence[Collection[int]], penalty: float
) -> NDArray[np.float32]:
    """Return logits [rows, vocab], those of tokens a row has seen divided by `penalty`, or if negative times it."""
    if penalty == 1:
        return logits
    lowered = logits.copy()
    for row, ids in zip(lowered, seen, strict=True):
        places = [place for place in ids if place < len(row)]  # a picture's id may have no logit
        row[places] = np.where(row[places] < 0, row[places] * penalty, row[places] / penalty)
    return lowered


def pieces(
    said: Iterator[tuple[int, int]], decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[int, str]]:
    """Yield the text of answers as their tokens arrive, each piece with the index of its answer.

    A piece is held back while its last character is incomplete.
    """
    ids: defaultdict[int, list[int]] = defaultdict(list)
    told: defaultdict[int, str] = defaultdict(str)
    for number, token in said:
        ids[number].append(token)
        text, before = decode(ids[number]), told[number]
        if text.startswith(before) and len(text) > len(before) and not text.endswith("\ufffd"):
            yield number, text[len(before) :]
            told[number] = text
    for number, tokens_of in ids.items():
        text = decode(tokens_of)
        if text != told[number]:
            yield number, text[len(told[number]) :]


def _batch(
    asked: Asked,
    suffixes: Sequence[list[int]],
    ends: Collection[int],
    limit: int,
    penalty: float,
    before: Collection[int],
    sampling: Sampling,
    draws: Sequence[Draws],
) -> Iterator[tuple[int, int]]:
    answers = asked.answers(suffixes)
    logits = answers.first()
    seen = [{*before, *suffix} for suffix in suffixes]
    live = list(range(len(logits)))  # numbers of the answers, by place
    for count in range(1, limit + 1):
        scores = penalised(logits, [seen[number] for number in live], penalty)
        following = asked.greedy(scores)
        if draws:
            rows = zip(scores, live, strict=True)
            following = [sampling.choose(row, draws[number]) for row, number in rows]
        for place in reversed(range(len(live))):
            if following[place] in ends:
                answers.drop(place)
                live[place], following[place] = live[-1], following[-1]
                del live[-1], following[-1]
        yield from zip(live, following, strict=True)
        for number, token in zip(live, following, strict=True):
            seen[number].add(token)
        if not live or count == limit:
            return
        logits = answers.after(following)


@dataclasses.dataclass(frozen=True)
class Talk:
    """Questions that are being answered: the ids that each answer follows, its longest, and ids `before` them all.

    Tokens are chosen by `sampling`, with the seed of each answer.
    """

    asked: Asked
    suffixes: list[list[int]]
    settings: TextSettings
    limit: int
    before: Sequence[int]
    sampling: Sampling = GREEDY
    seeds: Sequence[int] = ()

    def tokens(self) -> Iterator[tuple[int, int]]:
        """Yield the tokens of all answers; see `tokens` of this module."""
        ends, penalty = self.settings.stop_ids, self.settings.repetition_penalty
        return tokens(
            self.asked, self.suffixes, ends, self.limit, penalty, self.before, self.sampling, self.seeds
        )


def longest_answer(
    suffixes: Sequence[list[int]], template: int, limits: tuple[int, int], max_new_tokens: int | None
) -> int:
    """Return the longest answer in tokens; `limits` are those of a question and an answer, which share their sum."""
    if max_new_tokens is None:
        return limits[1]
    longest = max((len(suffix) for suffix in suffixes), default=template) - template
    return arguments.integer("max_new_tokens", max_new_tokens, 1, sum(limits) - longest, InputError)


class _FullForward:
    """Runs the whole sequence for every token, as published."""

    def __init__(self, engine: Engine, inputs: Tensors, suffixes: Sequence[list[int]]) -> None:
        self._engine, self._inputs = engine, inputs
        self._suffixes = [list(suffix) for suffix in suffixes]
        self._takes_end = takes_image_end(engine.spec)

    def first(self) -> NDArray[np.float32]:
        return np.concatenate([self._logits(suffix) for suffix in self._suffixes])

    def _logits(self, suffix: list[int]) -> NDArray[np.float32]:
        ids = np.array([suffix], dtype=np.int64)
        # An engine that was made to be told its context takes the id that ends the image by itself.
        given = (
            {IMAGE_END_IDS: ids[:, :1], "suffix_ids": ids[:, 1:]} if self._takes_end else {"suffix_ids": ids}
        )
        return self._engine.run({**self._inputs, **given})["logits"]

    def after(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        for suffix, token in zip(self._suffixes, tokens, strict=True):
            suffix.append(token)
        return self.first()

    def drop(self, place: int) -> None:
        self._suffixes[place] = self._suffixes[-1]
        del self._suffixes[-1]


class _CachedForward:
    """Runs the new rows alone, on cached keys and values. `context`: those of the picture and what precedes it."""

    def __init__(self, engine: Engine, context: Mapping[str, Any], suffixes: Sequence[list[int]]) -> None:
        self._engine, self._suffixes = engine, suffixes
        self._caches = Caches(engine.spec, context, len(suffixes))

    def first(self) -> NDArray[np.float32]:
        lengths = [len(suffix) for suffix in self._suffixes]
        if len(set(lengths)) == 1:
            return self._run(list(self._suffixes), lengths)
        # Logits are those of the last row, which is not the same for all: their last ids follow on their own. What
        # fills up shorter ones is written behind them, seen by none of theirs, and written over by what follows.
        longest = max(lengths) - 1
        ids = [suffix[:-1] + [0] * (longest - len(suffix) + 1) for suffix in self._suffixes]
        self._run(ids, [length - 1 for length in lengths])
        return self.after([suffix[-1] for suffix in self._suffixes])

    def after(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._run([[token] for token in tokens], [1] * len(tokens))

    def drop(self, place: int) -> None:
        self._caches.drop(place)

    def _run(self, ids: list[list[int]], lengths: list[int]) -> NDArray[np.float32]:
        state = self._caches.state(room_for=len(ids[0]))
        inputs = {"suffix_ids": np.array(ids, dtype=np.int64), ROWS_BEFORE: self._caches.lengths.copy()}
        logits = update(self._engine, inputs, state)["logits"]
        self._caches.lengths += lengths
        return logits


class Caches:
    """Keys and values of the rows so far, [answers, heads, capacity, width] for each layer that has some.

    `lengths` are the rows of each answer in the largest cache; others have fewer by the same number for all answers.
    """

    def __init__(self, spec: EngineSpec, context: Mapping[str, Any], count: int) -> None:
        if set(state_of(spec)) != set(context):
            raise BundleError(f"Engine {spec.name!r} does not update its caches; build the bundle again.")
        rows = {name: value.shape[2] for name, value in context.items()}
        most = max(rows.values())
        self._fewer = {name: most - number for name, number in rows.items()}
        # Indexing by a list copies, whatever kind of value was kept.
        self._arrays = {name: value[[0] * count] for name, value in context.items()}
        self.lengths = np.full(count, most, dtype=np.int64)

    def state(self, *, room_for: int) -> State:
        """Return the caches, grown if needed to hold `room_for` more rows of each answer."""
        needed = int(self.lengths.max()) + room_for
        for name, array in self._arrays.items():
            if array.shape[2] + self._fewer[name] < needed:
                batch, heads, rows, width = array.shape
                larger = zeros_like(array, (batch, heads, needed + ROOM - self._fewer[name], width))
                larger[:, :, :rows] = array
                self._arrays[name] = larger
        return self._arrays

    def drop(self, place: int) -> None:
        """Remove an answer; the last one takes its place. The others stay where they are."""
        self.lengths[place] = self.lengths[-1]
        self.lengths = self.lengths[:-1]
        for name, array in self._arrays.items():
            if place < len(array) - 1:
                array[place] = array[-1]
            self._arrays[name] = array[:-1]
