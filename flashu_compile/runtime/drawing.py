"""Pictures drawn code by code: two branches of guidance on cached keys and values, as a TokenPlan says.

Both branches read the codes that are chosen, behind the prompt or what stands in its place. A branch that the plan
leaves out for some codes reads all of them at once when it is needed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.sampling import Draws, Sampling
from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.recipe.token_plan import CodeStep, TokenPlan
from flashu_compile.runtime.decoding import ROWS_BEFORE, Caches, empty_caches
from flashu_compile.runtime.engine import Engines, update

Logits = NDArray[np.float32]


def branch_ids(codec: TextCodec, settings: DrawingSettings, prompt: str) -> tuple[list[int], list[int]]:
    """Encode what each branch of guidance reads before the first code: with the prompt, and without.

    Raises `InputError` if the prompt is too long.
    """
    template, other = settings.template, settings.unprompted
    prompted = codec.in_template(template, prompt, settings.max_prompt_tokens, "prompt")
    if other.text is not None:
        return prompted, codec.in_template(template, other.text)
    assert other.pad_id is not None  # one of the two is given
    return prompted, [number if number in other.kept_ids else other.pad_id for number in prompted]


def read_ids(settings: DrawingSettings, place: int, code: int) -> list[int]:
    """Return the ids that are read for the code at a place in the picture, and for the end of its row."""
    columns = settings.grid[1]
    ends = (place + 1) % columns == 0 and place + 1 < settings.length
    return [settings.first_code_id + code, *(settings.row_end if ends else ())]


def draw(
    engines: Engines,
    plan: TokenPlan,
    settings: DrawingSettings,
    branches: tuple[list[int], list[int]],
    sampling: Sampling,
    seed: int,
    progress: Callable[[], None] | None = None,
) -> NDArray[np.int64]:
    """Draw the codes int64 [codes] of one picture.

    `branches` are `branch_ids`. `progress` is called after each code. Raises `NotFiniteError` if the
    largest logit is not finite.
    """
    drawing, draws = Drawing(engines, settings, branches), Draws(seed)
    chosen: list[int] = []
    for step in plan.steps:
        logits = drawing.logits(step)
        (code,) = Source.engine(engines, step.engine).greedy(logits[None])
        if not sampling.is_greedy:
            code = sampling.choose(logits, draws)
        drawing.append(code)
        chosen.append(code)
        if progress is not None:
            progress()
    return np.array(chosen, dtype=np.int64)


def forced(
    engines: Engines,
    plan: TokenPlan,
    settings: DrawingSettings,
    branches: tuple[list[int], list[int]],
    codes: Iterable[int],
) -> Logits:
    """Return the guided logits [codes, vocab] of each of `codes`, the first of a picture, given those before it."""
    drawing, rows = Drawing(engines, settings, branches), []
    for step, code in zip(plan.steps, codes, strict=False):
        rows.append(drawing.logits(step))
        drawing.append(code)
    return np.stack(rows)


def guided(step: CodeStep, logits: Logits) -> Logits:
    """Combine the logits [branches, vocab] of a step's branches: l = l_u + s (l_c - l_u)."""
    if len(logits) == 1:
        return logits[0]
    conditional, unconditional = logits
    return unconditional + np.float32(step.guidance_scale) * (conditional - unconditional)


class Drawing:
    """A picture being drawn: the caches of both branches, and the ids that each has not read yet."""

    def __init__(
        self, engines: Engines, settings: DrawingSettings, branches: tuple[list[int], list[int]]
    ) -> None:
        self._engines, self._settings = engines, settings
        self._unread = [list(ids) for ids in branches]
        self._caches: Caches | None = None
        self._count = 0

    def append(self, code: int) -> None:
        """Let both branches read a code, and what follows a row where it ends one."""
        for ids in self._unread:
            ids.extend(read_ids(self._settings, self._count, code))
        self._count += 1

    def logits(self, step: CodeStep) -> Logits:
        """Return the guided logits [vocab] of the next code."""
        lengths = {len(self._unread[branch]) for branch in step.branches}
        if len(lengths) == 1:
            return guided(step, self._read(step.engine, step.branches))
        rows = [self._read(step.engine, (branch,)) for branch in step.branches]
        return guided(step, np.concatenate(rows))

    def _read(self, name: str, branches: tuple[int, ...]) -> Logits:
        """Let branches read what they have not, as many ids each, and return the logits [branches, vocab] behind it."""
        engine = self._engines.engine(name)
        if self._caches is None:
            self._caches = Caches(engine.spec, empty_caches(engine.spec), len(self._unread))
        ids = np.array([self._unread[branch] for branch in branches], dtype=np.int64)
        chosen, count = slice(branches[0], branches[-1] + 1), ids.shape[1]
        # A branch that lags behind needs no room beyond what the other one has.
        needed = int(self._caches.lengths[chosen].max()) + count
        state = self._caches.state(room_for=max(needed - int(self._caches.lengths.max()), 0))
        part: dict[str, Any] = {key: value[chosen] for key, value in state.items()}
        views = dict(part)
        inputs = {"suffix_ids": ids, ROWS_BEFORE: self._caches.lengths[chosen].copy()}
        logits = update(engine, inputs, part)["logits"]
        for key, value in part.items():
            if value is not views[key]:  # replaced, not overwritten
                state[key][chosen] = value
        self._caches.lengths[chosen] += count
        for branch in branches:
            self._unread[branch].clear()
        return logits
