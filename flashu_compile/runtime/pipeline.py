"""Pipeline: a loaded bundle that makes pictures from text and answers questions about pictures or none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from flashu_compile import arguments
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.images import Picture, engine_pixels
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.bundle.sampling import GREEDY, Sampling
from flashu_compile.bundle.settings import TextSettings, UnderstandingSettings
from flashu_compile.errors import ConfigurationError, InputError
from flashu_compile.runtime import decoding
from flashu_compile.runtime.backends import find_run_backend, open_engines
from flashu_compile.runtime.choice import AUTO, choose
from flashu_compile.runtime.decoding import Talk, longest_answer
from flashu_compile.runtime.parts import read_parts
from flashu_compile.runtime.pictures import MakesPictures, sampling_of, seeds_of
from flashu_compile.runtime.providers import ProviderOptions
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import MMU, TEXT


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
    container's quota). With `memory="fast"` engines keep weights in the form that is fastest to compute with, which
    ONNX Runtime on the CPU shares between them in the user's cache (see its option `packed_weights`); with `"low"` all
    of its engines read one map of the weights as they are, which takes less memory and more time.
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


class Pipeline(MakesPictures):
    """A loaded bundle; make one with `flashu_compile.load`. All methods may be called from several threads.

    `with load(…) as pipe:` closes it at the end. Sessions do not survive a fork and cannot be pickled: what would run
    one in a forked process, or pickle it, raises `PipelineError`; each process loads the bundle itself.

    `manifest` says what the bundle holds, `plan` how it makes pictures, `recipe` the rules of other plans (both
    None without t2i), `backend` what runs its engines, and `choice` by which times it was chosen (None unless it was).
    """

    @overload
    def ask(
        self,
        image: Picture | None,
        question: str,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> str: ...

    @overload
    def ask(
        self,
        image: Picture | None,
        question: list[str],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | list[int] = 0,
    ) -> list[str]: ...

    def ask(
        self,
        image: Picture | None,
        question: str | list[str],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | list[int] = 0,
    ) -> str | list[str]:
        """Answer a question about a picture or none; for a list of questions, return a list of answers.

        `image` is a path, a PIL image or a uint8 array [height, width, 3]; it is encoded once for all questions, whose
        answers are decoded side by side. None asks without a picture (task text). A question in a list gets the answer
        that it gets alone. Decoding ends at an end token or after `max_new_tokens` (default: the bundle's). It is
        greedy unless `sampling` says how tokens are chosen at random; `seed` is then that of every question, or a list
        of one for each. A question and its answer share as many positions as the longest of both have by the bundle's
        own limits.

        Raises `UnknownTaskError` if the bundle lacks mmu (text where no image is given), `InputError` on an unreadable
        picture or unusable question, `BundleError` if an engine's file is damaged, `NotFiniteError` if an engine's
        output is not finite.
        """
        talk = self._talk(image, question, max_new_tokens, sampling, seed)
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
        self,
        image: Picture | None,
        question: str,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Iterator[str]: ...

    @overload
    def stream(
        self,
        image: Picture | None,
        question: list[str],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | list[int] = 0,
    ) -> Iterator[tuple[int, str]]: ...

    def stream(
        self,
        image: Picture | None,
        question: str | list[str],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | list[int] = 0,
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """Return an iterator over the pieces of the answer as it is decoded; joined, they are what `ask` returns.

        For a list of questions, which are answered side by side, it yields pairs of a question's index in the list and
        the next piece of its answer. Arguments and errors as for `ask`; all arguments are checked when this is called.
        """
        talk = self._talk(image, question, max_new_tokens, sampling, seed)
        pieces = decoding.pieces(talk.tokens(), self.codec.decode)
        return (piece for _, piece in pieces) if isinstance(question, str) else pieces

    def _talk(
        self,
        image: Picture | None,
        question: str | list[str],
        max_new_tokens: int | None,
        sampling: Sampling | None = None,
        seed: int | list[int] = 0,
    ) -> Talk:
        """Encode every question, and the picture, if there is one. All arguments are checked before that."""
        texts = arguments.texts("question", question)
        chosen, seeds = sampling_of(sampling, GREEDY), seeds_of("question", question, seed)
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
        return Talk(asked, suffixes, settings, limit, before, chosen, seeds)

    def _picture(self, image: Picture) -> tuple[decoding.Asked, list[int]]:
        """Encode a picture; return it with the ids ahead of its rows."""
        settings = self._understanding()
        pixels = engine_pixels(image, settings.pictures)
        cells = settings.pictures.cells(*pixels.shape[2:])
        settings.check_rows(cells)
        prefix, _ = self.codec.around_picture(settings.template, "", cells=cells)
        return decoding.Picture.seen(self._engines, prefix, pixels), prefix

    def _understanding(self) -> UnderstandingSettings:
        if self.manifest.understanding is None:
            raise self._lacks(MMU)
        return self.manifest.understanding

    def _text(self) -> TextSettings:
        if self.manifest.text is None:
            raise self._lacks(TEXT)
        return self.manifest.text
