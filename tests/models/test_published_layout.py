"""Checkpoints in the published layout: what is read, inferred and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashu_compile.errors import CheckpointError, UnsupportedModelError
from flashu_compile.models import weights
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2 import checkpoint, vocabulary
from flashu_compile.models.showo2.config import (
    CONFIGURATIONS,
    Showo2Config,
)
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import SpaceToDepth
from tests.support.checkpoints import (
    LAYOUTS,
    QWEN_SPECIAL,
    VOCABULARY,
    WORDS,
    Writer,
    base_tokenizer,
    constructor_arguments,
    llm_settings,
    network_of,
    one_bin,
    publish,
    same_weights,
    small_config,
    velocity_of,
)


class TestPublishedLayout:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_reads_back_bit_equal(self, tmp_path: Path, llm: Path, layout: str, tied: bool) -> None:
        original = network_of(small_config(tied=tied))
        folder = publish(tmp_path / "show-o2-tiny", original, llm, LAYOUTS[layout])
        loaded = load_model(str(folder))
        assert loaded.name == "show-o2-tiny"
        assert loaded.network.config == original.config
        assert same_weights(loaded.network, original)
        assert not loaded.network.training
        assert (loaded.vae, loaded.calibration) == (None, None)
        shared = loaded.network.showo.lm_head.weight is loaded.network.showo.model.embed_tokens.weight
        assert shared is tied
        # Equal numbers prove that what no checkpoint stores, the rotary frequencies, is right too.
        assert torch.equal(velocity_of(loaded.network), velocity_of(original))

    @pytest.mark.parametrize("layout", ["one bin", "one safetensors"])
    def test_a_file_of_weights_stands_for_its_directory(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        folder = publish(tmp_path / "show-o2-tiny", network, llm, LAYOUTS[layout])
        (file,) = weights.weight_files(folder)
        other = file.rename(folder / f"ema{file.suffix}")
        loaded = load_model(str(other))
        assert loaded.name == "show-o2-tiny"
        assert same_weights(loaded.network, network)
        assert list(loaded.origins["model"].files or {}) == [other.name, "config.json"]
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match="pass tokenizer"):
            load_model(other)
        assert same_weights(load_model(other, tokenizer=llm, llm_config=llm).network, network)

    @pytest.mark.parametrize("layout", ["one bin", "bin shards, diffusers index", "safetensors shards"])
    def test_names_of_data_parallel_training(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        def write(folder: Path, state: dict[str, Tensor]) -> None:
            LAYOUTS[layout](folder, {f"module.{name}": value for name, value in state.items()})

        assert same_weights(load_model(publish(tmp_path / "m", network, llm, write)).network, network)

    @pytest.mark.parametrize(
        "layout", ["one safetensors", "safetensors shards", "bin shards, diffusers index"]
    )
    def test_wrapped_names_alone_tell_the_family(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        def write(folder: Path, state: dict[str, Tensor]) -> None:
            LAYOUTS[layout](folder, {f"module.{name}": value for name, value in state.items()})

        folder = publish(tmp_path / "m", network, llm, write)
        (folder / "config.json").write_text("{}")
        assert same_weights(load_model(folder, tokenizer=llm, llm_config=llm).network, network)

    def test_a_checkpoint_of_training(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        def write(folder: Path, state: dict[str, Tensor]) -> None:
            torch.save({"state_dict": state, "epoch": 3, "lr": [1e-4]}, folder / "pytorch_model.bin")

        assert same_weights(load_model(publish(tmp_path / "m", network, llm, write)).network, network)

    def test_buffers_are_ignored_with_a_warning(
        self, tmp_path: Path, llm: Path, network: Showo2, caplog: pytest.LogCaptureFixture
    ) -> None:
        def writer(**more: Tensor) -> Writer:
            return lambda folder, state: one_bin(
                folder, state | {name.replace("/", "."): value for name, value in more.items()}
            )

        buffers = {
            "showo/model/layers/0/self_attn/rotary_emb/inv_freq": torch.ones(4),
            "image_position_ids": torch.arange(9)[None],
        }
        loaded = load_model(publish(tmp_path / "m", network, llm, writer(**buffers)))
        assert same_weights(loaded.network, network)
        (record,) = caplog.records
        assert "rotary_emb.inv_freq, image_position_ids" in record.message
        other = publish(tmp_path / "n", network, llm, writer(**buffers, extra_position_ids=torch.ones(1)))
        with pytest.raises(CheckpointError, match="unexpected extra_position_ids"):
            load_model(other)

    @pytest.mark.parametrize("layout", ["bin shards, diffusers index", "safetensors shards"])
    def test_the_index_says_which_of_two_tensors_counts(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        folder = publish(tmp_path / "m", network, llm, LAYOUTS[layout])
        shards = weights.weight_files(folder)
        stored = [weights.read_weight_file(path) for path in shards]
        save = save_file if shards[0].suffix == ".safetensors" else torch.save
        name = next(iter(stored[2]))
        save({key: value.clone() for key, value in stored[0].items()} | {name: torch.zeros(2)}, shards[0])
        assert same_weights(load_model(folder).network, network)
        (index,) = folder.glob("*.index.json")
        placed = json.loads(index.read_text())
        placed["weight_map"][name] = shards[1].name
        index.write_text(json.dumps(placed))
        with pytest.raises(CheckpointError, match=f"00002-of-00003.* lacks {name}, which its index places"):
            load_model(folder)
        del placed["weight_map"][name]
        index.write_text(json.dumps(placed))
        with pytest.raises(
            CheckpointError, match=f"stores {name} in two shards, and its index names neither"
        ):
            load_model(folder)

    def test_tokenizer_is_the_llms_with_four_tokens_more(
        self, tmp_path: Path, llm: Path, network: Showo2
    ) -> None:
        tokenizer = load_model(publish(tmp_path / "m", network, llm)).tokenizer
        first = len(WORDS) + len(QWEN_SPECIAL)
        added = ["[PAD]", "<image>", "<|vid_start|>", "<|vid_end|>"]
        assert [tokenizer.token_to_id(token) for token in added] == list(range(first, first + 4))
        special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        assert special == {"[PAD]", *QWEN_SPECIAL}

    def test_tokenizer_beside_the_weights_is_preferred(
        self, tmp_path: Path, llm: Path, network: Showo2
    ) -> None:
        folder = publish(tmp_path / "m", network, "somewhere/else-entirely")
        vocabulary.extend(base_tokenizer()).save(str(folder / "tokenizer.json"))
        loaded = load_model(folder, llm_config=llm)
        assert loaded.tokenizer.get_vocab_size() == VOCABULARY

    def test_given_tokenizer_and_llm_config(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = publish(tmp_path / "m", network, "/not/here")
        with pytest.raises(CheckpointError, match="pass tokenizer"):
            load_model(folder)
        tokenizer = base_tokenizer()
        for config in (llm, llm / "config.json", llm_settings(network.config.llm)):
            loaded = load_model(folder, tokenizer=tokenizer, llm_config=config)
            assert loaded.network.config == network.config
        assert tokenizer.get_vocab_size() == VOCABULARY - 4, "the user's tokenizer was changed"
        assert (
            load_model(folder, tokenizer=llm, llm_config=llm).tokenizer.to_str() == loaded.tokenizer.to_str()
        )

    def test_unknown_heads_ask_for_llm_config(self, tmp_path: Path, network: Showo2) -> None:
        folder = publish(tmp_path / "m", network, "/not/here")
        with pytest.raises(CheckpointError, match="pass llm_config"):
            load_model(folder, tokenizer=base_tokenizer())

    def test_wrong_heads_are_noticed(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = publish(tmp_path / "m", network, llm)
        wrong = llm_settings(network.config.llm) | {"num_attention_heads": 8}
        with pytest.raises(CheckpointError, match="8 attention heads"):
            load_model(folder, llm_config=wrong)
        with pytest.raises(CheckpointError, match="hidden size 64"):
            load_model(folder, llm_config=wrong | {"hidden_size": 64})
        with pytest.raises(UnsupportedModelError, match="rope_type"):
            load_model(
                folder, llm_config=llm_settings(network.config.llm) | {"rope_scaling": {"type": "yarn"}}
            )

    def test_new_style_rope_parameters(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = publish(tmp_path / "m", network, llm)
        settings = llm_settings(network.config.llm)
        del settings["rope_theta"]
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
        assert load_model(folder, llm_config=settings).network.config.llm.rope_theta == 5000.0

    def test_contradicting_config_is_refused(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = publish(tmp_path / "m", network, llm, num_diffusion_layers=10)
        with pytest.raises(CheckpointError, match="num_diffusion_layers = 10, the weights have 2"):
            load_model(folder)

    def test_other_resolution(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        grid = {"image_latent_height": 5, "image_latent_width": 5}
        config = load_model(publish(tmp_path / "m", network, llm, **grid)).network.config
        assert (config.latent_grid, config.position_grid, config.image_tokens) == (5, 3, 25)
        config = load_model(publish(tmp_path / "n", network, llm, image_latent_width=4)).network.config
        assert config.latent_shape[1:] == (6, 8)

    @pytest.mark.parametrize(
        ("name", "changes", "warned"),
        [
            ("show-o2-1.5B-HQ", {}, True),
            ("m", {"_name_or_path": "checkpoints/showo2_hq"}, True),
            ("show-o2-1.5B-HQ", {"image_latent_height": 5, "image_latent_width": 5}, False),
            ("show-o2-1.5B", {}, False),
            ("shqow", {}, False),
        ],
    )
    def test_a_checkpoint_for_large_pictures_that_does_not_say_so(
        self,
        tmp_path: Path,
        llm: Path,
        network: Showo2,
        caplog: pytest.LogCaptureFixture,
        name: str,
        changes: dict[str, Any],
        warned: bool,
    ) -> None:
        folder = publish(tmp_path / name, network, llm, **changes)
        load_model(folder)
        assert ("--resolution 512" in caplog.text) is warned
        caplog.clear()
        vae = SpaceToDepth(factor=2, mean=0.0, std=1.0)
        vae.latent_channels = network.config.latent_channels
        assert load_model(folder, vae=vae, resolution=20).network.config.latent_grid == 5
        assert caplog.text == ""

    def test_sampler_is_that_of_the_authors_scripts(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        found = load_model(publish(tmp_path / "m", network, llm)).network.config
        for config in (found, *CONFIGURATIONS.values()):
            assert (config.guidance_scale, config.accelerated_guidance_scale, config.steps) == (7.5, 10, 50)
        length = CONFIGURATIONS["show-o2-1.5B"].at_grid(64, 64).sequence_length
        assert length == CONFIGURATIONS["show-o2-1.5B-HQ-1024"].sequence_length == 4352

    def test_without_time_tokens_the_published_projection_is_left_out(
        self, tmp_path: Path, llm: Path, network: Showo2
    ) -> None:
        loaded = load_model(publish(tmp_path / "m", network, llm, add_time_embeds=False))
        assert "time_embed_proj.weight" not in loaded.network.state_dict()

    def test_tokenizer_that_does_not_fit(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        tokenizer = base_tokenizer()
        tokenizer.add_tokens(["one", "more"])
        with pytest.raises(CheckpointError, match="do not belong together"):
            load_model(publish(tmp_path / "m", network, llm), tokenizer=tokenizer)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtype(self, tmp_path: Path, llm: Path, network: Showo2, dtype: torch.dtype) -> None:
        loaded = load_model(publish(tmp_path / "m", network, llm), dtype=dtype)
        for name, value in loaded.network.state_dict().items():
            assert torch.equal(value, network.state_dict()[name].to(dtype)), name
        # Rounding the rotary frequencies would turn late rows by whole radians.
        assert loaded.network.showo.model.rotary_emb.inv_freq.dtype == torch.float32
        assert velocity_of(loaded.network).isfinite().all()

    def test_tied_embeddings_are_converted_once(self, network: Showo2) -> None:
        converted = weights.convert(dict(network.state_dict()), torch.float64)
        assert converted[checkpoint.LM_HEAD] is converted[checkpoint.EMBEDDING]
        assert len({value.data_ptr() for value in converted.values()}) == len(converted) - 1

    def test_dtype_as_stored(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        half = {name: value.half() for name, value in network.state_dict().items()}
        folder = publish(tmp_path / "m", network, llm)
        torch.save(half, folder / "pytorch_model.bin")
        assert load_model(folder, dtype=None).network.dtype == torch.float16
        assert load_model(folder).network.dtype == torch.float32

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("time_embed.mlp.2.bias"), "missing time_embed.mlp.2.bias"),
            (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
            (
                lambda s: s.update({"diffusion_head_b.linear.bias": torch.ones(3)}),
                r"wrong shapes diffusion_head_b.linear.bias \[3\] instead of \[64\]",
            ),
            (lambda s: s.pop("image_embedder_und.proj.weight"), "no image_embedder_und.proj.weight"),
            (
                lambda s: s.update({"time_embed.mlp.0.bias": torch.ones(48, dtype=torch.int8)}),
                "not floating point time_embed.mlp.0.bias",
            ),
            (lambda s: s.update({f"z.{i}": torch.ones(1) for i in range(9)}), "z.3 and 5 more"),
        ],
    )
    def test_names_and_shapes_are_checked(
        self, tmp_path: Path, llm: Path, network: Showo2, change: Callable[[dict], object], message: str
    ) -> None:
        state = dict(network.state_dict())
        change(state)
        folder = publish(tmp_path / "m", network, llm)
        torch.save(state, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)


def _hollow(config: Showo2Config, settings: dict[str, Any]) -> Showo2Config:
    """Infer the configuration of a published size from its shapes: every tensor is one number, repeated."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Showo2(config).state_dict().items()}
    one, two = torch.zeros(1), torch.ones(1)
    state = {name: one.expand(shape) for name, shape in shapes.items()}
    if not config.llm.tie_word_embeddings:
        state[checkpoint.LM_HEAD] = two.expand(shapes[checkpoint.LM_HEAD])
    assert checkpoint.knows_llm(state)
    return checkpoint.infer_config(state, checkpoint.Declared(settings))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_published_configurations_are_recognised(name: str) -> None:
    """Without the language model's configuration, and with the sampler settings no checkpoint stores."""
    expected = CONFIGURATIONS[name]
    settings = constructor_arguments(expected, "Qwen/Qwen2.5-1.5B-Instruct")
    assert _hollow(expected, settings) == expected


def test_heads_of_no_width_are_refused() -> None:
    """Sizes are read off shapes, and one of 0 divides nothing."""
    config = CONFIGURATIONS["show-o2-1.5B"]
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Showo2(config).state_dict().items()}
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    state["diffusion_head_a.0.self_attn.q_norm.weight"] = torch.zeros(0)
    with pytest.raises(CheckpointError, match=r"q_norm\.weight is empty"):
        checkpoint.infer_config(state, checkpoint.Declared({}))
