"""Show-o2 against data made by the published code, and against a second implementation where there is none."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashu_compile.models.showo2.config import (
    HeadConfig,
    LLMConfig,
    SemanticConfig,
    Showo2Config,
    configuration,
)
from flashu_compile.models.showo2.layout import row_positions
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reference import GenerationReference, UnderstandingReference, generate
from tests.support.oracle import ORACLES, Oracle, load_oracle, relative_error
from tests.support.plain_showo2 import PlainShowo2

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return load_oracle(request.param)


def _both(noise: Tensor) -> Tensor:
    return noise.expand(2, -1, -1, -1)


def _close(value: Tensor, expected: Tensor) -> None:
    assert value.shape == expected.shape
    assert relative_error(value, expected) <= TOLERANCE


class TestOracle:
    def test_velocity(self, oracle: Oracle) -> None:
        reference = GenerationReference(oracle.model, oracle.text, oracle.offsets)
        step = reference.step(_both(oracle.tensors["noise"]), torch.full((2,), 0.3))
        for value, expected in zip(step.velocity, oracle.tensors["velocity_t0.3"], strict=True):
            _close(value, expected)

    def test_sampling(self, oracle: Oracle) -> None:
        trajectory = generate(
            oracle.model,
            oracle.text,
            oracle.offsets,
            oracle.tensors["noise"],
            points=oracle.geometry["baseline_points"],
            guidance_scale=oracle.geometry["guidance_scale"],
            shift=3.0,
        )
        _close(trajectory.latents, oracle.tensors["baseline_final"])
        expected = oracle.tensors["baseline_velocities"]
        assert len(trajectory.velocities) == len(expected) == oracle.geometry["baseline_points"] - 1
        for value, row in zip(trajectory.velocities, expected, strict=True):
            _close(value, row)

    def test_image_embeddings(self, oracle: Oracle) -> None:
        understanding = UnderstandingReference(oracle.model, oracle.tensors["mmu_latents"])
        _close(understanding.image, oracle.tensors["image_embeds"])

    def test_logits(self, oracle: Oracle) -> None:
        understanding = UnderstandingReference(oracle.model, oracle.tensors["mmu_latents"])
        _close(understanding.logits(oracle.prefix, oracle.suffix)[:, -1], oracle.tensors["mmu_logits_last"])

    def test_greedy_tokens(self, oracle: Oracle) -> None:
        understanding = UnderstandingReference(oracle.model, oracle.tensors["mmu_latents"])
        expected = oracle.tensors["mmu_greedy_tokens"][0].tolist()
        assert understanding.greedy(oracle.prefix, oracle.suffix, len(expected), stop=None) == expected
        before = expected[: expected.index(expected[3])]
        assert understanding.greedy(oracle.prefix, oracle.suffix, 50, stop=expected[3]) == before

    def test_understanding_span_starts_one_row_late(self, oracle: Oracle) -> None:
        # Were both starts to agree, the oracle could not tell them apart.
        model = oracle.model
        proper = Showo2(dataclasses.replace(model.config, understanding_span_start="time"))
        proper.load_state_dict(model.state_dict())
        logits = UnderstandingReference(proper.eval(), oracle.tensors["mmu_latents"]).logits(
            oracle.prefix, oracle.suffix
        )
        assert relative_error(logits[:, -1], oracle.tensors["mmu_logits_last"]) > 100 * TOLERANCE

    def test_second_implementation(self, oracle: Oracle) -> None:
        plain = PlainShowo2(oracle.model.state_dict(), oracle.model.config)
        for row, expected in enumerate(oracle.tensors["velocity_t0.3"]):
            ids, offset = oracle.text[row].tolist(), int(oracle.offsets[row])
            _close(plain.velocity(ids, offset, oracle.tensors["noise"][0], 0.3), expected)
        logits = plain.last_logits(
            oracle.prefix[0].tolist(), oracle.suffix[0].tolist(), oracle.tensors["mmu_latents"][0]
        )
        _close(logits, oracle.tensors["mmu_logits_last"][0])


class TestAlignedLayout:
    """Padding on the left, so that the span of every row of a batch starts at the same place."""

    def _step(self, oracle: Oracle, pad: int, end_rows: int | None) -> tuple[Tensor, Tensor]:
        """Velocity at t = 0.3 with `pad` needless rows on the left; logits of each row's last end row."""
        model, config = oracle.model, oracle.model.config
        prompt_rows = int(oracle.offsets.max()) + pad
        rows, valid = [], []
        for ids, offset in zip(oracle.text, oracle.offsets.tolist(), strict=True):
            tail = ids[offset + config.span_length :][:end_rows]
            fill = torch.full((prompt_rows - offset,), 7)  # any id: nobody may see it
            rows.append(torch.cat([fill, ids[:offset], ids[offset : offset + config.span_length], tail]))
            shown = torch.ones(len(rows[-1]), dtype=torch.bool)
            shown[: len(fill)] = False
            valid.append(shown)
        length = min(len(row) for row in rows)
        text, shown = torch.stack([r[:length] for r in rows]), torch.stack([v[:length] for v in valid])
        span = torch.zeros_like(shown)
        span[:, prompt_rows : prompt_rows + config.span_length] = True
        with torch.inference_mode():
            tables = model.tables(span, row_positions(shown), shown)
            time, time_row = model.embed_time(torch.full((2,), 0.3))
            image = model.embed_image(_both(oracle.tensors["noise"]))
            assert time_row is not None
            embedded = model.embed_text(text)
            embedded[:, prompt_rows : prompt_rows + config.span_length] = torch.cat([time_row, image], dim=1)
            hidden = model.llm(embedded, tables)
            features = model.head(hidden, time, tables)
            first = prompt_rows + config.span_length - config.image_tokens
            velocity = model.velocity(features[:, first : first + config.image_tokens], time)
        return velocity, hidden

    @pytest.mark.parametrize("pad", [0, 5])
    def test_velocity_equals_the_published_layouts(self, oracle: Oracle, pad: int) -> None:
        velocity, hidden = self._step(oracle, pad, None)
        assert hidden.isfinite().all()
        for value, expected in zip(velocity, oracle.tensors["velocity_t0.3"], strict=True):
            _close(value, expected)

    def test_rows_after_the_picture_do_not_matter(self, oracle: Oracle) -> None:
        velocity, _ = self._step(oracle, 0, 0)
        for value, expected in zip(velocity, oracle.tensors["velocity_t0.3"], strict=True):
            _close(value, expected)


