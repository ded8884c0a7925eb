"""What the compiler must be told about Show-o2: the roles of inputs and outputs, and the roots of its stacks.

Each task is captured once, in the published form (`forwards`): the padded generation step and the full-sequence
understanding forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch

from flashu_compile.bundle.settings import GenerationSettings, UnderstandingSettings
from flashu_compile.errors import CheckpointError
from flashu_compile.models import captures
from flashu_compile.models.adapter import LoadedModel, ModelAdapter, ModelSource, Sampler, Settings
from flashu_compile.models.showo2 import checkpoint, loading
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.forwards import GenerationStep, LatentDecoder, UnderstandingForward
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec, picture_rules
from flashu_compile.models.showo2.reduced import GRID, STACKS, of_few_words, reduced
from flashu_compile.models.vae import LatentCodec
from flashu_compile.program.program import BATCH, Input, Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import DENOISE, MMU, T2I, VAE_DECODE

#: The longest answer, in tokens, unless a caller says otherwise.
_MAX_NEW_TOKENS = 300
_SAMPLE_PROMPT = 6


class Showo2Adapter(ModelAdapter):
    """Show-o2: the published checkpoints, this project's own layout, and objects with the state dict of either."""

    name: ClassVar[str] = "showo2"
    title: ClassVar[str] = "Show-o2 with 1.5B or 7B parameters, and models of its architecture"
    tasks: ClassVar[tuple[str, ...]] = (T2I.name, MMU.name)
    maps_weights: ClassVar[bool] = True
    options: ClassVar[Mapping[str, str]] = {
        "vae": "a LatentCodec, an AutoencoderKLWan, or a Wan VAE's path or hub id, where the checkpoint holds none",
        "tokenizer": "a tokenizers.Tokenizer, a fast tokenizer of transformers, or the path or hub id of one",
        "llm_config": "the language model's config.json, or its contents, where sizes alone do not tell it",
        "resolution": "the size of pictures that are drawn, in pixels: 512, 768x512 (width first), such a pair, or "
        "the name of a published checkpoint: show-o2-1.5B-HQ",
    }

    def recognise(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Recognise a model by its layout's own entries of the configuration, or by its state dict."""
        published = str(config.get("_class_name", "")).startswith("Showo2") or "llm_model_path" in config
        return config.get("format") == loading.FORMAT or published or not checkpoint.missing_signature(names)

    def load(self, source: ModelSource, options: Mapping[str, Any], dtype: torch.dtype | None) -> LoadedModel:
        """Load a model; see `loading.load`."""
        return loading.load(self, source, options, dtype)

    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        """Return what to trace. Raises as `capture_specs` does, and `CheckpointError` if the model has no VAE."""
        if loaded.vae is None:
            raise CheckpointError(f"Model {loaded.name!r} has no VAE; pass its path as `vae`.")
        return capture_specs(task, loaded.network, loaded.vae)

    def settings(self, loaded: LoadedModel, task: str) -> Settings:
        """Return what the loops of t2i and mmu must know of the model."""
        config = loaded.network.config
        assert loaded.vae is not None
        factor, codec = loaded.vae.spatial_factor, PromptCodec(loaded.tokenizer)
        if task == MMU.name:
            return UnderstandingSettings(
                template=codec.understanding,
                stop_ids=(codec.eos,),
                max_question_tokens=config.sequence_length,
                max_new_tokens=_MAX_NEW_TOKENS,
                pictures=picture_rules(config.understanding_side * factor),
            )
        _, height, width = config.latent_shape
        return GenerationSettings(
            latent_shape=config.latent_shape,
            sequence_length=config.sequence_length,
            span_length=config.span_length,
            max_prompt_tokens=config.max_prompt_tokens,
            picture_size=(width * factor, height * factor),
            template=codec.generation,
            pad_id=codec.pad,
        )

    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return the roots of the language model, the semantic layers and the diffusion head."""
        return STACKS

    def eager(self, loaded: LoadedModel) -> EagerPipeline:
        """Return the model with its published loops."""
        return EagerPipeline(loaded)

    def sampler(self, loaded: LoadedModel) -> Sampler:
        """Return the model's own trajectory."""
        config = loaded.network.config
        return Sampler(
            config.guidance_scale, config.steps, config.time_shift, config.accelerated_guidance_scale
        )

    def image_rows(self, loaded: LoadedModel) -> int:
        """Count a picture's tokens, the time token before and the end token behind."""
        return loaded.network.config.position_grid**2 + 2

    def reduced(
        self, loaded: LoadedModel, layers: Mapping[str, Sequence[int]], token_pruning: float
    ) -> LoadedModel:
        """Return a copy with fewer words too, and the smallest picture at which token pruning drops a token.

        If there is none below the model's own, it is the usual one of copies.
        """
        sides = range(GRID, loaded.network.config.position_grid)
        side = next((side for side in sides if int(token_pruning * side**2)), GRID)
        network = reduced(loaded.network, layers, side)
        return of_few_words(dataclasses.replace(loaded, network=network, calibration=None))


def capture_specs(task: str, model: Showo2, vae: LatentCodec) -> tuple[CaptureSpec, ...]:
    """Return the specifications of the programs to capture for `task` ("t2i" or "mmu").

    Pictures are asked about at the size of the position table, the only one that understanding is published for.
    """
    config, dtype = model.config, model.dtype
    if task == T2I.name:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, *config.latent_shape, generator=generator, dtype=dtype)
        decoder = captures.of_decoder(VAE_DECODE, LatentDecoder(vae), Role.LATENTS, latents)
        return _generation(model), decoder
    side = config.understanding_side * vae.spatial_factor
    forward, words = UnderstandingForward(model, vae), config.llm.vocab_size
    return (captures.of_question(forward, words, (side, side), dtype, STACKS),)


def _generation(model: Showo2) -> CaptureSpec:
    config, dtype = model.config, model.dtype
    generator = torch.Generator().manual_seed(0)
    # Bos, boi and what fits between them; at least eoi and eos after the image.
    text_rows = config.sequence_length - config.span_length
    length = min(_SAMPLE_PROMPT, text_rows - 2)
    prompt = torch.randint(config.llm.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    mask[1, : length // 2] = False
    tail = torch.randint(config.llm.vocab_size, (2, text_rows - length), generator=generator)
    return CaptureSpec(
        name=DENOISE,
        task=T2I.name,
        module=GenerationStep(model),
        inputs=(
            Input(Role.PROMPT_IDS, (BATCH, "prompt")),
            Input(Role.PROMPT_MASK, (BATCH, "prompt")),
            Input(Role.TAIL_IDS, (BATCH, "tail")),
            Input(Role.LATENTS, (None, None, None, None)),
            Input(Role.TIMESTEP, (None,)),
        ),
        outputs=(Role.VELOCITY, Role.HEAD_FEATURES, Role.LOGITS),
        stacks=captures.inside(STACKS),
        sample={
            Role.PROMPT_IDS: prompt,
            Role.PROMPT_MASK: mask,
            Role.TAIL_IDS: tail,
            Role.LATENTS: torch.randn(1, *config.latent_shape, generator=generator, dtype=dtype),
            Role.TIMESTEP: torch.tensor([0.3], dtype=dtype),
        },
    )
