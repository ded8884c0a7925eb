"""Show-o2 from a state dict: the configuration it implies, and the network that takes its tensors.

Published checkpoints say little about themselves: the constructor's arguments and the tensors. Sizes come
from the tensors, which cannot lie; what tensors do not show (head counts, rotary base, image grid) comes from
the language model's configuration, the constructor's arguments, or the known sizes of Qwen2.5 and SigLIP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from flashu_compile.errors import CheckpointError, UnsupportedModelError
from flashu_compile.models.showo2.config import (
    CONFIGURATIONS,
    HeadConfig,
    LLMConfig,
    SemanticConfig,
    Showo2Config,
)
from flashu_compile.models.showo2.modeling import Showo2

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

# The published sequences hold at least this many prompt tokens and are rounded up to a multiple of 128.
_PROMPT_TOKENS = 251
_SEQUENCE_MULTIPLE = 128


class Declared(NamedTuple):
    """What is declared about a model beside its tensors. `None` and empty mappings mean: not declared.

    `settings` are the constructor's arguments under their published names; `llm` is a Hugging Face Qwen2
    configuration as a dictionary; `semantic_heads` the attention heads of `und_trans`.
    """

    settings: Mapping[str, Any] = {}
    llm: Mapping[str, Any] | None = None
    semantic_heads: int | None = None


def declared_by(module: nn.Module) -> Declared:
    """Read what an instance of the published class, or of one like it, declares about itself."""
    heads = _mapping(getattr(getattr(module, "und_trans", None), "config", None)).get("num_attention_heads")
    llm = _mapping(getattr(getattr(module, "showo", None), "config", None))
    return Declared(_mapping(getattr(module, "config", None)), llm or None, heads)


def missing_signature(names: Mapping[str, Any]) -> list[str]:
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
    settings = declared.settings
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
        if settings.get(name) is not None and settings[name] != value:
            raise CheckpointError(
                f"The configuration says {name} = {settings[name]}, the weights have {value}; "
                "they belong to different models."
            )
    if grid**2 != state["position_embedding.weight"].shape[0]:
        raise CheckpointError("The position table is not square; pictures of other shapes are not supported.")
    llm, latent_grid = _llm(state, declared.llm), _latent_grid(settings, grid)
    add_time_embeds = settings.get("add_time_embeds")
    published = _published_run(llm, latent_grid)
    return Showo2Config(
        llm=llm,
        semantic=_semantic(state, declared.semantic_heads),
        head=_head(state),
        latent_channels=patch[1],
        patch_size=patch[2],
        latent_grid=latent_grid,
        position_grid=grid,
        add_time_embeds=True if add_time_embeds is None else bool(add_time_embeds),
        sequence_length=published.sequence_length if published else _sequence_length(latent_grid),
        steps=published.steps if published else Showo2Config.steps,
    )


def build(config: Showo2Config, state: Mapping[str, Tensor]) -> Showo2:
    """Build the network of `config` on the tensors of `state` themselves, in eval mode, taking no gradients.

    Nothing is copied or initialised. `showo.lm_head.weight` may be absent where it is tied. A
    `time_embed_proj` is left out where no time token asks for it (published models always carry one).

    Raises:
        CheckpointError: names or shapes differ from the configuration's; the first few are listed.
    """
    state = dict(state)
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


def _llm(state: Mapping[str, Tensor], declared: Mapping[str, Any] | None) -> LLMConfig:
    hidden, ffn = _llm_sizes(state)
    if declared is not None:
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
    said = declared or {}
    return LLMConfig(
        vocab_size=_shape(state, EMBEDDING, 2)[0],
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=_count(state, "showo.model.layers."),
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        rope_theta=float(_rope(said).get("rope_theta", LLMConfig.rope_theta)),
        rms_norm_eps=float(said.get("rms_norm_eps", LLMConfig.rms_norm_eps)),
        tie_word_embeddings=_tied(state, said),
    )


def _declared_attention(llm: Mapping[str, Any], hidden: int, ffn: int) -> Attention:
    try:
        sizes, heads = (llm["hidden_size"], llm["intermediate_size"]), int(llm["num_attention_heads"])
        kv_heads = int(llm.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"llm_config is no Qwen2 configuration: {error!r}.") from error
    if sizes != (hidden, ffn):
        raise CheckpointError(
            f"llm_config describes a model of hidden size {sizes[0]} and FFN {sizes[1]}, the weights have "
            f"{hidden} and {ffn}; pass the configuration the checkpoint was made from."
        )
    odd = {
        "hidden_act": llm.get("hidden_act", "silu") != "silu",
        "use_sliding_window": bool(llm.get("use_sliding_window", False)),
        "rope_type": _rope(llm).get("rope_type", "default") != "default",
    }
    if any(odd.values()):
        names = ", ".join(name for name, differs in odd.items() if differs)
        raise UnsupportedModelError(f"The language model is no plain Qwen2 but differs in {names}.")
    return heads, kv_heads


def _rope(llm: Mapping[str, Any]) -> dict[str, Any]:
    """Read the rotary parameters, from where transformers stores them now or stored them before v5."""
    parameters = dict(llm.get("rope_scaling") or {}) | dict(llm.get("rope_parameters") or {})
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if "rope_theta" in llm:
        parameters.setdefault("rope_theta", llm["rope_theta"])
    return parameters


def _tied(state: Mapping[str, Tensor], llm: Mapping[str, Any]) -> bool:
    """Return whether output and input embeddings are tied: the tensors decide, where both are present."""
    if LM_HEAD not in state:
        return bool(llm.get("tie_word_embeddings", True))
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
    head_dim = _shape(state, block + "self_attn.q_norm.weight", 1)[0]
    return HeadConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=_count(state, "diffusion_head_a."),
        num_attention_heads=_shape(state, block + "self_attn.q_proj.weight", 2)[0] // head_dim,
        num_key_value_heads=_shape(state, block + "self_attn.k_proj.weight", 2)[0] // head_dim,
        frequency_embedding_size=_shape(state, "time_embed.mlp.0.weight", 2)[1],
    )


def _latent_grid(settings: Mapping[str, Any], position_grid: int) -> int:
    """Return the number of image tokens per side: as configured, else as many as there are learnt positions."""
    height, width = (settings.get(f"image_latent_{side}") for side in ("height", "width"))
    if height != width:
        raise CheckpointError(f"Pictures must be square; the configuration says {height} × {width} tokens.")
    if height is None:
        return position_grid
    if not isinstance(height, int) or height < 1:
        raise CheckpointError(f"image_latent_height is {height!r}; it must be a positive number of tokens.")
    return height


def _sequence_length(latent_grid: int) -> int:
    rows = latent_grid**2 + 1 + 4 + _PROMPT_TOKENS
    return -(-rows // _SEQUENCE_MULTIPLE) * _SEQUENCE_MULTIPLE


def _published_run(llm: LLMConfig, latent_grid: int) -> Showo2Config | None:
    """Find the published configuration of this size and resolution, for the settings no checkpoint stores."""
    for known in CONFIGURATIONS.values():
        sizes = (known.llm.hidden_size, known.llm.intermediate_size, known.latent_grid)
        if sizes == (llm.hidden_size, llm.intermediate_size, latent_grid):
            return known
    return None


def _mapping(config: Any) -> dict[str, Any]:
    """Convert a configuration object to a dictionary: a mapping, one with `to_dict`, or plain attributes."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if callable(getattr(config, "to_dict", None)):
        return dict(config.to_dict())
    return dict(vars(config)) if hasattr(config, "__dict__") else {}