def _small_config(**changes: object) -> Showo2Config:
    parts: dict[str, object] = {
        "llm": LLMConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        "semantic": SemanticConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
        ),
        "head": HeadConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
        ),
        "latent_channels": 5,
        "latent_grid": 3,
        "position_grid": 3,
        "sequence_length": 24,
    }
    return Showo2Config(**{**parts, **changes})  # type: ignore[arg-type]


_UNBRIDGED = HeadConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
_VARIANTS: dict[str, dict[str, object]] = {
    "as published": {},
    "no time token": {"add_time_embeds": False},
    "no bridge": {"head": _UNBRIDGED},
    "no time token, no bridge": {"add_time_embeds": False, "head": _UNBRIDGED},
    "higher resolution": {"latent_grid": 5, "sequence_length": 40},
    "lower resolution": {"latent_grid": 2},
    "not square": {"latent_grid": 2, "latent_columns": 5, "sequence_length": 30},
    "patches of one": {"patch_size": 1},
    "understanding span on the time token": {"understanding_span_start": "time"},
}


class TestVariants:
    @pytest.fixture(params=_VARIANTS)
    def model(self, request: pytest.FixtureRequest) -> Showo2:
        torch.manual_seed(0)
        model = Showo2(_small_config(**_VARIANTS[request.param])).eval()
        for parameter in model.parameters():  # norms and biases too, so that none can be left out
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    def test_velocity(self, model: Showo2) -> None:
        config, plain = model.config, PlainShowo2(model.state_dict(), model.config)
        text = torch.randint(0, 50, (2, config.sequence_length))
        offsets = torch.tensor([6, 2])
        latents, t = torch.randn(2, *config.latent_shape), torch.tensor([0.3, 0.8])
        step = GenerationReference(model, text, offsets).step(latents, t)
        for row in range(2):
            expected = plain.velocity(text[row].tolist(), int(offsets[row]), latents[row], t[row].item())
            _close(step.velocity[row], expected)

    def test_logits(self, model: Showo2) -> None:
        prefix, suffix = torch.randint(0, 50, (1, 4)), torch.randint(0, 50, (1, 6))
        latents = torch.randn(1, *model.config.latent_shape)
        logits = UnderstandingReference(model, latents).logits(prefix, suffix)
        plain = PlainShowo2(model.state_dict(), model.config)
        _close(logits[0, -1], plain.last_logits(prefix[0].tolist(), suffix[0].tolist(), latents[0]))


class TestPositionTable:
    def test_equal_size_is_the_table_itself(self) -> None:
        model = Showo2(_small_config())
        table = model.position_embedding.weight
        assert torch.equal(model._positions(6, 6), table)
        # And so it would be if it were interpolated, which the published code always does.
        grid = table.detach().T.reshape(1, 24, 3, 3)
        same = F.interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False)
        assert torch.equal(same, grid)

    @pytest.mark.parametrize("target", [(2, 2), (4, 4), (7, 7), (2, 5)])
    def test_other_size_is_bicubic(self, target: tuple[int, int]) -> None:
        model = Showo2(_small_config())
        table = model.position_embedding.weight.detach()
        expected = F.interpolate(
            table.unflatten(0, (3, 3)).permute(2, 0, 1)[None],
            size=target,
            mode="bicubic",
            align_corners=False,
            antialias=False,
        )
        found = model._positions(2 * target[0], 2 * target[1]).detach()
        torch.testing.assert_close(found, expected[0].permute(1, 2, 0).flatten(0, 1))

    def test_published_high_resolution(self) -> None:
        config = configuration("show-o2-1.5B-HQ")
        assert (config.position_grid, config.latent_grid, config.image_tokens) == (27, 32, 1024)
        assert config.latent_shape == (16, 64, 64)


