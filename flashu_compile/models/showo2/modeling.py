"""Show-o2: a Qwen2 language model, SigLIP semantic layers and a diffusion head over image latents.

Source: "Show-o2: Improved Native Unified Multimodal Models" (arXiv 2506.15564). Weight-compatible with the
published checkpoints: their state dicts load with `strict=True`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.layers import (
    FinalLayer,
    HeadBlock,
    PatchEmbedding,
    RMSNorm,
    Rotary,
    TimeEmbedding,
    at_least_float32,
    head_rotary,
    rotary_tables,
)
from flashu_compile.models.showo2.layout import attention_mask, span_rows


class RowTables(NamedTuple):
    """What depends only on how rows are laid out: computed once per sequence, shared by every layer and step."""

    span: Bool[Tensor, "b rows"]
    mask: (
        Bool[Tensor, "b 1 rows rows"] | Float[Tensor, "b 1 rows rows"]
    )  # what is seen, or numbers to add to scores
    llm_rotary: Rotary
    head_rotary: Rotary


class Showo2(nn.Module):
    """The network. Latents are normalised VAE latents; t is in [0, 1] with 0 = noise and 1 = data."""

    def __init__(self, config: Showo2Config) -> None:
        super().__init__()
        self.config = config
        llm, semantic, head = config.llm, config.semantic, config.head
        self.showo = Qwen2ForCausalLM(_qwen2_config(config))
        self.image_embedder_und = PatchEmbedding(
            config.latent_channels, semantic.hidden_size, config.patch_size
        )
        self.image_embedder_gen = PatchEmbedding(config.latent_channels, llm.hidden_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.position_grid**2, semantic.hidden_size)
        self.und_trans = SiglipEncoder(_siglip_config(config))  # type: ignore[arg-type]  # its annotation is narrow
        self.fusion_proj = nn.Sequential(
            RMSNorm(semantic.hidden_size + llm.hidden_size, llm.rms_norm_eps),
            nn.Linear(semantic.hidden_size + llm.hidden_size, llm.hidden_size),
            nn.GELU(),
            nn.Linear(llm.hidden_size, llm.hidden_size),
        )
        self.time_embed = TimeEmbedding(head.hidden_size, head.frequency_embedding_size)
        self.bridged = llm.hidden_size != head.hidden_size
        if self.bridged:
            self.diff_proj = nn.Sequential(
                nn.Linear(llm.hidden_size, head.hidden_size),
                nn.GELU(),
                nn.Linear(head.hidden_size, head.hidden_size),
            )
            if config.add_time_embeds:
                self.time_embed_proj = nn.Linear(head.hidden_size, llm.hidden_size)
        self.diffusion_head_a = nn.ModuleList(HeadBlock(head) for _ in range(head.num_hidden_layers))
        self.diffusion_head_b = FinalLayer(
            head.hidden_size, config.patch_size, config.latent_channels, head.final_norm_eps
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.image_embedder_gen.proj.weight.dtype

    def embed_text(self, ids: Int[Tensor, "b rows"]) -> Float[Tensor, "b rows hidden"]:
        """Look up the embeddings of token ids."""
        return self.showo.model.embed_tokens(ids)

    def embed_image(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens hidden"]:
        """Embed latents [b, c, rows*patch, columns*patch] as image tokens for the LLM, in raster order."""
        latents = latents.to(self.dtype)
        semantic = self.image_embedder_und(latents) + self._positions(*latents.shape[2:])
        semantic = self.und_trans(inputs_embeds=semantic).last_hidden_state
        return self.fusion_proj(torch.cat([semantic, self.image_embedder_gen(latents)], dim=-1))

    def _positions(self, height: int, width: int) -> Float[Tensor, "tokens hidden"]:
        """Return the position table for latents of this height and width, interpolated if they are not its own."""
        source, patch = self.config.position_grid, self.config.patch_size
        target = (height // patch, width // patch)
        if target == (source, source):
            return self.position_embedding.weight
        table = self.position_embedding.weight.T.reshape(1, -1, source, source)
        table = F.interpolate(at_least_float32(table), size=target, mode="bicubic", align_corners=False)
        return table.flatten(2)[0].T.to(self.dtype)

    def embed_time(
        self, t: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b head_hidden"], Float[Tensor, "b one hidden"] | None]:
        """Embed t as (time features for the head's modulation, the time token for the LLM or None)."""
        features = self.time_embed(t)
        if not self.config.add_time_embeds:
            return features, None
        row = self.time_embed_proj(features) if self.bridged else features
        return features, row[:, None]

    def tables(
        self,
        span: Bool[Tensor, "b rows"],
        positions: Int[Tensor, "b rows"],
        valid: Bool[Tensor, "b rows"] | None = None,
    ) -> RowTables:
        """Compute the attention mask and the rotary tables of rows with these positions."""
        # Not transformers' own function, which some releases write as a product of matrices: what follows from one
        # position could not be told from what follows from another.
        llm_rotary = rotary_tables(positions, self.showo.model.rotary_emb.inv_freq, self.dtype)
        mask = attention_mask(span, valid)
        return RowTables(span, mask, llm_rotary, head_rotary(self.config.head, positions, self.dtype))

    def published_tables(self, offsets: Int[Tensor, " b"], length: int, rows: int) -> RowTables:
        """Compute the tables of the published layout: spans of `length` rows at `offsets`, positions 0 … rows-1."""
        positions = torch.arange(rows, device=offsets.device)[None].expand(len(offsets), -1)
        return self.tables(span_rows(offsets, length, rows), positions)

    def llm(self, rows: Float[Tensor, "b rows hidden"], tables: RowTables) -> Float[Tensor, "b rows hidden"]:
        """Apply the LLM's decoder layers and final norm."""
        for layer in self.showo.model.layers:
            rows = layer(rows, attention_mask=tables.mask, position_embeddings=tables.llm_rotary)
        return self.showo.model.norm(rows)

    def logits(self, hidden: Float[Tensor, "b rows hidden"]) -> Float[Tensor, "b rows vocab"]:
        """Apply the language model's output head."""
        return self.showo.lm_head(hidden)

    def head(
        self, hidden: Float[Tensor, "b rows hidden"], time: Float[Tensor, "b head_hidden"], tables: RowTables
    ) -> Float[Tensor, "b rows head_hidden"]:
        """Apply the diffusion head's transformer stack to all rows."""
        rows = self.diff_proj(hidden) if self.bridged else hidden
        for block in self.diffusion_head_a:
            rows = block(rows, time, tables.span, tables.head_rotary, tables.mask)
        return rows

    def velocity(
        self, image_rows: Float[Tensor, "b tokens head_hidden"], time: Float[Tensor, "b head_hidden"]
    ) -> Float[Tensor, "b c h w"]:
        """Project the head features of the image rows to the velocity.

        The published model writes token k's patch to the raster positions p²k … p²k+p²-1 of the latent, not
        to the p×p square it was read from; it was trained so.
        """
        channels, height, width = self.config.latent_shape
        patches = self.diffusion_head_b(image_rows, time)
        return (
            patches.reshape(patches.shape[0], -1, channels)
            .transpose(1, 2)
            .reshape(-1, channels, height, width)
        )


def _qwen2_config(config: Showo2Config) -> Qwen2Config:
    llm = config.llm
    return Qwen2Config(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_hidden_layers,
        num_attention_heads=llm.num_attention_heads,
        num_key_value_heads=llm.num_key_value_heads,
        rms_norm_eps=llm.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        tie_word_embeddings=llm.tie_word_embeddings,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by the base class
    )


def _siglip_config(config: Showo2Config) -> SiglipVisionConfig:
    semantic = config.semantic
    return SiglipVisionConfig(
        hidden_size=semantic.hidden_size,
        intermediate_size=semantic.intermediate_size,
        num_hidden_layers=semantic.num_hidden_layers,
        num_attention_heads=semantic.num_attention_heads,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=semantic.layer_norm_eps,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by the base class
    )
