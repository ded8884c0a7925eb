"""A small copy of a Show-o2: some of its layers, a smaller picture, fewer words. Its tensors are the model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from flashu_compile.models.adapter import LoadedModel
from flashu_compile.models.reducing import place_in_copy
from flashu_compile.models.showo2 import checkpoint
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import BOI, BOS, EOI, EOS, IMAGE_PAD, PAD
from flashu_compile.models.stacks import HEAD, LLM, SEMANTIC

#: Where the layers of each stack are in a state dict.
STACKS = {LLM: "showo.model.layers", SEMANTIC: "und_trans.layers", HEAD: "diffusion_head_a"}
GRID, _VOCABULARY, _TEXT_ROWS = 8, 1024, 32
_WORDS = ("a", "red", "circle")  # of the prompt that a bundle is asked with


def reduced(network: Showo2, layers: Mapping[str, Sequence[int]], grid: int = GRID) -> Showo2:
    """Return a copy with only the `layers` of each stack, in that order. Widths and heads stay what they are.

    It shares the memory of `network`. Its picture has `grid` × `grid` tokens (two more per side where the model
    interpolates its position table, and one more per row where its picture is not square), its vocabulary the first
    1024 tokens, its text 32 rows; position table, vocabulary and text are never larger than the model's.
    """
    config = _config(network.config, layers, grid)
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if (place := place_in_copy(name, STACKS, layers)) is not None:
            state[place] = value
    state["position_embedding.weight"] = state["position_embedding.weight"][: config.position_grid**2]
    for name in (checkpoint.EMBEDDING, checkpoint.LM_HEAD):
        state[name] = state[name][: config.llm.vocab_size]
    return checkpoint.build(config, state)


def _config(config: Showo2Config, layers: Mapping[str, Sequence[int]], grid: int) -> Showo2Config:
    parts = {
        stack: dataclasses.replace(getattr(config, stack), num_hidden_layers=len(chosen))
        for stack, chosen in layers.items()
    }
    words = min(config.llm.vocab_size, _VOCABULARY)
    grid = min(config.position_grid, grid)
    rows, columns = config.latent_grid, config.latent_columns or config.latent_grid
    latent_grid = grid if (rows, columns) == (config.position_grid,) * 2 else grid + 2
    latent_columns = latent_grid + int(rows != columns)
    time_row = int(config.add_time_embeds)
    text_rows = min(config.sequence_length - config.span_length, _TEXT_ROWS)
    return dataclasses.replace(
        config,
        **{**parts, "llm": dataclasses.replace(parts["llm"], vocab_size=words)},
        position_grid=grid,
        latent_grid=latent_grid,
        latent_columns=latent_columns,
        sequence_length=latent_grid * latent_columns + time_row + text_rows,
    )


def of_few_words(loaded: LoadedModel) -> LoadedModel:
    """Return `loaded` with a tokenizer of a few words, for a copy of the model with a small vocabulary."""
    known = [PAD, BOS, EOS, BOI, EOI, IMAGE_PAD, "other", *_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="other"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(known[:6])
    return dataclasses.replace(loaded, tokenizer=tokenizer)
