"""What is traced, as a hash: equal where the same is traced, another wherever it is not, and none of foreign code."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashu_compile.compiler.fingerprints import (
    TensorHashes,
    UnknownCodeError,
    captured_fingerprint,
    environment,
)
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import LatentCodec, SpaceToDepth
from tests.support.tiny import CONFIG, VAE, PaddedSpaceToDepth, tiny_model


def fingerprints(model: Showo2, vae: LatentCodec = VAE) -> dict[str, str]:
    specs = [spec for task in ("t2i", "mmu") for spec in capture_specs(task, model, vae)]
    return {spec.name: captured_fingerprint(spec, TensorHashes()) for spec in specs}


def changed(model: Showo2, vae: LatentCodec = VAE) -> set[str]:
    before, after = fingerprints(tiny_model()), fingerprints(model, vae)
    return {name for name in before if before[name] != after[name]}


def test_the_same_model_twice() -> None:
    assert changed(tiny_model()) == set()


def test_one_weight() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.showo.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    assert changed(model) == {"denoise", "understand"}


def test_weights_that_are_tied_are_not_equal_ones() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.showo.lm_head.weight.copy_(model.showo.model.embed_tokens.weight)
    equal = fingerprints(model)
    model.showo.lm_head.weight = model.showo.model.embed_tokens.weight
    assert fingerprints(model)["understand"] != equal["understand"]


def test_settings() -> None:
    llm = dataclasses.replace(CONFIG.llm, num_attention_heads=2)
    with torch.no_grad():
        assert changed(tiny_model(llm=llm)) == {"denoise", "understand"}
    assert changed(tiny_model(), SpaceToDepth(factor=2, mean=0.2, std=0.5)) == {"vae_decode", "understand"}


def test_foreign_code_has_none() -> None:
    model, vae = tiny_model(latent_channels=16), PaddedSpaceToDepth()
    denoise, decode = capture_specs("t2i", model, vae)
    assert captured_fingerprint(denoise, TensorHashes())
    with pytest.raises(UnknownCodeError, match=r"identifies the code of tests\..*PaddedSpaceToDepth"):
        captured_fingerprint(decode, TensorHashes())
    decode.module.vae = SpaceToDepth(2)
    decode.module.vae.generator = torch.Generator()
    with pytest.raises(UnknownCodeError, match="Generator"):
        captured_fingerprint(decode, TensorHashes())


_TELL = """
from flashu_compile.compiler.fingerprints import environment
from tests.compiler.test_fingerprints import fingerprints
from tests.support.tiny import tiny_model
print(environment(), fingerprints(tiny_model()))
"""


def test_another_process_with_another_hash_seed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TELL],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"{environment()} {fingerprints(tiny_model())}"
