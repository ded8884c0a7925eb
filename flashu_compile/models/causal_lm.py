"""Language models of transformers that continue a text (Qwen2, Llama and such), captured from the library's class.

A model is a directory that `save_pretrained` made, or an object with a tokenizer of transformers. Its forward is the
library's own, with its mask functions; passes make of it what runs token by token.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import create_masks_for_generate
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from flashu_compile import arguments
from flashu_compile.bundle.manifest import TextSettings
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from flashu_compile.models import tokenizing, weights
from flashu_compile.models.adapter import LoadedModel, ModelAdapter, ModelSource
from flashu_compile.models.chat import text_settings
from flashu_compile.models.origins import IN_MEMORY, calibration_of, origin
from flashu_compile.program.program import BATCH, Input, Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import COMPLETE, LLM, TEXT

_AXES = {Role.PREFIX_IDS: "prefix", Role.SUFFIX_IDS: "suffix"}


class CompletionForward(nn.Module):
    """The whole forward, from ids in two parts, of which one may be empty, to the logits of the last row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor]:
        """Compute the logits of the last row."""
        rows = self.model.get_input_embeddings()(torch.cat([prefix_ids, suffix_ids], dim=1))
        # Made here without positions, in which the library would look for packed sequences.
        mask = create_masks_for_generate(self.model.config, rows, None, None, position_ids=None)
        return (self.model(inputs_embeds=rows, attention_mask=mask, use_cache=False).logits[:, -1],)


class EagerCompletion:
    """A language model in eager PyTorch."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model, self._settings = loaded.network, loaded.details
        self._codec = TextCodec(loaded.tokenizer)

    def trajectory(self, prompt: str, **_: Any) -> Any:
        """Raise `UnsupportedModelError`: there are no pictures."""
        raise UnsupportedModelError("A language model makes no pictures.")

    generate = trajectory

    @torch.inference_mode()
    def logits(self, image: Any, question: str, answer: Sequence[int]) -> Tensor:
        """Return the logits [tokens, vocab] of each token of `answer`, given the tokens before it."""
        ids = self._codec.in_template(self._settings.template, question)
        whole = torch.tensor([[*ids, *answer][:-1]])
        return self._model(input_ids=whole, use_cache=False).logits[0, len(ids) - 1 :]

    @torch.inference_mode()
    def answer(self, image: Any, question: str, tokens: int) -> None:
        """Decode just so many tokens greedily, by the library's own loop."""
        ids = torch.tensor([self._codec.in_template(self._settings.template, question)])
        self._model.generate(ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)


