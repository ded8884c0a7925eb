"""The adapter on the page for those who write one: taken from there as it stands, and held to the library."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

import flashu_compile
from flashu_compile.models import registry
from flashu_compile.models.loading import load_model
from tests.support import tiny_picture_lm as tiny
from tests.support.tiny_picture_lm import PROMPTS, Family, picture_of, reference, save

PAGE = Path(__file__).parents[2] / "docs" / "own-model.md"


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The page's class, in a module of its own, known to the registry as one of an installed package is."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    module = types.ModuleType("my_package")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_package", module)
    monkeypatch.setitem(registry._OWN, "vipllava", "my_package:VipLlavaAdapter")
    return module.VipLlavaAdapter  # type: ignore[no-any-return]


def vipllava() -> Family:
    vision = CLIPVisionConfig(**tiny.vision_config())
    config = VipLlavaConfig(
        vision_config=vision, text_config=tiny.text_config(LlamaConfig), image_token_index=tiny.IMAGE,
        vision_feature_layers=[-2, -1],
    )  # fmt: skip
    processor = tiny.llava_clip().processor
    return Family(tiny.scaled(VipLlavaForConditionalGeneration(config), 0), processor)


@pytest.mark.slow
def test_it_answers_as_the_library_does(adapter: type[Any], tmp_path: Path) -> None:
    family = vipllava()
    folder = save(tmp_path / "tiny-vipllava", family)
    assert isinstance(load_model(folder).adapter, adapter)
    flashu_compile.export(folder, "mmu", output=tmp_path / "bundle", cache=False)
    pipe = flashu_compile.load(tmp_path / "bundle")
    for number, prompt in enumerate(PROMPTS[:8]):
        answer = reference(family, picture_of(number), prompt, 16)
        text = family.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert pipe.ask(picture_of(number), prompt, max_new_tokens=16) == text
