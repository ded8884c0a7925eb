"""The eager model as a side of a benchmark, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashu_compile.compiler.metadata import understanding
from flashu_compile.evaluation.worker import PROMPT, QUESTION, Settings, Subject, picture, serve
from flashu_compile.models.loading import load_model
from flashu_compile.tasks import MMU, T2I, TEXT


class EagerSubject:
    """A model in eager PyTorch, loaded as `settings` say: model, vae, tokenizer, threads, steps and tokens."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings["threads"])
        parts = {name: settings.get(name) for name in ("vae", "tokenizer", "resolution")}
        loaded = load_model(settings["model"], **parts)
        self._sampler, self._model = loaded.adapter.sampler(loaded), loaded.adapter.eager(loaded)
        self._rules = understanding(loaded).pictures if MMU.name in loaded.adapter.tasks else None
        self._steps, self._tokens, self._tasks = settings["steps"], settings["tokens"], settings["tasks"]

    @property
    def facts(self) -> dict[str, Any]:
        """Return the precision, and the length of the trajectory if pictures are timed."""
        told: dict[str, Any] = {"precision": "float32", "backend": "eager"}
        if self._sampler is None or T2I.name not in self._tasks:
            return told
        points = self._sampler.points if self._steps is None else self._steps
        return told if points is None else {**told, "points": points, "evaluations": points - 1}

    def run(self, task: str) -> Mapping[str, list[float]]:
        """Make a picture, or encode one anew and decode as many tokens as the settings say."""
        if task == T2I.name:
            self._model.generate(PROMPT, steps=self._steps)
        elif task == TEXT.name:
            self._model.answer(None, QUESTION, self._tokens)
        else:
            assert self._rules is not None, "it has the task mmu"
            self._model.answer(picture(self._rules), QUESTION, self._tokens)
        return {}


def main() -> None:
    """Serve the model."""

    def prepare(settings: Settings) -> Callable[[], Subject]:
        return lambda: EagerSubject(settings)

    serve(prepare)
