"""Pixels to latents and back: space-to-depth, and the Wan VAE against diffusers itself."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.showo2_shapes.saving import save_model, save_wan
from flashu_compile.errors import CheckpointError, ConfigurationError, MissingDependencyError
from flashu_compile.models.loading import load_model
from flashu_compile.models.vae import LatentCodec, SpaceToDepth
from flashu_compile.models.wan_vae import WanVAE
from tests.support.oracle import load_oracle
from tests.support.tiny import tiny_model, tokenizer

diffusers = pytest.importorskip("diffusers", reason="needs the extra `wan`")

# The published normalisation (mean, std per channel), written out once more on purpose.
MEAN = (
    "-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 "
    "0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 -0.2921"
)
STD = (
    "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 "
    "3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"
)
BASE = 4


@pytest.fixture(scope="module")
def autoencoder() -> nn.Module:
    """The published architecture, narrow, with random weights everywhere (norms and biases too)."""
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKLWan(base_dim=BASE).eval()
    for name, parameter in autoencoder.named_parameters():
        # Small but for the norms; larger weights would drive every decoded pixel into the clamp.
        nn.init.normal_(parameter, mean=float("gamma" in name), std=0.1)
    return autoencoder


@pytest.fixture(scope="module")
def vae(autoencoder: nn.Module) -> WanVAE:
    return WanVAE(autoencoder)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(2))


def _constants(text: str) -> Tensor:
    return torch.tensor([float(number) for number in text.split()]).view(1, -1, 1, 1)


class TestSpaceToDepth:
    def test_round_trip(self, pixels: Tensor) -> None:
        vae: LatentCodec = SpaceToDepth(4, mean=0.78, std=0.39)
        latents = vae.encode(pixels)
        assert latents.shape == (2, 48, 8, 12)
        assert (vae.spatial_factor, vae.latent_channels) == (4, 48)
        torch.testing.assert_close(vae.decode(latents), pixels)

    def test_one_square_becomes_one_position(self) -> None:
        pixels = torch.zeros(1, 3, 4, 4)
        pixels[0, 1, 2, 3] = 1.0
        latents = SpaceToDepth(2, mean=0.5, std=2.0).encode(pixels)
        lit = torch.full((1, 12, 2, 2), -0.25)
        lit[0, 4 * 1 + 1, 1, 1] = 0.25
        assert torch.equal(latents, lit)


class TestWan:
    @torch.inference_mode()
    def test_encode_is_diffusers_posterior_mean(
        self, autoencoder: nn.Module, vae: WanVAE, pixels: Tensor
    ) -> None:
        posterior = autoencoder.encode(pixels[:, :, None]).latent_dist
        expected = (posterior.mode()[:, :, 0] - _constants(MEAN)) / _constants(STD)
        assert torch.equal(vae.encode(pixels), expected)
        assert expected.shape == (2, vae.latent_channels, 32 // vae.spatial_factor, 48 // vae.spatial_factor)
        assert expected.std() > 0.01

    @torch.inference_mode()
    def test_decode_is_diffusers(self, autoencoder: nn.Module, vae: WanVAE, latents: Tensor) -> None:
        raw = latents * _constants(STD) + _constants(MEAN)
        expected = autoencoder.decode(raw[:, :, None]).sample[:, :, 0]
        assert torch.equal(vae.decode(latents), expected)
        assert expected.shape == (2, 3, 32, 48)
        assert expected.std() > 0.01

    @torch.inference_mode()
    def test_pixels_are_clamped(self, vae: WanVAE, latents: Tensor) -> None:
        decoded = vae.decode(latents * 1e4)
        assert decoded.abs().max() == 1.0

    @torch.inference_mode()
    def test_batches_are_independent(self, vae: WanVAE, latents: Tensor) -> None:
        torch.testing.assert_close(vae.decode(latents)[1:], vae.decode(latents[1:]))

    @pytest.mark.parametrize("direction", ["encode", "decode"])
    def test_export_with_dynamic_batch(
        self, vae: WanVAE, pixels: Tensor, latents: Tensor, direction: str
    ) -> None:
        class Engine(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vae = vae

            def forward(self, x: Tensor) -> Tensor:
                return getattr(self.vae, direction)(x)

        sample = pixels if direction == "encode" else latents
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(Engine(), (sample,), strict=False, dynamic_shapes=({0: batch},))
        for size in (1, 2, 3):
            x = sample[:1].expand(size, -1, -1, -1).contiguous()
            with torch.inference_mode():
                torch.testing.assert_close(program.module()(x), Engine()(x))
        # Nothing of time remains: neither feature caches nor the convolutions along it.
        used = {spec.target for spec in program.graph_signature.input_specs if spec.target}
        weights = [name for name, node in _parameter_nodes(program).items() if node.users and name in used]
        assert weights
        assert not [name for name in weights if "time_conv" in name]

    def test_shares_weights_and_leaves_gradients_off(self, autoencoder: nn.Module, vae: WanVAE) -> None:
        assert vae.encoder is autoencoder.encoder
        assert not any(parameter.requires_grad for parameter in vae.parameters())
        assert not vae.training

    def test_wan_2_2_is_refused(self) -> None:
        other = diffusers.AutoencoderKLWan(
            base_dim=BASE, is_residual=True, patch_size=2, in_channels=12, out_channels=12
        )
        with pytest.raises(ConfigurationError, match=r"Wan 2\.2"):
            WanVAE(other)


def _parameter_nodes(program: torch.export.ExportedProgram) -> dict[str, torch.fx.Node]:
    signature = program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers
    return {names[n.name]: n for n in program.graph.nodes if n.op == "placeholder" and n.name in names}


def _original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers' under the names of the original release (two residual blocks a level)."""
    direct = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    for part in ("encoder", "decoder"):
        direct |= {f"{part}.conv_in": f"{part}.conv1", f"{part}.norm_out": f"{part}.head.0"}
        direct |= {f"{part}.conv_out": f"{part}.head.2", f"{part}.mid_block.attentions.0": f"{part}.middle.1"}
        direct |= {f"{part}.mid_block.resnets.{i}": f"{part}.middle.{2 * i}" for i in (0, 1)}
    direct |= {f"encoder.down_blocks.{i}": f"encoder.downsamples.{i}" for i in range(11)}
    for level in range(4):
        blocks = {f"resnets.{i}": i for i in range(3)} | {"upsamplers.0": 3}
        direct |= {
            f"decoder.up_blocks.{level}.{name}": f"decoder.upsamples.{4 * level + i}"
            for name, i in blocks.items()
        }
    inner = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    inner |= {"conv_shortcut": "shortcut"}
    renamed = {}
    for name, value in state.items():
        module = max((m for m in direct if name.startswith(f"{m}.")), key=len)
        rest = name.removeprefix(f"{module}.")
        first, _, last = rest.partition(".")
        renamed[f"{direct[module]}.{inner.get(first, first)}" + (f".{last}" if last else "")] = value
    return renamed


