"""Every way a model can be named, every file layout, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import flashu_compile
from flashu_compile.bundle.manifest import Origin, file_entry
from flashu_compile.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from flashu_compile.models import hub, loading, origins, weights
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2 import checkpoint, vocabulary
from flashu_compile.models.showo2.config import (
    CONFIGURATIONS,
    HeadConfig,
    LLMConfig,
    SemanticConfig,
    Showo2Config,
)
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reference import GenerationReference
from flashu_compile.models.showo2.saving import save_model
from flashu_compile.models.vae import SpaceToDepth

QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = ["a", "red", "circle", "what", "colour"]
VOCABULARY = len(WORDS) + len(QWEN_SPECIAL) + 4


def _config(*, tied: bool = True, **changes: Any) -> Showo2Config:
    # The semantic width is that of SigLIP base, since a published checkpoint does not say its head count.
    config = Showo2Config(
        llm=LLMConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        ),
        semantic=SemanticConfig(
            hidden_size=768, intermediate_size=16, num_hidden_layers=1, num_attention_heads=12
        ),
        head=HeadConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
        ),
        latent_grid=3,
        position_grid=3,
        sequence_length=384,
        accelerated_guidance_scale=10.0,
    )
    return dataclasses.replace(config, **changes)


def _network(config: Showo2Config) -> Showo2:
    torch.manual_seed(0)
    network = Showo2(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def _base_tokenizer() -> Tokenizer:
    """What the language model comes with: words and Qwen's special tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(QWEN_SPECIAL)
    return tokenizer


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


def _llm_settings(config: LLMConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "vocab_size": 99,  # padded in the original; the weights decide
    }


def _constructor_arguments(config: Showo2Config, llm: Path | str) -> dict[str, Any]:
    """The config.json of a published checkpoint."""
    return {
        "_class_name": "Showo2Qwen2_5",
        "_diffusers_version": "0.31.0",
        "add_qk_norm": True,
        "add_time_embeds": config.add_time_embeds,
        "clip_latent_dim": config.semantic.hidden_size,
        "clip_pretrained_model_path": "google/siglip-so400m-patch14-384",
        "hidden_size": config.llm.hidden_size,
        "image_latent_dim": config.latent_channels,
        "image_latent_height": config.latent_grid,
        "image_latent_width": config.latent_grid,
        "llm_model_path": str(llm),
        "llm_vocab_size": None,
        "load_from_showo": False,
        "num_diffusion_layers": config.head.num_hidden_layers,
        "num_refiner_layers": 10,
        "num_und_trans_layers": 8,
        "patch_size": config.patch_size,
    }


@pytest.fixture(scope="module")
def network() -> Showo2:
    return _network(_config())


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    """A local Qwen2 directory."""
    folder = tmp_path / "llm"
    folder.mkdir()
    _base_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(_llm_settings(_config().llm)))
    return folder


Writer = Callable[[Path, dict[str, Tensor]], None]


def _bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def _old_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _safetensors(folder: Path, state: dict[str, Tensor]) -> None:
    save_file({k: v.clone() for k, v in state.items()}, folder / "diffusion_pytorch_model.safetensors")


def _sharded(index: str, stem: str, save: Callable[[dict[str, Tensor], Path], object]) -> Writer:
    def write(folder: Path, state: dict[str, Tensor]) -> None:
        suffix = index.split(".", 1)[1].removesuffix(".index.json")
        names, placed = sorted(state), {}
        for i in range(3):
            shard = {name: state[name].clone() for name in names[i::3]}
            file = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
            save(shard, folder / file)
            placed |= dict.fromkeys(shard, file)
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))

    return write


LAYOUTS: dict[str, Writer] = {
    "one bin": _bin,
    "one bin of old torch": _old_bin,
    "bin shards, diffusers index": _sharded(
        "diffusion_pytorch_model.bin.index.json", "pytorch_model", torch.save
    ),
    "bin shards, transformers index": _sharded("pytorch_model.bin.index.json", "pytorch_model", torch.save),
    "one safetensors": _safetensors,
    "safetensors shards": _sharded("model.safetensors.index.json", "model", save_file),
}


def _publish(folder: Path, network: Showo2, llm: Path | str, write: Writer = _bin, **changes: Any) -> Path:
    folder.mkdir()
    write(folder, dict(network.state_dict()))
    settings = _constructor_arguments(network.config, llm) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _same_weights(first: Showo2, second: Showo2) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _velocity(network: Showo2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *network.config.latent_shape, generator=generator).to(network.dtype)
    text = torch.randint(0, VOCABULARY, (2, 30), generator=generator)
    step = GenerationReference(network, text, torch.tensor([3, 2]))
    return step.step(latents, torch.tensor([0.2, 0.7]).to(network.dtype)).velocity


