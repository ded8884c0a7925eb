"""Sizes of a Show-o2 model, as data. Named configurations are the published checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from flashu_compile import reading
from flashu_compile.errors import ConfigurationError
from flashu_compile.reading import Few, Positive, Size

SpanStart = Literal["time", "image"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """The Qwen2 language model (names as in `transformers.Qwen2Config`)."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Few
    num_attention_heads: Few
    num_key_value_heads: Few
    rope_theta: Positive = 1e6
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """The SigLIP encoder over image latents (`und_trans`)."""

    hidden_size: Size = 1152
    intermediate_size: Size = 4304
    num_hidden_layers: Few = 26
    num_attention_heads: Few = 16
    layer_norm_eps: Positive = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The flow-matching diffusion head."""

    hidden_size: Size = 2048
    intermediate_size: Size = 8192
    num_hidden_layers: Few = 10
    num_attention_heads: Few = 32
    num_key_value_heads: Few = 8
    rms_norm_eps: Positive = 1e-5
    qk_norm_eps: Positive = 1e-6
    final_norm_eps: Positive = 1e-6
    rope_theta: Positive = 5e5
    frequency_embedding_size: Size = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Showo2Config:
    """Everything that fixes the shape and the numbers of a Show-o2 model.

    `latent_grid` is the number of rows of image tokens that a picture is drawn with, `latent_columns` that of its
    columns (None: as many); `position_grid` the side of the learnt position table, which is interpolated for other
    pictures. Questions are asked about pictures of `position_grid` tokens a side, whatever is drawn.
    `sequence_length` is the padded length of the published generation step. `accelerated_guidance_scale` is the s0 of
    recipes that are `as_published` and adapt it (None: `guidance_scale`).
    """

    llm: LLMConfig
    semantic: SemanticConfig = SemanticConfig()
    head: HeadConfig = HeadConfig()
    latent_channels: Few = 16
    patch_size: Few = 2
    latent_grid: Few = 27
    latent_columns: Few | None = None
    position_grid: Few = 27
    add_time_embeds: bool = True
    sequence_length: Size = 1024
    time_shift: Positive = 3.0
    # The authors' README draws with 7.5 and 50 points, their DPG-Bench script with 10.
    guidance_scale: Positive = 7.5
    accelerated_guidance_scale: Positive | None = None
    steps: Few = 50
    understanding_span_start: SpanStart = "image"

    def __post_init__(self) -> None:
        for name, part in (("llm", self.llm), ("semantic", self.semantic), ("head", self.head)):
            if part.hidden_size % part.num_attention_heads:
                raise ConfigurationError(
                    f"{name}.hidden_size {part.hidden_size} is not a multiple of its "
                    f"{part.num_attention_heads} attention heads; correct the configuration."
                )
        if self.sequence_length < self.span_length + 4:
            raise ConfigurationError(
                f"sequence_length {self.sequence_length} cannot hold {self.image_tokens} image tokens and the "
                f"special tokens around them; use at least {self.span_length + 4}."
            )

    @property
    def image_tokens(self) -> int:
        """The number of image tokens of a picture that is drawn."""
        return self.latent_grid * (self.latent_columns or self.latent_grid)

    @property
    def span_length(self) -> int:
        """Rows of the image span: the image tokens and, with `add_time_embeds`, the time token."""
        return self.image_tokens + int(self.add_time_embeds)

    @property
    def max_prompt_tokens(self) -> int:
        """Prompt tokens that fit beside bos, boi, the image span, eoi and eos."""
        return self.sequence_length - self.span_length - 4

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape [channels, height, width] of the latents of a picture that is drawn."""
        columns = self.latent_columns or self.latent_grid
        return (self.latent_channels, self.latent_grid * self.patch_size, columns * self.patch_size)

    @property
    def understanding_side(self) -> int:
        """The height and width of the latents of a picture that is asked about."""
        return self.position_grid * self.patch_size

    def at_grid(self, rows: int, columns: int) -> Showo2Config:
        """Return the configuration of the same model for pictures of `rows` × `columns` image tokens.

        Its sequence is padded by the published rule if it was, and else has as much room for text as before.
        """
        length = published_sequence(rows * columns)
        if self.sequence_length != published_sequence(self.image_tokens):
            length = self.sequence_length - self.image_tokens + rows * columns
        across = None if rows == columns else columns
        return dataclasses.replace(self, latent_grid=rows, latent_columns=across, sequence_length=length)

    def to_dict(self) -> dict[str, Any]:
        """Convert the configuration to nested dictionaries, which `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Showo2Config:
        """Build a configuration from `to_dict`'s result.

        Raises `ConfigurationError` on unknown or missing keys, and on values of another type or out of range.
        """
        return reading.convert(data, cls, "The model's configuration", ConfigurationError)


def published_sequence(image_tokens: int) -> int:
    """Return the length that the published scripts pad a sequence to: 251 prompt tokens, up to a multiple of 128."""
    rows = image_tokens + 1 + 4 + 251
    return -(-rows // 128) * 128


_QWEN_1_5B = LLMConfig(
    vocab_size=151669,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
)
_QWEN_7B = LLMConfig(
    vocab_size=151669,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)

PUBLISHED_ACCELERATED_SCALE = 10.0
_PUBLISHED = Showo2Config(llm=_QWEN_1_5B, accelerated_guidance_scale=PUBLISHED_ACCELERATED_SCALE)

CONFIGURATIONS: dict[str, Showo2Config] = {
    "show-o2-1.5B": _PUBLISHED,
    "show-o2-1.5B-HQ": dataclasses.replace(_PUBLISHED, latent_grid=32, sequence_length=1280),
    "show-o2-1.5B-HQ-1024": dataclasses.replace(_PUBLISHED, latent_grid=64, sequence_length=4352),
    "show-o2-7B": dataclasses.replace(_PUBLISHED, llm=_QWEN_7B),
}


def configuration(name: str) -> Showo2Config:
    """Return the configuration of a published checkpoint by name. Raises `ConfigurationError` on an unknown name."""
    try:
        return CONFIGURATIONS[name]
    except KeyError:
        known = ", ".join(CONFIGURATIONS)
        raise ConfigurationError(f"Unknown configuration {name!r}; known ones are: {known}.") from None
