"""Pipeline: a loaded bundle that makes pictures from text and answers questions about pictures."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashu_compile.errors import (
    BackendUnavailableError,
    BundleError,
    ConfigurationError,
    InputError,
    UnknownTaskError,
)
from flashu_compile.plan import StepPlan, uniform_plan
from flashu_compile.runtime.files import BundleFiles
from flashu_compile.runtime.images import Picture, engine_pixels, to_picture
from flashu_compile.runtime.manifest import (
    PLAN,
    TOKENIZER,
    GenerationFacts,
    Manifest,
    UnderstandingFacts,
    read_manifest,
)
from flashu_compile.runtime.noise import initial_noise
from flashu_compile.runtime.prompts import PromptCodec
from flashu_compile.runtime.sampler import prompt_pair, sample
from flashu_compile.runtime.sessions import Engine, Engines, OnnxRuntimeEngines, Tensors

Progress = Callable[[int, int], None]


def load(
    path: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    verify_hashes: bool = True,
) -> Pipeline:
    """Open the bundle at `path`. Nothing in it is executed as code; engines load when first used.

    `provider` is `cpu`, `cuda`, `tensorrt` or a provider's name in ONNX Runtime: what is asked for runs, or this
    fails. `threads` is the number of threads an engine computes with (None: one per core). `verify_hashes=False`
    skips comparing each file with its recorded SHA-256 before its first use.

    Raises `BundleError` if there is no bundle or it is damaged, `BundleVersionError` if its schema is newer,
    `BackendUnavailableError` if its backend or the provider does not work here, `ConfigurationError` on an unknown
    provider name or number of threads.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    if manifest.backend != "onnxruntime":
        raise BackendUnavailableError(
            f"{directory} was built for backend {manifest.backend!r}; this version runs 'onnxruntime' bundles."
        )
    files = BundleFiles(directory, manifest, verify_hashes=verify_hashes)
    codec = PromptCodec.from_file(files.path(TOKENIZER))
    plan = None
    if manifest.generation is not None:
        plan = StepPlan.from_json(files.text(PLAN))
    _check_parts(manifest, plan)
    return Pipeline(manifest, plan, codec, OnnxRuntimeEngines(files, provider=provider, threads=threads))


def _check_parts(manifest: Manifest, plan: StepPlan | None) -> None:
    """Every engine the tasks need is there, with the outputs they read. Raises `BundleError` otherwise."""
    needed: dict[str, str] = {}
    if manifest.generation is not None:
        needed["vae_decode"] = "pixels"
        needed.update((step.engine, "velocity") for step in (plan.steps if plan else ()))
    if manifest.understanding is not None:
        needed.update(vision="image_embeds", language="logits")
    for name, output in needed.items():
        if output not in {tensor.name for tensor in manifest.engine(name).outputs}:
            raise BundleError(f"Engine {name!r} has no output {output!r}; build the bundle again.")


