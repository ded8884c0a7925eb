"""Pictures from text: the methods of a pipeline that make them, by either loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashu_compile import arguments
from flashu_compile.arguments import LARGEST_POINTS, shown
from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.images import to_picture
from flashu_compile.bundle.noise import check_seed, initial_noise
from flashu_compile.bundle.sampling import Sampling
from flashu_compile.bundle.settings import DrawingSettings, GenerationSettings
from flashu_compile.errors import ConfigurationError, InputError, UnknownTaskError
from flashu_compile.recipe.plan import StepPlan, engines_needed
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.runtime import drawing
from flashu_compile.runtime.engine import Engine
from flashu_compile.runtime.opened import OpenedBundle
from flashu_compile.runtime.sampler import prompt_pair, sample
from flashu_compile.tasks import CODES_DECODE, T2I, VAE_DECODE

CountProgress = Callable[[int, int], None]


class MakesPictures(OpenedBundle):
    """An open bundle that makes pictures, if it has t2i."""

    @overload
    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
        progress: CountProgress | None = None,
    ) -> Image.Image: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
        progress: CountProgress | None = None,
    ) -> list[Image.Image]: ...

    def generate(
        self,
        prompt: str | list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
        progress: CountProgress | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Generate a picture of the prompt; for a list of prompts, a list of pictures.

        A prompt in a list gives exactly what it gives alone with the same seed: one `seed` holds for every prompt, a
        list of seeds has one for each. `steps` counts time points (2 to 1,000), as in the published scripts: N points
        are N - 1 evaluations. It and `guidance_scale` default to the bundle's plan; a scale of 1 follows the prompt
        alone, 0 ignores it. A model that draws code by code has no steps; `sampling` chooses its codes, by default as
        the bundle says. `progress(done, total)` is called after each evaluation, all prompts counted together.

        Raises `UnknownTaskError` if the bundle lacks t2i, `InputError` on an unusable prompt, seed, number of steps,
        guidance scale or sampling, `BundleError` if an engine's file is damaged, `NotFiniteError` on outputs that are
        not finite.
        """
        if self.manifest.drawing is None:
            if sampling is not None:
                raise InputError("This model chooses no codes; leave sampling out.")
            name, role = VAE_DECODE, "latents"
            rows: Iterator[NDArray[Any]] = self._sample(prompt, seed, steps, guidance_scale, progress)
        else:
            name, role = CODES_DECODE, "codes"
            rows = self._draw(prompt, seed, steps, guidance_scale, sampling, progress)
        decoder: Engine | None = None
        pictures = []
        for row in rows:
            decoder = decoder or self._engines.engine(name)
            pixels = decoder.run({role: row})["pixels"][0]
            pictures.append(to_picture(pixels, Source.engine(self._engines, name)))
        return pictures[0] if isinstance(prompt, str) else pictures

    def latents(
        self,
        prompt: str | list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        progress: CountProgress | None = None,
    ) -> NDArray[np.float32]:
        """Sample the latents float32 [prompts, c, h, w] that `generate` would decode; for measuring and checking."""
        rows = list(self._sample(prompt, seed, steps, guidance_scale, progress))
        empty = np.empty((0, *self._generation().latent_shape), dtype=np.float32)
        return np.concatenate([empty, *rows])

    def codes(
        self,
        prompt: str | list[str],
        *,
        seed: int | list[int] = 0,
        guidance_scale: float | None = None,
        sampling: Sampling | None = None,
        progress: CountProgress | None = None,
    ) -> NDArray[np.int64]:
        """Draw the codes int64 [prompts, codes] that `generate` would decode; for measuring and checking.

        Raises as `generate` does, and `UnknownTaskError` if the bundle's model does not draw code by code.
        """
        rows = list(self._draw(prompt, seed, None, guidance_scale, sampling, progress))
        return np.concatenate([np.empty((0, self._drawing().length), np.int64), *rows])

    def code_logits(
        self, prompt: str, codes: Sequence[int], *, guidance_scale: float | None = None
    ) -> NDArray[np.float32]:
        """Return the guided logits [codes, vocab] of each of `codes`, the first of a picture, given those before it.

        For measuring and checking. Raises as `codes` does.
        """
        settings = self._drawing()
        if not isinstance(prompt, str):
            raise InputError(f"A prompt is a string, not {type(prompt).__name__}.")
        if not isinstance(codes, Sequence | np.ndarray):
            raise InputError(f"codes is a list of integers, not {shown(codes)}.")
        given = [arguments.integer("A code", code, 0, settings.codes - 1, InputError) for code in codes]
        if not 0 < len(given) <= settings.length:
            raise InputError(f"Give 1 to {settings.length:,} codes, not {len(given):,}.")
        branches = drawing.branch_ids(self.codec, settings, *arguments.texts("prompt", prompt))
        plan = self.plan_for(None, guidance_scale)
        assert isinstance(plan, TokenPlan)
        return drawing.forced(self._engines, plan, settings, branches, given)

    def plan_for(self, steps: int | None = None, guidance_scale: float | None = None) -> StepPlan | TokenPlan:
        """Return the plan that `generate` follows for these arguments; the bundle's own if both are None.

        `guidance_scale` is the scale that the recipe's guidance schedule refers to. Raises `UnknownTaskError` if the
        bundle lacks t2i, `InputError` if an argument is out of range, or the plan for it runs an engine that the bundle
        lacks.
        """
        if self.plan is None or self.recipe is None:
            raise self._lacks(T2I)
        length = None if self.manifest.drawing is None else self.manifest.drawing.length
        if length is not None and steps is not None:
            raise InputError(f"This model draws a picture in {length:,} codes; leave steps out.")
        if steps is None and guidance_scale is None:
            return self.plan
        points = None if steps is None else arguments.integer("steps", steps, 2, LARGEST_POINTS, InputError)
        if guidance_scale is not None and all(factor is None for _, factor in self.recipe.t2i.guidance):
            raise InputError("This bundle's recipe switches guidance off; leave guidance_scale out.")
        try:
            if length is not None:
                return self.recipe.token_plan(length, guidance_scale=guidance_scale)
            plan = self.recipe.plan(points=points, guidance_scale=guidance_scale)
        except ConfigurationError as error:
            raise InputError(str(error)) from error
        present = [engine.name for engine in self.manifest.engines]
        missing = [name for name in engines_needed(plan) if name not in present]
        if missing:
            raise InputError(
                f"With steps={steps} and guidance_scale={guidance_scale} the recipe's plan runs engine "
                f"{missing[0]!r}, which this bundle lacks; leave them out, or build with a recipe that sets them."
            )
        return plan

    def _sample(
        self,
        prompt: str | list[str],
        seed: int | list[int],
        steps: int | None,
        guidance_scale: float | None,
        progress: CountProgress | None,
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the latents [1, c, h, w] of each prompt. All arguments are checked before the first is sampled."""
        settings = self._generation()
        plan = self.plan_for(steps, guidance_scale)
        assert isinstance(plan, StepPlan)
        prompts = arguments.texts("prompt", prompt)
        seeds = seeds_of("prompt", prompt, seed)
        texts = [prompt_pair(self.codec, settings, text) for text in prompts]
        evaluated = _counting(progress, len(texts) * len(plan.steps))
        for text, one in zip(texts, seeds, strict=True):
            noise = initial_noise(one, 0, (1, *settings.latent_shape))
            yield sample(self._engines, plan, text, noise, evaluated, self._schedules)

    def _draw(
        self,
        prompt: str | list[str],
        seed: int | list[int],
        steps: int | None,
        guidance_scale: float | None,
        sampling: Sampling | None,
        progress: CountProgress | None,
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the codes [1, codes] of each prompt. All arguments are checked before the first is drawn."""
        settings = self._drawing()
        plan = self.plan_for(steps, guidance_scale)
        assert isinstance(plan, TokenPlan)
        prompts = arguments.texts("prompt", prompt)
        seeds = seeds_of("prompt", prompt, seed)
        chosen = sampling_of(sampling, settings.sampling)
        texts = [drawing.branch_ids(self.codec, settings, text) for text in prompts]
        drawn = _counting(progress, len(texts) * settings.length)
        for text, one in zip(texts, seeds, strict=True):
            yield drawing.draw(self._engines, plan, settings, text, chosen, one, drawn)[None]

    def _generation(self) -> GenerationSettings:
        if self.manifest.generation is None:
            if self.manifest.drawing is not None:
                raise UnknownTaskError("The model of this bundle makes pictures of codes, not of latents.")
            raise self._lacks(T2I)
        return self.manifest.generation

    def _drawing(self) -> DrawingSettings:
        if self.manifest.drawing is None:
            if self.manifest.generation is not None:
                raise UnknownTaskError("The model of this bundle makes pictures of latents, not of codes.")
            raise self._lacks(T2I)
        return self.manifest.drawing


def seeds_of(name: str, texts: str | list[str], seed: int | list[int]) -> list[int]:
    """Return a seed for each text, of one for all or a list of them. Raises `InputError` on others."""
    count = 1 if isinstance(texts, str) else len(texts)
    if isinstance(seed, Sequence) and (isinstance(texts, str) or len(seed) != count):
        raise InputError(
            f"Give one seed, or one for each {name} of a list: {count} {name}s, seeds {shown(seed)}."
        )
    return [check_seed(s) for s in (seed if isinstance(seed, Sequence) else [seed] * count)]


def sampling_of(given: object, default: Sampling) -> Sampling:
    """Return the sampling that was given, or the default. Raises `InputError` on anything else."""
    if given is not None and not isinstance(given, Sampling):
        raise InputError(f"sampling is a flashu_compile.Sampling, not {shown(given)}.")
    return default if given is None else given


def _counting(progress: CountProgress | None, total: int) -> Callable[[], None]:
    """Return a function that tells `progress` of one more that is done."""
    arguments.function("progress", progress, InputError)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return count
