"""Show-o2 from a state dict: the configuration it implies, and the network that takes its tensors.

Published checkpoints say little about themselves: the constructor's arguments and the tensors. Sizes come
from the tensors, which cannot lie; what tensors do not show (head counts, rotary base, image grid) comes from
the language model's configuration, the constructor's arguments, or the known sizes of Qwen2.5 and SigLIP.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from flashu_compile import reading
from flashu_compile.errors import CheckpointError, UnsupportedModelError
from flashu_compile.models.showo2.config import (
    PUBLISHED_ACCELERATED_SCALE,
    HeadConfig,
    LLMConfig,
    SemanticConfig,
    Showo2Config,
    published_sequence,
)
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.reading import Few, Positive, Size

EMBEDDING = "showo.model.embed_tokens.weight"
LM_HEAD = "showo.lm_head.weight"
_TIME_PROJECTION = "time_embed_proj."

SIGNATURE = (
    EMBEDDING,
    "showo.model.layers.0.self_attn.q_proj.weight",
    "image_embedder_und.proj.weight",
    "image_embedder_gen.proj.weight",
    "position_embedding.weight",
    "und_trans.layers.0.self_attn.q_proj.weight",
    "fusion_proj.1.weight",
    "time_embed.mlp.0.weight",
    "diffusion_head_a.0.self_attn.q_norm.weight",
    "diffusion_head_b.linear.weight",
)
"""Names by which a Show-o2 state dict is recognised, whatever class it comes from."""

#: Buffers that some versions store, and that are made anew from the configuration.
_BUFFERS = ("inv_freq", "image_position_ids")

_logger = logging.getLogger(__name__)

Attention = tuple[int, int]  # query heads, key/value heads

# Qwen2.5 by (hidden size, FFN width): heads cannot be read off the tensors' shapes.
_QWEN_ATTENTION: dict[tuple[int, int], Attention] = {
    (896, 4864): (14, 2),
    (1536, 8960): (12, 2),
    (2048, 11008): (16, 2),
    (3584, 18944): (28, 4),
    (5120, 13824): (40, 8),
    (5120, 27648): (40, 8),
    (8192, 29568): (64, 8),
}
# SigLIP vision towers by hidden size: base, large, so400m.
_SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}


class Declared(NamedTuple):
    """What is declared about a model beside its tensors. `None` and empty mappings mean: not declared.

    `settings` are the constructor's arguments under their published names; `llm` is a Hugging Face Qwen2
    configuration as a dictionary; `semantic_heads` the attention heads of `und_trans`.
    """

    settings: Mapping[str, Any] = {}
    llm: Mapping[str, Any] | None = None
    semantic_heads: int | None = None


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The constructor's arguments that are read here."""

    hidden_size: Size | None = None
    image_latent_dim: Size | None = None
    patch_size: Few | None = None
    clip_latent_dim: Size | None = None
    num_diffusion_layers: Few | None = None
    image_latent_height: Few | None = None
    image_latent_width: Few | None = None
    add_time_embeds: bool | None = None


