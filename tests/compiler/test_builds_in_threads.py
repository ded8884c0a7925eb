"""Builds in several threads of a process take turns, and give what one alone gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flashu_compile
from tests.support.tiny import VAE, shallow_model, tokenizer


def test_two_builds_at_once_are_those_of_one(tmp_path: Path) -> None:
    models = {name: shallow_model() for name in ("alone", "first", "second")}

    def built(name: str) -> str:
        bundle = flashu_compile.export(
            models[name],
            "mmu",
            output=tmp_path / name,
            vae=VAE,
            tokenizer=tokenizer(),
            cost_samples=0,
            cache=False,
        )
        return bundle.digest

    alone = built("alone")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(built, ["first", "second"])) == [alone, alone]
