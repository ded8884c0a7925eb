"""Drawing by Emu3: codes are ids of the vocabulary, with one for the end of each line, behind a picture's size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashu_compile import arguments
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings, Template, Unprompted
from flashu_compile.errors import CheckpointError, ConfigurationError
from flashu_compile.models.drawing_forward import CodesForward
from flashu_compile.models.drawing_lm import choices, library_choices
from flashu_compile.models.emu3_codes import ids_of_codes
from flashu_compile.models.picture_forward import Given

#: The side of a square picture of the area that the library's processor draws, in pixels.
SIDE = 720
#: The text that guidance leads away from in the authors' script (https://github.com/baaivision/Emu3).
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
#: The scale of that script, where a checkpoint names none.
GUIDANCE = 3.0
_PROBES = ("What is this?", "two  spaces ", "1 + 1 = é")


class Emu3Codes(CodesForward):
    """The forward that draws; codes are read as the ids above those of the vocabulary, whatever ids they have in it."""

    codes: Tensor
    vocabulary: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        codes = ids_of_codes(model)[:-1]
        words = torch.arange(model.get_input_embeddings().weight.shape[0])
        self.register_buffer("codes", codes)
        self.register_buffer("vocabulary", torch.cat([words, codes]))

    def rows(self, ids: Tensor) -> Tensor:
        """Embed ids, those of codes as the words that they are."""
        return self.model.get_input_embeddings()(self.vocabulary[ids])

    def head(self, rows: Tensor) -> Tensor:
        """Compute the logits of codes alone."""
        return F.linear(rows, self.model.lm_head.weight[self.codes])


def drawing_settings(given: Given, cell: int) -> DrawingSettings:
    """Return what the loop that draws must know; a code shows `cell` × `cell` pixels.

    Raises `ConfigurationError` on a size that is no multiple of that, or too large, `CheckpointError` on a tokenizer
    that encodes prompts otherwise than piece by piece.
    """
    network, options = given.network, given.options
    width, height = arguments.picture_size(options.get("resolution", SIDE))
    if width % cell or height % cell:
        raise ConfigurationError(
            f"Emu3 draws pictures whose sides are multiples of {cell} pixels, not {width}x{height}."
        )
    grid = height // cell, width // cell
    ids = ids_of_codes(network)
    template = _template(given.tokenizer, given.codec, grid)
    rows = grid[0] * (grid[1] + 1)
    longest = network.config.get_text_config().max_position_embeddings - rows - template.length
    if longest < 1:
        raise ConfigurationError(
            f"A picture of {width}x{height} takes {rows:,} positions, which the model does not have; choose a smaller "
            "resolution."
        )
    negative = arguments.name_of("negative_prompt", options.get("negative_prompt", NEGATIVE_PROMPT))
    if len(given.codec.encode(negative)) > longest:
        raise ConfigurationError(
            f"negative_prompt is longer than the {longest} tokens that a prompt may have."
        )
    return DrawingSettings(
        template=template,
        unprompted=Unprompted(text=negative),
        grid=grid,
        codes=len(ids) - 1,
        first_code_id=network.get_input_embeddings().weight.shape[0],
        row_end=(int(ids[-1]),),
        max_prompt_tokens=longest,
        picture_size=(width, height),
        **choices(given.generation),
    )


def _template(tokenizer: Any, codec: TextCodec, grid: tuple[int, int]) -> Template:
    """Return what the library's processor puts around a prompt."""
    begin, ahead, closing = tokenizer.bos_token, tokenizer.boi_token, tokenizer.image_wrapper_token
    behind = f"{ahead}{grid[0]}*{grid[1]}{closing}"
    encode = codec.tokenizer.encode
    before = encode(begin, add_special_tokens=False).ids
    template = Template(tuple(before), after=tuple(encode(behind, add_special_tokens=False).ids))
    for probe in _PROBES:
        if codec.in_template(template, probe) != tokenizer(f"{begin}{probe}{behind}").input_ids:
            raise CheckpointError(
                f"The tokenizer encodes {probe!r} before a picture's size in a way that cannot be followed piece by "
                "piece."
            )
    return template


def drawn(network: Any, settings: DrawingSettings, ids: Tensor, other: Tensor) -> Tensor:
    """Draw codes [codes] by the library's own loop, from a prompt's ids [1, n] and those that guidance leads from."""
    *codes, end = ids_of_codes(network).tolist()
    rows, columns = settings.grid
    count, scale = rows * (columns + 1), network.generation_config.guidance_scale

    def allowed(_: int, given: Tensor) -> list[int]:
        return [end] if (len(given) - ids.shape[1] + 1) % (columns + 1) == 0 else codes

    said = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        negative_prompt_ids=other,
        negative_prompt_attention_mask=torch.ones_like(other),
        guidance_scale=GUIDANCE if scale is None else scale,
        prefix_allowed_tokens_fn=allowed,
        **library_choices(settings),
        min_new_tokens=count,
        max_new_tokens=count,
    )
    place = {number: code for code, number in enumerate(codes)}
    return torch.tensor([place[number] for number in said[0, ids.shape[1] :].tolist() if number != end])