@dataclasses.dataclass(frozen=True)
class _Rope:
    """Rotary parameters of a Qwen2 configuration."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None


@dataclasses.dataclass(frozen=True)
class _Qwen2:
    """What is read of a Qwen2 configuration. transformers stores `rope_parameters` now, and the others before v5."""

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Few
    num_key_value_heads: Few | None = None
    hidden_act: str = "silu"
    use_sliding_window: bool | None = None
    rope_theta: Positive | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    rms_norm_eps: Positive = LLMConfig.rms_norm_eps
    tie_word_embeddings: bool = True

    @property
    def rope(self) -> _Rope:
        """The rotary parameters, from wherever they are stored."""
        new, old = self.rope_parameters or _Rope(), self.rope_scaling or _Rope()
        kind = new.rope_type or new.type or old.rope_type or old.type or "default"
        theta = new.rope_theta or old.rope_theta or self.rope_theta or LLMConfig.rope_theta
        return _Rope(rope_type=kind, rope_theta=theta)


def declared_by(module: nn.Module) -> Declared:
    """Read what an instance of the published class, or of one like it, declares about itself."""
    heads = _mapping(getattr(getattr(module, "und_trans", None), "config", None)).get("num_attention_heads")
    llm = _mapping(getattr(getattr(module, "showo", None), "config", None))
    return Declared(_mapping(getattr(module, "config", None)), llm or None, heads)


def missing_signature(names: Collection[str]) -> list[str]:
    """List the names of `SIGNATURE` that are absent: none if this is a Show-o2 state dict."""
    return [name for name in SIGNATURE if name not in names]


def knows_llm(state: Mapping[str, Tensor]) -> bool:
    """Return whether the language model is of a published size, so that its configuration need not be looked up."""
    return _llm_sizes(state) in _QWEN_ATTENTION


def infer_config(state: Mapping[str, Tensor], declared: Declared) -> Showo2Config:
    """Infer the configuration of a Show-o2 state dict in the published names.

    Raises:
        CheckpointError: head counts are unknown (the message says to pass `llm_config`), or tensors and
            declarations contradict each other.
        UnsupportedModelError: the language model has features that Show-o2's do not.
    """
    settings = reading.convert(
        declared.settings, _Settings, "The model's configuration", CheckpointError, foreign=True
    )
    patch = _shape(state, "image_embedder_gen.proj.weight", 4)
    grid = math.isqrt(_shape(state, "position_embedding.weight", 2)[0])
    found = {
        "hidden_size": patch[0],
        "image_latent_dim": patch[1],
        "patch_size": patch[2],
        "clip_latent_dim": _shape(state, "position_embedding.weight", 2)[1],
        "num_diffusion_layers": _count(state, "diffusion_head_a."),
    }
    for name, value in found.items():
        if (said := getattr(settings, name)) not in (None, value):
            raise CheckpointError(
                f"The configuration says {name} = {said}, the weights have {value}; "
                "they belong to different models."
            )
    if grid**2 != state["position_embedding.weight"].shape[0]:
        raise CheckpointError("The position table is not square; pictures of other shapes are not supported.")
    rows, columns = _latent_grid(settings, grid)
    add_time_embeds = settings.add_time_embeds
    return Showo2Config(
        llm=_llm(state, declared.llm),
        semantic=_semantic(state, declared.semantic_heads),
        head=_head(state),
        latent_channels=patch[1],
        patch_size=patch[2],
        latent_grid=rows,
        latent_columns=None if rows == columns else columns,
        position_grid=grid,
        add_time_embeds=True if add_time_embeds is None else add_time_embeds,
        sequence_length=published_sequence(rows * columns),
        accelerated_guidance_scale=PUBLISHED_ACCELERATED_SCALE,
    )


def build(config: Showo2Config, state: Mapping[str, Tensor]) -> Showo2:
    """Build the network of `config` on the tensors of `state` themselves, in eval mode, taking no gradients.

    Nothing is copied or initialised. `showo.lm_head.weight` may be absent where it is tied. A
    `time_embed_proj` is left out where no time token asks for it (published models always carry one), and so are
    buffers that are no weights, with a warning.

    Raises:
        CheckpointError: names or shapes differ from the configuration's; the first few are listed.
    """
    state = _without_buffers(state)
    _check_depths(config, state)
    if config.llm.tie_word_embeddings and EMBEDDING in state:
        state.setdefault(LM_HEAD, state[EMBEDDING])
    if not config.add_time_embeds:
        state = {name: value for name, value in state.items() if not name.startswith(_TIME_PROJECTION)}
    with torch.device("meta"):
        network = Showo2(config)
    _check(network.state_dict(), state)
    network.load_state_dict(state, strict=True, assign=True)
    if config.llm.tie_word_embeddings:
        network.showo.lm_head.weight = network.showo.model.embed_tokens.weight
    # Rotary frequencies are buffers no checkpoint stores: made anew, in float32, where the weights are.
    with torch.device(network.showo.model.embed_tokens.weight.device):
        network.showo.model.rotary_emb = Qwen2RotaryEmbedding(config=network.showo.config)
    unset = [n for n, v in itertools.chain(network.named_parameters(), network.named_buffers()) if v.is_meta]
    if unset:
        raise CheckpointError(f"These tensors have no values: {_first(unset)}.")
    return network.eval().requires_grad_(False)


def _without_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state without the buffers that mean nothing, and warn if there are some."""
    ignored = [name for name in state if name.rpartition(".")[2] in _BUFFERS]
    if ignored:
        _logger.warning("These tensors are no weights and are ignored: %s.", _first(ignored))
    return {name: value for name, value in state.items() if name not in ignored}


