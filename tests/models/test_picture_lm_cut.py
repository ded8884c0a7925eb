"""Models that read a picture, cut by recipes: held to the library's own layers, cut by hand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import flashu_compile
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.errors import RecipeError
from flashu_compile.recipe.recipe import Recipe
from tests.support import tiny_picture_lm as tiny
from tests.support.cut_models import cut_bundle, keep_neurons
from tests.support.tiny_picture_lm import PICTURES, PROMPTS, inputs, picture_of, reference, save
from tests.support.token_twin import _stay, value_norms

TOKENS = 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "janus"])
def test_what_a_recipe_cuts_is_what_is_cut_by_hand(name: str, tmp_path: Path) -> None:
    family = {"clip": tiny.llava_clip, "janus": tiny.janus}[name]()
    source = flashu_compile.capture_model(save(tmp_path / "m", family), "mmu")
    config = flashu_compile.MMUConfig(
        pruning={"llm": 0.25, "semantic": 0.25},
        width_multiple=8,
        layer_skipping={"llm": 0.25},
        token_pruning=0.5,
        token_layer=1,
    )
    samples = [(np.asarray(picture_of(n)), prompt) for n, prompt in enumerate(PROMPTS[:6])]
    recipe, bundle = cut_bundle(source, config, samples, tmp_path / "b")
    decided = recipe.decided("mmu")
    (skipped,) = decided.phases[0].layers.get("llm", ())
    kept = {block: torch.from_numpy(ids.copy()) for block, ids in decided.kept_neurons["llm"].items()}
    assert {len(ids) for ids in kept.values()} == {96}
    cut = _with_cut_tower(family.model, decided.kept_neurons["semantic"])
    pipe = flashu_compile.load(bundle, threads=1)
    for number, prompt in enumerate(PROMPTS[:6]):
        answer = reference(family, picture_of(number), prompt, TOKENS)
        given = inputs(family, picture_of(number), prompt)
        truth = np.stack(
            [_by_hand(cut, given, answer[:n], kept, skipped, 1, 0.5) for n in range(len(answer) + 1)]
        )
        _, logits = pipe.logits(picture_of(number), prompt, tokens=len(truth), answer=answer)
        assert relative_error(logits, truth) <= 1e-4
    report = (bundle / "report.json").read_text()
    assert all(f'"{told}"' in report for told in ("FFN pruning", "layer skipping", "token pruning"))


def _with_cut_tower(model: Any, kept: Mapping[int, np.ndarray]) -> Any:
    """A copy of a model whose vision tower has the kept neurons alone; layers that nothing reads stay whole."""
    cut = copy.deepcopy(model)
    tower = getattr(cut.model, "vision_tower", None) or cut.model.vision_model
    for block, neurons in kept.items():
        assert len(neurons) == 48
        keep_neurons(tower.encoder.layers[block].mlp, neurons, ["fc1"], "fc2")
    return cut


@torch.inference_mode()
def _by_hand(
    model: Any,
    given: dict[str, Any],
    answer: list[int],
    kept: dict[int, torch.Tensor],
    skipped: int,
    layer: int,
    ratio: float,
) -> np.ndarray:
    """Logits of the next token by the library's layers, one after the other, cut and with rows dropped after one."""
    ids = torch.cat([given["input_ids"], torch.tensor([answer], dtype=torch.int64)], dim=1)
    language = model.model.language_model
    rows = language.embed_tokens(ids)
    places = (given["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    features = model.model.get_image_features(given["pixel_values"], return_dict=True).pooler_output
    rows[0, places] = features[0]
    first, count = int(places[0]), len(places)
    cos, sin = language.rotary_emb(rows, torch.arange(rows.shape[1])[None])
    waiting = True
    for index, block in enumerate(language.layers):
        if index == skipped:
            continue
        length = rows.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        before, normed = rows, block.input_layernorm(rows)
        rows = rows + block.self_attn(normed, position_embeddings=(cos, sin), attention_mask=mask)[0]
        rows = rows + _cut_ffn(block.mlp, block.post_attention_layernorm(rows), kept[index])
        if index >= layer and waiting:
            waiting = False
            span = block.input_layernorm(before)[0, first : first + count]
            ranked = value_norms(span, block.self_attn.v_proj(span))
            stays = _stay(ranked, ratio, first, length)
            rows, cos, sin = rows[:, stays], cos[:, stays], sin[:, stays]
    return model.lm_head(language.norm(rows))[0, -1].numpy()


def _cut_ffn(mlp: nn.Module, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    hidden = nn.functional.silu(x @ gate[kept].T) * (x @ up[kept].T)
    return hidden @ down[:, kept].T


def test_a_tower_of_which_several_layers_are_read_is_not_pruned() -> None:
    """Small copies of it keep all its layers, so it is no stack; a build that asks for it is told."""
    family = tiny.llava_clip(vision_feature_layer=[-2, 2])
    parts = {"tokenizer": family.processor.tokenizer, "model_options": {"image_processor": family.processor}}
    source = flashu_compile.capture_model(family.model, "mmu", **parts)  # type: ignore[arg-type]
    wanted = dataclasses.replace(Recipe("cut"), mmu=flashu_compile.MMUConfig(pruning={"semantic": 0.25}))
    samples = [(np.asarray(PICTURES[0]), PROMPTS[0])]
    with pytest.raises(
        RecipeError, match=r"stack 'semantic', which mmu of model .* does not have; it has llm"
    ):
        flashu_compile.calibrate(source, "mmu", recipe=wanted, calibration=samples)
