"""Pictures in and out: a file, a PIL image or an array -> an engine's pixels, and back."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from flashu_compile.bundle import areas
from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.errors import InputError
from flashu_compile.system.drafts import draft_folder
from flashu_compile.system.paths import absolute

# What a picture can be saved as: Pillow's name and options that lose as little as the format allows.
_SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
}

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

# Formats that decode in this process. Left out on purpose: EPS, which Pillow hands to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64_000_000

# What Pillow's decoders raise on damaged files, besides OSError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


def read_picture(source: Picture) -> Image.Image:
    """Read a picture as RGB, upright (EXIF orientation applied), transparent parts on white; first frame only.

    `source` is a path, a PIL image, or a uint8 array [height, width], [height, width, 3] or [height, width, 4].
    Raises `InputError` if the file is absent, damaged or of no format in `FORMATS`, if it has more than
    `MAX_PIXELS` pixels, or if its mode, dtype or shape has no plain reading as colours.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "The picture")
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source), "The array")
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"A picture is a path, a PIL image or a uint8 array, not {type(source).__name__}.")
    path = absolute(source)
    if not path.exists():
        raise InputError(f"Picture {path} does not exist.")
    if not path.is_file():
        raise InputError(f"{path} is not a file.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _upright_rgb(image, f"Picture {path}")
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture in one of the formats {', '.join(FORMATS)}.") from error
    except (Image.DecompressionBombError, *_DAMAGE) as error:
        raise InputError(f"Picture {path} cannot be read: {error}.") from error


def _from_array(array: NDArray[Any]) -> Image.Image:
    colours = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not colours or 0 in array.shape:
        raise InputError(
            "A picture array must be uint8 (0 to 255) of shape [height, width, 3], "
            f"not {array.dtype} of shape {list(array.shape)}."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise InputError(f"{name} is {width} × {height}; the limit is {MAX_PIXELS:,} pixels. Scale it down.")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255 instead of scaling
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise InputError(
                f"{name} has mode {image.mode}, whose range of values is unknown; convert it to 8 bits per channel."
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except _DAMAGE as error:
        raise InputError(f"{name} cannot be read: {error}.") from error


def engine_pixels(source: Picture, rules: PictureRules) -> NDArray[np.float32]:
    """Prepare a picture for the vision engine: float32 [1, 3, height, width], by `rules`.

    Raises `InputError` as `read_picture` does, and for a picture too elongated to be prepared so.
    """
    image = read_picture(source)
    given = image.size
    for step in rules.steps:
        image = _prepared(image, step, given)
    width, height = image.size
    if rules.cell is not None and rules.cells(height, width) is None:
        raise InputError(
            f"A picture of {given[0]} × {given[1]} becomes one of {width} × {height}, whose sides are not two cells of "
            f"{rules.cell} pixels or more; crop it."
        )
    if rules.cell is None and image.size != (rules.width, rules.height):
        raise InputError(
            "A picture of {} × {} becomes one of {} × {}, not".format(*given, *image.size)
            + f" of {rules.width} × {rules.height}."
        )
    levels = (np.asarray(image).astype(np.float64) * rules.factor).astype(np.float32)
    values = (levels - np.array(rules.mean, np.float32)) / np.array(rules.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def _prepared(image: Image.Image, step: PictureStep, given: tuple[int, int]) -> Image.Image:
    """Carry out one step on a picture that was `given` in this size."""
    width, height = image.size
    shorter, longer = min(width, height), max(width, height)
    if step.kind == "crop":
        beyond = width - step.width, height - step.height
        left, top = (round(b / 2) if step.rounded else b // 2 for b in beyond)
        return image.crop((left, top, left + step.width, top + step.height))
    if step.kind == "shorter":
        target = step.height * width // shorter, step.height * height // shorter
    elif step.kind == "longer":
        scale = step.height / longer
        target = max(round(width * scale), step.least), max(round(height * scale), step.least)
    elif step.kind == "area":
        if longer > areas.LONGEST * shorter:
            raise InputError(
                "The picture is {} × {}; no side may be more than {} times the other.".format(
                    *given, areas.LONGEST
                )
            )
        target = areas.fitted(width, height, step.height, *step.area)
    else:
        target = (longer, longer) if step.kind == "square" else (step.width, step.height)
    if target[0] * target[1] > MAX_PIXELS:
        raise InputError("The picture is {} × {}: too elongated to be prepared.".format(*given))
    if step.kind == "square":
        canvas = Image.new("RGB", target, step.colour)
        canvas.paste(image, ((longer - width) // 2, (longer - height) // 2))
        return canvas
    return image.resize(target, Image.Resampling(step.resample))


def shown(pixels: NDArray[np.float32], rules: PictureRules) -> Image.Image:
    """Convert an engine's pixels [3, height, width] back to the picture that they were prepared from."""
    levels = (pixels.transpose(1, 2, 0) * np.array(rules.std) + np.array(rules.mean)) / rules.factor
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def to_picture(pixels: NDArray[np.float32], source: Source) -> Image.Image:
    """Convert decoded pixels [3, height, width] to a PIL image: (x + 1) / 2 * 255, clipped and truncated.

    Pixels lie in [-1, 1] but for overshoot; `source` is what computed them. Raises `NotFiniteError`, naming it, if
    one is not finite.
    """
    source.check("pixels", pixels)
    levels = (np.clip(pixels.astype(np.float32, copy=False), -1, 1) + 1) / 2 * 255
    return Image.fromarray(np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 0)))


def check_picture_path(path: Path) -> None:
    """Check, before the work of making a picture, that it can be saved there. Raises `InputError` if it cannot."""
    path = absolute(path)
    if path.suffix.lower() not in _SAVED:
        raise InputError(f"Cannot save a picture as {path.name!r}: its name must end in {', '.join(_SAVED)}.")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name.")
    if not path.parent.is_dir():
        raise InputError(f"The folder {path.parent} does not exist.")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write the picture in the format of its file extension; the file is complete, or as it was before.

    Raises `InputError` if the extension is unknown or the file cannot be written.
    """
    check_picture_path(path)
    kind, options = _SAVED[path.suffix.lower()]
    try:
        with draft_folder(path.parent) as draft:
            picture.save(draft / path.name, format=kind, **options)
            os.replace(draft / path.name, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error