def _check_depths(config: Showo2Config, state: Mapping[str, Tensor]) -> None:
    """Check the numbers of layers, before a network of so many is made. Raises `CheckpointError` if they differ."""
    for prefix, said in (
        ("showo.model.layers.", config.llm.num_hidden_layers),
        ("und_trans.layers.", config.semantic.num_hidden_layers),
        ("diffusion_head_a.", config.head.num_hidden_layers),
    ):
        if (found := _count(state, prefix)) != said:
            raise CheckpointError(
                f"The weights do not fit the Show-o2 configuration: it has {said} layers under {prefix.rstrip('.')}, "
                f"they have {found}."
            )


def _check(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := sorted(wanted.keys() - given.keys()):
        problems.append(f"missing {_first(missing)}")
    if unexpected := sorted(given.keys() - wanted.keys()):
        problems.append(f"unexpected {_first(unexpected)}")
    common = sorted(wanted.keys() & given.keys())
    if shapes := [n for n in common if wanted[n].shape != given[n].shape]:
        listed = [f"{n} {list(given[n].shape)} instead of {list(wanted[n].shape)}" for n in shapes]
        problems.append(f"wrong shapes {_first(listed)}")
    if other := [f"{n} ({given[n].dtype})" for n in common if not given[n].is_floating_point()]:
        problems.append(f"not floating point {_first(other)}")
    if problems:
        raise CheckpointError(f"The weights do not fit the Show-o2 configuration: {'; '.join(problems)}.")


def _first(names: list[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _shape(state: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"The weights lack {name}; this is not a complete Show-o2 checkpoint.")
    shape = tuple(state[name].shape)
    if len(shape) != rank:
        raise CheckpointError(f"{name} has shape {list(shape)}; a Show-o2 model has {rank} dimensions there.")
    return shape


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Count the layers under `prefix`: one more than the highest index."""
    indices = {name.removeprefix(prefix).split(".", 1)[0] for name in state if name.startswith(prefix)}
    return 1 + max((int(index) for index in indices if index.isdecimal()), default=-1)


def _llm_sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
    ffn, hidden = _shape(state, "showo.model.layers.0.mlp.gate_proj.weight", 2)
    return hidden, ffn


def _llm(state: Mapping[str, Tensor], said: Mapping[str, Any] | None) -> LLMConfig:
    hidden, ffn = _llm_sizes(state)
    declared = None
    if said is not None:
        declared = reading.convert(said, _Qwen2, "llm_config", CheckpointError, foreign=True)
        heads = _declared_attention(declared, hidden, ffn)
    elif (hidden, ffn) in _QWEN_ATTENTION:
        heads = _QWEN_ATTENTION[hidden, ffn]
    else:
        raise CheckpointError(
            f"The language model (hidden size {hidden}, FFN {ffn}) is of no published Qwen2.5 size, so its "
            "attention heads are unknown; pass llm_config, its Hugging Face config.json."
        )
    kv_rows = _shape(state, "showo.model.layers.0.self_attn.k_proj.weight", 2)[0]
    if hidden % heads[0] or kv_rows != hidden // heads[0] * heads[1]:
        raise CheckpointError(
            f"{heads[0]} attention heads and {heads[1]} key/value heads do not fit the weights (hidden size "
            f"{hidden}, {kv_rows} key rows); pass the llm_config of the model the checkpoint was made from."
        )
    found = declared or _Qwen2(hidden, ffn, *heads)
    return LLMConfig(
        vocab_size=_shape(state, EMBEDDING, 2)[0],
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=_count(state, "showo.model.layers."),
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        rope_theta=found.rope.rope_theta or LLMConfig.rope_theta,
        rms_norm_eps=found.rms_norm_eps,
        tie_word_embeddings=_tied(state, found.tie_word_embeddings),
    )


def _declared_attention(llm: _Qwen2, hidden: int, ffn: int) -> Attention:
    if (llm.hidden_size, llm.intermediate_size) != (hidden, ffn):
        raise CheckpointError(
            f"llm_config describes a model of hidden size {llm.hidden_size} and FFN {llm.intermediate_size}, the "
            f"weights have {hidden} and {ffn}; pass the configuration the checkpoint was made from."
        )
    odd = {
        "hidden_act": llm.hidden_act != "silu",
        "use_sliding_window": bool(llm.use_sliding_window),
        "rope_type": llm.rope.rope_type != "default",
    }
    if any(odd.values()):
        names = ", ".join(name for name, differs in odd.items() if differs)
        raise UnsupportedModelError(f"The language model is no plain Qwen2 but differs in {names}.")
    return llm.num_attention_heads, llm.num_key_value_heads or llm.num_attention_heads


def _tied(state: Mapping[str, Tensor], declared: bool) -> bool:
    """Return whether output and input embeddings are tied: the tensors decide, where both are present."""
    if LM_HEAD not in state:
        return declared
    embedding, head = state[EMBEDDING], state[LM_HEAD]
    if embedding.is_meta or head.is_meta:
        raise CheckpointError("The model has no values (it is on the meta device); load its weights first.")
    return embedding.shape == head.shape and (
        embedding.data_ptr() == head.data_ptr() or torch.equal(embedding, head)
    )


def _semantic(state: Mapping[str, Tensor], heads: int | None) -> SemanticConfig:
    ffn, hidden = _shape(state, "und_trans.layers.0.mlp.fc1.weight", 2)
    heads = heads or _SIGLIP_HEADS.get(hidden)
    if heads is None:
        raise CheckpointError(
            f"The semantic layers have hidden size {hidden}, which is no published SigLIP size, so their "
            "attention heads are unknown; pass the model as an instance whose und_trans.config says them."
        )
    layers = _count(state, "und_trans.layers.")
    return SemanticConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads
    )


def _head(state: Mapping[str, Tensor]) -> HeadConfig:
    block = "diffusion_head_a.0."
    ffn, hidden = _shape(state, block + "mlp.gate_proj.weight", 2)
    norm = block + "self_attn.q_norm.weight"
    head_dim = _shape(state, norm, 1)[0]
    if head_dim == 0:
        raise CheckpointError(f"{norm} is empty; no attention head has a width of 0.")
    return HeadConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=_count(state, "diffusion_head_a."),
        num_attention_heads=_shape(state, block + "self_attn.q_proj.weight", 2)[0] // head_dim,
        num_key_value_heads=_shape(state, block + "self_attn.k_proj.weight", 2)[0] // head_dim,
        frequency_embedding_size=_shape(state, "time_embed.mlp.0.weight", 2)[1],
    )


def _latent_grid(settings: _Settings, position_grid: int) -> tuple[int, int]:
    """Return the rows and columns of image tokens: as configured, else as many as there are learnt positions."""
    height, width = settings.image_latent_height, settings.image_latent_width
    return height or width or position_grid, width or height or position_grid


def _mapping(config: Any) -> dict[str, Any]:
    """Convert a configuration object to a dictionary: a mapping, one with `to_dict`, or plain attributes."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if callable(getattr(config, "to_dict", None)):
        return dict(config.to_dict())
    return dict(vars(config)) if hasattr(config, "__dict__") else {}
