"""Janus in eager PyTorch, drawing by the library's own loop."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.models.eager_lm import EagerDrawing, library_choices


class EagerJanus(EagerDrawing):
    """The model in eager PyTorch."""

    def library_codes(self, settings: DrawingSettings, scale: float, ids: Tensor, other: Tensor) -> Tensor:
        """Draw codes [codes] by the library's own loop, which makes guidance's other branch itself."""
        config = copy.deepcopy(self._network.generation_config)
        # The library forgets this entry of a file that it reads.
        config.generation_kwargs = {"boi_token_id": settings.unprompted.kept_ids[-1]}
        for name, value in {"guidance_scale": scale, **library_choices(settings)}.items():
            setattr(config, name, value)
        mask = torch.ones_like(ids)
        codes = self._network.generate(
            ids, attention_mask=mask, generation_config=config, generation_mode="image"
        )
        return codes[0]
