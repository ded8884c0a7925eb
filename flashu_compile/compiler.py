"""export(): model and task in, bundle out. Capture → passes → ONNX → bundle, nothing else."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashu_compile import __version__
from flashu_compile.capture import Capture, capture
from flashu_compile.errors import CheckpointError, ConfigurationError, RecipeError, UnknownTaskError
from flashu_compile.exporters.bundle import BundleFacts, EngineBuild, ensure_writable, write_bundle
from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.exporters.parity import engine_errors
from flashu_compile.exporters.statistics import graph_statistics
from flashu_compile.models.loading import LoadedModel, load_model
from flashu_compile.models.showo2.adapter import captures
from flashu_compile.passes.manager import PassManager, PassRecord
from flashu_compile.passes.pipelines import EXACT
from flashu_compile.plan import StepPlan, uniform_plan
from flashu_compile.program import Program
from flashu_compile.recipe import PRESETS, Recipe, preset
from flashu_compile.runtime.manifest import REPORT, GenerationFacts, Manifest, UnderstandingFacts

TASKS = ("t2i", "mmu")
BACKENDS = ("onnxruntime",)
PRECISIONS = ("float32",)
_MAX_NEW_TOKENS = 300
_VERSIONED = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle on disk, as `export` leaves it."""

    path: Path
    manifest: Manifest

    def summary(self) -> dict[str, Any]:
        """What was built: path, tasks, engines, sizes in bytes, and the error of every engine output."""
        report = json.loads((self.path / REPORT).read_text(encoding="utf-8"))
        return {
            "path": str(self.path),
            "tasks": list(self.manifest.tasks),
            "engines": [engine.name for engine in self.manifest.engines],
            "sizes": report["sizes"],
            "errors": {name: engine["errors"] for name, engine in report["engines"].items()},
        }


