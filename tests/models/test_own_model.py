"""The adapters on the page for those who write one: taken from there as they stand, and held to the library."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import flashu_compile
from flashu_compile.errors import UnsupportedModelError
from flashu_compile.models import registry
from flashu_compile.models.loading import load_model
from tests.support import tiny_picture_lm as tiny
from tests.support.tiny_picture_lm import PROMPTS, Family, picture_of, reference, save

PAGE = Path(__file__).parents[2] / "docs" / "own-model.md"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's code, as a module whose classes are known to the registry as those of an installed package are."""
    module = types.ModuleType("my_package")
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_package", module)
    for name in ("VipLlava", "PaliGemma"):
        monkeypatch.setitem(registry._OWN, name.lower(), f"my_package:{name}Adapter")
    return module


def vipllava() -> Family:
    vision = CLIPVisionConfig(**tiny.vision_config())
    config = VipLlavaConfig(
        vision_config=vision, text_config=tiny.text_config(LlamaConfig), image_token_index=tiny.IMAGE,
        vision_feature_layers=[-2, -1],
    )  # fmt: skip
    processor = tiny.llava_clip().processor
    return Family(tiny.scaled(VipLlavaForConditionalGeneration(config), 0), processor)


def test_they_know_no_layout_but_their_own(package: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(
        UnsupportedModelError, match=rf"No adapter knows {tmp_path}; there are: .*paligemma.*vipllava"
    ):
        load_model(tmp_path)


@pytest.mark.slow
def test_it_answers_as_the_library_does(package: Any, tmp_path: Path) -> None:
    family = vipllava()
    folder = save(tmp_path / "tiny-vipllava", family)
    assert isinstance(load_model(folder).adapter, package.VipLlavaAdapter)
    flashu_compile.export(folder, "mmu", output=tmp_path / "bundle", cache=False)
    pipe = flashu_compile.load(tmp_path / "bundle")
    for number, prompt in enumerate(PROMPTS[:8]):
        answer = reference(family, picture_of(number), prompt, 16)
        text = family.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert pipe.ask(picture_of(number), prompt, max_new_tokens=16) == text


def paligemma() -> Family:
    vision = SiglipVisionConfig(**tiny.vision_config(), vision_use_head=False)
    pictures = SiglipImageProcessorPil(size={"height": tiny.SIDE, "width": tiny.SIDE})
    pictures.image_seq_length = (tiny.SIDE // tiny.PATCH) ** 2
    processor = PaliGemmaProcessor(pictures, tiny.tokenizer("", adds=True))  # and adds tokens of places
    text = GemmaConfig(**{**tiny.text_config(LlamaConfig).to_dict(), "vocab_size": len(processor.tokenizer)})
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=tiny.IMAGE, projection_dim=text.hidden_size
    )
    return Family(tiny.scaled(PaliGemmaForConditionalGeneration(config), 0), processor)


@torch.inference_mode()
def answer_of(family: Family, number: int, tokens: int) -> list[int]:
    """The ids of the library's answer about a picture, its end included."""
    given = family.processor(images=picture_of(number), text=PROMPTS[number], return_tensors="pt")
    del given["labels"]
    said = family.model.generate(**given, do_sample=False, max_new_tokens=tokens)
    return said[0, given["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_prefix_that_attends_in_both_directions(package: Any, tmp_path: Path) -> None:
    family, tokens = paligemma(), 16
    folder = save(tmp_path / "tiny-paligemma", family)
    answers = [answer_of(family, number, tokens) for number in range(10)]
    assert len({tuple(answer) for answer in answers if len(set(answer)) >= 6}) >= 6
    loaded = load_model(folder)
    assert isinstance(loaded.adapter, package.PaliGemmaAdapter)
    eager = loaded.adapter.eager(loaded)
    for number, answer in enumerate(answers):
        assert eager.logits(picture_of(number), PROMPTS[number], answer).argmax(-1).tolist() == answer
    eager.answer(picture_of(0), PROMPTS[0], 3)
    flashu_compile.export(folder, "mmu", output=tmp_path / "bundle", cache=False)
    pipe = flashu_compile.load(tmp_path / "bundle", threads=1)
    for number, answer in enumerate(answers):
        said, _ = pipe.logits(picture_of(number), PROMPTS[number], tokens=len(answer))
        assert said == answer


def test_an_answer_may_hold_the_mark(package: Any, tmp_path: Path) -> None:
    """What is traced is held against the eager model, on an answer with the picture's own id in it."""
    loaded = load_model(save(tmp_path / "tiny-paligemma", paligemma()))
    eager: Any = loaded.adapter.eager(loaded)
    answer = [5, tiny.IMAGE, 7, tiny.IMAGE, 9]
    logits = eager.logits(picture_of(1), PROMPTS[1], answer)
    ids, seen = eager.given(picture_of(1), PROMPTS[1])
    question = ids[ids.index(tiny.IMAGE) + loaded.details.rows :]
    (spec,) = loaded.adapter.captures(loaded, "mmu")
    nothing = torch.empty(1, 0, dtype=torch.int64)
    for count, expected in enumerate(logits):
        suffix = torch.tensor([[*question, tiny.IMAGE, *answer[:count]]])
        with torch.inference_mode():
            (found,), _ = spec.module(seen["pixel_values"], nothing, suffix)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
