"""Settings of generation, of a `generation_config.json` or a user: how the codes of a picture are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashu_compile import arguments
from flashu_compile.bundle.sampling import Sampling
from flashu_compile.errors import CheckpointError, ConfigurationError, InputError

#: Settings by which tokens are chosen, and those of them that are carried out.
_CARRIED = ("temperature", "top_k", "top_p")
_OTHERS = ("top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty")


def generation_of(network: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of generation of a model, and those that a user gave instead."""
    replaced = arguments.mapping("generation", options.get("generation"))
    return {**network.generation_config.to_diff_dict(), **replaced}


def code_choices(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return how codes are chosen by settings of generation: by plain probability where they do not say.

    Raises `ConfigurationError` on a setting that is not carried out, `CheckpointError` on a value out of range.
    """
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    others = [name for name in _OTHERS if generation.get(name) not in (None, 0, 1)]
    if others:
        raise ConfigurationError(
            f"The generation_config asks for {others[0]} = {generation[others[0]]!r}, by which codes are not chosen; "
            f"if pictures without it will do, pass model_options={{'generation': {{'{others[0]}': None}}}}."
        )
    told = {name: generation[name] for name in _CARRIED if generation.get(name) is not None}
    try:
        Sampling(**told)
    except InputError as error:
        raise CheckpointError(f"The generation_config does not say how codes are chosen: {error}") from error
    return told
