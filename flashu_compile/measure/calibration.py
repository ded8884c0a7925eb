"""Calibration: run Programs over samples, measure what techniques need to know, and decide.

Statistics are sums over samples, so memory does not grow with their number; samples, noise and ties are all
determined by the seed. Samples run at the same time, and the sums of each are added in their order. What is measured,
per task:

- Wanda scores of FFN neurons (FlashU, technique 1): ||X_j||_2 * sum_i |W_down[i, j]|, X = the input of the down
  projection on every row that is computed: for t2i along the sampling trajectory of the unpruned model, both
  guidance branches, padding left out; for mmu over the picture, the question and the model's own answer.
- Layer importance (technique 3): 1 - mean cosine between a layer's input and output, of the decoder and of every stack
  of which layers are skipped; for t2i per phase of the trajectory over the same rows, for mmu over the rows that
  predict the answer's tokens (of other stacks than the decoder: over all rows).
- Norms of value vectors (technique 6) of image and text rows, per layer, for the report.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.bundle.images import Picture
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import GenerationSettings, TextSettings, UnderstandingSettings
from flashu_compile.errors import CalibrationError, FlashuError
from flashu_compile.measure.asked import Asked, about_nothing, about_picture
from flashu_compile.measure.prompt_rows import prompts_of
from flashu_compile.measure.recorder import Recorder, RecordingEngine, Tap, joined_taps
from flashu_compile.measure.statistics import Rows, Statistics, keep_neurons, score_curves, skip_layers
from flashu_compile.passes.analysis.attention import attention_sites
from flashu_compile.passes.analysis.span import no_fixed_length, visual_span
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.program.program import Program, Role
from flashu_compile.recipe.config import MMUConfig, T2IConfig, TaskConfig, TextConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.plan import compile_plan
from flashu_compile.runtime.sampler import sample
from flashu_compile.system.workers import Check, in_parallel

#: The outputs of a generation step that its trajectory is made of; nothing reads its logits.
TRAJECTORY_ROLES = (Role.VELOCITY,)

CountProgress = Callable[[int, int], None]
_Item = TypeVar("_Item")
_Sums = TypeVar("_Sums")


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrated:
    """The decisions of calibration for a task, and the figures behind them (JSON values, for the report)."""

    decisions: Decisions
    figures: dict[str, Any]
    scores: dict[str, dict[int, NDArray[np.float64]]]


def calibrate_t2i(
    program: Program,
    codec: TextCodec,
    settings: GenerationSettings,
    config: T2IConfig,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    progress: CountProgress | None = None,
) -> Calibrated:
    """Decide for t2i, from the trajectories of `prompts` through the captured denoise `program`.

    `config` must be resolved (points, guidance scale and time shift given). The trajectory has its guidance
    and solver with nothing pruned, skipped or cached. Prompt i has the noise of seed `seed + i`. Raises
    `CalibrationError` if there are no prompts, one of them fails, or activations are not finite.
    """
    if not prompts:
        raise CalibrationError("Calibrating t2i needs prompts; the samples hold none.")
    (program,) = KeepOutputs(TRAJECTORY_ROLES).call(program).programs
    plan, text = compile_plan(config.without_techniques()), prompts_of(program, codec, settings)
    total = Statistics(program, config.pruned, config.skipping)
    phases = _PhaseCosines(total, len(plan.steps), config.skipping_interval, settings.span_length)

    def trajectory(index: int, check: Check) -> _PhaseCosines:
        own = phases.empty()
        own.statistics.where = where = f"prompt {index} ({prompts[index]!r})"
        engine = RecordingEngine(Recorder(program, own.statistics.taps()), own.before)
        try:
            noise = initial_noise(seed + index, 0, (1, *settings.latent_shape))
            sample(engine, plan, text(prompts[index]), noise, check)
        except CalibrationError:
            raise
        except FlashuError as error:
            raise CalibrationError(f"Calibration failed on {where}: {error}") from error
        own.close()
        return own

    add_samples(trajectory, range(len(prompts)), phases.add, progress)
    scores = total.scores()
    kept = _kept(scores, config.pruned, config.width_multiple)
    decisions = Decisions(kept, phases.decide(config.skipping) if config.skipping else ())
    figures = {
        "samples": len(prompts),
        "layer_importance": phases.figures(),
        "neuron_scores": score_curves(scores, kept),
    }
    return Calibrated(decisions, figures, scores)


class _PhaseCosines:
    """Splits a trajectory's cosines into phases of `interval` evaluations, and selects the live rows of each.

    `span` is the number of rows of the picture.
    """

    def __init__(self, statistics: Statistics, evaluations: int, interval: int, span: int) -> None:
        self.statistics, self.evaluations, self.interval = statistics, evaluations, interval
        self.evaluation, self.span = 0, span
        count = self.count = -(-evaluations // interval)
        self.sums = {
            stack: torch.zeros(count, len(blocks), dtype=torch.float64)
            for stack, blocks in statistics.blocks.items()
        }
        self.rows = {stack: torch.zeros(count, dtype=torch.int64) for stack in self.sums}
        self._phase: int | None = None

    def empty(self) -> _PhaseCosines:
        """Return phases of the same trajectory, of statistics of their own, that begin at zero."""
        return _PhaseCosines(self.statistics.empty(), self.evaluations, self.interval, self.span)

    def add(self, other: _PhaseCosines) -> None:
        """Add the sums of a whole trajectory, and those of its statistics."""
        self.statistics.add(other.statistics)
        for stack, sums in other.sums.items():
            self.sums[stack] += sums
            self.rows[stack] += other.rows[stack]

    def before(self, inputs: Mapping[str, Tensor]) -> None:
        self.close()
        self._phase = self.evaluation // self.interval
        self.evaluation += 1
        self.statistics.rows = self.statistics.last_rows = _live_rows(inputs, self.span)

    def close(self) -> None:
        """Add the sums of the last evaluation to its phase."""
        if self._phase is not None:
            for stack, sums in self.sums.items():
                sums[self._phase] += self.statistics.cosines[stack]
                self.rows[stack][self._phase] += self.statistics.counted[stack]
        self._phase = None
        self.statistics.reset_cosines()

    def importance(self) -> dict[str, list[list[float]]]:
        return {stack: (1 - sums / self.rows[stack][:, None]).tolist() for stack, sums in self.sums.items()}

    def starts(self) -> list[float]:
        return [p * self.interval / self.evaluations for p in range(self.count)]

    def decide(self, ratios: Mapping[str, float]) -> tuple[Phase, ...]:
        importance = self.importance()
        return tuple(
            Phase(start, {stack: skip_layers(importance[stack][number], ratios[stack]) for stack in ratios})
            for number, start in enumerate(self.starts())
        )

    def figures(self) -> dict[str, list[dict[str, Any]]]:
        starts = self.starts()
        return {
            stack: [
                {"start": start, "importance": importance}
                for start, importance in zip(starts, phases, strict=True)
            ]
            for stack, phases in self.importance().items()
        }


def _live_rows(inputs: Mapping[str, Tensor], span: int) -> Rows:
    """Select the rows of the text and the image span, without padding before and everything after the image.

    Stacks over image tokens alone have another number of rows, which are all selected.
    """
    mask, tail = inputs[Role.PROMPT_MASK], inputs[Role.TAIL_IDS].shape[1]
    shape = (mask.shape[0], mask.shape[1] + span + tail)
    live = torch.zeros(shape, dtype=torch.bool)
    live[:, : mask.shape[1]] = mask
    live[:, mask.shape[1] : mask.shape[1] + span] = True
    places = live.flatten().nonzero()[:, 0]

    def rows(value: Tensor) -> Tensor:
        flat = value.flatten(0, -2)
        return flat if value.shape[:2] != shape else flat.index_select(0, places)

    return rows


def calibrate_mmu(
    program: Program,
    codec: TextCodec,
    settings: UnderstandingSettings,
    config: MMUConfig,
    questions: Sequence[tuple[Picture, str]],
    *,
    progress: CountProgress | None = None,
) -> Calibrated:
    """Decide for mmu, from the model's answers to `questions` (image and text) through the `understand` program.

    Raises `CalibrationError` if there are no questions, one of them fails, or activations are not finite.
    """
    if not questions:
        raise CalibrationError(
            "Calibrating mmu needs pairs of an image and a question; the samples hold none."
        )
    norms = _ValueNorms(program) if no_fixed_length(program) is None else None
    asked = [
        (f"question {index} ({question[1]!r})", functools.partial(about_picture, codec, settings, *question))
        for index, question in enumerate(questions)
    ]
    made = _calibrate_answers(program, config, asked, norms, progress)
    if norms is None:
        return made
    return dataclasses.replace(made, figures={**made.figures, "value_norms": norms.figures()})


def calibrate_text(
    program: Program,
    codec: TextCodec,
    settings: TextSettings,
    config: TextConfig,
    prompts: Sequence[str],
    *,
    progress: CountProgress | None = None,
) -> Calibrated:
    """Decide for text, from the model's answers to `prompts` through the `complete` program.

    Raises `CalibrationError` if there are no prompts, one of them fails, or activations are not finite.
    """
    if not prompts:
        raise CalibrationError("Calibrating text needs prompts; the samples hold none.")
    asked = [
        (f"prompt {index} ({prompt!r})", functools.partial(about_nothing, codec, settings, prompt))
        for index, prompt in enumerate(prompts)
    ]
    return _calibrate_answers(program, config, asked, None, progress)


def _calibrate_answers(
    program: Program,
    config: MMUConfig | TextConfig,
    questions: Sequence[tuple[str, Callable[[], Asked]]],
    norms: _ValueNorms | None,
    progress: CountProgress | None,
) -> Calibrated:
    """Decide from the answers to `questions`, each with its name for errors; `norms` are of the same values."""
    statistics = Statistics(program, config.pruned, config.skipping)
    # Pillow reads a file when its picture is first used, which questions may share.
    preparing = threading.Lock()

    def answered(
        question: tuple[str, Callable[[], Asked]], check: Check
    ) -> tuple[Statistics, _ValueNorms | None]:
        name, prepare = question
        own, own_norms = statistics.empty(), None if norms is None else norms.empty()
        own.where = name
        plain = Recorder(program, {})

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            check()
            return plain.record(inputs)

        try:
            with preparing:
                asked = prepare()
            answer, _ = asked.greedy(program, run)
        except FlashuError as error:
            raise CalibrationError(f"Calibration failed on {name}: {error}") from error
        own.last_rows = last_rows(len(answer) + 1)
        taps = {} if own_norms is None else own_norms.taps()
        Recorder(program, joined_taps([*own.taps().items(), *taps.items()])).record(asked.inputs(answer))
        return own, own_norms

    def add(sums: tuple[Statistics, _ValueNorms | None]) -> None:
        own, own_norms = sums
        statistics.add(own)
        if norms is not None and own_norms is not None:
            norms.add(own_norms)

    add_samples(answered, questions, add, progress)
    return decided_of_answers(statistics, config, len(questions))


def add_samples(
    work: Callable[[_Item, Check], _Sums],
    items: Sequence[_Item],
    add: Callable[[_Sums], None],
    progress: CountProgress | None,
) -> None:
    """Run `work` on samples at the same time, `add` what each gives, in their order, and report how many are done."""
    with closing(in_parallel(work, items)) as found:
        for index, sums in enumerate(found):
            add(sums)
            if progress is not None:
                progress(index + 1, len(items))


def decided_of_answers(statistics: Statistics, config: TaskConfig, count: int) -> Calibrated:
    """Decide for what is decoded token by token, of which `statistics` saw `count` samples."""
    importance = statistics.importance()
    scores = statistics.scores()
    skipped = {stack: skip_layers(importance[stack], ratio) for stack, ratio in config.skipping.items()}
    phases = (Phase(0.0, skipped),) if skipped else ()
    kept = _kept(scores, config.pruned, config.width_multiple)
    figures = {
        "samples": count,
        "layer_importance": importance,
        "neuron_scores": score_curves(scores, kept),
    }
    return Calibrated(Decisions(kept, phases), figures, scores)


def last_rows(count: int) -> Rows:
    """Select so many rows at the end of each value."""
    return lambda value: value[:, -count:].flatten(0, 1)


class _ValueNorms:
    """Mean L2 norm of the value vectors (all kv heads together) of image and of text rows, per layer of the decoder."""

    def __init__(self, program: Program) -> None:
        self._sites = attention_sites(program, program.decoder)
        self._span = visual_span(program)
        self._clear()

    def _clear(self) -> None:
        self._before = dict.fromkeys(self._span.before, 0)
        self._sums = {(site.block, kind): [0.0, 0] for site in self._sites for kind in ("image", "text")}

    def empty(self) -> _ValueNorms:
        """Return norms of the same values of the same program that begin at zero."""
        made = copy.copy(self)
        made._clear()
        return made

    def add(self, other: _ValueNorms) -> None:
        """Add the norms of `other`, which is of the same program."""
        for key, (norms, rows) in other._sums.items():
            self._sums[key][0] += norms
            self._sums[key][1] += rows

    def taps(self) -> dict[fx.Node, Tap]:
        taps: dict[fx.Node, Tap] = {site.value: self._norms(site.block) for site in self._sites}
        return taps | {segment: self._measure(segment) for segment in self._before}

    def _measure(self, segment: fx.Node) -> Tap:
        def tap(value: Tensor) -> None:
            self._before[segment] = value.shape[self._span.axis]

        return tap

    def _norms(self, block: int) -> Tap:
        def tap(value: Tensor) -> None:
            norms = value.double().square().sum((1, 3)).sqrt()[0]
            start = sum(self._before.values())
            image = slice(start, start + self._span.length)
            parts = {"image": norms[image], "text": torch.cat([norms[: image.start], norms[image.stop :]])}
            for kind, part in parts.items():
                sums = self._sums[block, kind]
                sums[0] += part.sum().item()
                sums[1] += len(part)

        return tap

    def figures(self) -> list[dict[str, float]]:
        return [
            {
                kind: self._sums[site.block, kind][0] / self._sums[site.block, kind][1]
                for kind in ("image", "text")
            }
            for site in self._sites
        ]


def _kept(
    scores: Mapping[str, Mapping[int, NDArray[np.float64]]], ratios: Mapping[str, float], multiple: int
) -> dict[str, dict[int, NDArray[np.int64]]]:
    return {
        stack: {
            block: keep_neurons(values, ratio, multiple, f"FFN {block} of stack {stack!r}")
            for block, values in scores.get(stack, {}).items()
        }
        for stack, ratio in ratios.items()
    }
