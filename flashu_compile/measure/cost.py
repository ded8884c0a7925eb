"""The cost of a lossy recipe at the task's level: the engines just built against the program as captured.

- t2i: final latents at equal seed and prompt, the recipe's step plan against the published sampler at the model's
  own number of time points and the same guidance scale.
- mmu and text: logits of the next token on teacher-forced answers (the exact program's own), and how often the token is
  the same.

Every technique is also measured alone, on the first sample, by emulation (`emulation.py`), to show its share
of the cost. Errors are relative L2, ‖x - exact‖ / ‖exact‖ over what is not masked, to three digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flashu_compile.bundle.agreement import relative_error, rounded
from flashu_compile.bundle.images import Picture as Given
from flashu_compile.bundle.images import shown, to_picture
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import GenerationSettings, TextSettings, UnderstandingSettings
from flashu_compile.measure.asked import Asked, Run, about_nothing, about_picture
from flashu_compile.measure.emulation import EmulatedEngines, Emulator, edits
from flashu_compile.measure.prompt_rows import prompts_of
from flashu_compile.measure.recorder import captured_source
from flashu_compile.program.program import Program, Role
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.report.pictures import Comparison
from flashu_compile.runtime import decoding
from flashu_compile.runtime.engine import Engines
from flashu_compile.runtime.sampler import prompt_pair, sample
from flashu_compile.system.workers import Check, in_parallel
from flashu_compile.tasks import MMU, TEXT

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Cost:
    """A measured cost. `figures` are plain JSON values, for the report; `comparisons` are for its page."""

    figures: dict[str, Any]
    comparisons: tuple[Comparison, ...]


# --- t2i --------------------------------------------------------------------------------------------------------------


def picture_cost(
    program: Program,
    decoder: Program,
    engines: Engines,
    codec: TextCodec,
    settings: GenerationSettings,
    recipe: Recipe,
    points: int,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    tell: Tell,
) -> Cost:
    """Measure the cost of `recipe` for t2i: the error of final latents, and by technique.

    `program` is the captured generation step, `decoder` the captured VAE decoder and `points` the model's own
    number of time points. Prompt i has the noise of seed `seed + i`.
    """
    text = prompts_of(program, codec, settings)
    noises = [initial_noise(seed + i, 0, (1, *settings.latent_shape)) for i in range(len(prompts))]
    exact = dataclasses.replace(
        recipe, t2i=dataclasses.replace(recipe.t2i.published_sampler(), points=points)
    )

    alone = list(_picture_techniques(recipe, exact))

    def emulated(run: tuple[Recipe, int], check: Check) -> NDArray[np.float32]:
        changed, number = run
        given = text(prompts[number])
        return sample(EmulatedEngines(program, changed), changed.plan(), given, noises[number], check)

    runs = [*((exact, number) for number in range(len(prompts))), *((changed, 0) for _, changed in alone)]
    plan = recipe.plan()
    rows: list[dict[str, Any]] = []
    comparisons, truths, techniques = [], [], []
    with closing(in_parallel(emulated, runs)) as trajectories:
        for number, prompt in enumerate(prompts):
            tell(f"measuring the recipe's cost on prompt {number + 1} of {len(prompts)}")
            truth = next(trajectories)
            latents = sample(engines, plan, prompt_pair(codec, settings, prompt), noises[number])
            rows.append({"prompt": prompt, "seed": seed + number, "error": _error(latents, truth)})
            pictures = tuple(decoded(decoder, Role.LATENTS, value) for value in (truth, latents))
            comparisons.append(Comparison(prompt, pictures))
            truths.append(truth)
        for (name, _), latents in zip(alone, trajectories, strict=True):
            tell(f"measuring {name} alone")
            techniques.append({"name": name, "error": _error(latents, truths[0])})
    figures = {
        "samples": rows,
        "error": mean(row["error"] for row in rows),
        "techniques": techniques,
        "evaluations": {"exact": points - 1, "recipe": len(plan.steps)},
    }
    return Cost(figures, tuple(comparisons))


def _picture_techniques(recipe: Recipe, exact: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield each technique that is on, alone on the grid of the exact trajectory."""
    config, plain = recipe.t2i, exact.t2i
    end = {"full_ffn": config.full_ffn, "full_ffn_at": config.full_ffn_at}
    cache = {name: getattr(config, name) for name in ("head_cache", "head_extrapolation")}
    alone: dict[str, dict[str, Any]] = {
        "FFN pruning": {"pruning": config.pruning, **end},
        "layer skipping": {"layer_skipping": config.layer_skipping, **end},
        "head cache": {**cache, **end},
        "guidance schedule": {"guidance": config.guidance},
        "time points and solver": {"points": config.points, "solver": config.solver},
    }
    for name, settings in alone.items():
        changed = dataclasses.replace(plain, **settings)
        if dataclasses.replace(changed, full_ffn=0, full_ffn_at=plain.full_ffn_at) != plain:
            yield name, dataclasses.replace(exact, t2i=changed)


