from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashu_compile.runtime import binding
from flashu_compile.runtime.binding import BoundRuns
from flashu_compile.runtime.sessions import create_session
from tests.runtime.tiny_bundle import LATENT_SHAPE


def test_bound_runs_give_what_ordinary_runs_give(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "MAX_SHAPES", 2)
    session = create_session(bundle / "vae_decode.onnx", "cpu", threads=1)
    bound = BoundRuns(session, ["pixels"], "cpu")
    generator = np.random.default_rng(0)
    kept = []
    # Of three sets of shapes the last has no buffers.
    for batch in (1, 2, 1, 2, 3, 1, 3):
        latents = generator.standard_normal((batch, *LATENT_SHAPE), dtype=np.float32)
        (pixels,) = bound.run({"latents": latents})
        kept.append((pixels, session.run(["pixels"], {"latents": latents})[0]))
    # Compared at the end: an output must not change when the buffers are used again.
    for given, expected in kept:
        np.testing.assert_array_equal(given, expected)
    assert len(bound._buffers) == 2


def test_buffers_stay_where_they_are(bundle: Path) -> None:
    session = create_session(bundle / "vae_decode.onnx", "cpu", threads=1)
    bound = BoundRuns(session, ["pixels"], "cpu")
    latents = np.ones((1, *LATENT_SHAPE), np.float32)
    bound.run({"latents": latents})
    (buffers,) = bound._buffers.values()
    places = [value.data_ptr() for value in (*buffers.inputs.values(), *buffers.outputs)]
    bound.run({"latents": 2 * latents})
    (again,) = bound._buffers.values()
    assert [value.data_ptr() for value in (*again.inputs.values(), *again.outputs)] == places
    np.testing.assert_array_equal(latents, 1)
