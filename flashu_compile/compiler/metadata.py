"""The manifest's data about a bundle's model and build, besides its engines."""

from __future__ import annotations

from typing import TypeVar

from flashu_compile.bundle.profiles import Range, known_ranges
from flashu_compile.bundle.settings import (
    DrawingSettings,
    GenerationSettings,
    Template,
    TextSettings,
    UnderstandingSettings,
)
from flashu_compile.errors import ConfigurationError
from flashu_compile.exporters.bundle import BundleMetadata
from flashu_compile.extras import installed_versions
from flashu_compile.models.adapter import LoadedModel
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.tasks import MMU, T2I, TEXT
from flashu_compile.version import __version__

_Kind = TypeVar("_Kind", GenerationSettings, DrawingSettings, UnderstandingSettings, TextSettings)
_VERSIONED = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


def bundle_metadata(
    loaded: LoadedModel, tasks: tuple[str, ...], backend: str, precision: str, recipe: str
) -> BundleMetadata:
    """Return what the manifest says of a bundle besides its engines."""
    return BundleMetadata(
        model=loaded.name,
        tasks=tasks,
        backend=backend,
        precision=precision,
        recipe=recipe,
        generation=_drawn_by(loaded, tasks, GenerationSettings),
        drawing=_drawn_by(loaded, tasks, DrawingSettings),
        understanding=understanding(loaded) if MMU.name in tasks else None,
        text=text(loaded) if TEXT.name in tasks else None,
        versions=_versions(),
        origins=loaded.origins,
    )


def generation(loaded: LoadedModel) -> GenerationSettings:
    """Return the model's settings that the t2i pipeline needs."""
    return _settings(loaded, T2I.name, GenerationSettings)


def drawing(loaded: LoadedModel) -> DrawingSettings:
    """Return the settings that the t2i pipeline needs of a model that draws code by code."""
    return _settings(loaded, T2I.name, DrawingSettings)


def _drawn_by(loaded: LoadedModel, tasks: tuple[str, ...], kind: type[_Kind]) -> _Kind | None:
    """Return the settings of t2i if it is one of the tasks, and the model makes pictures by the loop of this kind."""
    found = loaded.adapter.settings(loaded, T2I.name) if T2I.name in tasks else None
    return found if type(found) is kind else None


def picture_plan(loaded: LoadedModel, tasks: tuple[str, ...], recipe: Recipe) -> StepPlan | TokenPlan | None:
    """Return the plan by which a model makes pictures, or None if t2i is not one of the tasks."""
    drawn = _drawn_by(loaded, tasks, DrawingSettings)
    if drawn is not None:
        return recipe.token_plan(drawn.length)
    return recipe.plan() if T2I.name in tasks else None


def understanding(loaded: LoadedModel) -> UnderstandingSettings:
    """Return the model's settings that the mmu pipeline needs."""
    return _settings(loaded, MMU.name, UnderstandingSettings)


def text(loaded: LoadedModel) -> TextSettings:
    """Return the model's settings that the text pipeline needs."""
    return _settings(loaded, TEXT.name, TextSettings)


def prompt_limit(loaded: LoadedModel, task: str) -> tuple[int, Template]:
    """Return how many tokens a prompt of t2i or text may have, and the template that it stands in."""
    if task == T2I.name:
        made = loaded.adapter.settings(loaded, task)
        assert isinstance(made, GenerationSettings | DrawingSettings)
        return made.max_prompt_tokens, made.template
    told = text(loaded)
    return told.max_question_tokens, told.template


def _settings(loaded: LoadedModel, task: str, kind: type[_Kind]) -> _Kind:
    """Return a task's settings, which are of the kind that its loop takes. Raises `ConfigurationError` if not."""
    found = loaded.adapter.settings(loaded, task)
    if type(found) is not kind:
        raise ConfigurationError(
            f"The adapter {loaded.adapter.name} gives {type(found).__name__} for {task}, whose loop takes "
            f"{kind.__name__}."
        )
    return found


def size_ranges(loaded: LoadedModel, tasks: tuple[str, ...]) -> dict[str, Range]:
    """Return the range of sizes of every dynamic dimension of the model's engines, by name."""
    made = _drawn_by(loaded, tasks, GenerationSettings)
    drawn = _drawn_by(loaded, tasks, DrawingSettings)
    asked = understanding(loaded) if MMU.name in tasks else None
    told = text(loaded) if TEXT.name in tasks else None
    return known_ranges(made, asked, told, loaded.adapter.image_rows(loaded), drawn)


def _versions() -> dict[str, str]:
    return {"flashu-compile": __version__, **installed_versions((*_RUNTIMES, *_VERSIONED))}


def checkpoint_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of the network's distinct tensors at the precision it is compiled in."""
    tensors = {tensor.data_ptr(): tensor for tensor in loaded.network.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