def _published_shapes(hidden: int, heads: int, kv_heads: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, `#` standing for a layer's index."""
    kv, wide, image, semantic_ffn, head_ffn = hidden // heads * kv_heads, 2048, 1152, 4304, 8192
    shapes: dict[str, tuple[int, ...]] = {
        "showo.model.embed_tokens.weight": (151669, hidden),
        "showo.model.norm.weight": (hidden,),
        "showo.lm_head.weight": (151669, hidden),
        "image_embedder_und.proj.weight": (image, 16, 2, 2),
        "image_embedder_und.proj.bias": (image,),
        "image_embedder_gen.proj.weight": (hidden, 16, 2, 2),
        "image_embedder_gen.proj.bias": (hidden,),
        "position_embedding.weight": (729, image),
        "fusion_proj.0.weight": (image + hidden,),
    }
    linears = {
        "fusion_proj.1": (hidden, image + hidden),
        "fusion_proj.3": (hidden, hidden),
        "time_embed.mlp.0": (wide, 256),
        "time_embed.mlp.2": (wide, wide),
        "time_embed_proj": (hidden, wide),
        "diff_proj.0": (wide, hidden),
        "diff_proj.2": (wide, wide),
        "diffusion_head_a.#.adaLN_modulation.1": (6 * wide, wide),
        "diffusion_head_b.adaLN_modulation.1": (2 * wide, wide),
        "diffusion_head_b.linear": (2 * 2 * 16, wide),
        "showo.model.layers.#.self_attn.q_proj": (hidden, hidden),
        "showo.model.layers.#.self_attn.k_proj": (kv, hidden),
        "showo.model.layers.#.self_attn.v_proj": (kv, hidden),
        "und_trans.layers.#.mlp.fc1": (semantic_ffn, image),
        "und_trans.layers.#.mlp.fc2": (image, semantic_ffn),
    }
    linears |= {f"und_trans.layers.#.self_attn.{p}_proj": (image, image) for p in ("q", "k", "v", "out")}
    unbiased = {
        "showo.model.layers.#.self_attn.o_proj": (hidden, hidden),
        "showo.model.layers.#.mlp.gate_proj": (ffn, hidden),
        "showo.model.layers.#.mlp.up_proj": (ffn, hidden),
        "showo.model.layers.#.mlp.down_proj": (hidden, ffn),
        "diffusion_head_a.#.self_attn.q_proj": (wide, wide),
        "diffusion_head_a.#.self_attn.k_proj": (512, wide),
        "diffusion_head_a.#.self_attn.v_proj": (512, wide),
        "diffusion_head_a.#.self_attn.o_proj": (wide, wide),
        "diffusion_head_a.#.mlp.gate_proj": (head_ffn, wide),
        "diffusion_head_a.#.mlp.up_proj": (head_ffn, wide),
        "diffusion_head_a.#.mlp.down_proj": (wide, head_ffn),
    }
    shapes |= {f"{name}.weight": shape for name, shape in (linears | unbiased).items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"showo.model.layers.#.{norm}.weight"] = (hidden,)
        shapes[f"diffusion_head_a.#.{norm}.weight"] = (wide,)
    for norm in ("layer_norm1", "layer_norm2"):
        shapes |= {f"und_trans.layers.#.{norm}.{part}": (image,) for part in ("weight", "bias")}
    shapes |= {f"diffusion_head_a.#.self_attn.{part}_norm.weight": (64,) for part in "qk"}
    shapes["diffusion_head_b.norm_final.weight"] = (wide,)
    return shapes


@pytest.mark.parametrize(
    ("name", "sizes", "tied"),
    [
        ("show-o2-1.5B", (1536, 12, 2, 8960), True),
        ("show-o2-1.5B-HQ", (1536, 12, 2, 8960), True),
        ("show-o2-7B", (3584, 28, 4, 18944), False),
    ],
)
def test_published_names_and_shapes(name: str, sizes: tuple[int, int, int, int], tied: bool) -> None:
    with torch.device("meta"):
        model = Showo2(configuration(name))
    layers = {"showo.model.layers.": 28, "und_trans.layers.": 26, "diffusion_head_a.": 10}
    expected = {}
    for template, shape in _published_shapes(*sizes).items():
        count = next((n for stack, n in layers.items() if template.startswith(stack)), 1)
        expected |= {template.replace("#", str(index)): shape for index in range(count)}
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == expected
    assert (model.showo.lm_head.weight is model.showo.model.embed_tokens.weight) is tied
    assert not [key for key in found if re.search(r"inv_freq|position_ids", key)]
