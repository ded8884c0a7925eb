"""Pictures of Emu3 as codes of its VQ model and ids of its vocabulary, and codes as pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.errors import CheckpointError
from flashu_compile.models import pretrained
from flashu_compile.models.language_forward import CodesForward, RowsForward


def ids_of_codes(network: Any) -> Tensor:
    """Return the id of each code [codes], and last that of the end of a line.

    Raises `CheckpointError` if the vocabulary lacks one.
    """
    mapping, count = network.vocabulary_mapping, network.config.vq_config.codebook_size
    words = pretrained.words(network)
    ids = [*(mapping.img2bpe.get(code) for code in range(count)), mapping.eol_token_id]
    if lacking := [code for code, number in enumerate(ids) if number is None or not 0 <= number < words]:
        what = "the end of a line" if lacking[0] == count else f"code {lacking[0]}"
        raise CheckpointError(f"The model's vocabulary_map has no id for {what} of a picture.")
    return torch.tensor(ids)


def picture_ids(network: Any, pixels: Tensor, ids: Tensor) -> Tensor:
    """Compute the ids [b, rows] of a picture, line by line, by the `ids` of codes and of a line's end."""
    found = ids[picture_codes(network.model.vqmodel, pixels)]
    return torch.cat([found, ids[-1].expand(*found.shape[:2], 1)], dim=2).flatten(1)


def picture_codes(vq: Any, pixels: Tensor) -> Tensor:
    """Compute the codes [b, height, width] of a picture.

    The library sees a film in it, of frames that are all the same; until frames meet, one is computed here.
    """
    encoder, silu = vq.encoder, nn.functional.silu
    one = encoder.middle_block(encoder.down_block(encoder.conv_in(pixels)))
    one = encoder.conv_out(silu(encoder.norm_out(one)))
    film = one.unsqueeze(2).expand(-1, -1, vq.config.temporal_downsample_factor, -1, -1)
    for conv in encoder.time_conv:
        film = silu(conv(film))
    for layer in encoder.time_res_stack:
        film = layer(film)
    return vq.quantize(vq.quant_conv(film).permute(0, 2, 1, 3, 4))[:, 0]


class PictureAsIds(RowsForward):
    """From pixels and the ids around the picture to the logits of the last row."""

    ids_of_codes: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.register_buffer("ids_of_codes", ids_of_codes(model))

    def forward(self, pixels: Tensor, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of the last row, and the ids up to the picture's last."""
        context = torch.cat([prefix_ids, picture_ids(self.model, pixels, self.ids_of_codes)], dim=1)
        return self.logits(self.rows(torch.cat([context, suffix_ids], dim=1))), context


class Emu3Codes(CodesForward):
    """The forward that draws; codes are read as the ids above those of the vocabulary, whatever ids they have in it."""

    codes: Tensor
    vocabulary: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        codes = ids_of_codes(model)[:-1]
        words = torch.arange(pretrained.words(model))
        self.register_buffer("codes", codes)
        self.register_buffer("vocabulary", torch.cat([words, codes]))

    def rows(self, ids: Tensor) -> Tensor:
        """Embed ids, those of codes as the words that they are."""
        return self.model.get_input_embeddings()(self.vocabulary[ids])

    def head(self, rows: Tensor) -> Tensor:
        """Compute the logits of codes alone."""
        return F.linear(rows, self.model.lm_head.weight[self.codes])


class PixelsOfCodes(nn.Module):
    """The decoder of a VQ model `vq`, from the codes of a picture that is so many cells high and wide to its pixels."""

    def __init__(self, vq: Any, height: int, width: int) -> None:
        super().__init__()
        self.vq, self.height, self.width = vq, height, width

    def forward(self, codes: Tensor) -> Tensor:
        """Compute pixels [b, 3, height, width] of codes [b, cells], line by line, in the values that the model reads.

        The library makes a film of them and shows its first frame, the only one that is computed here once frames do
        not meet any longer.
        """
        vq, decoder, silu = self.vq, self.vq.decoder, nn.functional.silu
        found = vq.quantize.embedding(codes.view(-1, 1, self.height, self.width)).permute(0, 4, 1, 2, 3)
        film = torch.cat([vq.post_quant_conv(found), found])
        for layer in decoder.time_res_stack:
            film = layer(film)
        for conv in decoder.time_conv:
            film = silu(conv(film))
        count = codes.shape[0]
        one, quant = film[:count, :, 0], film[count:, :, 0]
        one = decoder.up_block(decoder.middle_block(decoder.conv_in(one), quant), quant)
        return decoder.conv_out(silu(decoder.norm_out(one, quant)))
