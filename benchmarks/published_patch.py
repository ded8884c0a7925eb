"""The published acceleration in eager PyTorch: the patched model that compiled engines are compared with.

Like the authors' code it patches layers in place: FFNs with fewer neurons, layers that are left out, a diffusion head
whose features are kept for some steps. It runs what that code runs: every row of the padded sequence, both branches
from the patch embedders on, the language model on every step and vocabulary logits. It does not rank layers; they are
given.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reference import GenerationReference, place_span, time_grid
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.tasks import REUSE


class PublishedPatch:
    """`kept`: the neurons of each LLM layer on steps that are not full; `skipped`: the layers left out, by step.

    `full`: the number of steps, at the end, that run everything.
    """

    def __init__(
        self,
        model: Showo2,
        plan: StepPlan,
        kept: Mapping[int, Sequence[int]],
        skipped: Mapping[int, Sequence[int]],
        full: int,
    ) -> None:
        self.model, self.plan, self.skipped, self.full = model, plan, skipped, full
        self._whole = [layer.mlp for layer in model.showo.model.layers]
        self._pruned = [_narrow(mlp, kept[i]) for i, mlp in enumerate(self._whole)]

    @torch.inference_mode()
    def run(self, text: Tensor, offsets: Tensor, noise: Tensor) -> Tensor:
        """Final latents [1, c, h, w]; arguments as of the reference loop."""
        model, plan = self.model, self.plan
        sequence = GenerationReference(model, text, offsets)
        times = time_grid(plan.points, plan.time_shift).tolist()
        latents, features = noise, None
        try:
            for index, (t, following) in enumerate(itertools.pairwise(times)):
                step, planned = index + 1, plan.steps[index]
                full = step > len(plan.steps) - self.full
                self._use(self._whole if full else self._pruned)
                hidden, time = self._llm(sequence, latents, t, [] if full else self.skipped[step])
                if planned.engine != REUSE:
                    features = self._features(sequence, hidden, time)
                assert features is not None
                model.logits(hidden)
                conditional, unconditional = model.velocity(features, time).to(latents)
                latents = latents + (following - t) * (
                    unconditional + planned.guidance_scale * (conditional - unconditional)
                )
        finally:
            self._use(self._whole)
        return latents

    def _use(self, mlps: Sequence[nn.Module]) -> None:
        for layer, mlp in zip(self.model.showo.model.layers, mlps, strict=True):
            layer.mlp = mlp

    def _llm(
        self, sequence: GenerationReference, latents: Tensor, t: float, skipped: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        model = self.model
        time, time_row = model.embed_time(torch.full((2,), t, dtype=latents.dtype, device=latents.device))
        image = model.embed_image(latents.expand(2, -1, -1, -1))
        span = image if time_row is None else torch.cat([time_row, image], dim=1)
        rows = place_span(sequence.text, span, sequence.offsets)
        for index, layer in enumerate(model.showo.model.layers):
            if index not in skipped:
                tables = sequence.tables
                rows = layer(rows, attention_mask=tables.mask, position_embeddings=tables.llm_rotary)
        return model.showo.model.norm(rows), time

    def _features(self, sequence: GenerationReference, hidden: Tensor, time: Tensor) -> Tensor:
        features = self.model.head(hidden, time, sequence.tables)
        tokens = self.model.config.image_tokens
        ends = [offset + self.model.config.span_length for offset in sequence.offsets]
        return torch.stack([f[end - tokens : end] for f, end in zip(features, ends, strict=True)])


def _narrow(mlp: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The FFN with these neurons alone."""
    neurons = torch.as_tensor(np.asarray(kept), device=next(mlp.parameters()).device)
    narrow = type(mlp).__new__(type(mlp))
    nn.Module.__init__(narrow)
    narrow.act_fn = mlp.act_fn
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        whole = getattr(mlp, name)
        weight = whole.weight.index_select(dim, neurons).contiguous()
        linear = type(whole)(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        setattr(narrow, name, linear)
    return narrow
