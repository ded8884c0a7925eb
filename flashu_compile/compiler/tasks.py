"""The compiler's side of each task: one class per task, found by the task's name.

To add a task, write a class with the members of `CompiledTask` beside those here, a record in
`flashu_compile/tasks.py`, and its parameters in `recipe/config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import GenerationSettings, TextSettings, UnderstandingSettings
from flashu_compile.compiler import metadata
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.drawing import DrawingByCodes
from flashu_compile.compiler.specialise import Job
from flashu_compile.measure.calibration import Calibrated, calibrate_mmu, calibrate_t2i, calibrate_text
from flashu_compile.measure.cost import Cost, answer_cost, picture_cost, text_cost
from flashu_compile.measure.samples import CalibrationSamples
from flashu_compile.measure.sensitivity import Probe, generation_probe, text_probe, understanding_probe
from flashu_compile.passes import pipelines
from flashu_compile.passes.base import Pass
from flashu_compile.passes.gather_tokens import GatherTokens
from flashu_compile.passes.manager import PassRecord
from flashu_compile.passes.prune_ffn import PruneFFN
from flashu_compile.passes.remove_layers import RemoveLayers
from flashu_compile.program.program import Program, Role
from flashu_compile.recipe.plan import engines_needed, variants
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.runtime.engine import Engines
from flashu_compile.tasks import (
    COMPLETE,
    DENOISE,
    LANGUAGE,
    MAIN,
    MMU,
    REUSE,
    T2I,
    TEXT,
    UNDERSTAND,
    VAE_DECODE,
    TaskRecord,
    schedule_of,
)


class CompiledTask(Protocol):
    """The compiler's side of a task. `recipe` is resolved for the model wherever one is given."""

    @property
    def record(self) -> TaskRecord:
        """Return the task's record."""
        ...

    @property
    def program(self) -> str:
        """Return the name of the captured program that techniques change."""
        ...

    def absent(self, recipe: Recipe) -> tuple[tuple[str, str], ...]:
        """Return each technique that `recipe` asks for and this loop does not have, with the reason."""
        ...

    def jobs(self, recipe: Recipe) -> tuple[Job, ...]:
        """Return the jobs that `recipe` makes of the program that techniques change.

        Raises `RecipeError` if the recipe lacks a decision.
        """
        ...

    def calibrate(
        self,
        source: CapturedModel,
        recipe: Recipe,
        samples: CalibrationSamples,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> Calibrated:
        """Take the recipe's open decisions from `samples`.

        Raises `CalibrationError` as measure/calibration.py does.
        """
        ...

    def probe(self, source: CapturedModel, recipe: Recipe, samples: Sequence[Any]) -> Probe:
        """Return what int8 is measured on, the program's own sample if there are no `samples`."""
        ...

    def cost(
        self,
        source: CapturedModel,
        engines: Engines,
        recipe: Recipe,
        samples: tuple[Any, ...],
        seed: int,
        tell: Callable[[str], None],
    ) -> Cost:
        """Measure the cost of a lossy recipe: the engines against the program as captured."""
        ...


class TextToImage:
    """Pictures from text: variants of `denoise` by phase of the trajectory, and the engine that reuses features."""

    record, program = T2I, DENOISE

    def absent(self, recipe: Recipe) -> tuple[tuple[str, str], ...]:
        """Return nothing: the recipe's parameters for this task are those of this loop."""
        return ()

    def jobs(self, recipe: Recipe) -> tuple[Job, ...]:
        """Return a job for each variant that the recipe's plan runs, and one for the engine that reuses features."""
        config, decided = recipe.t2i, recipe.decided(T2I.name)
        names = engines_needed(recipe.plan())
        found = [
            Job(
                variant.name,
                pipelines.denoise(
                    kept=decided.kept_neurons if variant.pruned else {},
                    skipped=dict(variant.skipped),
                    features=config.head_cache > 1,
                ),
            )
            for variant in variants(config, decided, recipe.decoder)
            if variant.name in names
        ]
        if REUSE in names:
            only = (schedule_of(REUSE), REUSE)
            found.append(Job(DENOISE, pipelines.reuse(), then={REUSE: pipelines.reused()}, only=only))
        return tuple(found)

    def _parts(self, source: CapturedModel) -> tuple[Program, TextCodec, GenerationSettings]:
        loaded = source.loaded
        return source.programs[DENOISE].program, TextCodec(loaded.tokenizer), metadata.generation(loaded)

    def calibrate(
        self,
        source: CapturedModel,
        recipe: Recipe,
        samples: CalibrationSamples,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> Calibrated:
        """Calibrate on sampling trajectories of the prompts."""
        return calibrate_t2i(*self._parts(source), recipe.t2i, samples.prompts, seed=seed, progress=progress)

    def probe(self, source: CapturedModel, recipe: Recipe, samples: Sequence[Any]) -> Probe:
        """Probe trajectories of the prompts."""
        return generation_probe(*self._parts(source), recipe, samples)

    def cost(
        self,
        source: CapturedModel,
        engines: Engines,
        recipe: Recipe,
        samples: tuple[Any, ...],
        seed: int,
        tell: Callable[[str], None],
    ) -> Cost:
        """Measure final latents at equal seed against the published sampler."""
        program, codec, settings = self._parts(source)
        assert source.points is not None, "its adapter has t2i"
        return picture_cost(
            program,
            source.programs[VAE_DECODE].program,
            engines,
            codec,
            settings,
            recipe,
            source.points,
            samples,
            seed=seed,
            tell=tell,
        )


class Understanding:
    """Answers about pictures: the picture once, the question once, then token by token."""

    record, program = MMU, UNDERSTAND

    def absent(self, recipe: Recipe) -> tuple[tuple[str, str], ...]:
        """Return nothing: the recipe's parameters for this task are those of this loop."""
        return ()

    def jobs(self, recipe: Recipe) -> tuple[Job, ...]:
        """Return the one job that makes the vision engine, the prologue and the language engine."""
        config, decided = recipe.mmu, recipe.decided(MMU.name)
        skipped = decided.phases[0].layers if decided.phases else {}
        gather = None
        if config.token_pruning > 0:
            gather = GatherTokens(config.token_layer, config.token_pruning, config.token_scorer, skipped)
        passes = pipelines.understand(kept=decided.kept_neurons, skipped=skipped, gather=gather)
        return (Job(UNDERSTAND, passes, then={LANGUAGE: pipelines.decode()}),)

    def _parts(self, source: CapturedModel) -> tuple[Program, TextCodec, UnderstandingSettings]:
        loaded = source.loaded
        return (
            source.programs[UNDERSTAND].program,
            TextCodec(loaded.tokenizer),
            metadata.understanding(loaded),
        )

    def calibrate(
        self,
        source: CapturedModel,
        recipe: Recipe,
        samples: CalibrationSamples,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> Calibrated:
        """Calibrate on the model's answers to the questions; `seed` does not matter."""
        return calibrate_mmu(*self._parts(source), recipe.mmu, samples.questions, progress=progress)

    def probe(self, source: CapturedModel, recipe: Recipe, samples: Sequence[Any]) -> Probe:
        """Probe the questions and their pictures."""
        return understanding_probe(*self._parts(source), samples)

    def cost(
        self,
        source: CapturedModel,
        engines: Engines,
        recipe: Recipe,
        samples: tuple[Any, ...],
        seed: int,
        tell: Callable[[str], None],
    ) -> Cost:
        """Measure logits of the next token on teacher-forced answers."""
        program, codec, settings = self._parts(source)
        return answer_cost(program, engines, codec, settings, recipe, samples, tell=tell)


class Completion:
    """Answers without a picture: the question once, then token by token, on buffers that begin empty."""

    record, program = TEXT, COMPLETE

    def absent(self, recipe: Recipe) -> tuple[tuple[str, str], ...]:
        """Return nothing: the recipe's parameters for this task are those of this loop."""
        return ()

    def jobs(self, recipe: Recipe) -> tuple[Job, ...]:
        """Return the one job that makes the engine."""
        decided = recipe.decided(TEXT.name)
        skipped = decided.phases[0].layers if decided.phases else {}
        passes = pipelines.complete(kept=decided.kept_neurons, skipped=skipped)
        return (Job(COMPLETE, passes, only=(COMPLETE,), without=(Role.PREFIX_IDS,)),)

    def _parts(self, source: CapturedModel) -> tuple[Program, TextCodec, TextSettings]:
        loaded = source.loaded
        return source.programs[COMPLETE].program, TextCodec(loaded.tokenizer), metadata.text(loaded)

    def calibrate(
        self,
        source: CapturedModel,
        recipe: Recipe,
        samples: CalibrationSamples,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> Calibrated:
        """Calibrate on the model's answers to the prompts; `seed` does not matter."""
        return calibrate_text(*self._parts(source), recipe.text, samples.prompts, progress=progress)

    def probe(self, source: CapturedModel, recipe: Recipe, samples: Sequence[Any]) -> Probe:
        """Probe the prompts."""
        return text_probe(*self._parts(source), samples)

    def cost(
        self,
        source: CapturedModel,
        engines: Engines,
        recipe: Recipe,
        samples: tuple[Any, ...],
        seed: int,
        tell: Callable[[str], None],
    ) -> Cost:
        """Measure logits of the next token on teacher-forced answers."""
        program, codec, settings = self._parts(source)
        return text_cost(program, engines, codec, settings, recipe, samples, tell=tell)


#: By the captured program that techniques change, for there are two ways to make pictures.
_COMPILED: Mapping[str, CompiledTask] = {
    task.program: task for task in (TextToImage(), DrawingByCodes(), Understanding(), Completion())
}


def compiled_task(source: CapturedModel, task: str) -> CompiledTask:
    """Return the compiler's side of a task of a model, by the program that was captured for it."""
    return _COMPILED[main_program(source, task)]


def main_program(source: CapturedModel, task: str) -> str:
    """Return the name of the captured program of a task that techniques change."""
    programs = source.programs.items()
    return next(name for name, captured in programs if captured.spec.task == task and name in MAIN)


def jobs(task: str, program: str, recipe: Recipe) -> tuple[Job, ...]:
    """Return the jobs that `recipe` makes of the captured program called `program`.

    Programs that no technique changes are only cleaned. Raises `RecipeError` if the recipe lacks a decision.
    """
    return _COMPILED[program].jobs(recipe) if program in MAIN else (Job(program, pipelines.CLEAN),)


def changes_outputs(source: CapturedModel, task: str, recipe: Recipe, *, engines: bool) -> bool:
    """Tell whether what is built for a task computes something else than the model.

    `engines`: lossy passes changed some of them. What a recipe asks for and passes declined changes nothing.
    """
    if engines or not recipe.config(task).is_lossy(source.points):
        return engines
    plan = metadata.picture_plan(source.loaded, (task,), recipe)
    if isinstance(plan, TokenPlan):
        return {span.guidance_scale for span in plan.spans} != {recipe.t2i.guidance_scale}
    return plan is not None  # a trajectory differs by its time points, too, and by what evaluations reuse


def undone(task: str, program: str, recipe: Recipe, made: Sequence[Job]) -> tuple[PassRecord, ...]:
    """Return a record for each technique that `recipe` asks for and no job of `program` has a pass for.

    Examples are decisions that skip no layer, and a plan whose evaluations are all full. What passes
    themselves decline is in their own records. A technique that is done in part is done: some blocks may keep
    all their neurons, some engines be whole and some phases skip nothing.
    """
    if program not in MAIN:
        return ()
    config, passes = recipe.config(task), [step for job in made for step in job.passes]
    pruned = {step.stack for step in passes if isinstance(step, PruneFFN) and step.kept}
    skipped = {step.stack for step in passes if isinstance(step, RemoveLayers)}
    reasons: list[tuple[type[Pass], str]] = [
        *(
            (PruneFFN, f"no engine that runs has fewer neurons in stack {stack}")
            for stack in config.pruned
            if stack not in pruned
        ),
        *(
            (RemoveLayers, f"no engine that runs skips a layer of stack {stack}")
            for stack in config.skipping
            if stack not in skipped
        ),
    ]
    told = [(step.__name__, step.technique, reason) for step, reason in reasons]
    told += [(technique, technique, reason) for technique, reason in _COMPILED[program].absent(recipe)]
    return tuple(
        PassRecord(program, name, "lossy", (), None, (reason,), technique) for name, technique, reason in told
    )
