"""Models in this project's own layout, as objects, and by name."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import flashu_compile
from examples.showo2_shapes.saving import save_model
from flashu_compile.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from flashu_compile.models import hub, loading
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2 import vocabulary
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import SpaceToDepth
from tests.support.checkpoints import (
    QWEN_SPECIAL,
    VOCABULARY,
    WORDS,
    base_tokenizer,
    constructor_arguments,
    llm_settings,
    network_of,
    same_weights,
    small_config,
    velocity_of,
)


def _without_unknown() -> Tokenizer:
    """It knows its own words, and fails on others."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(QWEN_SPECIAL)
    return tokenizer


class _Words:
    def pre_tokenize(self, text: Any) -> None:
        text.split(lambda _, part: part.split(" ", "removed"))


def _custom(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a part that is written in Python."""
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_Words())
    return tokenizer


class TestOwnLayout:
    @pytest.mark.parametrize("tied", [True, False])
    def test_round_trip(self, tmp_path: Path, tied: bool) -> None:
        network, tokenizer = network_of(small_config(tied=tied)), vocabulary.extend(base_tokenizer())
        vae = SpaceToDepth(4, mean=0.5, std=0.25)
        network.config = dataclasses.replace(network.config)
        save_model(tmp_path / "m", network, tokenizer, None)
        loaded = load_model(tmp_path / "m")
        assert loaded.network.config == network.config
        for name, value in network.state_dict().items():
            assert torch.equal(loaded.network.state_dict()[name], value.half().float()), name
        assert loaded.tokenizer.to_str() == tokenizer.to_str()
        assert (loaded.vae, loaded.calibration, loaded.name) == (None, None, "m")
        assert ("showo.lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) is not tied
        with pytest.raises(CheckpointError, match="48 latent channels, the model reads 16"):
            load_model(tmp_path / "m", vae=vae)

    def test_vae_and_calibration(self, tmp_path: Path) -> None:
        network, vae = network_of(small_config(latent_channels=48)), SpaceToDepth(4, mean=0.78, std=0.39)
        save_model(tmp_path, network, vocabulary.extend(base_tokenizer()), vae, torch.float32)
        (tmp_path / "calibration.json").write_text("{}")
        loaded = load_model(tmp_path)
        assert isinstance(loaded.vae, SpaceToDepth)
        assert (loaded.vae.spatial_factor, loaded.vae.mean, loaded.vae.std) == (4, 0.78, 0.39)
        assert loaded.calibration == tmp_path / "calibration.json"
        assert same_weights(loaded.network, network)
        other = SpaceToDepth(4)
        assert load_model(tmp_path, vae=other).vae is other

    def test_same_model_same_bytes(self, tmp_path: Path, network: Showo2) -> None:
        tokenizer = vocabulary.extend(base_tokenizer())
        save_model(tmp_path / "a", network, tokenizer, None)
        save_model(tmp_path / "b", load_model(tmp_path / "a").network, tokenizer, None)
        save_model(tmp_path / "b", load_model(tmp_path / "a").network, tokenizer, None)
        files = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert files == ["config.json", "model.safetensors", "tokenizer.json"]
        assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file

    def test_overflow_is_refused(self, tmp_path: Path) -> None:
        network = network_of(small_config())
        with torch.no_grad():
            network.showo.model.norm.weight[0] = 1e6
        with pytest.raises(ConfigurationError, match=r"showo.model.norm.weight is not finite"):
            save_model(tmp_path / "m", network, base_tokenizer(), None)
        assert not (tmp_path / "m").exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"config": {}},
            {"config": {"llm": 3}},
            {"vae": {"kind": "unheard of"}},
            {"vae": {"kind": []}},
            {"vae": {"kind": "space_to_depth", "factor": 2.5, "mean": 0, "std": 1}},
            {"vae": {"kind": "space_to_depth"}},
            {"vae": 7},
            {"vae": {"kind": "wan", "folder": "../elsewhere"}},
        ],
    )
    def test_broken_description(self, tmp_path: Path, network: Showo2, change: dict[str, Any]) -> None:
        save_model(tmp_path, network, vocabulary.extend(base_tokenizer()), None)
        settings = json.loads((tmp_path / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"config.json"):
            load_model(tmp_path)

    @pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "rope_theta"])
    @pytest.mark.parametrize("value", [True, 1e30, None, -1, 10**30, "2"])
    def test_numbers_of_a_language_model(
        self, tmp_path: Path, network: Showo2, name: str, value: object
    ) -> None:
        save_model(tmp_path, network, vocabulary.extend(base_tokenizer()), None)
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["config"]["llm"][name] = value
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"config.json"):
            load_model(tmp_path)

    @pytest.mark.parametrize(
        "change", [{"latent_channels": -1}, {"patch_size": {}}, {"steps": 10**9}, {"unknown": 1}]
    )
    def test_numbers_of_a_model(self, tmp_path: Path, network: Showo2, change: dict[str, Any]) -> None:
        save_model(tmp_path, network, vocabulary.extend(base_tokenizer()), None)
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["config"] |= change
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"config.json"):
            load_model(tmp_path)

    def test_layers_that_the_weights_lack_are_not_made(self, tmp_path: Path, network: Showo2) -> None:
        save_model(tmp_path, network, vocabulary.extend(base_tokenizer()), None)
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["config"]["llm"]["num_hidden_layers"] = 1000
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"1000 layers under showo.model.layers, they have 2"):
            load_model(tmp_path)

    def test_llm_config_does_not_apply(self, tmp_path: Path, network: Showo2) -> None:
        save_model(tmp_path, network, vocabulary.extend(base_tokenizer()), None)
        with pytest.raises(ConfigurationError, match="llm_config does not apply"):
            load_model(tmp_path, llm_config={})


class _Published(nn.Module):
    """Shaped like the authors' class: same names, another class, constructor arguments in `config`."""

    def __init__(self, network: Showo2, config: Any) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
        self._settings = config

    @property
    def config(self) -> Any:
        return self._settings


class TestObjects:
    def test_own_class(self, network: Showo2) -> None:
        tokenizer = vocabulary.extend(base_tokenizer())
        loaded = load_model(network, tokenizer=tokenizer)
        assert loaded.tokenizer is tokenizer
        assert loaded.network.config is network.config
        assert torch.equal(velocity_of(loaded.network), velocity_of(network))
        for name, value in network.state_dict().items():
            assert loaded.network.state_dict()[name].data_ptr() == value.data_ptr(), name
        with pytest.raises(CheckpointError, match="pass tokenizer"):
            load_model(network)
        with pytest.raises(ConfigurationError, match="llm_config does not apply"):
            load_model(network, tokenizer=tokenizer, llm_config={})

    @pytest.mark.parametrize("tied", [True, False])
    def test_authors_class(self, tied: bool) -> None:
        original = network_of(small_config(tied=tied)).train()
        module = _Published(original, constructor_arguments(original.config, "Qwen/Qwen2.5-1.5B-Instruct"))
        loaded = load_model(module, tokenizer=base_tokenizer())
        assert loaded.network.config == original.config
        assert torch.equal(velocity_of(loaded.network), velocity_of(original))
        assert original.training, "the user's object was changed"
        assert all(parameter.requires_grad for parameter in original.parameters())
        for name, value in original.state_dict().items():
            assert loaded.network.state_dict()[name].data_ptr() == value.data_ptr(), name
        assert loaded.tokenizer.get_vocab_size() == VOCABULARY

    def test_authors_class_in_half_precision(self, network: Showo2) -> None:
        original = network_of(small_config()).bfloat16()
        module = _Published(original, constructor_arguments(original.config, ""))
        loaded = load_model(module, tokenizer=base_tokenizer())
        assert loaded.network.dtype == torch.float32
        assert original.dtype == torch.bfloat16
        kept = load_model(module, tokenizer=base_tokenizer(), dtype=None)
        assert kept.network.dtype == torch.bfloat16
        # The module's own frequencies were rounded with its weights; ours are made anew.
        exact = network.showo.model.rotary_emb.inv_freq
        assert torch.equal(kept.network.showo.model.rotary_emb.inv_freq, exact)

    def test_without_any_configuration(self) -> None:
        original = network_of(small_config())
        module = _Published(original, None)
        module.showo.config = None  # as if the language model were of another library
        with pytest.raises(CheckpointError, match="pass llm_config"):
            load_model(module, tokenizer=base_tokenizer())
        settings = llm_settings(original.config.llm)
        assert load_model(module, tokenizer=base_tokenizer(), llm_config=settings).network.config == (
            original.config
        )

    def test_transformers_tokenizer(self, network: Showo2) -> None:
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_object=vocabulary.extend(base_tokenizer()))
        assert load_model(network, tokenizer=fast).tokenizer.get_vocab_size() == VOCABULARY
        with pytest.raises(CheckpointError, match="no tokenizer of the tokenizers library"):
            load_model(network, tokenizer=object())

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (base_tokenizer, r"has no '\[PAD\]' token"),
            (
                lambda: _custom(vocabulary.extend(base_tokenizer())),
                "cannot be written to a file and read back",
            ),
            (lambda: vocabulary.extend(_without_unknown()), "cannot encode the text"),
        ],
    )
    def test_a_tokenizer_that_no_bundle_could_be_loaded_with(
        self, network: Showo2, made: Callable[[], Tokenizer], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_model(network, tokenizer=made())
        with pytest.raises(CheckpointError, match=message):
            flashu_compile.export(network, "mmu", output=tmp_path / "b", tokenizer=made())
        assert not list(tmp_path.iterdir())

    def test_a_tokenizer_s_own_settings_are_left_as_they_are(self, network: Showo2) -> None:
        tokenizer = vocabulary.extend(base_tokenizer())
        tokenizer.enable_truncation(3)
        load_model(network, tokenizer=tokenizer)
        assert tokenizer.truncation is not None

    def test_other_modules_are_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match=r"No adapter knows a Linear; there are: .*showo2"):
            load_model(nn.Linear(2, 2), tokenizer=base_tokenizer())

    def test_a_model_without_values(self) -> None:
        with torch.device("meta"):
            network = Showo2(small_config())
        with pytest.raises(CheckpointError, match="no values"):
            load_model(network, tokenizer=vocabulary.extend(base_tokenizer()))

    def test_unknown_vae(self, network: Showo2) -> None:
        with pytest.raises(ConfigurationError, match="Linear is no VAE"):
            load_model(network, tokenizer=vocabulary.extend(base_tokenizer()), vae=nn.Linear(2, 2))


