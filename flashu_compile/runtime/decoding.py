"""The next token's logits, for one answer after another to one picture: with cached keys and values, or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashu_compile.errors import BundleError
from flashu_compile.runtime.sessions import Engine, Engines, Tensors

LANGUAGE = "language"


def new_rows(name: str) -> str:
    """The output that holds an engine's own rows of what it takes, of the rows before, as input `name`."""
    return f"{name}.new"


class Answer(Protocol):
    """One answer on its way."""

    def first(self, suffix: list[int]) -> NDArray[np.float32]:
        """Logits [vocab] of the token after `suffix`, the ids behind the image."""
        ...

    def after(self, token: int) -> NDArray[np.float32]:
        """Logits [vocab] of the token after `token`, which follows what was given before."""
        ...


class Picture:
    """A picture that questions are asked about: what answers share is computed once."""

    def __init__(self, engines: Engines, prefix: list[int], embeds: NDArray[np.float32]) -> None:
        self._engines, self._engine = engines, engines.engine(LANGUAGE)
        self._inputs: Tensors = {"prefix_ids": np.array([prefix], dtype=np.int64), "image_embeds": embeds}
        self._context: Mapping[str, NDArray[Any]] | None = None

    def answer(self, image_end: int) -> Answer:
        """A new answer; `image_end` is the first id behind the image, which all suffixes begin with."""
        if self._engine.spec.prologue is None:
            return _FullForward(self._engine, self._inputs)
        if self._context is None:
            ids = np.array([[image_end]], dtype=np.int64)
            prologue = self._engines.engine(self._engine.spec.prologue)
            self._context = prologue.run({**self._inputs, "image_end_ids": ids})
        return _CachedForward(self._engine, self._context)


def tokens(answer: Answer, suffix: list[int], end: int, limit: int) -> Iterator[int]:
    """Greedy tokens, up to `limit` of them, ending before the token `end`."""
    following = int(answer.first(suffix).argmax())
    for count in range(1, limit + 1):
        if following == end:
            return
        yield following
        if count < limit:
            following = int(answer.after(following).argmax())


class _FullForward:
    """Runs the whole sequence for every token, as published."""

    def __init__(self, engine: Engine, inputs: Tensors) -> None:
        self._engine, self._inputs = engine, inputs
        self._suffix: list[int] = []

    def first(self, suffix: list[int]) -> NDArray[np.float32]:
        self._suffix = list(suffix)
        return self._run()

    def after(self, token: int) -> NDArray[np.float32]:
        self._suffix.append(token)
        return self._run()

    def _run(self) -> NDArray[np.float32]:
        suffix = np.array([self._suffix], dtype=np.int64)
        return self._engine.run({**self._inputs, "suffix_ids": suffix})["logits"][0]


class _CachedForward:
    """Runs new rows alone, on keys and values of the rows before. `context`: those of the picture and what precedes."""

    def __init__(self, engine: Engine, context: Mapping[str, NDArray[Any]]) -> None:
        self._engine = engine
        self._past = dict(context)
        given = {tensor.name for tensor in engine.spec.outputs}
        self._axes = {
            tensor.name: _row_axis(tensor.shape)
            for tensor in engine.spec.inputs
            if tensor.name in context and new_rows(tensor.name) in given
        }
        if self._axes.keys() != context.keys():
            raise BundleError(
                f"Engine {engine.spec.name!r} does not go on from its own rows; build the bundle again."
            )

    def first(self, suffix: list[int]) -> NDArray[np.float32]:
        return self._run(suffix[1:])  # the first is part of the context

    def after(self, token: int) -> NDArray[np.float32]:
        return self._run([token])

    def _run(self, ids: list[int]) -> NDArray[np.float32]:
        outputs = self._engine.run({"suffix_ids": np.array([ids], dtype=np.int64), **self._past})
        self._past = {
            name: np.concatenate([self._past[name], outputs[new_rows(name)]], axis=axis)
            for name, axis in self._axes.items()
        }
        return outputs["logits"][0]


def _row_axis(shape: tuple[int | str, ...]) -> int:
    """The dimension that grows: the dynamic one that is not the batch."""
    return next(axis for axis, size in enumerate(shape) if axis and isinstance(size, str))
