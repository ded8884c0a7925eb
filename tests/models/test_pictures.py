"""How pictures are prepared: by rules of settings on disk, equal to what the library's image processors do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.donut.image_processing_pil_donut import DonutImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flashu_compile.bundle.images import engine_pixels, shown
from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.errors import CheckpointError, ConfigurationError
from flashu_compile.models.janus import JanusAdapter
from flashu_compile.models.llava import LlavaAdapter
from flashu_compile.models.pictures import read_processor

SIDE = 28
SIZES = [(28, 28), (40, 30), (30, 40), (17, 55), (91, 13), (5, 7), (1, 1), (29, 28), (333, 200), (64, 63)]
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SQUEEZED = {"size": {"height": SIDE, "width": SIDE}}
PROCESSORS: dict[str, tuple[Any, Any]] = {
    "clip": (LlavaAdapter, CLIPImageProcessorPil(**CROPPED)),
    "clip, cropped larger than resized": (
        LlavaAdapter,
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=CROPPED["crop_size"]),
    ),
    "clip, bilinear, own colours": (
        LlavaAdapter,
        CLIPImageProcessorPil(**CROPPED, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=0.4),
    ),
    "clip, not normalised": (LlavaAdapter, CLIPImageProcessorPil(**CROPPED, do_normalize=False)),
    "clip, not rescaled": (LlavaAdapter, CLIPImageProcessorPil(**CROPPED, do_rescale=False)),
    "siglip": (LlavaAdapter, SiglipImageProcessorPil(**SQUEEZED)),
    "llava": (LlavaAdapter, LlavaImageProcessorPil(**CROPPED)),
    "llava, made square": (LlavaAdapter, LlavaImageProcessorPil(**CROPPED, do_pad=True)),
    "janus": (JanusAdapter, JanusImageProcessorPil(**SQUEEZED)),
    "janus, at least as large": (JanusAdapter, JanusImageProcessorPil(**SQUEEZED, min_size=9)),
}


def rules_of(kind: Any, given: Any, side: int = SIDE) -> PictureRules:
    vision = SimpleNamespace(image_size=side)
    network = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    return kind().rules("the model", network, read_processor(given))


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("apart", [False, True])
def test_pixels_are_those_of_the_library(name: str, apart: bool, tmp_path: Path) -> None:
    kind, processor = PROCESSORS[name]
    if apart:
        processor.save_pretrained(tmp_path)
    else:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor.to_dict()}))
    rules = rules_of(kind, tmp_path)
    for size in SIZES:
        expected = np.asarray(processor(picture(*size), return_tensors="np")["pixel_values"])
        found = engine_pixels(picture(*size), rules)
        assert found.shape == (1, 3, SIDE, SIDE)
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)


def test_of_two_files_that_of_the_processor_holds_as_in_the_library(tmp_path: Path) -> None:
    old = CLIPImageProcessorPil(**CROPPED, image_mean=[0.1] * 3)
    new = CLIPImageProcessorPil(**CROPPED, image_mean=[0.5] * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old.to_dict()))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": new.to_dict()}))
    assert read_processor(tmp_path).image_mean == CLIPImageProcessorPil.from_pretrained(tmp_path).image_mean
    assert list(read_processor(tmp_path).image_mean) == [0.5] * 3


def test_pixels_become_the_picture_again() -> None:
    rules = rules_of(*PROCESSORS["clip"])
    assert shown(engine_pixels(picture(28, 28), rules)[0], rules) == picture(28, 28)


def test_an_object_will_do_and_a_processor_of_both() -> None:
    kind, processor = PROCESSORS["siglip"]

    class Both:
        image_processor = processor

    assert rules_of(kind, Both()) == rules_of(kind, processor)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (CLIPImageProcessorPil(size={"shortest_edge": SIDE}, do_center_crop=False), "becomes one of"),
        (CLIPImageProcessorPil(**CROPPED, do_resize=False, do_center_crop=False), "becomes one of"),
        (SiglipImageProcessorPil(size={"height": 30, "width": 28}), "30, not of 28 × 28"),
        (SiglipImageProcessorPil(size={"shortest_edge": 8, "longest_edge": 9}), "not carried out"),
        (SiglipImageProcessorPil(**SQUEEZED, do_pad=True, pad_size={"height": 30, "width": 30}), "it pads"),
        (DonutImageProcessorPil(), "own way in"),
        (SiglipImageProcessorPil(**SQUEEZED, image_std=0.0), "std must be"),
    ],
)
def test_what_no_rules_say_is_refused(given: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        rules_of(LlavaAdapter, given)


def test_settings_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pass image_processor"):
        read_processor(None)
    with pytest.raises(ConfigurationError, match="A list is no image processor"):
        read_processor([])
    with pytest.raises(CheckpointError, match="does not say how pictures are prepared"):
        read_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchImageProcessor"}')
    with pytest.raises(CheckpointError, match="no image processor 'NoSuchImageProcessor'"):
        read_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessorFast"}')
    assert type(read_processor(tmp_path)) is CLIPImageProcessorPil