class TestNames:
    def test_bundled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Showo2) -> None:
        assert "showo2-shapes" in loading.BUNDLED
        monkeypatch.setitem(loading.BUNDLED, "showo2-shapes", tmp_path)
        with pytest.raises(CheckpointError, match=r"no config.json"):
            load_model("showo2-shapes")
        save_model(tmp_path, network, vocabulary.extend(base_tokenizer()), None)
        assert load_model("showo2-shapes").name == "showo2-shapes"
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model.safetensors does not exist"):
            load_model("showo2-shapes")

    def test_unknown(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="bundled model"):
            load_model("show-o2")
        with pytest.raises(CheckpointError, match="no model"):
            load_model(tmp_path / "absent")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"is a file, and not one of weights \(.safetensors, .bin"):
            load_model(tmp_path / "file")
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            load_model(tmp_path)

    def test_hub_id_without_a_connection(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(CheckpointError, match=r"no connection.*hf download showlab/show-o2-1.5B.*path"):
            load_model("showlab/show-o2-1.5B")

    def test_the_hub_in_a_process_that_has_used_nothing_else(self, tmp_path: Path) -> None:
        """Which parts of the client are there depends on who imported it first."""
        code = "from flashu_compile.models.hub import fetch; fetch('somebody/something', ['*'], instead='pass it')"
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False
        )
        assert "CheckpointError" in done.stderr.splitlines()[-1]
        assert "there is no connection to the hub" in done.stderr

    def test_hub_without_a_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The client would make a folder called `~` in the current directory."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
        with pytest.raises(CheckpointError, match="set HF_HOME to a folder, or HOME"):
            load_model("somebody/something")
        assert not any(tmp_path.iterdir())

    def test_hub_refusals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(repository: str, **_: object) -> str:
            raise OSError("401 for this repository\nand much more")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(CheckpointError, match=r"hub: 401 for this repository\. Download"):
            load_model("someone/private")
        with pytest.raises(
            CheckpointError, match=r"'someone/private@v1' .* \(hf download someone/private --revision v1\)"
        ):
            load_model("someone/private@v1")

    @pytest.mark.parametrize(
        "text", ["a/b", "a/b@main", "a/b@0123abc", "Qwen/Qwen2.5-1.5B@refs/pr/1", "a/b@v1.0-rc_2"]
    )
    def test_hub_ids(self, text: str) -> None:
        assert hub.is_hub_id(text)

    @pytest.mark.parametrize(
        "text",
        [
            "a",
            "a/b/c",
            "a/b@",
            "@main",
            "a@main",
            "a/b@../c",
            "a/b@x/../../c",
            "a/b@/x",
            "a/b@-x",
            "a/b@x@y",
            "a/b@x ",
        ],
    )
    def test_what_is_no_hub_id(self, text: str) -> None:
        assert not hub.is_hub_id(text)
        with pytest.raises(CheckpointError, match="no model"):
            load_model(text)
