"""The parts of a bundle beside its engines, read and held against the manifest."""

from __future__ import annotations

import dataclasses

from flashu_compile.arguments import shown
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import PLAN, RECIPE, TOKENIZER, EngineSpec, Manifest
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.errors import BundleError, ConfigurationError, RecipeError
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.runtime.decoding import takes_image_end
from flashu_compile.tasks import CODES_DECODE, COMPLETE, LANGUAGE, VAE_DECODE, VISION

Shape = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a pipeline needs of a bundle beside its engines; plan and recipe are None without t2i."""

    codec: TextCodec
    plan: StepPlan | TokenPlan | None
    recipe: Recipe | None


def read_parts(files: BundleFiles, *, allow_control_tokens: bool = False) -> Parts:
    """Read the parts of a bundle.

    Raises `BundleError` if one is absent or damaged, or the manifest lacks an engine or an output that they need.
    """
    with files.held(TOKENIZER) as (tokenizer,):
        codec = TextCodec.from_file(tokenizer, allow_control_tokens=allow_control_tokens)
    plan, recipe = read_plan(files), None
    if plan is not None:
        recipe = _read_recipe(files)
    _check_parts(files.manifest, plan)
    return Parts(codec, plan, recipe)


def read_plan(files: BundleFiles) -> StepPlan | TokenPlan | None:
    """Read the plan of a bundle's pictures; None if it makes none. Raises `BundleError` if it is damaged."""
    drawing = files.manifest.drawing
    if drawing is None:
        return None if files.manifest.generation is None else StepPlan.from_json(files.text(PLAN))
    plan = TokenPlan.from_json(files.text(PLAN))
    if sum(span.count for span in plan.spans) != drawing.length:
        raise BundleError(
            f"The plan draws {sum(span.count for span in plan.spans)} codes, and a picture has {drawing.length}; build "
            "the bundle again."
        )
    return plan


def _read_recipe(files: BundleFiles) -> Recipe:
    """Read the bundle's recipe, whose rules give plans. Raises `BundleError` if they do not."""
    drawing = files.manifest.drawing
    try:
        recipe = Recipe.from_json(files.text(RECIPE))
        recipe.plan() if drawing is None else recipe.token_plan(drawing.length)
    except (RecipeError, ConfigurationError) as error:
        raise BundleError(
            f"{files.directory / RECIPE} is not the recipe of a bundle: {error} Build the bundle again."
        ) from error
    return recipe


def _check_parts(manifest: Manifest, plan: StepPlan | TokenPlan | None) -> None:
    """Check that every engine the tasks need exists, with the outputs they read. Raises `BundleError` otherwise."""
    needed: list[tuple[str, str, Shape]] = []
    if manifest.drawing is not None:
        assert isinstance(plan, TokenPlan)
        needed.append((CODES_DECODE, "pixels", (None, 3, None, None)))
        needed.extend((engine, "logits", (None, manifest.drawing.codes)) for engine in plan.engines)
    if manifest.generation is not None:
        steps, settings = plan.steps if isinstance(plan, StepPlan) else (), manifest.generation
        needed.append((VAE_DECODE, "pixels", (None, 3, None, None)))
        needed.extend((step.engine, "velocity", (None, *settings.latent_shape)) for step in steps)
        needed.extend((step.engine, "head_features", (None, None, None)) for step in steps if step.store)
    if manifest.understanding is not None:
        embeds = manifest.understanding.pictures.cell is None
        rows: Shape = (None, None, None) if embeds else (None, None)
        needed.append((VISION, "image_embeds" if embeds else "context_ids", rows))
        needed.append((LANGUAGE, "logits", (None, None)))
    if manifest.text is not None:
        needed.append((COMPLETE, "logits", (None, None)))
    for engine in manifest.engines:
        for before in filter(None, (engine.prologue, engine.schedule)):
            manifest.engine(before)
    asked = manifest.understanding
    if asked is not None and asked.prefix == asked.template.before:
        if any(takes_image_end(engine) for engine in manifest.engines):
            raise BundleError(
                "The template of mmu has no id of its own behind the picture, which an engine takes; build the bundle "
                "again."
            )
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
