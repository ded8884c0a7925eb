"""The loop that draws code by code, on an engine whose logits tell all that each branch has read, in order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.bundle.profiles import ROOM
from flashu_compile.bundle.sampling import GREEDY, Sampling
from flashu_compile.bundle.settings import DrawingSettings, Template, Unprompted
from flashu_compile.errors import BundleError, NotFiniteError
from flashu_compile.recipe.token_plan import Span, TokenPlan
from flashu_compile.runtime.drawing import draw, forced

CODES, FIRST, END = 11, 100, 99
CACHE = "rows"
SPEC = EngineSpec(
    name="draw",
    task="t2i",
    file="",
    inputs=(
        TensorSpec("suffix_ids", "int64", ("batch", "suffix")),
        TensorSpec(CACHE, "float32", ("batch", 1, "capacity", 1)),
        TensorSpec("rows_before", "int64", ("batch",)),
    ),
    outputs=(
        TensorSpec("logits", "float32", ("batch", CODES)),
        TensorSpec(f"{CACHE}.updated", "float32", ("batch", 1, "capacity", 1)),
    ),
    reference="",
)


def logits_of(ids: tuple[int, ...], name: str) -> np.ndarray:
    """Numbers that no other ids give, in no other order, nor another engine."""
    seed = [len(name), *ids]
    return np.random.default_rng(seed).normal(size=CODES).astype(np.float32)


class Remembering:
    """Engines that keep in their caches what they have read."""

    precision = "float32"

    def __init__(self, name: str = "") -> None:
        self.spec, self._name = SPEC, name
        self.runs: list[tuple[int, int]] = []

    @functools.cache  # noqa: B019
    def engine(self, name: str) -> Remembering:
        return Remembering(name)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ids, rows, before = inputs["suffix_ids"], inputs[CACHE].copy(), inputs["rows_before"]
        self.runs.append(ids.shape)
        logits = []
        for number in range(len(ids)):
            end = before[number] + ids.shape[1]
            rows[number, 0, before[number] : end, 0] = ids[number]
            logits.append(logits_of(tuple(rows[number, 0, :end, 0].astype(int)), self._name))
        return {"logits": np.stack(logits), f"{CACHE}.updated": rows}


def settings(rows: int = 3, columns: int = 4, row_end: tuple[int, ...] = ()) -> DrawingSettings:
    return DrawingSettings(
        template=Template(),
        unprompted=Unprompted(text=""),
        grid=(rows, columns),
        codes=CODES,
        first_code_id=FIRST,
        row_end=row_end,
        max_prompt_tokens=50,
        picture_size=(8, 8),
    )


def by_hand(plan: TokenPlan, told: DrawingSettings, branches: tuple[list[int], list[int]]) -> list[int]:
    """The codes of a loop that knows no caches."""
    read, codes = [list(ids) for ids in branches], []
    for step in plan.steps:
        prompted, other = (logits_of(tuple(ids), step.engine) for ids in read)
        if step.guidance_scale == 1:
            guided = prompted
        elif step.guidance_scale == 0:
            guided = other
        else:
            guided = other + np.float32(step.guidance_scale) * (prompted - other)
        codes.append(int(guided.argmax()))
        ended = len(codes) % told.grid[1] == 0 and len(codes) < told.length
        for ids in read:
            ids.extend([FIRST + codes[-1], *(told.row_end if ended else ())])
    return codes


@given(
    first=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    second=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    scales=st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=1, max_size=5),
    row_end=st.sampled_from([(), (END,), (END, 98)]),
)
def test_it_draws_what_a_loop_without_caches_draws(
    first: list[int], second: list[int], scales: list[float], row_end: tuple[int, ...]
) -> None:
    """Whatever branches are left out, and for how long, and however long they are."""
    told = settings(row_end=row_end)
    names = ["draw", "draw_pruned"]
    counts = [len(part) for part in np.array_split(range(told.length), len(scales))]
    plan = TokenPlan(
        tuple(Span(c, names[n % 2], s) for n, (c, s) in enumerate(zip(counts, scales, strict=True)))
    )
    branches = (first, second)
    expected = by_hand(plan, told, branches)
    assert draw(Remembering(), plan, told, branches, GREEDY, seed=0).tolist() == expected
    rows = forced(Remembering(), plan, told, branches, expected)
    assert rows.argmax(-1).tolist() == expected


def test_both_branches_are_read_in_one_run() -> None:
    told, engines = settings(row_end=(END,)), Remembering()
    draw(engines, TokenPlan((Span(12, "draw", 3.0),)), told, ([1, 2, 3], [4, 5, 6]), GREEDY, seed=0)
    # The prompt, then code by code, and what ends a row together with the code before it.
    assert engines.engine("draw").runs == [(2, 3), *[(2, 2 if n % 4 == 0 else 1) for n in range(1, 12)]]


def test_a_branch_that_is_left_out_is_not_read() -> None:
    engines = Remembering()
    plan = TokenPlan((Span(6, "draw", 1.0), Span(6, "draw", 3.0)))
    draw(engines, plan, settings(), ([1, 2], [3, 4]), GREEDY, seed=0)
    runs = engines.engine("draw").runs
    assert runs[:6] == [(1, 2), *[(1, 1)] * 5]
    assert runs[6:8] == [(1, 1), (1, 8)]
    assert runs[8:] == [(2, 1)] * 5


def test_a_branch_that_catches_up_needs_no_more_room() -> None:
    """Caches hold what is read, and at most what they grow by."""
    sizes: list[int] = []

    class Measuring(Remembering):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            sizes.append(inputs[CACHE].shape[2])
            return super().run(inputs)

        def engine(self, name: str) -> Remembering:
            return self

    told = settings(20, 10)
    plan = TokenPlan((Span(150, "draw", 1.0), Span(50, "draw", 3.0)))
    draw(Measuring(), plan, told, ([1, 2, 3], [4, 5]), GREEDY, seed=0)
    assert max(sizes) <= 3 + 200 + ROOM


def test_seeds_choose() -> None:
    plan, told = TokenPlan((Span(12, "draw", 3.0),)), settings()
    drawn = [draw(Remembering(), plan, told, ([1], [2]), Sampling(2.0), seed=s).tolist() for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_logits_that_are_no_numbers_are_an_error() -> None:
    class Broken(Remembering):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            made = super().run(inputs)
            return {**made, "logits": np.full_like(made["logits"], np.nan)}

        def engine(self, name: str) -> Remembering:
            return self

    with pytest.raises(NotFiniteError, match="Engine 'draw'"):
        draw(Broken(), TokenPlan((Span(12, "draw", 1.0),)), settings(), ([1], [2]), Sampling(), seed=0)


class TestSettings:
    def test_a_second_branch_needs_one_of_two(self) -> None:
        for text, pad_id in ((None, None), ("", 3)):
            with pytest.raises(BundleError, match="either a text or a pad_id"):
                Unprompted(text=text, pad_id=pad_id)

    @pytest.mark.parametrize(
        "changed",
        [
            {"grid": (0, 4)},
            {"codes": 0},
            {"grid": (8_000, 8_000)},
            {"template": Template(before=(1,), picture=1)},
            {"top_p": 0.0},
        ],
    )
    def test_damaged_ones_are_refused(self, changed: dict[str, Any]) -> None:
        with pytest.raises(BundleError):
            DrawingSettings(**{**vars(settings()), **changed})