def decoded(decoder: Program, role: str, values: NDArray[Any]) -> Image.Image:
    """Return the picture that a captured decoder makes of its input of a role, [1, …]."""
    with torch.inference_mode():
        pixels = decoder.run({role: torch.from_numpy(values)})[Role.PIXELS]
    return to_picture(pixels[0].numpy(), captured_source(decoder))


# --- mmu --------------------------------------------------------------------------------------------------------------


def answer_cost(
    program: Program,
    engines: Engines,
    codec: TextCodec,
    settings: UnderstandingSettings,
    recipe: Recipe,
    questions: Sequence[tuple[Given, str]],
    *,
    tell: Tell,
) -> Cost:
    """Measure the cost of `recipe` for mmu: the error of next-token logits, and by technique.

    `program` is the captured understanding forward.
    """
    asked = [about_picture(codec, settings, *question) for question in questions]
    rows, techniques = _answer_errors(program, engines, codec, recipe, MMU.name, asked, tell)
    whole = emulator_of(program, recipe, MMU.name)
    comparisons = []
    for question, row in zip(asked, rows, strict=True):
        picture = shown(question.given[Role.PIXELS][0].numpy(), settings.pictures)
        kept = _kept_tokens(whole, question, row.answer)
        comparisons.append(Comparison(question.text, (picture,), kept))
    return Cost(_answer_figures(rows, techniques), tuple(comparisons))


def text_cost(
    program: Program,
    engines: Engines,
    codec: TextCodec,
    settings: TextSettings,
    recipe: Recipe,
    prompts: Sequence[str],
    *,
    tell: Tell,
) -> Cost:
    """Measure the cost of `recipe` for text as `answer_cost` does; `program` is the captured completion forward."""
    asked = [about_nothing(codec, settings, prompt) for prompt in prompts]
    rows, techniques = _answer_errors(program, engines, codec, recipe, TEXT.name, asked, tell)
    return Cost(_answer_figures(rows, techniques), ())


@dataclasses.dataclass(frozen=True)
class _AnswerRow:
    """The exact program's answer to a question, and the figures of the engines on it."""

    answer: list[int]
    figures: dict[str, Any]


