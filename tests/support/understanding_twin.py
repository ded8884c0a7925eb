"""Understanding with pruned neurons, skipped layers and dropped image tokens: plain PyTorch, for comparing.

One published sequence `prefix, time, image, suffix`, recomputed in full for every answer token; what engines with
a key/value cache give must equal it. Decisions are plain numbers, lists and mappings, as in `flashu_twin`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flashu_compile.models.showo2.layers import at_least_float32
from flashu_compile.models.showo2.modeling import Showo2
from tests.support.flashu_twin import Kept, floor, pruned


class TwinAnswer(NamedTuple):
    """logits of the last row [1, vocab]; keep: the image tokens that stay [tokens].

    scores: what decided, the largest being dropped [tokens]; None where nothing is dropped or `keep` was given.
    decided: the LLM layer that decided, or None where nothing is dropped.
    """

    logits: Float[Tensor, "1 vocab"]
    keep: Bool[Tensor, " tokens"]
    scores: Float[Tensor, " tokens"] | None
    decided: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnderstandingTwin:
    """The understanding forward on a picture's latents.

    - kept: hidden neurons that stay.
    - skipped: LLM layers left out.
    - token_layer: the layer that decides which image tokens stay; it runs on all rows, later layers on those
      kept. If it is skipped, the next layer that runs decides; if none does, nothing is dropped.
    - token_ratio: share of the image tokens to drop, rounded down.
    - keep: the image tokens that stay, instead of those with the smallest values.

    Tokens with the largest L2 norm of their value vector (all key/value heads together) are dropped, on a tie
    the later one. Only image tokens are ever dropped, never text or the time row; rows keep their order and
    positions, and among themselves they see what they saw before.
    """

    model: Showo2
    kept: Kept = dataclasses.field(default_factory=dict)
    skipped: Collection[int] = ()
    token_layer: int = 2
    token_ratio: float = 0.0
    keep: Bool[Tensor, " tokens"] | None = None

    @torch.inference_mode()
    def image(self, latents: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 tokens hidden"]:
        """What enters the LLM for the picture, pruned neurons of the semantic layers left out."""
        with pruned(self.model, self.kept):
            return self.model.embed_image(latents)

    @torch.inference_mode()
    def last(
        self,
        image: Float[Tensor, "1 tokens hidden"],
        prefix: Int[Tensor, "1 prefix"],
        suffix: Int[Tensor, "1 suffix"],
    ) -> TwinAnswer:
        """The answer's first logits after `prefix, time, image, suffix`, `image` being what `image()` gives.

        Prefix ends on boi, suffix begins with eoi; answer tokens may follow in the suffix.
        """
        model, config = self.model, self.model.config
        time_row = model.embed_time(torch.ones(1, dtype=model.dtype))[1]
        time = [] if time_row is None else [time_row]
        rows = torch.cat([model.embed_text(prefix), *time, image, model.embed_text(suffix)], dim=1)
        first = prefix.shape[1] + len(time)
        start = first if config.understanding_span_start == "image" else prefix.shape[1]
        tables = model.published_tables(torch.tensor([start]), config.span_length, rows.shape[1])
        mask, (cos, sin) = tables.mask, tables.llm_rotary

        keep, scores, decided = torch.ones(config.image_tokens, dtype=torch.bool), None, None
        with pruned(model, self.kept):
            for index, layer in enumerate(model.showo.model.layers):
                if index in self.skipped:
                    continue
                decides = decided is None and index >= self.token_layer and self._drops()
                before = rows
                rows = layer(rows, attention_mask=mask, position_embeddings=(cos, sin))
                if not decides:
                    continue
                decided = index
                if self.keep is None:
                    values = layer.self_attn.v_proj(layer.input_layernorm(before))
                    scores = at_least_float32(values[0, first : first + config.image_tokens]).norm(dim=-1)
                    dropped = scores.argsort(stable=True).flip(0)[: floor(self.token_ratio * len(scores))]
                    keep[dropped] = False
                else:
                    keep = self.keep
                stay = torch.ones(rows.shape[1], dtype=torch.bool)
                stay[first : first + config.image_tokens] = keep
                rows, cos, sin = rows[:, stay], cos[:, stay], sin[:, stay]
                mask = mask[:, :, stay][:, :, :, stay]
            logits = model.logits(model.showo.model.norm(rows[:, -1]))
        return TwinAnswer(logits, keep, scores, decided)

    def greedy(
        self,
        image: Float[Tensor, "1 tokens hidden"],
        prefix: Int[Tensor, "1 prefix"],
        suffix: Int[Tensor, "1 suffix"],
        limit: int,
        stop: int | None = None,
    ) -> list[int]:
        """Up to `limit` greedy tokens, ending before `stop`; the question alone decides which tokens stay."""
        tokens: list[int] = []
        twin = dataclasses.replace(self, keep=self.last(image, prefix, suffix).keep)
        while len(tokens) < limit:
            answer = torch.tensor([tokens], dtype=suffix.dtype)
            token = int(twin.last(image, prefix, torch.cat([suffix, answer], dim=1)).logits.argmax())
            if token == stop:
                break
            tokens.append(token)
        return tokens

    def _drops(self) -> bool:
        if self.keep is not None:
            return not bool(self.keep.all())
        return floor(self.token_ratio * self.model.config.image_tokens) > 0
