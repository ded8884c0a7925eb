"""Llava: a vision tower (CLIP, SigLIP) whose patches become rows of a causal language model (Llama, Qwen2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.errors import CheckpointError
from flashu_compile.models import pictures, reducing
from flashu_compile.models.adapter import LoadedModel, ModelSource
from flashu_compile.models.chat import PictureMark
from flashu_compile.models.picture_lm import PictureLMAdapter
from flashu_compile.models.pretrained import layer_list
from flashu_compile.models.stacks import LLM
from flashu_compile.models.tokenizing import picture_token

_PROCESSOR = "LlavaImageProcessorPil"


class LlavaAdapter(PictureLMAdapter):
    """Llava as `LlavaForConditionalGeneration` of transformers."""

    name: ClassVar[str] = "llava"
    title: ClassVar[str] = "Llava of transformers, such as llava-hf/llava-1.5-7b-hf"
    model_type: ClassVar[str] = "llava"
    architecture: ClassVar[str] = "LlavaForConditionalGeneration"
    vision: ClassVar[str] = "model.vision_tower"
    own_names: ClassVar[frozenset[str]] = frozenset(
        name for part in ("Llama", "Mistral", "Mpt", "Qwen")
        for name in (f"llava_{part.lower()}", f"Llava{part}ForCausalLM")
    )  # fmt: skip
    converted: ClassVar[str] = "llava-hf/llava-1.5-7b-hf"

    @staticmethod
    def features(network: Any, pixels: Tensor) -> Tensor:
        """Compute a picture's rows as the library does, which loops over the pictures of a batch."""
        config, model = network.config, network.model
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        states = model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        first = int(config.vision_feature_select_strategy == "default")
        return model.multi_modal_projector(torch.cat([states[n][:, first:] for n in layers], dim=-1))

    def mark(self, source: ModelSource, network: Any, tokenizer: Any, processor: Any) -> PictureMark:
        """Return the token of the picture, which the processor repeats and puts nothing beside."""
        return PictureMark(picture_token(network, tokenizer))

    def rules(self, source: ModelSource, network: Any, processor: Any) -> PictureRules:
        """Return the rules of an image processor; Llava's own may make pictures square before all else."""
        if type(processor).__name__ != _PROCESSOR:
            return super().rules(source, network, processor)
        steps = pictures.steps_of(processor, own=frozenset({"_preprocess"}))
        if processor.do_pad:
            red, green, blue = (int(level * 255) for level in processor.image_mean or (0, 0, 0))
            steps = (PictureStep("square", colour=(red, green, blue)), *steps)
        side = pictures.square_side(source, network.config.vision_config)
        return pictures.picture_rules(processor, side, steps)

    def prepared(self, network: Any) -> Any:
        """Return the network with the vision tower's layers up to the one whose output it reads, if it reads one."""
        root = layer_list(network, self.vision)
        depth, layer = len(network.get_submodule(root)), network.config.vision_feature_layer
        if not isinstance(layer, int) or layer == -1:
            return network
        count = layer if layer >= 0 else depth + 1 + layer
        if not 0 < count <= depth:
            raise CheckpointError(
                f"The model reads layer {layer} of a vision tower of {depth} layers, which is not carried out."
            )
        made: Any = reducing.with_layers(network, {"vision": root}, {"vision": range(count)})
        reducing.tell_depth(made.get_submodule(self.vision), count)
        made.config = made.model.config = copy.copy(network.config)
        made.config.vision_feature_layer = -1
        return made

    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return the roots of the stacks; a tower of which several layers are read keeps all of them in copies."""
        reads_one = isinstance(loaded.network.config.vision_feature_layer, int)
        return {stack: root for stack, root in super().stacks(loaded).items() if reads_one or stack == LLM}
