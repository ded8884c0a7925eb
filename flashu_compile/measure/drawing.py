"""Pictures drawn code by code: what a recipe leaves open, what int8 loses, and what a recipe costs.

Codes are drawn by the exact program on cached keys and values; whatever is measured is measured on these codes, given
one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashu_compile.bundle.agreement import relative_error, rounded
from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.images import to_picture
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.errors import CalibrationError, FlashuError
from flashu_compile.measure.cached import CachedEngines
from flashu_compile.measure.calibration import (
    Calibrated,
    CountProgress,
    add_samples,
    decided_of_answers,
    last_rows,
)
from flashu_compile.measure.cost import Cost, Tell, decoded, emulator_of, mean
from flashu_compile.measure.recorder import Recorder
from flashu_compile.measure.sensitivity import Probe
from flashu_compile.measure.statistics import Statistics
from flashu_compile.program.program import Program, Role
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import CodeStep, TokenPlan, compile_token_plan
from flashu_compile.report.pictures import Comparison
from flashu_compile.runtime import drawing
from flashu_compile.runtime.drawing import branch_ids, draw, forced
from flashu_compile.runtime.engine import Engines
from flashu_compile.system.workers import Check
from flashu_compile.tasks import CODES_DECODE, T2I

#: So many codes of a picture are looked at for the cost of a technique alone.
_PLACES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class _Drawn:
    """A picture that the exact program drew: the ids that each branch reads, and the codes."""

    branches: tuple[list[int], list[int]]
    codes: NDArray[np.int64]

    def rows(self, settings: DrawingSettings, branch: int, count: int) -> list[int]:
        """Return the ids that a branch has read before the code at the place `count`."""
        before = enumerate(self.codes[:count].tolist())
        return [
            *self.branches[branch],
            *(i for n, code in before for i in drawing.read_ids(settings, n, code)),
        ]


class _Exact:
    """The exact program, and what it draws of a prompt with a constant guidance scale, chosen as the model says."""

    def __init__(
        self, program: Program, codec: TextCodec, settings: DrawingSettings, plan: TokenPlan
    ) -> None:
        self.engines, self.plan = CachedEngines(program), plan
        self._codec, self._settings = codec, settings
        self.sampling = settings.sampling

    def drawn(self, prompt: str, seed: int, check: Check | None = None) -> _Drawn:
        branches = branch_ids(self._codec, self._settings, prompt)
        codes = draw(self.engines, self.plan, self._settings, branches, self.sampling, seed, check)
        return _Drawn(branches, codes)


def _inputs(ids: Sequence[int]) -> dict[str, Tensor]:
    """Return the inputs of the captured program for ids of one branch."""
    return {Role.PREFIX_IDS: torch.empty(1, 0, dtype=torch.int64), Role.SUFFIX_IDS: torch.tensor([list(ids)])}


def calibrate_drawing(
    program: Program,
    codec: TextCodec,
    settings: DrawingSettings,
    config: T2IConfig,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    progress: CountProgress | None = None,
) -> Calibrated:
    """Decide for t2i from the pictures of `prompts`, drawn by the captured `program` with nothing cut.

    Neurons are scored on all rows of both guidance branches, layers on those that codes follow. `config` must be
    resolved. Prompt i is drawn with seed `seed + i`. Raises `CalibrationError` if there are no prompts, one of them
    fails, or activations are not finite.
    """
    if not prompts:
        raise CalibrationError("Calibrating t2i needs prompts; the samples hold none.")
    plan = compile_token_plan(config.without_techniques(), Decisions(), settings.length)
    exact = _Exact(program, codec, settings, plan)
    statistics = Statistics(program, config.pruned, config.skipping)
    # The row before the first code, and those of codes and of ends of rows.
    read = 1 + sum(len(drawing.read_ids(settings, place, 0)) for place in range(settings.length - 1))

    def counted(index: int, check: Check) -> Statistics:
        own = statistics.empty()
        own.where = f"prompt {index} ({prompts[index]!r})"
        own.last_rows = last_rows(read)
        try:
            drawn = exact.drawn(prompts[index], seed + index, check)
        except FlashuError as error:
            raise CalibrationError(f"Calibration failed on {own.where}: {error}") from error
        recorder = Recorder(program, own.taps())
        for branch in range(len(drawn.branches)):
            check()
            recorder.record(_inputs(drawn.rows(settings, branch, settings.length - 1)))
        return own

    add_samples(counted, range(len(prompts)), statistics.add, progress)
    return decided_of_answers(statistics, config, len(prompts))


def drawing_probe(
    program: Program, codec: TextCodec, settings: DrawingSettings, recipe: Recipe, prompts: Sequence[str]
) -> Probe:
    """Probe the logits of the last code of pictures, or those on the program's own sample if there are no prompts."""
    plan = compile_token_plan(recipe.t2i.published_sampler(), Decisions(), settings.length)
    given: list[Any] = [program.sample]
    if prompts:
        exact = _Exact(program, codec, settings, plan)
        drawn = [exact.drawn(prompt, index) for index, prompt in enumerate(prompts)]
        given = [
            _inputs(one.rows(settings, branch, settings.length - 1)) for one in drawn for branch in (0, 1)
        ]

    def outputs(recorder: Recorder) -> NDArray[Any]:
        return np.concatenate([recorder.record(inputs)[Role.LOGITS].numpy() for inputs in given])

    return Probe(program, outputs)