def _answer_errors(
    program: Program,
    engines: Engines,
    codec: TextCodec,
    recipe: Recipe,
    task: str,
    asked: Sequence[Asked],
    tell: Tell,
) -> tuple[list[_AnswerRow], list[dict[str, Any]]]:
    """Measure the engines on every question, and each technique alone on the first."""
    unchanged = edits(program, Decisions(), {})

    def greedy(question: Asked, check: Check) -> tuple[list[int], list[Tensor]]:
        return question.greedy(program, _checked(Emulator(program, (Role.LOGITS,), unchanged), check))

    rows: list[_AnswerRow] = []
    truths = []
    with closing(in_parallel(greedy, asked)) as answers:
        for number, question in enumerate(asked):
            tell(f"measuring the recipe's cost on question {number + 1} of {len(asked)}")
            answer, steps = next(answers)
            truth = np.concatenate([step.numpy() for step in steps])
            logits = _logits_of_engines(engines, question, answer)
            same = logits.argmax(-1) == truth.argmax(-1)
            told = {
                "question": question.text,
                "answer": codec.decode(answer),
                "tokens": len(truth),
                "error": _error(logits, truth),
                "same_tokens": int(same.sum()),
            }
            rows.append(_AnswerRow(answer, told))
            truths.append(truth)

    def forced(changed: Recipe, check: Check) -> NDArray[np.float32]:
        run, answer = _checked(emulator_of(program, changed, task), check), rows[0].answer
        steps = [run(asked[0].inputs(answer[:n]))[Role.LOGITS] for n in range(len(answer) + 1)]
        return np.concatenate([step.numpy() for step in steps])

    alone, techniques = list(_answer_techniques(recipe, task)), []
    with closing(in_parallel(forced, [changed for _, changed in alone])) as found:
        for (name, _), logits in zip(alone, found, strict=True):
            tell(f"measuring {name} alone")
            techniques.append({"name": name, "error": _error(logits, truths[0])})
    return rows, techniques


def _checked(emulator: Emulator, check: Check) -> Run:
    """Return a function that calls `check` and runs an emulator."""

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check()
        return emulator.emulate(inputs)

    return run


def _answer_figures(rows: Sequence[_AnswerRow], techniques: list[dict[str, Any]]) -> dict[str, Any]:
    samples = [row.figures for row in rows]
    return {
        "samples": samples,
        "error": mean(sample["error"] for sample in samples),
        "same_tokens": sum(sample["same_tokens"] for sample in samples),
        "tokens": sum(sample["tokens"] for sample in samples),
        "techniques": techniques,
    }


def _answer_techniques(recipe: Recipe, task: str) -> Iterator[tuple[str, Recipe]]:
    """Yield each technique of a task that answers, alone."""
    config = recipe.config(task)
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    names: dict[str, tuple[str, ...]] = {
        "FFN pruning": ("pruning",),
        "layer skipping": ("layer_skipping",),
        "token pruning": ("token_pruning", "token_layer", "token_scorer") if own.get("token_pruning") else (),
    }
    for technique, fields in names.items():
        changed = type(config)(**{name: own[name] for name in fields if name in own})
        if changed != type(config)():
            alone: dict[str, Any] = {task: changed}
            yield technique, dataclasses.replace(recipe, **alone)


def emulator_of(program: Program, recipe: Recipe, task: str) -> Emulator:
    """Return an emulator of a recipe on the captured program of a task, for logits."""
    decided, config = recipe.decided(task), recipe.config(task)
    skipped = decided.phases[0].layers if decided.phases else {}
    tokens = config if isinstance(config, MMUConfig) else None
    return Emulator(program, (Role.LOGITS,), edits(program, decided, skipped, tokens))


def _logits_of_engines(engines: Engines, question: Asked, answer: Sequence[int]) -> NDArray[np.float32]:
    """Return the logits [tokens + 1, vocab] that engines give with `answer` given token by token."""
    about_none = Role.PIXELS not in question.given
    asked: decoding.Asked = decoding.Nothing(engines) if about_none else _picture_of(engines, question)
    going = asked.answers([question.suffix])
    logits = np.concatenate([going.first(), *(going.after([token]) for token in answer)])
    asked.greedy(logits)
    return logits


def _picture_of(engines: Engines, question: Asked) -> decoding.Picture:
    prefix = question.given[Role.PREFIX_IDS][0].tolist()
    return decoding.Picture.seen(engines, prefix, question.given[Role.PIXELS].numpy())


def _kept_tokens(emulator: Emulator, question: Asked, answer: Sequence[int]) -> NDArray[np.bool_] | None:
    """Return which image tokens token pruning keeps, or None if the recipe prunes none."""
    if emulator.tokens is None:
        return None
    emulator.emulate(question.inputs(answer))
    return emulator.tokens.kept


def _error(value: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    return rounded(relative_error(value, truth))


def mean(values: Iterator[float]) -> float:
    """Return the mean, rounded as errors are."""
    return rounded(float(np.mean(list(values))))
