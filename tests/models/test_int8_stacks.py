"""int8 by stack for families of transformers: where products of bytes are, and how far answers are from eager ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch

import flashu_compile
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.models.loading import load_model
from flashu_compile.passes.quantize_linears import MIN_WIDTH
from tests.support import tiny_emu3, tiny_lm, tiny_picture_lm
from tests.support.tiny_picture_lm import PROMPTS, Family

TOKENS = 8
#: How far below the best logit one may be that is chosen instead, in standard deviations of a row of logits. Measured:
#: at most 0.035 (causal-lm) and 0.083 (llava-tower) in 240 tokens, of which 230 were the likeliest in both.
NEAR_TIE = 0.2


class Case(NamedTuple):
    """A family with wide layers: what writes a model, its task, what a question is about, and the parts in int8."""

    save: Callable[[Path], Path]
    task: str
    picture: Callable[[int], Any]
    parts: tuple[str, ...]


@torch.no_grad()
def _calmed(model: Any) -> Any:
    """Weights so small that errors do not grow from layer to layer; those of codes and words stay."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2 and "embed" not in name and "quantize" not in name:
            parameter.mul_(0.3)
    return model


def _language_model(folder: Path) -> Path:
    return tiny_lm.save(folder, _calmed(tiny_lm.language_model("qwen2", hidden_size=MIN_WIDTH)))


def _reading(maker: Callable[..., Family]) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        family = maker(width=MIN_WIDTH)
        return tiny_picture_lm.save(folder, family._replace(model=_calmed(family.model)))

    return save


CASES = {
    "causal-lm": Case(_language_model, "text", lambda _: None, ("llm",)),
    "llava": Case(_reading(tiny_picture_lm.llava_clip), "mmu", tiny_picture_lm.picture_of, ("llm",)),
    "llava-tower": Case(
        _reading(tiny_picture_lm.llava_siglip), "mmu", tiny_picture_lm.picture_of, ("llm", "semantic")
    ),
    "emu3": Case(_reading(tiny_emu3.emu3), "mmu", tiny_emu3.picture_of, ("llm",)),
}


def _products(bundle: Path) -> set[str]:
    """The modules whose products are of bytes, in any engine."""
    found = set()
    for path in bundle.glob("*.onnx"):
        for node in onnx.load(path, load_external_data=False).graph.node:
            if node.op_type == "MatMulInteger":
                found.add(next(entry.value for entry in node.metadata_props if entry.key == "flashu.module"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_products_are_of_bytes_and_answers_within_the_budget(name: str, tmp_path: Path) -> None:
    one, output = CASES[name], tmp_path / "b"
    folder = one.save(tmp_path / "m")
    precision: dict[str, Any] = dict.fromkeys(one.parts, "int8")
    flashu_compile.export(folder, one.task, output=output, precision=precision, cache=False)
    loaded, products = load_model(folder), _products(output)
    places = {part: f"model.{root}." for part, root in loaded.adapter.stacks(loaded).items()}
    told = json.loads((output / "report.json").read_text())["int8"]["tasks"][one.task]
    assert list(told["parts"]) == sorted(one.parts)
    for part in one.parts:
        count = told["parts"][part]["layers"] - told["parts"][part]["sensitive"]
        assert len({module for module in products if module.startswith(places[part])}) == count >= 12
    assert all(module.startswith(tuple(places[part] for part in one.parts)) for module in products)
    assert 0 < told["error"] <= told["budget"]
    eager, errors, regrets = loaded.adapter.eager(loaded), [], []
    with flashu_compile.load(output, threads=1) as pipe:
        for number, prompt in enumerate(PROMPTS[:6]):
            answer, logits = pipe.logits(one.picture(number), prompt, tokens=TOKENS)
            truth = eager.logits(one.picture(number), prompt, answer)
            errors.append(relative_error(logits, truth.numpy()))
            chosen = truth.gather(1, torch.tensor(answer)[:, None])[:, 0]
            regrets += ((truth.amax(dim=1) - chosen) / truth.std(dim=1)).tolist()
    assert min(errors) > 1e-4
    assert max(errors) < told["budget"]
    assert max(regrets) <= NEAR_TIE, "tokens are those of float32, but where two are nearly as likely"