def export(
    model: nn.Module | str | Path,
    task: str | Sequence[str],
    *,
    output: str | Path | None = None,
    recipe: str | Recipe = "exact",
    calibration: object = None,
    backend: str = "onnxruntime",
    precision: str = "float32",
    vae: object = None,
    tokenizer: object = None,
    llm_config: Mapping[str, Any] | str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Compile `model` for a task or several, into a bundle directory that `flashu_compile.load` runs.

    Args:
        model: a Show-o2 network (ours, or the authors' class), the name of a bundled model ("showo2-shapes"), a
            local checkpoint directory, or a hub id.
        task: "t2i", "mmu", or a list of them.
        output: the bundle's directory; `./<model>-<tasks>` if not given. It must not exist, or be empty.
        recipe: the decisions to carry out. "exact" changes no output; it is the only one so far.
        calibration: samples for lossy recipes; the exact recipe takes none.
        backend: "onnxruntime".
        precision: "float32".
        vae: a LatentCodec, an AutoencoderKLWan or its path, where the checkpoint holds none.
        tokenizer: a tokenizers.Tokenizer or its path, where the checkpoint holds none.
        llm_config: the LLM's Hugging Face `config.json` (or its contents), where sizes alone do not tell it.
        overwrite: replace an existing bundle at `output`.
        progress: called with (what is being done, fraction done in [0, 1]).

    Raises:
        FlashuError: a subclass that says what is wrong and what to do; nothing is left behind.
    """
    tasks = _tasks(task)
    _check_decisions(recipe, calibration, backend, precision)
    tell = progress or (lambda stage, fraction: None)
    if output is not None:
        ensure_writable(Path(output), overwrite=overwrite)
    tell("loading the model", 0.0)
    loaded = load_model(model, vae=vae, tokenizer=tokenizer, llm_config=llm_config)
    if loaded.vae is None:
        raise CheckpointError(f"Model {loaded.name!r} has no VAE; pass its path as `vae`.")
    directory = Path(output) if output is not None else Path(f"{loaded.name}-{'-'.join(tasks)}")
    ensure_writable(directory, overwrite=overwrite)
    decisions = _recipe(recipe, loaded)
    plan = _plan(decisions)
    directory.absolute().parent.mkdir(parents=True, exist_ok=True)

    builds, statistics, records = _compile(loaded, tasks, directory.absolute().parent, tell)
    tell("writing the bundle", 0.9)
    manifest = write_bundle(
        directory,
        engines=builds,
        facts=_facts(loaded, tasks, backend, precision, decisions),
        tokenizer=loaded.tokenizer,
        recipe_json=decisions.to_json(),
        plan=plan if "t2i" in tasks else None,
        report={"engines": statistics, "passes": [dataclasses.asdict(r) for r in records]},
        checkpoint_bytes=_checkpoint_bytes(loaded),
        overwrite=overwrite,
    )
    tell("done", 1.0)
    return Bundle(directory, manifest)


def _compile(
    loaded: LoadedModel, tasks: tuple[str, ...], scratch_parent: Path, progress: Progress
) -> tuple[list[EngineBuild], dict[str, Any], list[PassRecord]]:
    """Capture every program of the tasks, run its passes and emit what comes out."""
    assert loaded.vae is not None
    specs = [spec for task in tasks for spec in captures(task, loaded.network, loaded.vae)]
    builds: list[EngineBuild] = []
    statistics: dict[str, Any] = {}
    records: list[PassRecord] = []
    for index, spec in enumerate(specs):
        start, share = 0.05 + 0.85 * index / len(specs), 0.85 / len(specs)
        progress(f"{spec.task}: capturing {spec.name}", start)
        program = capture(spec)
        truth = _eager_outputs(spec)
        progress(f"{spec.task}: passes over {spec.name}", start + 0.4 * share)
        programs, made = PassManager(EXACT[program.name]).run(program)
        records.extend(made)
        for part in programs:
            progress(f"{spec.task}: emitting {part.name}", start + 0.6 * share)
            build = _emit(part, truth)
            builds.append(build)
            errors = engine_errors(build, scratch_parent)
            statistics[part.name] = graph_statistics(part, build.model) | {"errors": errors}
    return builds, statistics, records


def _eager_outputs(spec: Capture) -> dict[str, Tensor]:
    """The outputs of the untraced module on the sample: the truth engines are held against."""
    with torch.inference_mode():
        threads = torch.get_num_threads()
        # One thread: the last bits depend on how many there are, and a build's bytes must not.
        torch.set_num_threads(1)
        try:
            results = spec.module(*(spec.sample[i.role] for i in spec.inputs))
        finally:
            torch.set_num_threads(threads)
    return dict(zip(spec.outputs, results, strict=True))


def _emit(program: Program, truth: Mapping[str, Tensor]) -> EngineBuild:
    return EngineBuild(
        name=program.name,
        task=program.task,
        model=emit_onnx(program),
        reference_inputs={str(role): program.sample[role] for role in program.input_roles},
        reference_outputs={str(role): truth[role] for role in program.outputs},
    )


def _tasks(task: str | Sequence[str]) -> tuple[str, ...]:
    asked = (task,) if isinstance(task, str) else tuple(task)
    unknown = [name for name in asked if name not in TASKS]
    if unknown or not asked:
        what = f"Unknown task {unknown[0]!r}" if unknown else "No task given"
        raise UnknownTaskError(f"{what}; known tasks are: {', '.join(TASKS)}.")
    return tuple(name for name in TASKS if name in asked)


def _check_decisions(recipe: str | Recipe, calibration: object, backend: str, precision: str) -> None:
    _check_choice("backend", backend, BACKENDS)
    _check_choice("precision", precision, PRECISIONS)
    if isinstance(recipe, str) and recipe not in PRESETS:
        raise RecipeError(f"Unknown recipe {recipe!r}; known presets are: {', '.join(PRESETS)}.")
    if calibration is not None:
        raise RecipeError("The exact recipe takes no calibration data; leave `calibration` out.")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"Unknown {name} {value!r}; known ones are: {', '.join(known)}.")


def _recipe(recipe: str | Recipe, loaded: LoadedModel) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    config = loaded.network.config
    return preset(
        recipe, points=config.steps, guidance_scale=config.guidance_scale, time_shift=config.time_shift
    )


def _plan(recipe: Recipe) -> StepPlan:
    return uniform_plan(recipe.points, recipe.guidance_scale, recipe.time_shift, "denoise")


def _picture_size(loaded: LoadedModel) -> int:
    assert loaded.vae is not None
    return loaded.network.config.latent_shape[1] * loaded.vae.spatial_factor


def _facts(
    loaded: LoadedModel, tasks: tuple[str, ...], backend: str, precision: str, recipe: Recipe
) -> BundleFacts:
    return BundleFacts(
        model=loaded.name,
        tasks=tasks,
        backend=backend,
        precision=precision,
        recipe=recipe.name,
        generation=_generation_facts(loaded) if "t2i" in tasks else None,
        understanding=_understanding_facts(loaded) if "mmu" in tasks else None,
        versions=_versions(),
    )


def _generation_facts(loaded: LoadedModel) -> GenerationFacts:
    config = loaded.network.config
    return GenerationFacts(
        latent_shape=config.latent_shape,
        sequence_length=config.sequence_length,
        span_length=config.span_length,
        max_prompt_tokens=config.max_prompt_tokens,
        picture_size=_picture_size(loaded),
    )


def _understanding_facts(loaded: LoadedModel) -> UnderstandingFacts:
    return UnderstandingFacts(
        picture_size=_picture_size(loaded),
        max_question_tokens=loaded.network.config.sequence_length,
        max_new_tokens=_MAX_NEW_TOKENS,
    )


def _versions() -> dict[str, str]:
    installed = {
        d.name: d.version for d in importlib.metadata.distributions(name=None) if d.name in _RUNTIMES
    }
    return {
        "flashu-compile": __version__,
        **installed,
        **{n: importlib.metadata.version(n) for n in _VERSIONED},
    }


def _checkpoint_bytes(loaded: LoadedModel) -> int:
    """Bytes of the network's distinct tensors at the precision it is compiled in."""
    tensors = {tensor.data_ptr(): tensor for tensor in loaded.network.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
