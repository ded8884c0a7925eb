"""The adapter: what flashu_compile must be told about this family."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashu_compile.bundle.settings import GenerationSettings, Template, UnderstandingSettings
from flashu_compile.errors import CheckpointError
from flashu_compile.models.adapter import LoadedModel, ModelAdapter, ModelSource, Sampler, Settings
from flashu_compile.program.program import BATCH, Input, Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import DENOISE, MMU, T2I, UNDERSTAND, VAE_DECODE
from inkling.eager import Eager
from inkling.model import CHANNELS, PATCH, SIDE, TOKENS, WORDS, Inkling
from inkling.words import ANSWER, BEGIN, END, FRAME, PAD, PICTURES, STOP, tokenizer

TEXT_ROWS = 40


class Drawing(nn.Module):
    """A step of drawing, of both guidance branches, their prompts padded on the left."""

    def __init__(self, network: Inkling) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, tail_ids: Tensor, latents: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        network, batch = self.network, prompt_ids.shape[0]
        image = network.outline(latents.expand(batch, -1, -1, -1))
        rows = torch.cat([network.words(prompt_ids), image, network.words(tail_ids)], dim=1)
        there = torch.ones(batch, TOKENS, dtype=torch.bool)
        valid = torch.cat([prompt_mask, there, torch.ones_like(tail_ids, dtype=torch.bool)], dim=1)
        index = torch.arange(rows.shape[1])
        mask = (index[:, None] >= index[None]) & valid[:, None, :] | (index[:, None] == index[None])
        hidden = network.read(rows, mask[:, None], (valid.long().cumsum(1) - 1).clamp(min=0))
        start = prompt_ids.shape[1]
        features = network.paint(hidden[:, start : start + TOKENS], timestep.expand(batch))
        return network.velocity(features), features


class Developing(nn.Module):
    """Latents to pixels."""

    def __init__(self, network: Inkling) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (self.network.develop(latents),)


class Answering(nn.Module):
    """Pixels and the ids around them to the logits of the last row."""

    def __init__(self, network: Inkling) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor, Tensor]:
        network, image = self.network, self.network.view(pixels)
        rows = torch.cat([network.words(prefix_ids), image, network.words(suffix_ids)], dim=1)
        index = torch.arange(rows.shape[1])
        mask = (index[:, None] >= index[None])[None, None]
        hidden = network.read(rows, mask, index.expand(rows.shape[0], -1))
        return network.speak(hidden[:, -1]), image


class InklingAdapter(ModelAdapter):
    """Inklings: objects of the class, and directories with their weights."""

    name: ClassVar[str] = "inkling"
    title: ClassVar[str] = "inklings, which are invented"
    tasks: ClassVar[tuple[str, ...]] = (T2I.name, MMU.name)
    options: ClassVar[Mapping[str, str]] = {}

    def recognise(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        return "trunk.0.mlp.gate.weight" in names and "painter.0.time.weight" in names

    def load(self, source: ModelSource, options: Mapping[str, Any], dtype: torch.dtype | None) -> LoadedModel:
        if source.module is None:
            raise CheckpointError(f"{source} is a directory; inklings are given as objects.")
        network = copy.deepcopy(source.module).to(dtype or torch.float32).eval().requires_grad_(False)
        return LoadedModel(source.name, network, None, tokenizer(), adapter=self)

    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        network, generator = loaded.network, torch.Generator().manual_seed(0)
        dtype, latents = network.words.weight.dtype, (CHANNELS, SIDE, SIDE)
        ids = torch.randint(WORDS, (2, TEXT_ROWS), generator=generator)
        if task == MMU.name:
            pixels = torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH, generator=generator, dtype=dtype) * 2 - 1
            sample = {
                Role.PIXELS: pixels,
                Role.PREFIX_IDS: ids[:, :5].contiguous(),
                Role.SUFFIX_IDS: ids[:, 5:15].contiguous(),
            }
            inputs = (
                Input(Role.PIXELS, (BATCH, None, None, None)),
                Input(Role.PREFIX_IDS, (BATCH, "prefix")),
                Input(Role.SUFFIX_IDS, (BATCH, "suffix")),
            )
            outputs, stacks = (Role.LOGITS, Role.IMAGE_EMBEDS), self._stacks("trunk", "eye")
            return (CaptureSpec(UNDERSTAND, task, Answering(network), inputs, outputs, stacks, sample),)
        mask = torch.ones(2, 6, dtype=torch.bool)
        mask[1, :3] = False
        sample = {
            Role.PROMPT_IDS: ids[:, :6].contiguous(),
            Role.PROMPT_MASK: mask,
            Role.TAIL_IDS: ids[:, 6:].contiguous(),
            Role.LATENTS: torch.randn(1, *latents, generator=generator, dtype=dtype),
            Role.TIMESTEP: torch.tensor([0.3], dtype=dtype),
        }
        inputs = (
            Input(Role.PROMPT_IDS, (BATCH, "prompt")),
            Input(Role.PROMPT_MASK, (BATCH, "prompt")),
            Input(Role.TAIL_IDS, (BATCH, "tail")),
            Input(Role.LATENTS, (None, None, None, None)),
            Input(Role.TIMESTEP, (None,)),
        )
        outputs, stacks = (Role.VELOCITY, Role.HEAD_FEATURES), self._stacks("painter", "trunk")
        drawn = {Role.LATENTS: torch.randn(2, *latents, generator=generator, dtype=dtype)}
        return (
            CaptureSpec(DENOISE, task, Drawing(network), inputs, outputs, stacks, sample),
            CaptureSpec(
                VAE_DECODE,
                task,
                Developing(network),
                (Input(Role.LATENTS, (BATCH, None, None, None)),),
                (Role.PIXELS,),
                {},
                drawn,
            ),
        )

    def _stacks(self, *names: str) -> dict[str, str]:
        return {name: f"network.{_STACKS[name]}" for name in names}

    def settings(self, loaded: LoadedModel, task: str) -> Settings:
        if task == MMU.name:
            template = Template((BEGIN, FRAME, END), after=(ANSWER,), picture=2, placeholder=PAD)
            return UnderstandingSettings(template, (STOP,), 100, 20, pictures=PICTURES)
        return GenerationSettings(
            latent_shape=(CHANNELS, SIDE, SIDE),
            sequence_length=TOKENS + TEXT_ROWS,
            span_length=TOKENS,
            max_prompt_tokens=TEXT_ROWS - 5,
            picture_size=(SIDE * PATCH, SIDE * PATCH),
            template=Template(before=(BEGIN,), after=(FRAME, END), picture=2),
            pad_id=PAD,
        )

    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        return _STACKS

    def decoder(self, loaded: LoadedModel) -> str:
        return "trunk"

    def eager(self, loaded: LoadedModel) -> Eager:
        return Eager(loaded.network)

    def sampler(self, loaded: LoadedModel) -> Sampler:
        return Sampler(points=9, guidance_scale=3.0, time_shift=1.0)

    def image_rows(self, loaded: LoadedModel) -> int:
        return TOKENS + 2


_STACKS = {"eye": "eye.layers", "painter": "painter", "trunk": "trunk"}