class Pipeline:
    """A loaded bundle; make one with `flashu_compile.load`. All methods may be called from several threads.

    `manifest` says what the bundle holds. `plan` is the trajectory it was built with (None without t2i).
    """

    def __init__(
        self, manifest: Manifest, plan: StepPlan | None, codec: PromptCodec, engines: Engines
    ) -> None:
        self.manifest = manifest
        self.plan = plan
        self._codec = codec
        self._engines = engines

    def __repr__(self) -> str:
        return f"<Pipeline {self.manifest.model}: {', '.join(self.manifest.tasks)}>"

    @overload
    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> Image.Image: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> list[Image.Image]: ...

    def generate(
        self,
        prompt: str | list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> Image.Image | list[Image.Image]:
        """A picture of the prompt; for a list of prompts, a list of pictures.

        A prompt in a list gives exactly what it gives alone with the same seed: one `seed` holds for every prompt,
        a list of seeds has one for each. `steps` counts time points, as in the published scripts: N points are N - 1
        evaluations. It and `guidance_scale` default to the bundle's plan; a scale of 1 follows the prompt alone,
        0 ignores it. `progress(done, total)` is called after each evaluation, all prompts counted together.

        Raises `UnknownTaskError` if the bundle lacks t2i, `InputError` on an unusable prompt, seed, number of
        steps or guidance scale, `BundleError` if an engine's file is damaged.
        """
        decoder: Engine | None = None
        pictures = []
        for latents in self._sample(prompt, seed, steps, guidance_scale, progress):
            decoder = decoder or self._engines.engine("vae_decode")
            pictures.append(to_picture(decoder.run({"latents": latents})["pixels"][0]))
        return pictures[0] if isinstance(prompt, str) else pictures

    def latents(
        self,
        prompt: str | list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """The final latents float32 [prompts, c, h, w] that `generate` would decode; for measuring and checking."""
        rows = list(self._sample(prompt, seed, steps, guidance_scale, progress))
        empty = np.empty((0, *self._generation().latent_shape), dtype=np.float32)
        return np.concatenate([empty, *rows])

    def plan_for(self, steps: int | None = None, guidance_scale: float | None = None) -> StepPlan:
        """The trajectory `generate` follows for these arguments; the bundle's own if both are None.

        Raises `UnknownTaskError` if the bundle lacks t2i, `InputError` if an argument is out of range or the
        bundle's plan, being uneven, says nothing about other numbers of steps.
        """
        self._generation()
        plan = self.plan
        assert plan is not None  # read with the generation facts, in `load`
        if steps is None and guidance_scale is None:
            return plan
        engines = {step.engine for step in plan.steps}
        scales = {step.guidance_scale for step in plan.steps}
        if len(engines) != 1 or (guidance_scale is None and len(scales) != 1):
            raise InputError(
                "The bundle's plan changes its engine or guidance along the way, so no other plan follows from it: "
                "leave out steps and guidance_scale, or build a bundle with the plan you want."
            )
        points = plan.points if steps is None else _integer("steps", steps)
        try:
            scale = scales.pop() if guidance_scale is None else float(guidance_scale)
            return uniform_plan(points, scale, plan.time_shift, engines.pop())
        except (TypeError, ValueError):
            raise InputError(f"guidance_scale must be a number, not {guidance_scale!r}.") from None
        except ConfigurationError as error:
            raise InputError(str(error)) from error

    def _sample(
        self,
        prompt: str | list[str],
        seed: int | list[int],
        steps: int | None,
        guidance_scale: float | None,
        progress: Progress | None,
    ) -> Iterator[NDArray[np.float32]]:
        """Latents [1, c, h, w] of one prompt after another. All arguments are checked before the first is sampled."""
        facts = self._generation()
        plan = self.plan_for(steps, guidance_scale)
        prompts = _texts("prompt", prompt)
        if isinstance(seed, Sequence) and (isinstance(prompt, str) or len(seed) != len(prompts)):
            raise InputError(
                f"Give one seed, or one for each prompt of a list: {len(prompts)} prompts, seeds {seed!r}."
            )
        seeds = seed if isinstance(seed, Sequence) else [seed] * len(prompts)
        texts = [prompt_pair(self._codec, facts, text) for text in prompts]
        noises = [initial_noise(s, 0, (1, *facts.latent_shape)) for s in seeds]
        total, done = len(texts) * len(plan.steps), 0

        def evaluated() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        for text, noise in zip(texts, noises, strict=True):
            yield sample(self._engines, plan, text, noise, evaluated)

    @overload
    def ask(self, image: Picture, question: str, *, max_new_tokens: int | None = None) -> str: ...

    @overload
    def ask(self, image: Picture, question: list[str], *, max_new_tokens: int | None = None) -> list[str]: ...

    def ask(
        self, image: Picture, question: str | list[str], *, max_new_tokens: int | None = None
    ) -> str | list[str]:
        """The answer to a question about a picture; for a list of questions, a list of answers.

        `image` is a path, a PIL image or a uint8 array [height, width, 3]; it is encoded once for all questions.
        Decoding is greedy and ends at the end-of-sequence token or after `max_new_tokens` (default: the bundle's).

        Raises `UnknownTaskError` if the bundle lacks mmu, `InputError` on an unreadable picture or unusable
        question, `BundleError` if an engine's file is damaged.
        """
        facts = self._understanding()
        limit = facts.max_new_tokens if max_new_tokens is None else _integer("max_new_tokens", max_new_tokens)
        if limit < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {limit}.")
        longest = facts.max_question_tokens
        suffixes = [self._codec.question_suffix(text, longest) for text in _texts("question", question)]
        pixels = engine_pixels(image, facts.picture_size)
        embeds = self._engines.engine("vision").run({"pixels": pixels})["image_embeds"]
        answers = [self._answer(embeds, suffix, limit) for suffix in suffixes]
        return answers[0] if isinstance(question, str) else answers

    def _answer(self, embeds: NDArray[np.float32], suffix: list[int], limit: int) -> str:
        logits = _FullForward(self._engines.engine("language"), self._codec.question_prefix(), embeds)
        tokens: list[int] = []
        following = int(logits.first(suffix).argmax())
        while following != self._codec.eos:
            tokens.append(following)
            if len(tokens) == limit:
                break
            following = int(logits.after(following).argmax())
        return self._codec.decode(tokens)

    def _generation(self) -> GenerationFacts:
        if self.manifest.generation is None:
            raise self._lacks("t2i", "generate pictures")
        return self.manifest.generation

    def _understanding(self) -> UnderstandingFacts:
        if self.manifest.understanding is None:
            raise self._lacks("mmu", "answer questions")
        return self.manifest.understanding

    def _lacks(self, task: str, purpose: str) -> UnknownTaskError:
        return UnknownTaskError(
            f"This bundle was built for {', '.join(self.manifest.tasks)} and cannot {purpose}: "
            f"build one with task {task!r}."
        )


class _FullForward:
    """Next-token logits of one answer by running the whole sequence for every token, as published.

    A cached decoder takes its place with the same two methods, each giving logits [vocab].
    """

    def __init__(self, engine: Engine, prefix: list[int], embeds: NDArray[np.float32]) -> None:
        self._engine = engine
        self._prefix = np.array([prefix], dtype=np.int64)
        self._embeds = embeds
        self._suffix: list[int] = []

    def first(self, suffix: list[int]) -> NDArray[np.float32]:
        self._suffix = list(suffix)
        return self._run()

    def after(self, token: int) -> NDArray[np.float32]:
        self._suffix.append(token)
        return self._run()

    def _run(self) -> NDArray[np.float32]:
        suffix = np.array([self._suffix], dtype=np.int64)
        inputs: Tensors = {"prefix_ids": self._prefix, "image_embeds": self._embeds, "suffix_ids": suffix}
        return self._engine.run(inputs)["logits"][0]


def _integer(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer, not {value!r}.") from None


def _texts(name: str, value: str | list[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise InputError(f"A {name} is a string or a list of strings, not {type(value).__name__}.")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"A {name} is a string, not {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"The {name} {text!r} is not valid Unicode text.") from None
    return list(texts)
