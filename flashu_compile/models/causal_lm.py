"""Language models of transformers that continue a text (Qwen2, Llama and such), captured from the library's class.

A model is a directory that `save_pretrained` made, or an object with a tokenizer of transformers. Its forward is the
library's own, with its mask functions; passes make of it what runs token by token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import TextSettings
from flashu_compile.models import captures, pretrained
from flashu_compile.models.adapter import LoadedModel, ModelAdapter, ModelSource
from flashu_compile.models.chat import text_settings
from flashu_compile.models.eager_lm import EagerCompletion
from flashu_compile.models.generation import generation_of
from flashu_compile.models.language_forward import CompletionForward
from flashu_compile.models.stacks import LLM
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import COMPLETE, TEXT


class CausalLMAdapter(ModelAdapter):
    """Causal language models of transformers whose layers all attend to all rows before."""

    name: ClassVar[str] = "causal-lm"
    title: ClassVar[str] = "causal language models of transformers, such as Qwen2 and Llama"
    tasks: ClassVar[tuple[str, ...]] = (TEXT.name,)
    options: ClassVar[Mapping[str, str]] = pretrained.OPTIONS

    def recognise(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Recognise a model by the class that its configuration names; some that read pictures too are listed there."""
        known = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type"))))
        named = config.get("architectures")
        # An object may not say its class; one with a language model beside others is none of this family.
        named = named if isinstance(named, list) and named else [known] * ("text_config" not in config)
        return known in named and known.endswith(("ForCausalLM", "LMHeadModel"))

    def load(self, source: ModelSource, options: Mapping[str, Any], dtype: torch.dtype | None) -> LoadedModel:
        """Load a model and its tokenizer. Raises `UnsupportedModelError` on layers that do not see all rows before."""
        tokenizer = pretrained.read_tokenizer(options.get("tokenizer", source.directory))
        files = pretrained.weight_files(source)
        network = pretrained.read_network(source, AutoModelForCausalLM, dtype)
        positions = pretrained.check_decoder(source, network.config)
        kept = pretrained.kept_tokenizer(tokenizer, network)
        generation = generation_of(network, options)
        ends = getattr(network.config, "eos_token_id", None)
        settings = text_settings(tokenizer, TextCodec(kept), generation, positions, ends)
        model = LoadedModel(source.name, network, None, kept, details=settings, adapter=self)
        return pretrained.with_origin(model, source, files)

    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        """Return the completion forward."""
        forward, words = CompletionForward(loaded.network), pretrained.words(loaded.network)
        return (captures.of_ids(COMPLETE, TEXT.name, forward, words, self.stacks(loaded)),)

    def settings(self, loaded: LoadedModel, task: str) -> TextSettings:
        """Return the template, the ends of answers and their limits."""
        return loaded.details

    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return the root of the decoder layers."""
        return {LLM: pretrained.layer_list(loaded.network)}

    def eager(self, loaded: LoadedModel) -> EagerCompletion:
        """Return the model with the library's own loop."""
        return EagerCompletion(loaded)
