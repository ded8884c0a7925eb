"""Rules of preparing pictures, from the settings that an image processor of transformers is saved with.

The library's class for Pillow, which needs no torchvision, gives the settings their defaults. Its steps are translated
where it carries them out as its base class does; what a class does in its own way, an adapter translates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashu_compile.bundle.images import engine_pixels
from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.errors import CheckpointError, ConfigurationError, FlashuError, MissingDependencyError
from flashu_compile.models import weights
from flashu_compile.system.paths import absolute

#: Where a directory has the settings, and under which entry; the first holds, as in the library.
_PLACES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))
_METHODS = ("_preprocess", "resize", "center_crop", "rescale", "normalize", "convert_to_rgb", "process_image")
#: Heights and widths of pictures that rules are tried on.
_TRIED = ((1, 1), (3, 5), (41, 17), (64, 64), (90, 700))


def read_processor(given: Any) -> Any:
    """Return an image processor of transformers that needs Pillow alone, from a directory or an object of its kind.

    Raises `CheckpointError` if there is none, or none that is known, `ConfigurationError` if `given` is something else,
    `MissingDependencyError` if this transformers has no such classes.
    """
    settings = _settings(given)
    try:
        from transformers.image_processing_backends import PilBackend
        from transformers.image_processing_utils import BaseImageProcessor
        from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
    except ImportError as error:
        raise MissingDependencyError(
            f"This transformers has no image processors for Pillow alone ({error}); install a newer one."
        ) from error
    name = str(settings.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    kind = get_image_processor_class_from_name(f"{name}Pil") if name else None
    if name and kind is None:  # of one from before there were classes for several libraries
        kind = get_image_processor_class_from_name(name)
    old = kind is not None and kind.__base__ is BaseImageProcessor
    if kind is None or not (old or issubclass(kind, PilBackend)):
        raise CheckpointError(f"transformers has no image processor {name!r} for Pillow alone.")
    try:
        return kind.from_dict(dict(settings))
    except Exception as error:  # whatever the library makes of odd settings
        raise CheckpointError(f"transformers makes no {name} of the settings there are: {error}") from error


def _settings(given: Any) -> Mapping[str, Any]:
    if given is None:
        raise CheckpointError("A model object says nothing about its pictures; pass image_processor.")
    if not isinstance(given, str | Path):
        inner = getattr(given, "image_processor", given)  # of a processor of text and pictures
        to_dict = getattr(inner, "to_dict", None)
        if not callable(to_dict):
            raise ConfigurationError(f"A {type(given).__name__} is no image processor of transformers.")
        return to_dict()
    for name, entry in _PLACES:
        path = absolute(given) / name
        if path.is_file():
            config = weights.read_config(path)
            found = config if entry is None else config.get(entry)
            if isinstance(found, Mapping):
                return found
    raise CheckpointError(
        f"{given} does not say how pictures are prepared: there is no {_PLACES[1][0]}, and no "
        f"{_PLACES[0][1]} in a {_PLACES[0][0]}."
    )


def picture_rules(
    processor: Any, side: int, steps: tuple[PictureStep, ...] | None = None, cell: int | None = None
) -> PictureRules:
    """Return the rules by which a processor makes pixels of `side` × `side`, by `steps` where these are given.

    With a `cell`, pictures differ in size, and these sides are usual.

    Raises `CheckpointError` if it prepares them in a way that rules cannot say, or they become pixels of another size.
    """
    try:
        rules = PictureRules(
            side,
            side,
            steps_of(processor) if steps is None else steps,
            float(processor.rescale_factor) if processor.do_rescale else 1.0,
            _colours(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            _colours(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
            cell,
        )
        for height, width in _TRIED if cell is None else [(side, side)]:
            if not np.isfinite(engine_pixels(np.zeros((height, width, 3), np.uint8), rules)).all():
                raise CheckpointError("its numbers give pixels that are none")
    except (FlashuError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"Its {type(processor).__name__} does not prepare pictures for the model: {error}"
        ) from error
    return rules


def square_side(source: object, vision: Any) -> int:
    """Return the side of pictures in pixels. Raises `CheckpointError` if the configuration names no square."""
    side = getattr(vision, "image_size", None)
    if isinstance(side, list | tuple) and len(set(side)) == 1:
        side = side[0]
    if not isinstance(side, int):
        raise CheckpointError(f"{source} reads pictures of {side} pixels, which is no square.")
    return side


def steps_of(processor: Any, own: frozenset[str] = frozenset()) -> tuple[PictureStep, ...]:
    """Return the steps of a processor that prepares pictures as its base class does, but for the methods `own`.

    Raises `CheckpointError` on one that does not, or whose settings ask for more.
    """
    from transformers.image_processing_backends import PilBackend

    kind = type(processor)
    for name in _METHODS:
        if name not in own and getattr(kind, name, None) is not getattr(PilBackend, name):
            raise CheckpointError(f"{kind.__name__} has its own way in {name}, which no rules say.")
    if "_preprocess" not in own and processor.do_pad and processor.pad_size is not None:
        raise CheckpointError(f"it pads pictures to {processor.pad_size}, which is not carried out")
    steps = [_resized(processor)] if processor.do_resize else []
    if getattr(processor, "do_center_crop", False):
        steps.append(PictureStep("crop", processor.crop_size.height, processor.crop_size.width))
    return tuple(steps)


def _resized(processor: Any) -> PictureStep:
    size = {name: value for name, value in dict(processor.size).items() if value is not None}
    resample = int(processor.resample)
    if size.keys() == {"shortest_edge"}:
        return PictureStep("shorter", size["shortest_edge"], resample=resample)
    if size.keys() == {"height", "width"}:
        return PictureStep("exact", size["height"], size["width"], resample=resample)
    raise CheckpointError(f"it resizes pictures to {size}, which is not carried out")


def _colours(value: Any) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)