class TestWanFiles:
    def test_diffusers_folder(self, tmp_path: Path, autoencoder: nn.Module, latents: Tensor) -> None:
        autoencoder.save_pretrained(tmp_path)
        loaded = WanVAE.load(tmp_path)
        assert torch.equal(loaded.decode(latents), WanVAE(autoencoder).decode(latents))
        assert WanVAE.load(tmp_path, torch.bfloat16).decode(latents).dtype == torch.bfloat16

    def test_diffusers_folder_of_pickles(
        self, tmp_path: Path, autoencoder: nn.Module, latents: Tensor
    ) -> None:
        autoencoder.save_pretrained(tmp_path, safe_serialization=False)
        assert not list(tmp_path.glob("*.safetensors"))
        assert torch.equal(WanVAE.load(tmp_path).decode(latents), WanVAE(autoencoder).decode(latents))

    def test_original_file(
        self, tmp_path: Path, autoencoder: nn.Module, pixels: Tensor, latents: Tensor
    ) -> None:
        original = _original_names(autoencoder.state_dict())
        assert "decoder.upsamples.4.shortcut.weight" in original
        torch.save(original, tmp_path / "Wan2.1_VAE.pth")
        loaded = WanVAE.load(tmp_path / "Wan2.1_VAE.pth", config={"base_dim": BASE})
        expected = WanVAE(autoencoder)
        assert torch.equal(loaded.encode(pixels), expected.encode(pixels))
        assert torch.equal(loaded.decode(latents), expected.decode(latents))

    def test_original_file_has_the_published_sizes_by_default(
        self, tmp_path: Path, autoencoder: nn.Module
    ) -> None:
        torch.save(_original_names(autoencoder.state_dict()), tmp_path / "narrow.pth")
        with pytest.raises(CheckpointError, match="does not fit AutoencoderKLWan"):
            WanVAE.load(tmp_path / "narrow.pth")

    def test_missing_names_are_noticed(self, tmp_path: Path, autoencoder: nn.Module) -> None:
        original = _original_names(autoencoder.state_dict())
        del original["conv1.bias"]
        torch.save(original, tmp_path / "part.pth")
        with pytest.raises(CheckpointError, match=r"quant_conv\.bias"):
            WanVAE.load(tmp_path / "part.pth", config={"base_dim": BASE})

    def test_code_in_a_pickle_does_not_run(self, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> tuple:
                return os.system, (f"touch {tmp_path / 'evidence'}",)

        torch.save({"conv1.weight": Payload()}, tmp_path / "Wan2.1_VAE.pth")
        with pytest.raises(CheckpointError, match="could run code"):
            WanVAE.load(tmp_path / "Wan2.1_VAE.pth")
        assert not (tmp_path / "evidence").exists()

    def test_other_folders_and_files(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            WanVAE.load(tmp_path / "absent.pth")
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            WanVAE.load(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
        with pytest.raises(CheckpointError, match="is a AutoencoderKL, not an AutoencoderKLWan"):
            WanVAE.load(tmp_path)

    def test_save(self, tmp_path: Path, vae: WanVAE, latents: Tensor) -> None:
        save_wan(tmp_path / "a", vae)
        loaded = WanVAE.load(tmp_path / "a")
        save_wan(tmp_path / "b", loaded)
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert torch.equal(loaded.decode(latents), vae.decode(latents))
        again = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "a")
        assert torch.equal(WanVAE(again).decode(latents), vae.decode(latents))

    def test_with_a_model(self, tmp_path: Path, autoencoder: nn.Module, latents: Tensor) -> None:
        oracle, words = load_oracle("tiny"), tokenizer()
        expected = WanVAE(autoencoder).decode(latents)
        loaded = load_model(oracle.model, tokenizer=words, vae=autoencoder)
        save_model(tmp_path / "m", loaded.network, words, loaded.vae)
        vae = load_model(tmp_path / "m").vae
        assert isinstance(vae, WanVAE)
        assert torch.equal(vae.decode(latents), expected)
        autoencoder.save_pretrained(tmp_path / "vae")
        given = load_model(oracle.model, tokenizer=words, vae=str(tmp_path / "vae")).vae
        assert given is not None
        assert torch.equal(given.decode(latents), expected)

    def test_without_diffusers(
        self, tmp_path: Path, autoencoder: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        autoencoder.save_pretrained(tmp_path)
        torch.save(_original_names(autoencoder.state_dict()), tmp_path / "Wan2.1_VAE.pth")
        monkeypatch.setitem(sys.modules, "diffusers", None)
        for path in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
            with pytest.raises(MissingDependencyError, match=r"flashu-compile\[wan\]"):
                WanVAE.load(path)


def test_stored_half_precision_is_widened(tmp_path: Path, autoencoder: nn.Module) -> None:
    autoencoder.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    assert WanVAE.load(tmp_path, torch.float32).mean.dtype == torch.float32
    assert WanVAE.load(tmp_path).mean.dtype == torch.float16


class TestObjectsGiven:
    def test_an_autoencoder_is_copied_and_converted(self) -> None:
        given = diffusers.AutoencoderKLWan(base_dim=BASE).to(torch.bfloat16).train()
        loaded = load_model(tiny_model(latent_channels=16), tokenizer=tokenizer(), vae=given)
        assert isinstance(loaded.vae, WanVAE)
        assert {p.dtype for p in loaded.vae.parameters()} == {torch.float32}
        assert {p.dtype for p in given.parameters()} == {torch.bfloat16}
        assert given.training
        assert all(p.requires_grad for p in given.parameters())

    def test_a_codec_of_another_dtype_is_refused(self) -> None:
        codec = WanVAE(diffusers.AutoencoderKLWan(base_dim=BASE).to(torch.bfloat16))
        with pytest.raises(ConfigurationError, match=r"bfloat16.*float32"):
            load_model(tiny_model(latent_channels=16), tokenizer=tokenizer(), vae=codec)
