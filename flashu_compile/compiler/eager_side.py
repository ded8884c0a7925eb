"""The eager model as a side of a benchmark, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashu_compile.evaluation.worker import PROMPT, QUESTION, Settings, Subject, picture, serve
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.reference import UnderstandingReference
from flashu_compile.tasks import T2I


class EagerSubject:
    """A model in eager PyTorch, loaded as `settings` say: model, vae, tokenizer, threads, steps and tokens."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings["threads"])
        parts = {name: settings.get(name) for name in ("vae", "tokenizer", "resolution")}
        self._pipe = EagerPipeline(load_model(settings["model"], **parts))
        self._steps, self._tokens = settings["steps"], settings["tokens"]

    @property
    def facts(self) -> dict[str, Any]:
        """Return the precision, and the length of the trajectory."""
        points = self._pipe.network.config.steps if self._steps is None else self._steps
        return {"precision": "float32", "backend": "eager", "points": points, "evaluations": points - 1}

    def run(self, task: str) -> Mapping[str, list[float]]:
        """Make a picture, or encode one anew and decode as many tokens as the settings say."""
        if task == T2I.name:
            self._pipe.generate(PROMPT, steps=self._steps)
        else:
            self._answer()
        return {}

    @torch.inference_mode()
    def _answer(self) -> None:
        network, codec = self._pipe.network, self._pipe.codec
        side = network.config.understanding_side * self._pipe.vae.spatial_factor
        reference = UnderstandingReference(network, self._pipe.latents(picture(side)))
        prefix, suffix = (
            torch.tensor([ids]) for ids in (codec.question_prefix(), codec.question_suffix(QUESTION))
        )
        reference.greedy(prefix, suffix, self._tokens, None)  # no token ends it: all sides decode as many


def main() -> None:
    """Serve the model."""

    def prepare(settings: Settings) -> Callable[[], Subject]:
        return lambda: EagerSubject(settings)

    serve(prepare)
