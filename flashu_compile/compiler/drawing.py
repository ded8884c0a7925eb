"""The compiler's side of t2i for models that draw pictures code by code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.compiler import metadata
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.specialise import Job
from flashu_compile.measure.calibration import Calibrated
from flashu_compile.measure.cost import Cost
from flashu_compile.measure.drawing import calibrate_drawing, drawing_cost, drawing_probe
from flashu_compile.measure.samples import CalibrationSamples
from flashu_compile.measure.sensitivity import Probe
from flashu_compile.passes import pipelines
from flashu_compile.program.program import Program, Role
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import drawing_variants
from flashu_compile.runtime.engine import Engines
from flashu_compile.tasks import CODES_DECODE, DRAW, T2I

_NO_TRAJECTORY = "the model draws pictures code by code, and has no trajectory"


class DrawingByCodes:
    """Pictures code by code: variants of `draw`, which read both branches of guidance on caches that begin empty."""

    record, program = T2I, DRAW

    def jobs(self, recipe: Recipe) -> tuple[Job, ...]:
        """Return a job for each engine that the recipe's plan runs."""
        decided = recipe.decided(T2I.name)
        found = []
        for variant in drawing_variants(recipe.t2i, decided, recipe.decoder):
            kept, name = decided.kept_neurons if variant.pruned else {}, variant.named(DRAW)
            passes = pipelines.complete(kept=kept, skipped=dict(variant.skipped))
            found.append(Job(name, passes, only=(name,), without=(Role.PREFIX_IDS,)))
        return tuple(found)

    def absent(self, recipe: Recipe) -> tuple[tuple[str, str], ...]:
        """Return what the recipe asks for that only a trajectory has."""
        config, plain = recipe.t2i, T2IConfig()
        asked = {
            "time points": config.points is not None,
            "time shift": config.time_shift is not None,
            "a solver": config.solver != plain.solver,
            "head cache": config.head_cache > 1,
        }
        told = [(name, _NO_TRAJECTORY) for name, given in asked.items() if given]
        if config.full_ffn > 0 and not config.pruned:
            told.append(("hybrid FFN", "no neurons are pruned, and layers are skipped for a whole picture"))
        return tuple(told)

    def _parts(self, source: CapturedModel) -> tuple[Program, TextCodec, DrawingSettings]:
        loaded = source.loaded
        settings = metadata.drawing(loaded)
        assert settings is not None, "its adapter draws code by code"
        return source.programs[DRAW].program, TextCodec(loaded.tokenizer), settings

    def calibrate(
        self,
        source: CapturedModel,
        recipe: Recipe,
        samples: CalibrationSamples,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> Calibrated:
        """Calibrate on pictures of the prompts."""
        parts = self._parts(source)
        return calibrate_drawing(*parts, recipe.t2i, samples.prompts, seed=seed, progress=progress)

    def probe(self, source: CapturedModel, recipe: Recipe, samples: Sequence[Any]) -> Probe:
        """Probe pictures of the prompts."""
        return drawing_probe(*self._parts(source), recipe, samples)

    def cost(
        self,
        source: CapturedModel,
        engines: Engines,
        recipe: Recipe,
        samples: tuple[Any, ...],
        seed: int,
        tell: Callable[[str], None],
    ) -> Cost:
        """Measure guided logits of the next code on pictures that the exact program drew."""
        program, codec, settings = self._parts(source)
        decoder = source.programs[CODES_DECODE].program
        return drawing_cost(program, decoder, engines, codec, settings, recipe, samples, seed=seed, tell=tell)
