"""Pipeline: a loaded bundle that makes pictures from text and answers questions about pictures or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashu_compile import arguments
from flashu_compile.arguments import LARGEST_POINTS, shown
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.images import Picture, engine_pixels, to_picture
from flashu_compile.bundle.manifest import (
    GenerationSettings,
    Manifest,
    TextSettings,
    UnderstandingSettings,
    read_manifest,
)
from flashu_compile.bundle.noise import check_seed, initial_noise
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.errors import ConfigurationError, InputError, UnknownTaskError
from flashu_compile.recipe.plan import StepPlan, engines_needed
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import decoding
from flashu_compile.runtime.backends import find_run_backend, open_engines
from flashu_compile.runtime.choice import AUTO, Choice, choose
from flashu_compile.runtime.decoding import Talk, longest_answer
from flashu_compile.runtime.engine import Engine, Engines
from flashu_compile.runtime.lifetime import Closing, OwnedEngines
from flashu_compile.runtime.parts import read_parts
from flashu_compile.runtime.providers import ProviderOptions
from flashu_compile.runtime.sampler import prompt_pair, sample, schedules
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import MMU, T2I, TEXT, VAE_DECODE, TaskRecord

CountProgress = Callable[[int, int], None]


def load(
    path: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    provider_options: ProviderOptions | None = None,
    threads: int | None = None,
    memory: str = "fast",
    verify_hashes: bool = True,
    trust: bool = False,
    allow_control_tokens: bool = False,
    options: Mapping[str, Any] | None = None,
    digest: str | None = None,
    backend: str | None = None,
) -> Pipeline:
    """Open the bundle at `path`; engines load when first used. Nothing in it is run as code without `trust`.

    `provider` is `cpu`, `cuda`, `tensorrt` or a provider's name in ONNX Runtime; loading fails if it does not work.
    `provider_options` are its options by ONNX Runtime's names, such as `device_id`, `gpu_mem_limit`,
    `enable_cuda_graph` or `trt_engine_cache_path`; `library` is that of a plug-in, whose code it runs. `threads` is the
    number of threads an engine computes with (None: one for each core that the process may use, by its affinity and its
    container's quota). With `memory="fast"` each engine keeps weights in the form that is fastest to compute with; with
    `"low"` (ONNX Runtime on the CPU) all engines read one map of the weights, which takes less memory and more time.
    `verify_hashes=False` skips comparing each file with its SHA-256; `digest` is that of the manifest, as `export` gave
    it. `trust=True` lets engines be code, or have any operators: give it only for bundles whose builder you know. A
    prompt or question is plain text, whatever it spells; with `allow_control_tokens=True` the tokenizer's added tokens
    in it (`<|im_end|>`, `<image>`) are control tokens, as in the published scripts. `options` are the backend's own.
    `backend` is what runs the engines, if not what they were built for: `openvino` runs bundles built for
    `onnxruntime`, on its device that `provider` names; `auto` takes the faster of the two on the CPU, measured at the
    first load and kept in the user's cache.

    Raises `PathError` if `path` cannot be one, `BundleError` if there is no bundle, it is damaged, or not of `digest`,
    `BundleVersionError` if its schema is another, `BackendUnavailableError` if backend or provider do not work here,
    `ConfigurationError` on an unknown provider, number of threads, memory mode, option or digest, or a need for trust.
    """
    directory = absolute(path)
    arguments.flag("verify_hashes", verify_hashes)
    manifest = read_manifest(directory, digest=digest)
    if find_run_backend(manifest.backend).runs_code and not verify_hashes:
        raise ConfigurationError(
            f"{directory} was built for backend {manifest.backend!r}, whose engines are code: "
            "their hashes are always checked; leave verify_hashes out."
        )
    files = BundleFiles(directory, manifest, verify_hashes=verify_hashes)
    parts = read_parts(files, allow_control_tokens=allow_control_tokens)

    def opened(name: str | None) -> Pipeline:
        engines = open_engines(
            files, provider=provider, provider_options=provider_options, threads=threads, memory=memory, trust=trust,
            options=options, backend=name,
        )  # fmt: skip
        return Pipeline(manifest, parts.plan, parts.recipe, parts.codec, engines, backend=name)

    if backend != AUTO:
        return opened(backend)
    if provider != "cpu" or provider_options or options or memory != "fast":
        raise ConfigurationError(
            f"backend={AUTO!r} chooses on the CPU, between backends as they are; leave out provider, provider_options, "
            "options and memory, or name a backend."
        )
    choice = choose(files, threads, opened)
    pipe = opened(choice.backend)
    pipe.choice = choice
    return pipe


class Pipeline(Closing):
    """A loaded bundle; make one with `flashu_compile.load`. All methods may be called from several threads.

    `with load(…) as pipe:` closes it at the end. Sessions do not survive a fork and cannot be pickled: what would run
    one in a forked process, or pickle it, raises `PipelineError`; each process loads the bundle itself.

    `manifest` says what the bundle holds, `plan` its trajectory, `recipe` the rules of others (both None without t2i),
    `backend` what runs its engines, and `choice` by which times it was chosen (None unless it was).
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: StepPlan | None,
        recipe: Recipe | None,
        codec: TextCodec,
        engines: Engines,
        *,
        backend: str | None = None,
    ) -> None:
        self.manifest = manifest
        self.backend = backend or manifest.backend
        self.choice: Choice | None = None
        self.plan = plan
        self.recipe = recipe
        self.codec = codec
        self._engines = engines
        self._schedules = schedules(engines)

    @property
    def engines(self) -> Engines:
        """The bundle's engines by name; for measuring and checking."""
        return self._engines

    def close(self) -> None:
        """Release sessions, weights and their maps. Methods that need one raise `PipelineError` afterwards."""
        if isinstance(self._engines, OwnedEngines):
            self._engines.close()
        self._schedules = schedules(self._engines)  # without the values it remembered

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
        progress: CountProgress | None = None,
    ) -> list[Image.Image]: ...

    def generate(
        self,
        prompt: str | list[str],
        *,
        seed: int | list[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        progress: CountProgress | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Generate a picture of the prompt; for a list of prompts, a list of pictures.

        A prompt in a list gives exactly what it gives alone with the same seed: one `seed` holds for every prompt, a
        list of seeds has one for each. `steps` counts time points (2 to 1,000), as in the published scripts: N points
        are N - 1 evaluations. It and `guidance_scale` default to the bundle's plan; a scale of 1 follows the prompt
        alone, 0 ignores it. `progress(done, total)` is called after each evaluation, all prompts counted together.

        Raises `UnknownTaskError` if the bundle lacks t2i, `InputError` on an unusable prompt, seed, number of steps or
        guidance scale, `BundleError` if an engine's file is damaged, `NotFiniteError` on outputs that are not finite.
        """
        decoder: Engine | None = None
        pictures = []
        for latents in self._sample(prompt, seed, steps, guidance_scale, progress):
            decoder = decoder or self._engines.engine(VAE_DECODE)
            pixels = decoder.run({"latents": latents})["pixels"][0]
            pictures.append(to_picture(pixels, Source.engine(self._engines, decoder.spec.name)))
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

    def plan_for(self, steps: int | None = None, guidance_scale: float | None = None) -> StepPlan:
        """Return the trajectory that `generate` follows for these arguments; the bundle's own if both are None.

        `guidance_scale` is the scale that the recipe's guidance schedule refers to. Raises `UnknownTaskError` if the
        bundle lacks t2i, `InputError` if an argument is out of range, or the plan for it runs an engine that the bundle
        lacks.
        """
        self._generation()
        assert self.plan is not None  # both read with the generation settings, in `load`
        assert self.recipe is not None
        if steps is None and guidance_scale is None:
            return self.plan
        points = None if steps is None else arguments.integer("steps", steps, 2, LARGEST_POINTS, InputError)
        if guidance_scale is not None and all(factor is None for _, factor in self.recipe.t2i.guidance):
            raise InputError("This bundle's recipe switches guidance off; leave guidance_scale out.")
        try:
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
        prompts = arguments.texts("prompt", prompt)
        if isinstance(seed, Sequence) and (isinstance(prompt, str) or len(seed) != len(prompts)):
            raise InputError(
                f"Give one seed, or one for each prompt of a list: {len(prompts)} prompts, seeds {shown(seed)}."
            )
        seeds = [check_seed(s) for s in (seed if isinstance(seed, Sequence) else [seed] * len(prompts))]
        arguments.function("progress", progress, InputError)
        texts = [prompt_pair(self.codec, settings, text) for text in prompts]
        total, done = len(texts) * len(plan.steps), 0

        def evaluated() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        for text, one in zip(texts, seeds, strict=True):
            noise = initial_noise(one, 0, (1, *settings.latent_shape))
            yield sample(self._engines, plan, text, noise, evaluated, self._schedules)

    @overload
    def ask(self, image: Picture | None, question: str, *, max_new_tokens: int | None = None) -> str: ...

    @overload
    def ask(
        self, image: Picture | None, question: list[str], *, max_new_tokens: int | None = None
    ) -> list[str]: ...

    def ask(
        self, image: Picture | None, question: str | list[str], *, max_new_tokens: int | None = None
    ) -> str | list[str]:
        """Answer a question about a picture or none; for a list of questions, return a list of answers.

        `image` is a path, a PIL image or a uint8 array [height, width, 3]; it is encoded once for all questions, whose
        answers are decoded side by side. None asks without a picture (task text). A question in a list gets the answer
        that it gets alone. Decoding is greedy and ends at an end token or after `max_new_tokens` (default: the
        bundle's). A question and its answer share as many positions as the longest of both have by the bundle's own
        limits.

        Raises `UnknownTaskError` if the bundle lacks mmu (text where no image is given), `InputError` on an unreadable
        picture or unusable question, `BundleError` if an engine's file is damaged, `NotFiniteError` if an engine's
        output is not finite.
        """
        talk = self._talk(image, question, max_new_tokens)
        answers: list[list[int]] = [[] for _ in talk.suffixes]
        for number, token in talk.tokens():
            answers[number].append(token)
        texts = [self.codec.decode(ids) for ids in answers]
        return texts[0] if isinstance(question, str) else texts

    def logits(
        self, image: Picture | None, question: str, *, tokens: int, answer: Sequence[int] = ()
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Return the first `tokens` ids of the answer, and the logits [tokens, vocab] whose argmax they are.

        An end token counts like any other here, and no token is penalised for having been there before. Each id follows
        those before it, or as many of `answer` as there are instead; for measuring and checking. Errors as for `ask`.
        """
        talk = self._talk(image, question, tokens)
        answers = talk.asked.answers(talk.suffixes)
        rows = [answers.first()]
        while len(rows) < talk.limit:
            given = answer[len(rows) - 1 : len(rows)]
            rows.append(answers.after(list(given) or rows[-1].argmax(axis=1).tolist()))
        logits = np.concatenate(rows)
        return logits.argmax(axis=1).tolist(), logits

    @overload
    def stream(
        self, image: Picture | None, question: str, *, max_new_tokens: int | None = None
    ) -> Iterator[str]: ...

    @overload
    def stream(
        self, image: Picture | None, question: list[str], *, max_new_tokens: int | None = None
    ) -> Iterator[tuple[int, str]]: ...

    def stream(
        self, image: Picture | None, question: str | list[str], *, max_new_tokens: int | None = None
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """Return an iterator over the pieces of the answer as it is decoded; joined, they are what `ask` returns.

        For a list of questions, which are answered side by side, it yields pairs of a question's index in the list and
        the next piece of its answer. Arguments and errors as for `ask`; all arguments are checked when this is called.
        """
        pieces = decoding.pieces(self._talk(image, question, max_new_tokens).tokens(), self.codec.decode)
        return (piece for _, piece in pieces) if isinstance(question, str) else pieces

    def _talk(self, image: Picture | None, question: str | list[str], max_new_tokens: int | None) -> Talk:
        """Encode every question, and the picture, if there is one. All arguments are checked before that."""
        texts = arguments.texts("question", question)
        settings = self._text() if image is None else self._understanding()
        template = settings.template
        limits = settings.max_question_tokens, settings.max_new_tokens
        empty, *whole = (self.codec.in_template(template, text, limits[0]) for text in ("", *texts))
        limit = longest_answer(whole, len(empty), limits, max_new_tokens)
        ahead = template.picture or 0
        suffixes = [ids[ahead:] for ids in whole]
        if not all(suffixes):
            raise InputError("A question is empty, and so is what the model reads of it; ask something.")
        asked, prefix = (decoding.Nothing(self._engines), []) if image is None else self._picture(image)
        before = [*prefix, *([] if template.placeholder is None else [template.placeholder])]
        return Talk(asked, suffixes, settings, limit, before)

    def _picture(self, image: Picture) -> tuple[decoding.Asked, list[int]]:
        """Encode a picture; return it with the ids ahead of its rows."""
        settings = self._understanding()
        pixels = engine_pixels(image, settings.pictures)
        cells = settings.pictures.cells(*pixels.shape[2:])
        prefix, _ = self.codec.around_picture(settings.template, "", cells=cells)
        return decoding.Picture.seen(self._engines, prefix, pixels), prefix

    def _generation(self) -> GenerationSettings:
        if self.manifest.generation is None:
            raise self._lacks(T2I)
        return self.manifest.generation

    def _understanding(self) -> UnderstandingSettings:
        if self.manifest.understanding is None:
            raise self._lacks(MMU)
        return self.manifest.understanding

    def _text(self) -> TextSettings:
        if self.manifest.text is None:
            raise self._lacks(TEXT)
        return self.manifest.text

    def _lacks(self, task: TaskRecord) -> UnknownTaskError:
        return UnknownTaskError(
            f"This bundle was built for {', '.join(self.manifest.tasks)} and cannot {task.purpose}: "
            f"build one with task {task.name!r}."
        )
