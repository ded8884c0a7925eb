"""Emu3 in eager PyTorch, by the library's own loops: asked about a picture whose size it is told, and drawing."""

from __future__ import annotations

import torch
from torch import Tensor

from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.models.eager_lm import EagerDrawing, library_choices
from flashu_compile.models.emu3_codes import ids_of_codes


class EagerEmu3(EagerDrawing):
    """The model in eager PyTorch; the library is told the size of a picture, and what may follow what is drawn."""

    def seen(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the pixels and their height and width."""
        return {"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[2:]])}

    def library_codes(self, settings: DrawingSettings, scale: float, ids: Tensor, other: Tensor) -> Tensor:
        """Draw codes [codes] by the library's own loop, by the rules of its documentation."""
        *codes, end = ids_of_codes(self._network).tolist()
        rows, columns = settings.grid
        count = rows * (columns + 1)

        def allowed(_: int, given: Tensor) -> list[int]:
            return [end] if (len(given) - ids.shape[1] + 1) % (columns + 1) == 0 else codes

        said = self._network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            negative_prompt_ids=other,
            negative_prompt_attention_mask=torch.ones_like(other),
            guidance_scale=scale,
            prefix_allowed_tokens_fn=allowed,
            **library_choices(settings),
            min_new_tokens=count,
            max_new_tokens=count,
        )
        place = {number: code for code, number in enumerate(codes)}
        return torch.tensor([place[number] for number in said[0, ids.shape[1] :].tolist() if number != end])