class TestPublishedLayout:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_reads_back_bit_equal(self, tmp_path: Path, llm: Path, layout: str, tied: bool) -> None:
        original = _network(_config(tied=tied))
        folder = _publish(tmp_path / "show-o2-tiny", original, llm, LAYOUTS[layout])
        loaded = load_model(str(folder))
        assert loaded.name == "show-o2-tiny"
        assert loaded.network.config == original.config
        assert _same_weights(loaded.network, original)
        assert not loaded.network.training
        assert (loaded.vae, loaded.calibration) == (None, None)
        shared = loaded.network.showo.lm_head.weight is loaded.network.showo.model.embed_tokens.weight
        assert shared is tied
        # Equal numbers prove that what no checkpoint stores, the rotary frequencies, is right too.
        assert torch.equal(_velocity(loaded.network), _velocity(original))

    @pytest.mark.parametrize("layout", ["one bin", "one safetensors"])
    def test_a_file_of_weights_stands_for_its_directory(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        folder = _publish(tmp_path / "show-o2-tiny", network, llm, LAYOUTS[layout])
        (file,) = weights.weight_files(folder)
        other = file.rename(folder / f"ema{file.suffix}")
        loaded = load_model(str(other))
        assert loaded.name == "show-o2-tiny"
        assert _same_weights(loaded.network, network)
        assert list(loaded.origins["model"].files or {}) == [other.name, "config.json"]
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match="pass tokenizer"):
            load_model(other)
        assert _same_weights(load_model(other, tokenizer=llm, llm_config=llm).network, network)

    @pytest.mark.parametrize("layout", ["one bin", "bin shards, diffusers index", "safetensors shards"])
    def test_names_of_data_parallel_training(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        def write(folder: Path, state: dict[str, Tensor]) -> None:
            LAYOUTS[layout](folder, {f"module.{name}": value for name, value in state.items()})

        assert _same_weights(load_model(_publish(tmp_path / "m", network, llm, write)).network, network)

    @pytest.mark.parametrize(
        "layout", ["one safetensors", "safetensors shards", "bin shards, diffusers index"]
    )
    def test_wrapped_names_alone_tell_the_family(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        def write(folder: Path, state: dict[str, Tensor]) -> None:
            LAYOUTS[layout](folder, {f"module.{name}": value for name, value in state.items()})

        folder = _publish(tmp_path / "m", network, llm, write)
        (folder / "config.json").write_text("{}")
        assert _same_weights(load_model(folder, tokenizer=llm, llm_config=llm).network, network)

    def test_a_checkpoint_of_training(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        def write(folder: Path, state: dict[str, Tensor]) -> None:
            torch.save({"state_dict": state, "epoch": 3, "lr": [1e-4]}, folder / "pytorch_model.bin")

        assert _same_weights(load_model(_publish(tmp_path / "m", network, llm, write)).network, network)

    def test_buffers_are_ignored_with_a_warning(
        self, tmp_path: Path, llm: Path, network: Showo2, caplog: pytest.LogCaptureFixture
    ) -> None:
        def writer(**more: Tensor) -> Writer:
            return lambda folder, state: _bin(
                folder, state | {name.replace("/", "."): value for name, value in more.items()}
            )

        buffers = {
            "showo/model/layers/0/self_attn/rotary_emb/inv_freq": torch.ones(4),
            "image_position_ids": torch.arange(9)[None],
        }
        loaded = load_model(_publish(tmp_path / "m", network, llm, writer(**buffers)))
        assert _same_weights(loaded.network, network)
        (record,) = caplog.records
        assert "rotary_emb.inv_freq, image_position_ids" in record.message
        other = _publish(tmp_path / "n", network, llm, writer(**buffers, extra_position_ids=torch.ones(1)))
        with pytest.raises(CheckpointError, match="unexpected extra_position_ids"):
            load_model(other)

    @pytest.mark.parametrize("layout", ["bin shards, diffusers index", "safetensors shards"])
    def test_the_index_says_which_of_two_tensors_counts(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        folder = _publish(tmp_path / "m", network, llm, LAYOUTS[layout])
        shards = weights.weight_files(folder)
        stored = [weights.read_weight_file(path) for path in shards]
        save = save_file if shards[0].suffix == ".safetensors" else torch.save
        name = next(iter(stored[2]))
        save({key: value.clone() for key, value in stored[0].items()} | {name: torch.zeros(2)}, shards[0])
        assert _same_weights(load_model(folder).network, network)
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
        tokenizer = load_model(_publish(tmp_path / "m", network, llm)).tokenizer
        first = len(WORDS) + len(QWEN_SPECIAL)
        added = ["[PAD]", "<image>", "<|vid_start|>", "<|vid_end|>"]
        assert [tokenizer.token_to_id(token) for token in added] == list(range(first, first + 4))
        special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        assert special == {"[PAD]", *QWEN_SPECIAL}

    def test_tokenizer_beside_the_weights_is_preferred(
        self, tmp_path: Path, llm: Path, network: Showo2
    ) -> None:
        folder = _publish(tmp_path / "m", network, "somewhere/else-entirely")
        vocabulary.extend(_base_tokenizer()).save(str(folder / "tokenizer.json"))
        loaded = load_model(folder, llm_config=llm)
        assert loaded.tokenizer.get_vocab_size() == VOCABULARY

    def test_given_tokenizer_and_llm_config(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = _publish(tmp_path / "m", network, "/not/here")
        with pytest.raises(CheckpointError, match="pass tokenizer"):
            load_model(folder)
        tokenizer = _base_tokenizer()
        for config in (llm, llm / "config.json", _llm_settings(network.config.llm)):
            loaded = load_model(folder, tokenizer=tokenizer, llm_config=config)
            assert loaded.network.config == network.config
        assert tokenizer.get_vocab_size() == VOCABULARY - 4, "the user's tokenizer was changed"
        assert (
            load_model(folder, tokenizer=llm, llm_config=llm).tokenizer.to_str() == loaded.tokenizer.to_str()
        )

    def test_unknown_heads_ask_for_llm_config(self, tmp_path: Path, network: Showo2) -> None:
        folder = _publish(tmp_path / "m", network, "/not/here")
        with pytest.raises(CheckpointError, match="pass llm_config"):
            load_model(folder, tokenizer=_base_tokenizer())

    def test_wrong_heads_are_noticed(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = _publish(tmp_path / "m", network, llm)
        wrong = _llm_settings(network.config.llm) | {"num_attention_heads": 8}
        with pytest.raises(CheckpointError, match="8 attention heads"):
            load_model(folder, llm_config=wrong)
        with pytest.raises(CheckpointError, match="hidden size 64"):
            load_model(folder, llm_config=wrong | {"hidden_size": 64})
        with pytest.raises(UnsupportedModelError, match="rope_type"):
            load_model(
                folder, llm_config=_llm_settings(network.config.llm) | {"rope_scaling": {"type": "yarn"}}
            )

    def test_new_style_rope_parameters(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = _publish(tmp_path / "m", network, llm)
        settings = _llm_settings(network.config.llm)
        del settings["rope_theta"]
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
        assert load_model(folder, llm_config=settings).network.config.llm.rope_theta == 5000.0

    def test_contradicting_config_is_refused(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = _publish(tmp_path / "m", network, llm, num_diffusion_layers=10)
        with pytest.raises(CheckpointError, match="num_diffusion_layers = 10, the weights have 2"):
            load_model(folder)

    def test_other_resolution(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        grid = {"image_latent_height": 5, "image_latent_width": 5}
        config = load_model(_publish(tmp_path / "m", network, llm, **grid)).network.config
        assert (config.latent_grid, config.position_grid, config.image_tokens) == (5, 3, 25)
        config = load_model(_publish(tmp_path / "n", network, llm, image_latent_width=4)).network.config
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
        folder = _publish(tmp_path / name, network, llm, **changes)
        load_model(folder)
        assert ("--resolution 512" in caplog.text) is warned
        caplog.clear()
        vae = SpaceToDepth(factor=2, mean=0.0, std=1.0)
        vae.latent_channels = network.config.latent_channels
        assert load_model(folder, vae=vae, resolution=20).network.config.latent_grid == 5
        assert caplog.text == ""

    def test_sampler_is_that_of_the_authors_scripts(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        found = load_model(_publish(tmp_path / "m", network, llm)).network.config
        for config in (found, *CONFIGURATIONS.values()):
            assert (config.guidance_scale, config.accelerated_guidance_scale, config.steps) == (7.5, 10, 50)
        length = CONFIGURATIONS["show-o2-1.5B"].at_grid(64, 64).sequence_length
        assert length == CONFIGURATIONS["show-o2-1.5B-HQ-1024"].sequence_length == 4352

    def test_without_time_tokens_the_published_projection_is_left_out(
        self, tmp_path: Path, llm: Path, network: Showo2
    ) -> None:
        loaded = load_model(_publish(tmp_path / "m", network, llm, add_time_embeds=False))
        assert "time_embed_proj.weight" not in loaded.network.state_dict()

    def test_tokenizer_that_does_not_fit(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        tokenizer = _base_tokenizer()
        tokenizer.add_tokens(["one", "more"])
        with pytest.raises(CheckpointError, match="do not belong together"):
            load_model(_publish(tmp_path / "m", network, llm), tokenizer=tokenizer)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtype(self, tmp_path: Path, llm: Path, network: Showo2, dtype: torch.dtype) -> None:
        loaded = load_model(_publish(tmp_path / "m", network, llm), dtype=dtype)
        for name, value in loaded.network.state_dict().items():
            assert torch.equal(value, network.state_dict()[name].to(dtype)), name
        # Rounding the rotary frequencies would turn late rows by whole radians.
        assert loaded.network.showo.model.rotary_emb.inv_freq.dtype == torch.float32
        assert _velocity(loaded.network).isfinite().all()

    def test_tied_embeddings_are_converted_once(self, network: Showo2) -> None:
        converted = weights.convert(dict(network.state_dict()), torch.float64)
        assert converted[checkpoint.LM_HEAD] is converted[checkpoint.EMBEDDING]
        assert len({value.data_ptr() for value in converted.values()}) == len(converted) - 1

    def test_dtype_as_stored(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        half = {name: value.half() for name, value in network.state_dict().items()}
        folder = _publish(tmp_path / "m", network, llm)
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
        folder = _publish(tmp_path / "m", network, llm)
        torch.save(state, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)


class _Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


class TestUntrustedFiles:
    @pytest.mark.parametrize("new", [True, False])
    def test_code_in_a_pickle_does_not_run(
        self, tmp_path: Path, llm: Path, network: Showo2, new: bool
    ) -> None:
        folder, evidence = _publish(tmp_path / "m", network, llm), tmp_path / "evidence"
        state = {**network.state_dict(), "payload": _Payload(evidence)}
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match="could run code"):
            load_model(folder)
        assert not evidence.exists()

    @pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", b"PK\x03\x04 cut short"])
    @pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
    def test_damaged_files(
        self, tmp_path: Path, llm: Path, network: Showo2, file: str, content: bytes
    ) -> None:
        folder = _publish(tmp_path / "m", network, llm)
        (folder / file).write_bytes(content)
        with pytest.raises(CheckpointError, match=file):
            load_model(folder)

    def test_a_pickle_of_something_else(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = _publish(tmp_path / "m", network, llm)
        torch.save([torch.ones(2)], folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="dictionary of tensors"):
            load_model(folder)

    @pytest.mark.parametrize("shard", ["../m2/pytorch_model.bin", "/etc/passwd", ".."])
    def test_an_index_cannot_leave_its_directory(
        self, tmp_path: Path, llm: Path, network: Showo2, shard: str
    ) -> None:
        _publish(tmp_path / "m2", network, llm)
        folder = _publish(tmp_path / "m", network, llm)
        (folder / "pytorch_model.bin").unlink()
        index = {"weight_map": dict.fromkeys(network.state_dict(), shard)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="not a file beside it"):
            load_model(folder)

    def test_a_missing_shard_is_named(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        write = LAYOUTS["bin shards, diffusers index"]
        folder = _publish(tmp_path / "m", network, llm, write)
        (folder / "pytorch_model-00002-of-00003.bin").unlink()
        with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin does not exist"):
            load_model(folder)

    @pytest.mark.parametrize("text", ["", "[1]", "{", '{"format": "flashu_compile.other"}'])
    def test_broken_config(self, tmp_path: Path, llm: Path, network: Showo2, text: str) -> None:
        folder = _publish(tmp_path / "m", network, llm)
        (folder / "config.json").write_text(text)
        with pytest.raises((CheckpointError, UnsupportedModelError), match=r"config.json|No adapter knows"):
            load_model(folder)


class TestOwnLayout:
    @pytest.mark.parametrize("tied", [True, False])
    def test_round_trip(self, tmp_path: Path, tied: bool) -> None:
        network, tokenizer = _network(_config(tied=tied)), vocabulary.extend(_base_tokenizer())
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
        network, vae = _network(_config(latent_channels=48)), SpaceToDepth(4, mean=0.78, std=0.39)
        save_model(tmp_path, network, vocabulary.extend(_base_tokenizer()), vae, torch.float32)
        (tmp_path / "calibration.json").write_text("{}")
        loaded = load_model(tmp_path)
        assert isinstance(loaded.vae, SpaceToDepth)
        assert (loaded.vae.spatial_factor, loaded.vae.mean, loaded.vae.std) == (4, 0.78, 0.39)
        assert loaded.calibration == tmp_path / "calibration.json"
        assert _same_weights(loaded.network, network)
        other = SpaceToDepth(4)
        assert load_model(tmp_path, vae=other).vae is other

    def test_same_model_same_bytes(self, tmp_path: Path, network: Showo2) -> None:
        tokenizer = vocabulary.extend(_base_tokenizer())
        save_model(tmp_path / "a", network, tokenizer, None)
        save_model(tmp_path / "b", load_model(tmp_path / "a").network, tokenizer, None)
        save_model(tmp_path / "b", load_model(tmp_path / "a").network, tokenizer, None)
        files = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert files == ["config.json", "model.safetensors", "tokenizer.json"]
        assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file

    def test_overflow_is_refused(self, tmp_path: Path) -> None:
        network = _network(_config())
        with torch.no_grad():
            network.showo.model.norm.weight[0] = 1e6
        with pytest.raises(ConfigurationError, match=r"showo.model.norm.weight is not finite"):
            save_model(tmp_path / "m", network, _base_tokenizer(), None)
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
        save_model(tmp_path, network, vocabulary.extend(_base_tokenizer()), None)
        settings = json.loads((tmp_path / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"config.json"):
            load_model(tmp_path)

    @pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "rope_theta"])
    @pytest.mark.parametrize("value", [True, 1e30, None, -1, 10**30, "2"])
    def test_numbers_of_a_language_model(
        self, tmp_path: Path, network: Showo2, name: str, value: object
    ) -> None:
        save_model(tmp_path, network, vocabulary.extend(_base_tokenizer()), None)
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["config"]["llm"][name] = value
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"config.json"):
            load_model(tmp_path)

    @pytest.mark.parametrize(
        "change", [{"latent_channels": -1}, {"patch_size": {}}, {"steps": 10**9}, {"unknown": 1}]
    )
    def test_numbers_of_a_model(self, tmp_path: Path, network: Showo2, change: dict[str, Any]) -> None:
        save_model(tmp_path, network, vocabulary.extend(_base_tokenizer()), None)
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["config"] |= change
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"config.json"):
            load_model(tmp_path)

    def test_layers_that_the_weights_lack_are_not_made(self, tmp_path: Path, network: Showo2) -> None:
        save_model(tmp_path, network, vocabulary.extend(_base_tokenizer()), None)
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["config"]["llm"]["num_hidden_layers"] = 1000
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=r"1000 layers under showo.model.layers, they have 2"):
            load_model(tmp_path)

    def test_llm_config_does_not_apply(self, tmp_path: Path, network: Showo2) -> None:
        save_model(tmp_path, network, vocabulary.extend(_base_tokenizer()), None)
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
        tokenizer = vocabulary.extend(_base_tokenizer())
        loaded = load_model(network, tokenizer=tokenizer)
        assert loaded.tokenizer is tokenizer
        assert loaded.network.config is network.config
        assert torch.equal(_velocity(loaded.network), _velocity(network))
        for name, value in network.state_dict().items():
            assert loaded.network.state_dict()[name].data_ptr() == value.data_ptr(), name
        with pytest.raises(CheckpointError, match="pass tokenizer"):
            load_model(network)
        with pytest.raises(ConfigurationError, match="llm_config does not apply"):
            load_model(network, tokenizer=tokenizer, llm_config={})

    @pytest.mark.parametrize("tied", [True, False])
    def test_authors_class(self, tied: bool) -> None:
        original = _network(_config(tied=tied)).train()
        module = _Published(original, _constructor_arguments(original.config, "Qwen/Qwen2.5-1.5B-Instruct"))
        loaded = load_model(module, tokenizer=_base_tokenizer())
        assert loaded.network.config == original.config
        assert torch.equal(_velocity(loaded.network), _velocity(original))
        assert original.training, "the user's object was changed"
        assert all(parameter.requires_grad for parameter in original.parameters())
        for name, value in original.state_dict().items():
            assert loaded.network.state_dict()[name].data_ptr() == value.data_ptr(), name
        assert loaded.tokenizer.get_vocab_size() == VOCABULARY

    def test_authors_class_in_half_precision(self, network: Showo2) -> None:
        original = _network(_config()).bfloat16()
        module = _Published(original, _constructor_arguments(original.config, ""))
        loaded = load_model(module, tokenizer=_base_tokenizer())
        assert loaded.network.dtype == torch.float32
        assert original.dtype == torch.bfloat16
        kept = load_model(module, tokenizer=_base_tokenizer(), dtype=None)
        assert kept.network.dtype == torch.bfloat16
        # The module's own frequencies were rounded with its weights; ours are made anew.
        exact = network.showo.model.rotary_emb.inv_freq
        assert torch.equal(kept.network.showo.model.rotary_emb.inv_freq, exact)

    def test_without_any_configuration(self) -> None:
        original = _network(_config())
        module = _Published(original, None)
        module.showo.config = None  # as if the language model were of another library
        with pytest.raises(CheckpointError, match="pass llm_config"):
            load_model(module, tokenizer=_base_tokenizer())
        settings = _llm_settings(original.config.llm)
        assert load_model(module, tokenizer=_base_tokenizer(), llm_config=settings).network.config == (
            original.config
        )

    def test_transformers_tokenizer(self, network: Showo2) -> None:
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_object=vocabulary.extend(_base_tokenizer()))
        assert load_model(network, tokenizer=fast).tokenizer.get_vocab_size() == VOCABULARY
        with pytest.raises(CheckpointError, match="no tokenizer of the tokenizers library"):
            load_model(network, tokenizer=object())

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (_base_tokenizer, r"has no '\[PAD\]' token"),
            (
                lambda: _custom(vocabulary.extend(_base_tokenizer())),
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
        tokenizer = vocabulary.extend(_base_tokenizer())
        tokenizer.enable_truncation(3)
        load_model(network, tokenizer=tokenizer)
        assert tokenizer.truncation is not None

    def test_other_modules_are_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match=r"No adapter knows a Linear; there are: .*showo2"):
            load_model(nn.Linear(2, 2), tokenizer=_base_tokenizer())

    def test_a_model_without_values(self) -> None:
        with torch.device("meta"):
            network = Showo2(_config())
        with pytest.raises(CheckpointError, match="no values"):
            load_model(network, tokenizer=vocabulary.extend(_base_tokenizer()))

    def test_unknown_vae(self, network: Showo2) -> None:
        with pytest.raises(ConfigurationError, match="Linear is no VAE"):
            load_model(network, tokenizer=vocabulary.extend(_base_tokenizer()), vae=nn.Linear(2, 2))


class TestNames:
    def test_bundled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Showo2) -> None:
        assert "showo2-shapes" in loading.BUNDLED
        monkeypatch.setitem(loading.BUNDLED, "showo2-shapes", tmp_path)
        with pytest.raises(CheckpointError, match=r"no config.json"):
            load_model("showo2-shapes")
        save_model(tmp_path, network, vocabulary.extend(_base_tokenizer()), None)
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


class _Hub:
    """In place of the hub client's download: repositories with commits, and what was asked for and fetched."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.commits: dict[tuple[str, str], Path] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.fetched: list[str] = []

    def publish(self, repository: str, commit: str, folder: Path, *branches: str) -> None:
        self.commits[repository, commit] = folder
        for branch in branches:
            self.branches[repository, branch] = commit

    def snapshot_download(
        self, repository: str, *, revision: str | None = None, allow_patterns: list[str]
    ) -> str:
        self.asked.append((repository, revision))
        named = revision or "main"
        commit = self.branches.get((repository, named), named)
        source, target = self.commits[repository, commit], self.cache / repository / "snapshots" / commit
        target.mkdir(parents=True, exist_ok=True)
        names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
            self.fetched.append(name)
        return str(target)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    made = _Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


class TestHub:
    def test_a_model_and_its_language_model_s_small_files(
        self, tmp_path: Path, fake_hub: _Hub, llm: Path, network: Showo2
    ) -> None:
        published = _publish(tmp_path / "m", network, "Qwen/Qwen2.5-tiny", _safetensors)
        (llm / "model.safetensors").write_bytes(b"never fetched")
        fake_hub.publish("showlab/show-o2-tiny", COMMIT, published, "main")
        fake_hub.publish("Qwen/Qwen2.5-tiny", OTHER_COMMIT, llm, "main")
        loaded = load_model("showlab/show-o2-tiny")
        assert loaded.name == "show-o2-tiny"
        assert _same_weights(loaded.network, network)
        assert fake_hub.fetched == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
            "tokenizer.json",
            "config.json",
        ]
        origin = loaded.origins["model"]
        assert (origin.repository, origin.revision) == ("showlab/show-o2-tiny", COMMIT)

    @pytest.mark.parametrize("revision", ["v2", OTHER_COMMIT])
    def test_a_revision_is_what_is_loaded_and_recorded(
        self, tmp_path: Path, fake_hub: _Hub, llm: Path, network: Showo2, revision: str
    ) -> None:
        other = _network(_config())
        with torch.no_grad():
            other.showo.model.norm.weight += 1
        fake_hub.publish("showlab/tiny", COMMIT, _publish(tmp_path / "one", network, llm), "main")
        fake_hub.publish("showlab/tiny", OTHER_COMMIT, _publish(tmp_path / "two", other, llm), "v2")
        for hub_id, expected, commit in (
            ("showlab/tiny", network, COMMIT),
            (f"showlab/tiny@{revision}", other, OTHER_COMMIT),
        ):
            loaded = load_model(hub_id)
            assert loaded.name == "tiny"
            assert _same_weights(loaded.network, expected)
            assert loaded.origins["model"].revision == commit

    @pytest.mark.parametrize(
        ("layouts", "fetched"),
        [
            (["one bin", "one safetensors"], {"diffusion_pytorch_model.safetensors"}),
            (
                ["bin shards, transformers index", "safetensors shards"],
                {"model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))},
            ),
            (["one bin"], {"pytorch_model.bin"}),
            (
                ["bin shards, diffusers index"],
                {
                    "diffusion_pytorch_model.bin.index.json",
                    *(f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)),
                },
            ),
        ],
    )
    def test_weights_come_in_one_format(
        self,
        tmp_path: Path,
        fake_hub: _Hub,
        llm: Path,
        network: Showo2,
        layouts: list[str],
        fetched: set[str],
    ) -> None:
        folder = _publish(tmp_path / "m", network, llm, LAYOUTS[layouts[0]])
        for layout in layouts[1:]:
            LAYOUTS[layout](folder, dict(network.state_dict()))
        fake_hub.publish("showlab/tiny", COMMIT, folder, "main")
        loaded = load_model("showlab/tiny")
        assert _same_weights(loaded.network, network)
        assert set(fake_hub.fetched) == {"config.json"} | fetched
        # A branch may move between two downloads: the second one is of the first one's commit.
        assert [revision for _, revision in fake_hub.asked] in ([None], [None, COMMIT])
        files = loaded.origins["model"].files
        assert files is not None
        assert files.keys() == {name for name in fetched if not name.endswith(".json")} | {"config.json"}

    def test_safetensors_of_something_else_do_not_hide_the_pickles(
        self, tmp_path: Path, fake_hub: _Hub, llm: Path, network: Showo2
    ) -> None:
        folder = _publish(tmp_path / "m", network, llm)
        save_file({"a": torch.ones(1)}, folder / "adapter.safetensors")
        fake_hub.publish("showlab/tiny", COMMIT, folder, "main")
        assert _same_weights(load_model("showlab/tiny").network, network)

    @pytest.mark.parametrize(
        ("files", "found", "fetched"),
        [
            (
                ["vae/config.json", "vae/model.safetensors", "transformer/model.safetensors"],
                "vae",
                ["vae/config.json", "vae/model.safetensors"],
            ),
            (["Wan2.1_VAE.pth", "diffusion_pytorch_model.safetensors"], "Wan2.1_VAE.pth", ["Wan2.1_VAE.pth"]),
            (
                ["config.json", "diffusion_pytorch_model.safetensors"],
                "",
                ["config.json", "config.json", "diffusion_pytorch_model.safetensors"],
            ),
        ],
    )
    def test_a_vae_by_its_hub_id(
        self, tmp_path: Path, fake_hub: _Hub, files: list[str], found: str, fetched: list[str]
    ) -> None:
        for name in files:
            path = tmp_path / "repository" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"_class_name": "AutoencoderKLWan", "license": "mit"}')
        fake_hub.publish("Wan-AI/Wan2.1", COMMIT, tmp_path / "repository", "main")
        path, snapshot = origins.fetched_vae("Wan-AI/Wan2.1")
        assert snapshot is not None
        assert path == snapshot.directory / found
        assert fake_hub.fetched == fetched
        origin = origins.vae_origin(path, origins.vae_files(path), snapshot)
        assert (origin.repository, origin.revision) == ("Wan-AI/Wan2.1", COMMIT)
        assert origin.license == (None if found.endswith(".pth") else "mit")

    def test_a_repository_without_a_vae(self, tmp_path: Path, fake_hub: _Hub) -> None:
        folder = tmp_path / "repository"
        folder.mkdir()
        (folder / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
        (folder / "model.safetensors").write_bytes(b"gigabytes")
        fake_hub.publish("Wan-AI/Wan2.1", COMMIT, folder, "main")
        with pytest.raises(CheckpointError, match=r"holds no VAE: no folder vae, no Wan2\.1_VAE\.pth"):
            load_model("showo2-shapes", vae="Wan-AI/Wan2.1")
        assert fake_hub.fetched == ["config.json"]

    def test_what_is_no_hub_id_of_a_vae(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "wan" / "vae").mkdir(parents=True)
        vae = SpaceToDepth(4)
        for given in ("wan/vae", "vae.pth", tmp_path, vae):
            assert origins.fetched_vae(given) == (given, None)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TestOrigins:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_weight_file_with_its_hash(
        self, tmp_path: Path, llm: Path, network: Showo2, layout: str
    ) -> None:
        folder = _publish(tmp_path / "m", network, llm, LAYOUTS[layout])
        (folder / "training_args.bin").write_bytes(b"not read")
        origin = load_model(folder).origins["model"]
        read = [p for p in folder.iterdir() if p.suffix in (".bin", ".safetensors")]
        expected = {p.name: _sha256(p) for p in read if p.name != "training_args.bin"}
        expected["config.json"] = _sha256(folder / "config.json")
        assert origin.files is not None
        assert {name: entry.sha256 for name, entry in origin.files.items()} == expected
        assert (origin.repository, origin.revision, origin.license) == (None, None, None)

    def test_own_layout_and_objects(self, tmp_path: Path) -> None:
        network, tokenizer = _network(_config(latent_channels=48)), vocabulary.extend(_base_tokenizer())
        save_model(tmp_path, network, tokenizer, SpaceToDepth(4))
        loaded = load_model(tmp_path)
        read = {name: file_entry(tmp_path / name) for name in ("model.safetensors", "config.json")}
        assert loaded.origins == {"model": Origin(read)}
        given = load_model(network, tokenizer=tokenizer, vae=SpaceToDepth(4))
        assert given.origins == {"model": Origin(None), "vae": Origin(None)}

    @pytest.mark.parametrize(
        ("card", "settings", "license"),
        [
            ("---\nlanguage: en\nlicense: mit\n---\n# A model\n", {}, "mit"),
            ("\ufeff---\r\nlicense: apache-2.0\r\n---\r\n", {"license": "mit"}, "apache-2.0"),
            ("---\nlicense: other\nlicense_name: qwen-research\n---\n", {}, "qwen-research"),
            ("---\nlicense: other\n---\n", {}, "other"),
            ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", {}, "mit, cc-by-4.0"),
            ("---\ntags: []\n---\n", {"license": "mit"}, "mit"),
            ("# license: mit\n", {}, None),
            ("---\nlicense: 5\n---\n", {"license": {}}, None),
            (None, {"license": "mit"}, "mit"),
            (None, {}, None),
        ],
    )
    def test_license(
        self,
        tmp_path: Path,
        llm: Path,
        network: Showo2,
        card: str | None,
        settings: dict[str, Any],
        license: str | None,
    ) -> None:
        folder = _publish(tmp_path / "m", network, llm, **settings)
        if card is not None:
            (folder / "README.md").write_bytes(card.encode())
        assert load_model(folder).origins["model"].license == license

    @pytest.mark.parametrize(
        "card",
        [
            b"---\nlicense: [\n---\n",
            b"---\n- a list\n---\n",
            b"---\nlicense: \xff\n---\n",
            b"---\nlicense: " + b"[" * 5000 + b"\n---\n",
            b"---\nlicense: mit\n---\n" + bytes(1 << 21),
        ],
        ids=["broken", "list", "not UTF-8", "deep", "large"],
    )
    def test_a_card_that_cannot_be_read_is_logged(
        self, tmp_path: Path, llm: Path, network: Showo2, card: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = _publish(tmp_path / "m", network, llm)
        (folder / "README.md").write_bytes(card)
        assert load_model(folder).origins["model"].license is None
        assert "No licence is recorded" in caplog.text


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
    settings = _constructor_arguments(expected, "Qwen/Qwen2.5-1.5B-Instruct")
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


def _flip(path: Path) -> None:
    """Write another last byte, of a tensor, in place."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def _exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    _flip(other)
    other.replace(path)


class TestChangedFiles:
    @pytest.mark.parametrize("change", [_flip, _exchange])
    @pytest.mark.parametrize("layout", ["one bin", "one safetensors", "safetensors shards"])
    def test_while_they_are_read(
        self,
        tmp_path: Path,
        llm: Path,
        network: Showo2,
        layout: str,
        change: Callable[[Path], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Before they are read: hashes taken later would be of what was read; and between two shards."""
        folder = _publish(tmp_path / "m", network, llm, LAYOUTS[layout])
        read = weights.read_weight_file

        def changed(path: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
            change(path)
            return read(path, dtype)

        monkeypatch.setattr(weights, "read_weight_file", changed)
        with pytest.raises(CheckpointError, match="was replaced or written to while the model was in use"):
            load_model(folder)

    @pytest.mark.parametrize("change", [_flip, _exchange, Path.unlink])
    def test_after_they_were_read(
        self, tmp_path: Path, llm: Path, network: Showo2, change: Callable[[Path], None]
    ) -> None:
        loaded = load_model(_publish(tmp_path / "m", network, llm, LAYOUTS["safetensors shards"]))
        (tmp_path / "backup").hardlink_to(loaded.sources[1].path)
        loaded.check_unchanged()
        assert len(loaded.sources) == 3 + 1  # the settings
        change(loaded.sources[1].path)
        with pytest.raises(CheckpointError, match=r"00002-of-00003.* was replaced or written to"):
            loaded.check_unchanged()

    def test_a_vae_given_by_its_path(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        """It is read once; its files are watched like the model's."""
        path = tmp_path / "vae.pth"
        torch.save({"a": torch.ones(3)}, path)
        (file,) = origins.vae_files(path)
        assert origins.vae_origin(path, (file,)).files == {"vae.pth": file_entry(path)}
        _flip(path)
        assert not file.is_unchanged()
        with pytest.raises(CheckpointError, match=r"Weight file .* does not exist"):
            origins.vae_files(tmp_path / "none.pth")
