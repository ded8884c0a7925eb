"""The manifest's data about a bundle's model and build, besides its engines."""

from __future__ import annotations

import importlib.metadata

from flashu_compile.bundle.manifest import GenerationSettings, UnderstandingSettings
from flashu_compile.bundle.profiles import Range, known_ranges
from flashu_compile.exporters.bundle import BundleMetadata
from flashu_compile.models.loading import LoadedModel
from flashu_compile.tasks import MMU, T2I
from flashu_compile.version import __version__

_MAX_NEW_TOKENS = 300
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
        generation=generation(loaded) if T2I.name in tasks else None,
        understanding=understanding(loaded) if MMU.name in tasks else None,
        versions=_versions(),
        origins=loaded.origins,
    )


def generation(loaded: LoadedModel) -> GenerationSettings:
    """Return the model's settings that the t2i pipeline needs."""
    config = loaded.network.config
    _, height, width = config.latent_shape
    return GenerationSettings(
        latent_shape=config.latent_shape,
        sequence_length=config.sequence_length,
        span_length=config.span_length,
        max_prompt_tokens=config.max_prompt_tokens,
        picture_size=(width * _factor(loaded), height * _factor(loaded)),
    )


def understanding(loaded: LoadedModel) -> UnderstandingSettings:
    """Return the model's settings that the mmu pipeline needs."""
    return UnderstandingSettings(
        picture_size=loaded.network.config.understanding_side * _factor(loaded),
        max_question_tokens=loaded.network.config.sequence_length,
        max_new_tokens=_MAX_NEW_TOKENS,
    )


def size_ranges(loaded: LoadedModel, tasks: tuple[str, ...]) -> dict[str, Range]:
    """Return the range of sizes of every dynamic dimension of the model's engines, by name."""
    made = generation(loaded) if T2I.name in tasks else None
    asked = understanding(loaded) if MMU.name in tasks else None
    # A picture's rows are its tokens, the time token before and the end token behind.
    return known_ranges(made, asked, loaded.network.config.position_grid**2 + 2)


def _versions() -> dict[str, str]:
    installed = {
        d.name: d.version for d in importlib.metadata.distributions(name=None) if d.name in _RUNTIMES
    }
    return {
        "flashu-compile": __version__,
        **installed,
        **{n: importlib.metadata.version(n) for n in _VERSIONED},
    }


def checkpoint_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of the network's distinct tensors at the precision it is compiled in."""
    tensors = {tensor.data_ptr(): tensor for tensor in loaded.network.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _factor(loaded: LoadedModel) -> int:
    assert loaded.vae is not None
    return loaded.vae.spatial_factor
