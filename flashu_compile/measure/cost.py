"""The cost of a lossy recipe at the task's level: the engines just built against the program as captured.

- t2i: final latents at equal seed and prompt, the recipe's step plan against the published sampler at the model's
  own number of time points and the same guidance scale.
- mmu: logits of the next token on teacher-forced answers (the exact program's own), and how often the token is
  the same.

Every technique is also measured alone, on the first sample, by emulation (`emulation.py`), to show its share
of the cost. Errors are relative L2, ‖x - exact‖ / ‖exact‖ over what is not masked, to three digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.images import Picture as Given
from flashu_compile.bundle.images import engine_pixels, to_picture
from flashu_compile.bundle.manifest import GenerationSettings, UnderstandingSettings
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.bundle.prompts import PromptCodec
from flashu_compile.measure.calibration import ANSWER_TOKENS
from flashu_compile.measure.emulation import EmulatedEngines, Emulator, edits
from flashu_compile.measure.recorder import captured_source
from flashu_compile.program.program import Program, Role
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.report.pictures import Comparison
from flashu_compile.runtime import decoding
from flashu_compile.runtime.engine import Engines
from flashu_compile.runtime.sampler import prompt_pair, sample
from flashu_compile.tasks import MMU, VISION

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
    codec: PromptCodec,
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
    texts = [prompt_pair(codec, settings, prompt) for prompt in prompts]
    noises = [initial_noise(seed + i, 0, (1, *settings.latent_shape)) for i in range(len(prompts))]
    exact = dataclasses.replace(
        recipe, t2i=dataclasses.replace(recipe.t2i.published_sampler(), points=points)
    )

    def emulated(changed: Recipe, number: int) -> NDArray[np.float32]:
        return sample(EmulatedEngines(program, changed), changed.plan(), texts[number], noises[number])

    plan = recipe.plan()
    rows: list[dict[str, Any]] = []
    comparisons, truths = [], []
    for number, prompt in enumerate(prompts):
        tell(f"measuring the recipe's cost on prompt {number + 1} of {len(prompts)}")
        truth = emulated(exact, number)
        latents = sample(engines, plan, texts[number], noises[number])
        rows.append({"prompt": prompt, "seed": seed + number, "error": _error(latents, truth)})
        pictures = tuple(_picture(decoder, value) for value in (truth, latents))
        comparisons.append(Comparison(prompt, pictures))
        truths.append(truth)
    techniques = []
    for name, changed in _picture_techniques(recipe, exact):
        tell(f"measuring {name} alone")
        techniques.append({"name": name, "error": _error(emulated(changed, 0), truths[0])})
    figures = {
        "samples": rows,
        "error": _mean(row["error"] for row in rows),
        "techniques": techniques,
        "evaluations": {"exact": points - 1, "recipe": len(plan.steps)},
    }
    return Cost(figures, tuple(comparisons))


def _picture_techniques(recipe: Recipe, exact: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield each technique that is on, alone on the grid of the exact trajectory."""
    config, plain = recipe.t2i, exact.t2i
    end = {"full_ffn": config.full_ffn, "full_ffn_at": config.full_ffn_at}
    pruning = {name: getattr(config, name) for name in ("ffn_pruning", "semantic_pruning", "head_pruning")}
    cache = {name: getattr(config, name) for name in ("head_cache", "head_extrapolation")}
    alone: dict[str, dict[str, Any]] = {
        "FFN pruning": {**pruning, **end},
        "layer skipping": {"layer_skipping": config.layer_skipping, **end},
        "head cache": {**cache, **end},
        "guidance schedule": {"guidance": config.guidance},
        "time points and solver": {"points": config.points, "solver": config.solver},
    }
    for name, settings in alone.items():
        changed = dataclasses.replace(plain, **settings)
        if dataclasses.replace(changed, full_ffn=0, full_ffn_at=plain.full_ffn_at) != plain:
            yield name, dataclasses.replace(exact, t2i=changed)


def _picture(decoder: Program, latents: NDArray[np.float32]) -> Image.Image:
    with torch.inference_mode():
        pixels = decoder.run({Role.LATENTS: torch.from_numpy(latents)})[Role.PIXELS]
    return to_picture(pixels[0].numpy(), captured_source(decoder))


# --- mmu --------------------------------------------------------------------------------------------------------------


