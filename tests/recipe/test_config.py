"""T2IConfig and MMUConfig: what they refuse, and how they say so."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flashu_compile.errors import ConfigurationError
from flashu_compile.recipe.config import MMUConfig, T2IConfig, config_from_dict


def test_defaults_switch_everything_off() -> None:
    t2i, mmu = T2IConfig(), MMUConfig()
    assert (t2i.pruning, t2i.layer_skipping, mmu.pruning, mmu.layer_skipping) == ({}, {}, {}, {})
    assert (t2i.head_cache, t2i.full_ffn, t2i.guidance, mmu.token_pruning) == (1, 0, ((0, 1),), 0)


def test_shares_by_stack() -> None:
    config = MMUConfig(pruning={"trunk": 0.25, "eye": 0.5, "painter": 0}, layer_skipping=0.25)
    assert (config.pruned, config.skipping) == ({"eye": 0.5, "trunk": 0.25}, {"decoder": 0.25})
    assert config == MMUConfig(
        pruning={"eye": np.float32(0.5), "trunk": 0.25}, layer_skipping={"decoder": 0.25}
    )  # type: ignore[dict-item]
    assert repr(config) == repr(MMUConfig(pruning={"eye": 0.5, "trunk": 0.25}, layer_skipping=0.25))
    written = {"pruning": {"trunk": 0.25, "eye": 0.5, "painter": 0}, "layer_skipping": 0.25}
    assert config_from_dict(MMUConfig, written, "'mmu'") == config


def test_numbers_become_plain_ones() -> None:
    """So that two configurations that are equal are also written in the same way."""
    config = T2IConfig(points=np.int64(5), guidance_scale=3, guidance=[[0, 1], [np.float32(0.5), None]])  # type: ignore[arg-type]
    assert config == T2IConfig(5, 3.0, guidance=((0.0, 1.0), (0.5, None)))
    assert repr(config) == repr(T2IConfig(5, 3.0, guidance=((0.0, 1.0), (0.5, None))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": 1}, "points must be an integer from 2 to 1,000, not 1"),
        ({"points": 2.0}, "points must be an integer"),
        ({"points": True}, "points must be an integer"),
        ({"points": 1001}, "points must be an integer from 2 to 1,000, not 1001"),
        (
            {"points": 10**5000},
            "points must be an integer .*, not a value of type int that cannot be printed",
        ),
        ({"guidance": ((k / 2000, 1) for k in range(3))}, "guidance must be a list of pairs"),
        ({"solver": ["euler"]}, "solver must be one of euler, ab2"),
        ({"time_shift": 1e-20}, "time_shift must be a number at least 0.0001"),
        ({"guidance_scale": -1}, "guidance_scale must be a number at least 0 and at most 10000, not -1"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a number .*, not nan"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number .*, not '5'"),
        ({"time_shift": 0}, "time_shift must be a number at least 0.0001"),
        ({"solver": "heun"}, "solver must be one of euler, ab2, not 'heun'"),
        ({"pruning": 1}, "pruning must be a number at least 0 and below 1, not 1"),
        ({"pruning": {"eye": -0.1}}, "pruning of stack 'eye' must be a number"),
        ({"pruning": None}, "pruning must be a number .*, not None"),
        ({"pruning": {"eye": False}}, "pruning of stack 'eye' must be a number .*, not False"),
        ({"pruning": {1: 0.1}}, "pruning must be a mapping from names to values"),
        ({"layer_skipping": 1.5}, "layer_skipping must be a number"),
        ({"full_ffn": 1.1}, "full_ffn must be a number at least 0 and at most 1"),
        ({"full_ffn_at": "middle"}, "full_ffn_at must be one of first, last"),
        ({"width_multiple": 0}, "width_multiple must be an integer from 1"),
        ({"skipping_interval": 0}, "skipping_interval must be an integer from 1 to 1,000"),
        ({"head_cache": 0}, "head_cache must be an integer from 1 to 1,000"),
        ({"head_cache": 5, "head_extrapolation": 1}, "head_extrapolation must be true or false"),
        ({"as_published": None}, "as_published must be true or false"),
        ({"head_extrapolation": True}, "head_extrapolation needs a head cache"),
        ({"guidance": 3}, "guidance must be a list of pairs .*, not 3"),
        ({"guidance": ()}, "guidance must be a list of pairs"),
        ({"guidance": (0, 1)}, "0 is not such a pair"),
        ({"guidance": ((0, 1, 2),)}, "is not such a pair"),
        ({"guidance": ((0.5, 1),)}, "guidance must start at 0"),
        ({"guidance": ((0, 1), (0.5, 1), (0.5, 2))}, "in rising order, not at 0, 0.5, 0.5"),
        ({"guidance": ((0, 1), (1, 1))}, "at least 0 and below 1"),
        ({"guidance": ((0, -1),)}, "must have a factor from 0"),
        ({"guidance": ((0, math.inf),)}, "must have a factor"),
        ({"guidance": ((0, True),)}, "must have a factor"),
    ],
)
def test_t2i_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        T2IConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pruning": 1}, "pruning must be a number"),
        ({"pruning": "x"}, "pruning must be a number"),
        ({"layer_skipping": -1}, "layer_skipping must be a number"),
        ({"token_pruning": 1.0}, "token_pruning must be a number at least 0 and below 1"),
        ({"token_layer": -1}, "token_layer must be an integer from 0"),
        ({"token_layer": 1.5}, "token_layer must be an integer"),
        ({"token_scorer": "attention"}, "token_scorer must be one of v_norm, random, duplication"),
        ({"width_multiple": 0.5}, "width_multiple must be an integer"),
    ],
)
def test_mmu_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MMUConfig(**values)


@pytest.mark.parametrize("zero", [0.0, 0.999])
def test_the_ends_of_ranges_are_allowed(zero: float) -> None:
    T2IConfig(2, 0, 1e4, full_ffn=1.0, pruning=zero, layer_skipping={"eye": zero})
    MMUConfig(token_pruning=zero, token_layer=0)


def test_from_a_dict() -> None:
    assert config_from_dict(MMUConfig, {"token_layer": 3}, "'mmu'") == MMUConfig(token_layer=3)
    with pytest.raises(
        ConfigurationError, match=r"'t2i' is not valid: there is no field 'tau' in .*, only points, "
    ):
        config_from_dict(T2IConfig, {"tau": 11}, "'t2i'")
    with pytest.raises(ConfigurationError, match=r"'t2i' .* expected int | null, got str at \$.points"):
        config_from_dict(T2IConfig, {"points": "35"}, "'t2i'")
