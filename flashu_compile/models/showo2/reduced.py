"""A small copy of a Show-o2: some of its layers, a smaller picture, fewer words. Its tensors are the model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from flashu_compile.models.showo2 import checkpoint
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2

#: Where the layers of each stack are in a state dict.
STACKS = {"llm": "showo.model.layers.", "semantic": "und_trans.layers.", "head": "diffusion_head_a."}
GRID, _VOCABULARY, _TEXT_ROWS = 8, 1024, 32


def depths(config: Showo2Config) -> dict[str, int]:
    """Return the number of layers of each stack."""
    return {stack: getattr(config, stack).num_hidden_layers for stack in STACKS}


def reduced(network: Showo2, layers: Mapping[str, Sequence[int]], grid: int = GRID) -> Showo2:
    """Return a copy with only the `layers` of each stack, in that order. Widths and heads stay what they are.

    It shares the memory of `network`. Its picture has `grid` × `grid` tokens (two more per side where the model
    interpolates its position table, and one more per row where its picture is not square), its vocabulary the first
    1024 tokens, its text 32 rows; position table, vocabulary and text are never larger than the model's.
    """
    config = _config(network.config, layers, grid)
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if (place := place_in_copy(name, layers)) is not None:
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


def place_in_copy(name: str, layers: Mapping[str, Sequence[int]]) -> str | None:
    """Map a tensor's name in the model, with any prefix, to its name in the copy; None if the copy lacks it."""
    for stack, root in STACKS.items():
        before, found, rest = name.partition(root)
        if found:
            index, _, inside = rest.partition(".")
            chosen = list(layers[stack])
            return f"{before}{root}{chosen.index(int(index))}.{inside}" if int(index) in chosen else None
    return name