def answer_cost(
    program: Program,
    engines: Engines,
    codec: PromptCodec,
    settings: UnderstandingSettings,
    recipe: Recipe,
    questions: Sequence[tuple[Given, str]],
    *,
    tell: Tell,
) -> Cost:
    """Measure the cost of `recipe` for mmu: the error of next-token logits, and by technique.

    `program` is the captured understanding forward.
    """
    asked = [_Question(codec, settings, *question) for question in questions]
    whole = _emulator(program, recipe)
    rows: list[dict[str, Any]] = []
    comparisons, truths = [], []
    for number, question in enumerate(asked):
        tell(f"measuring the recipe's cost on question {number + 1} of {len(asked)}")
        answer, truth = question.greedy(Emulator(program, (Role.LOGITS,), edits(program, Decisions(), ())))
        logits = question.logits_of_engines(engines, answer)
        same = logits.argmax(-1) == truth.argmax(-1)
        rows.append(
            {
                "question": question.text,
                "answer": codec.decode(answer),
                "tokens": len(truth),
                "error": _error(logits, truth),
                "same_tokens": int(same.sum()),
            }
        )
        comparisons.append(Comparison(question.text, (question.picture,), question.kept(whole, answer)))
        truths.append((answer, truth))
    techniques = []
    for name, changed in _answer_techniques(recipe):
        tell(f"measuring {name} alone")
        answer, truth = truths[0]
        logits = asked[0].logits(_emulator(program, changed), answer)
        techniques.append({"name": name, "error": _error(logits, truth)})
    figures = {
        "samples": rows,
        "error": _mean(row["error"] for row in rows),
        "same_tokens": sum(row["same_tokens"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "techniques": techniques,
    }
    return Cost(figures, tuple(comparisons))


def _answer_techniques(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    config = recipe.mmu
    tokens = {name: getattr(config, name) for name in ("token_pruning", "token_layer", "token_scorer")}
    alone: dict[str, dict[str, Any]] = {
        "FFN pruning": {
            "ffn_pruning": config.ffn_pruning,
            "semantic_pruning": config.semantic_pruning,
        },
        "layer skipping": {"layer_skipping": config.layer_skipping},
        "token pruning": tokens if config.token_pruning else {},
    }
    for name, settings in alone.items():
        changed = MMUConfig(**settings)
        if changed != MMUConfig():
            yield name, dataclasses.replace(recipe, mmu=changed)


def _emulator(program: Program, recipe: Recipe) -> Emulator:
    decided = recipe.decided(MMU.name)
    skipped = decided.phases[0].skipped if decided.phases else ()
    return Emulator(program, (Role.LOGITS,), edits(program, decided, skipped, recipe.mmu))


class _Question:
    """A question about a picture, to be answered by programs and engines token by token."""

    def __init__(self, codec: PromptCodec, settings: UnderstandingSettings, image: Given, text: str) -> None:
        self.text, self._end = text, codec.eos
        self._pixels = engine_pixels(image, settings.picture_size)
        self._prefix = codec.question_prefix()
        self._suffix = codec.question_suffix(text, settings.max_question_tokens)

    @property
    def picture(self) -> Image.Image:
        return to_picture(self._pixels[0], Source("The picture asked about", "float32"))

    def _next(self, emulator: Emulator, answer: Sequence[int]) -> NDArray[np.float32]:
        inputs: Mapping[str, Any] = {
            Role.PIXELS: torch.from_numpy(self._pixels),
            Role.PREFIX_IDS: torch.tensor([self._prefix]),
            Role.SUFFIX_IDS: torch.tensor([[*self._suffix, *answer]]),
        }
        logits = emulator.emulate(inputs)[Role.LOGITS].numpy()
        captured_source(emulator.program).greedy(logits)
        return logits[0]

    def greedy(self, emulator: Emulator) -> tuple[list[int], NDArray[np.float32]]:
        """Return the greedy answer without its end token, and the logits [tokens + 1, vocab] of both."""
        answer: list[int] = []
        rows = [self._next(emulator, answer)]
        while len(answer) < ANSWER_TOKENS and (token := int(rows[-1].argmax())) != self._end:
            answer.append(token)
            rows.append(self._next(emulator, answer))
        return answer, np.stack(rows)

    def logits(self, emulator: Emulator, answer: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [tokens + 1, vocab] with `answer` given token by token."""
        return np.stack([self._next(emulator, answer[:count]) for count in range(len(answer) + 1)])

    def logits_of_engines(self, engines: Engines, answer: Sequence[int]) -> NDArray[np.float32]:
        embeds = engines.engine(VISION).run({"pixels": self._pixels})["image_embeds"]
        Source.engine(engines, VISION).check("image_embeds", embeds)
        asked = decoding.Picture(engines, self._prefix, embeds)
        going = asked.answers([self._suffix])
        logits = np.concatenate([going.first(), *(going.after([token]) for token in answer)])
        asked.greedy(logits)
        return logits

    def kept(self, emulator: Emulator, answer: Sequence[int]) -> NDArray[np.bool_] | None:
        """Return which image tokens token pruning keeps, or None if the recipe prunes none."""
        if emulator.tokens is None:
            return None
        self._next(emulator, answer)
        return emulator.tokens.kept


def _error(value: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    return _rounded(relative_error(value, truth))


def _mean(values: Iterator[float]) -> float:
    return _rounded(float(np.mean(list(values))))


def _rounded(value: float) -> float:
    # Three digits: the last bits depend on where in memory operands lie.
    return float(f"{value:.2e}")
