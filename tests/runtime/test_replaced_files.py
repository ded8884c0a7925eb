"""Files that are replaced or written to between two engines, in both memory modes and with hashes or without."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from flashu_compile.errors import BundleError, ConfigurationError
from flashu_compile.looking.comparison.compare import compare_layers
from flashu_compile.runtime import Pipeline, load
from flashu_compile.runtime.verify import verify
from tests.runtime.tiny_bundle import accept_changes

SETTINGS = [
    {"memory": memory, "verify_hashes": hashes} for memory in ("fast", "low") for hashes in (True, False)
]


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


@pytest.mark.parametrize("settings", SETTINGS)
def test_engines_of_a_replaced_store(own_bundle: Path, pipeline: Pipeline, settings: dict) -> None:
    """Engines that exist keep the old bytes; no other is made of the new ones."""
    pipe = load(own_bundle, **settings)
    picture = pipe.generate("a")
    _replace(own_bundle / "weights.bin")
    np.testing.assert_array_equal(pipe.latents("a"), pipeline.latents("a"))
    with pytest.raises(BundleError, match=r"weights\.bin was replaced or written to while"):
        pipe.ask(picture, "what?")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *((settings, "weights.bin") for settings in SETTINGS),
        # Without hashes, what was never read may be anything.
        *((settings, "language.onnx") for settings in SETTINGS if settings["verify_hashes"]),
    ],
)
def test_no_engine_is_made_of_what_was_written_in_place(own_bundle: Path, settings: dict, name: str) -> None:
    pipe = load(own_bundle, **settings)
    picture = pipe.generate("a")
    _overwrite(own_bundle / name)
    with pytest.raises(BundleError, match=rf"{name} (was replaced or written to|is damaged)"):
        pipe.ask(picture, "what?")


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("change", [_replace, _overwrite])
def test_a_store_that_changes_while_a_session_is_made(
    own_bundle: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, memory: str, change
) -> None:
    from flashu_compile.runtime import sessions

    made, path = sessions.create_session, own_bundle / "weights.bin"
    before = path.read_bytes()

    def changed(*arguments, **options):
        change(path)
        return made(*arguments, **options)

    pipe = load(own_bundle, memory=memory)
    monkeypatch.setattr(sessions, "create_session", changed)
    with pytest.raises(BundleError, match=r"weights\.bin was replaced or written to"):
        pipe.latents("a")
    monkeypatch.undo()
    path.write_bytes(before)
    again = load(own_bundle, memory=memory)
    np.testing.assert_array_equal(again.latents("a"), pipeline.latents("a"))


def test_verify_holds_what_it_runs(own_bundle: Path) -> None:
    """The store is replaced after its hash was found in order, and before the first engine is made."""

    def tell(name: str) -> None:
        if name == "denoise":
            _replace(own_bundle / "weights.bin")

    found = verify(own_bundle, progress=tell)
    assert all(row.ok for row in found.files)
    assert not any(row.ok for row in found.outputs)
    assert all("weights.bin was replaced" in row.note for row in found.outputs)


def _digest(directory: Path) -> str:
    return hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()


def test_a_digest_pins_the_bundle(own_bundle: Path, pipeline: Pipeline) -> None:
    digest = _digest(own_bundle)
    for given in (digest, digest.upper()):
        pipe = load(own_bundle, digest=given)
        np.testing.assert_array_equal(pipe.latents("a"), pipeline.latents("a"))
        assert verify(own_bundle, digest=given).ok
    # As somebody would who wants another bundle to look whole.
    _overwrite(own_bundle / "weights.bin")
    accept_changes(own_bundle, "weights.bin")
    load(own_bundle).latents("a")
    for use in (load, verify, lambda path, digest: compare_layers(path, "onnx", digest=digest)):
        with pytest.raises(
            BundleError, match=f"has the SHA-256 {_digest(own_bundle)}, not the digest {digest}"
        ):
            use(own_bundle, digest=digest)


@pytest.mark.parametrize("digest", ["", "abc", "g" * 64, "a" * 63, "a" * 65, 5, b"a" * 64, "a" * 64 + "\n"])
def test_what_is_no_digest(bundle: Path, digest: object) -> None:
    with pytest.raises(ConfigurationError, match=r"[Dd]igest"):
        load(bundle, digest=digest)  # type: ignore[arg-type]