class CausalLMAdapter(ModelAdapter):
    """Causal language models of transformers whose layers all attend to all rows before."""

    name: ClassVar[str] = "causal-lm"
    title: ClassVar[str] = "causal language models of transformers, such as Qwen2 and Llama"
    tasks: ClassVar[tuple[str, ...]] = (TEXT.name,)
    options: ClassVar[Mapping[str, str]] = {
        "tokenizer": "a fast tokenizer of transformers, or the directory of one; needed with a model in memory",
        "generation": "entries that replace those of the checkpoint's generation_config; None leaves one out",
    }

    def recognise(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Recognise a model by the class that its configuration names; some that read pictures too are listed there."""
        known = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type"))))
        named = config.get("architectures") or [known]
        return known in named and known.endswith(("ForCausalLM", "LMHeadModel"))

    def load(self, source: ModelSource, options: Mapping[str, Any], dtype: torch.dtype | None) -> LoadedModel:
        """Load a model and its tokenizer. Raises `UnsupportedModelError` on layers that do not see all rows before."""
        tokenizer = _tokenizer(options.get("tokenizer", source.directory))
        files = () if source.directory is None else weights.hashed(weights.weight_files(source.directory))
        network = _network(source, dtype)
        config = network.config
        window = () if getattr(config, "sliding_window", None) is None else ("sliding_attention",)
        if others := sorted({*(getattr(config, "layer_types", None) or window)} - {"full_attention"}):
            raise UnsupportedModelError(
                f"{source} has layers of {', '.join(others)}; only full attention is decoded on kept keys and values."
            )
        replaced = arguments.mapping("generation", options.get("generation"))
        generation = {**network.generation_config.to_diff_dict(), **replaced}
        if (positions := getattr(config, "max_position_embeddings", None)) is None:
            raise UnsupportedModelError(f"{source} does not say how many positions it has.")
        kept = tokenizing.check_kept(tokenizer.backend_tokenizer)
        tokenizing.check_size(kept, network.get_input_embeddings().weight.shape[0])
        ends = getattr(config, "eos_token_id", None)
        settings = text_settings(tokenizer, TextCodec(kept), generation, positions, ends)
        calibration, place = None, IN_MEMORY
        if source.directory is not None:
            calibration = calibration_of(source.directory)
            place = origin(files, source.directory, source.config, source.snapshot)
        return LoadedModel(
            source.name, network, None, kept, calibration, {"model": place}, files, settings, adapter=self
        )

    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        """Return the completion forward."""
        words = loaded.network.get_input_embeddings().weight.shape[0]
        ids = torch.randint(words, (2, 20), generator=torch.Generator().manual_seed(0))
        return (
            CaptureSpec(
                name=COMPLETE,
                task=TEXT.name,
                module=CompletionForward(loaded.network),
                inputs=tuple(Input(role, (BATCH, axis)) for role, axis in _AXES.items()),
                outputs=(Role.LOGITS,),
                stacks={stack: f"model.{root}" for stack, root in self.stacks(loaded).items()},
                sample=dict(zip(_AXES, (ids[:, :8].contiguous(), ids[:, 8:].contiguous()), strict=True)),
            ),
        )

    def settings(self, loaded: LoadedModel, task: str) -> TextSettings:
        """Return the template, the ends of answers and their limits."""
        return loaded.details

    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return the root of the decoder layers: the one list with as many modules as the configuration says."""
        lists = [(name, len(m)) for name, m in loaded.network.named_modules() if isinstance(m, nn.ModuleList)]
        depth = max(count for _, count in lists)
        return {LLM: next(name for name, count in lists if count == depth)}

    def eager(self, loaded: LoadedModel) -> EagerCompletion:
        """Return the model with the library's own loop."""
        return EagerCompletion(loaded)


def _tokenizer(given: Any) -> Any:
    """Return a fast tokenizer of transformers, from a directory if it is none."""
    if given is None:
        raise CheckpointError("A model object says nothing about its tokenizer; pass tokenizer.")
    if isinstance(given, str | Path):
        try:
            given = AutoTokenizer.from_pretrained(str(given), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of whatever the library stumbles over
            raise CheckpointError(f"{given} holds no tokenizer that transformers reads: {error}") from error
    if not hasattr(given, "backend_tokenizer"):
        raise ConfigurationError(
            f"A {type(given).__name__} is no fast tokenizer of transformers; pass one, or the directory of one."
        )
    return given


def _network(source: ModelSource, dtype: torch.dtype | None) -> Any:
    """Return the library's class with the model's weights in `dtype`; of an object, a copy that shares its tensors."""
    module = source.module
    if module is None:
        return _read(source, dtype).eval().requires_grad_(False)
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        raise CheckpointError("The model's tensors have no values; load its weights first.")
    # What is in the memo is not copied again; each tensor is there once, under a holder of its own.
    held = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    network: Any = copy.deepcopy(module, held)
    network.set_attn_implementation("sdpa")
    return network.to(dtype or network.dtype).eval()


def _shaped(source: ModelSource, dtype: torch.dtype | None) -> Any:
    """Make the network that a directory describes, with zeros that take no memory. Raises `CheckpointError`."""
    library: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(
            str(source.directory), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            network = library.from_config(config, attn_implementation="sdpa", dtype=dtype)
    except Exception as error:  # of whatever the library stumbles over
        raise CheckpointError(f"{source} cannot be read by transformers: {error}") from error
    network._apply(lambda tensor: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape))
    network.tie_weights()
    return network


def _read(source: ModelSource, dtype: torch.dtype | None) -> Any:
    """Read a directory. Raises `CheckpointError` if the library cannot, or a tensor is lacking."""
    library: Any = AutoModelForCausalLM
    if weights.reads_shapes_alone():
        return _shaped(source, dtype)
    options = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": "sdpa"}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network, told = library.from_pretrained(
            str(source.directory), dtype=dtype or "auto", output_loading_info=True, **options
        )
    except Exception as error:  # of whatever the library stumbles over
        raise CheckpointError(f"{source} cannot be read by transformers: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if lacking := sorted(told["missing_keys"]):  # the library has made them up
        raise CheckpointError(f"{source} has no {lacking[0]}.")
    return network
