"""Whether a bundle has the engines that its tasks need, as far as its manifest tells."""

from __future__ import annotations

from flashu_compile.arguments import shown
from flashu_compile.bundle.manifest import EngineSpec, Manifest
from flashu_compile.errors import BundleError
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.tasks import LANGUAGE, VAE_DECODE, VISION

Shape = tuple[int | None, ...]


def check_parts(manifest: Manifest, plan: StepPlan | None) -> None:
    """Check that every engine the tasks need exists, with the outputs they read. Raises `BundleError` otherwise."""
    needed: list[tuple[str, str, Shape]] = []
    if manifest.generation is not None:
        steps, settings = plan.steps if plan else (), manifest.generation
        needed.append((VAE_DECODE, "pixels", (None, 3, None, None)))
        needed.extend((step.engine, "velocity", (None, *settings.latent_shape)) for step in steps)
        needed.extend((step.engine, "head_features", (None, None, None)) for step in steps if step.store)
    if manifest.understanding is not None:
        needed.append((VISION, "image_embeds", (None, None, None)))
        needed.append((LANGUAGE, "logits", (None, None)))
    for engine in manifest.engines:
        for before in filter(None, (engine.prologue, engine.schedule)):
            manifest.engine(before)
    for name, output, shape in dict.fromkeys(needed):
        _check_output(manifest.engine(name), output, shape)


def _check_output(spec: EngineSpec, name: str, shape: Shape) -> None:
    """Check that an output exists with this rank, and with these sizes where the signature fixes them."""
    found = next((tensor for tensor in spec.outputs if tensor.name == name), None)
    if found is None:
        raise BundleError(f"Engine {spec.name!r} has no output {name!r}; build the bundle again.")
    fits = len(found.shape) == len(shape) and all(
        size is None or not isinstance(given, int) or given == size
        for given, size in zip(found.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise BundleError(
            f"Engine {spec.name!r}: output {name!r} has the shape {shown(list(found.shape))}, where [{wanted}] is "
            "needed; build the bundle again."
        )