def drawing_cost(
    program: Program,
    decoder: Program,
    engines: Engines,
    codec: TextCodec,
    settings: DrawingSettings,
    recipe: Recipe,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    tell: Tell,
) -> Cost:
    """Measure the cost of `recipe` for t2i: the error of guided logits on the exact program's codes, and by technique.

    `program` is the captured forward, `decoder` the captured decoder of codes. Prompt i is drawn with `seed + i`.
    """
    plan = recipe.token_plan(settings.length)
    published = compile_token_plan(recipe.t2i.published_sampler(), Decisions(), settings.length)
    exact = _Exact(program, codec, settings, published)
    rows: list[dict[str, Any]] = []
    comparisons, pictures, truths = [], [], []
    for number, prompt in enumerate(prompts):
        tell(f"measuring the recipe's cost on prompt {number + 1} of {len(prompts)}")
        drawn = exact.drawn(prompt, seed + number)
        truth = forced(exact.engines, published, settings, drawn.branches, drawn.codes)
        logits = forced(engines, plan, settings, drawn.branches, drawn.codes)
        same = int((logits.argmax(-1) == truth.argmax(-1)).sum())
        rows.append(
            {
                "prompt": prompt,
                "seed": seed + number,
                "error": rounded(relative_error(logits, truth)),
                "same_tokens": same,
                "tokens": settings.length,
            }
        )
        own = draw(engines, plan, settings, drawn.branches, exact.sampling, seed + number)
        shown = (decoded(decoder, Role.CODES, drawn.codes[None]), _picture_of(engines, own))
        comparisons.append(Comparison(prompt, shown))
        pictures.append(drawn)
        truths.append(truth)
    techniques = []
    for name, changed in _techniques(recipe):
        tell(f"measuring {name} alone")
        techniques.append({"name": name, "error": _alone(program, settings, changed, pictures[0], truths[0])})
    figures = {
        "samples": rows,
        "error": mean(row["error"] for row in rows),
        "same_tokens": sum(row["same_tokens"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "techniques": techniques,
    }
    return Cost(figures, tuple(comparisons))


def _techniques(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield each technique that is on, alone."""
    config, plain = recipe.t2i, recipe.t2i.published_sampler()
    end = {"full_ffn": config.full_ffn, "full_ffn_at": config.full_ffn_at} if config.pruned else {}
    alone: dict[str, dict[str, Any]] = {
        "FFN pruning": {"pruning": config.pruning, **end},
        "layer skipping": {"layer_skipping": config.layer_skipping},
        "guidance schedule": {"guidance": config.guidance},
    }
    for name, settings in alone.items():
        changed = dataclasses.replace(plain, **settings)
        if changed != plain:
            yield name, dataclasses.replace(recipe, t2i=changed)


def _alone(
    program: Program, settings: DrawingSettings, recipe: Recipe, drawn: _Drawn, truth: NDArray[np.float32]
) -> float:
    """Return the error of guided logits at some places of a picture, by emulation."""
    steps = recipe.token_plan(settings.length).steps
    whole = dataclasses.replace(recipe, t2i=dataclasses.replace(recipe.t2i, pruning={}))
    # By whether all neurons are there. Keys and values of rows that other engines left are not told apart.
    emulators = [emulator_of(program, one, T2I.name) for one in (recipe, whole)]
    places = sorted({round(x) for x in np.linspace(0, settings.length - 1, _PLACES)})

    def logits(place: int, step: CodeStep) -> NDArray[np.float32]:
        emulator = emulators["_pruned" not in step.engine]
        rows = [
            emulator.emulate(_inputs(drawn.rows(settings, branch, place)))[Role.LOGITS].numpy()
            for branch in step.branches
        ]
        return drawing.guided(step, np.concatenate(rows))

    found = np.stack([logits(place, steps[place]) for place in places])
    return rounded(relative_error(found, truth[places]))


def _picture_of(engines: Engines, codes: NDArray[np.int64]) -> Any:
    pixels = engines.engine(CODES_DECODE).run({"codes": codes[None]})["pixels"][0]
    return to_picture(pixels, Source.engine(engines, CODES_DECODE))
