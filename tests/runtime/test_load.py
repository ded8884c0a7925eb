"""Loading a bundle: what load takes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashu_compile.bundle import files
from flashu_compile.errors import (
    BackendUnavailableError,
    BundleError,
    BundleVersionError,
    ConfigurationError,
)
from flashu_compile.runtime import load
from tests.runtime.test_pipeline import BRIGHT
from tests.runtime.tiny_bundle import (
    edit_json,
    flip_byte,
)


class TestLoading:
    def test_no_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="does not exist; it is not a bundle"):
            load(tmp_path / "absent")
        with pytest.raises(BundleError, match="has no manifest"):
            load(tmp_path)

    def test_newer_schema(self, own_bundle: Path) -> None:
        edit_json(own_bundle / "manifest.json", schema=99)
        with pytest.raises(BundleVersionError, match=r"schema 99; this version reads \d+: upgrade"):
            load(own_bundle)

    def test_older_schema(self, own_bundle: Path) -> None:
        edit_json(own_bundle / "manifest.json", schema=3)
        with pytest.raises(
            BundleVersionError, match=r"schema 3; this version reads 6: build the bundle again"
        ):
            load(own_bundle)

    @pytest.mark.parametrize(
        "origins",
        [None, 5, {"model": 5}, {"model": {}}, {"model": {"files": 5}}, {"model": {"files": {"a": 5}}}],
    )
    def test_malformed_origins(self, own_bundle: Path, origins: object) -> None:
        edit_json(own_bundle / "manifest.json", origins=origins)
        with pytest.raises(BundleError, match=r"manifest\.json is not valid"):
            load(own_bundle)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', "\x00"])
    def test_malformed_manifest(self, own_bundle: Path, text: str) -> None:
        (own_bundle / "manifest.json").write_text(text)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            load(own_bundle)

    def test_plan_that_is_no_text(self, own_bundle: Path) -> None:
        (own_bundle / "plan.json").write_bytes(b"\xff{}")
        with pytest.raises(BundleError, match=r"plan\.json is damaged"):
            load(own_bundle, verify_hashes=False)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "no strict JSON"),
            ('{"schema": 2, "name": "open"}', "needs points"),
            ('{"schema": 2, "name": "raw", "t2i": {"layer_skipping": 0.5}}', "needs points"),
            (
                json.dumps(
                    {
                        "schema": 2,
                        "name": "raw",
                        "t2i": {"points": 5, "guidance_scale": 2, "time_shift": 3, "layer_skipping": 0.5},
                    }
                ),
                "layer skipping of stack 'llm' but nothing is decided",
            ),
        ],
    )
    def test_recipe_that_gives_no_plan(self, own_bundle: Path, text: str, message: str) -> None:
        (own_bundle / "recipe.json").write_text(text)
        with pytest.raises(BundleError, match=rf"recipe\.json is not the recipe of a bundle: .*{message}"):
            load(own_bundle, verify_hashes=False)

    def test_plan_that_stores_what_no_engine_gives(self, own_bundle: Path) -> None:
        plan = json.loads((own_bundle / "plan.json").read_text())
        plan["steps"][0]["store"] = True
        edit_json(own_bundle / "plan.json", steps=plan["steps"])
        with pytest.raises(BundleError, match="'denoise' has no output 'head_features'"):
            load(own_bundle, verify_hashes=False)

    def test_other_backend(self, own_bundle: Path) -> None:
        edit_json(own_bundle / "manifest.json", backend="abacus")
        with pytest.raises(BackendUnavailableError, match="no backend 'abacus'"):
            load(own_bundle)

    @pytest.mark.parametrize("name", ["plan.json", "recipe.json", "tokenizer.json"])
    def test_damaged_when_loaded(self, own_bundle: Path, name: str) -> None:
        flip_byte(own_bundle / name, 20)
        with pytest.raises(BundleError, match=f"{name} is damaged"):
            load(own_bundle)

    @pytest.mark.parametrize("name", ["denoise.onnx", "weights.bin"])
    def test_damaged_when_used(self, own_bundle: Path, name: str) -> None:
        flip_byte(own_bundle / name)
        pipe = load(own_bundle)
        for _ in range(2):
            with pytest.raises(BundleError, match=f"{name} is damaged"):
                pipe.generate("a")

    def test_hashes_are_checked_once(self, own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: list[str] = []
        entry = files.file_entry
        monkeypatch.setattr(files, "file_entry", lambda path: hashed.append(path.name) or entry(path))
        pipe = load(own_bundle)
        pipe.generate(["a", "b"])
        pipe.ask(BRIGHT, "a")
        assert hashed.count("weights.bin") == 1
        assert len(hashed) == len(set(hashed)) == 8

    def test_hashes_can_be_left_unchecked(self, own_bundle: Path) -> None:
        edit_json(own_bundle / "recipe.json", name="edited")
        edit_json(own_bundle / "plan.json", time_shift=2.0)
        load(own_bundle, verify_hashes=False).generate("a")

    @pytest.mark.parametrize(
        "name", ["denoise.onnx", "weights.bin", "plan.json", "recipe.json", "tokenizer.json"]
    )
    def test_missing_file(self, own_bundle: Path, name: str) -> None:
        (own_bundle / name).unlink()
        with pytest.raises(BundleError, match=f"{name} is missing"):
            load(own_bundle, verify_hashes=False).generate("a")

    def test_graph_that_is_no_onnx(self, own_bundle: Path) -> None:
        (own_bundle / "vision.onnx").write_bytes(b"not a graph")
        with pytest.raises(BundleError, match=r"vision\.onnx is not a sound ONNX model"):
            load(own_bundle, verify_hashes=False).ask(BRIGHT, "a")

    @pytest.mark.parametrize("name", ["../outside.onnx", "/etc/passwd", "a/../../b", ""])
    def test_files_outside_the_bundle(self, own_bundle: Path, name: str) -> None:
        manifest = json.loads((own_bundle / "manifest.json").read_text())
        manifest["engines"][0]["file"] = name
        (own_bundle / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="not a file inside the bundle"):
            load(own_bundle, verify_hashes=False).generate("a")

    def test_engine_the_plan_needs_is_missing(self, own_bundle: Path) -> None:
        manifest = json.loads((own_bundle / "manifest.json").read_text())
        del manifest["engines"][0]
        (own_bundle / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="no engine 'denoise'"):
            load(own_bundle)

    def test_graph_and_manifest_disagree(self, own_bundle: Path) -> None:
        manifest = json.loads((own_bundle / "manifest.json").read_text())
        manifest["engines"][0]["inputs"][4]["dtype"] = "float16"
        (own_bundle / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match=r"'denoise': the inputs of denoise\.onnx"):
            load(own_bundle).generate("a")

    def test_unknown_solver_and_input(self, own_bundle: Path) -> None:
        edit_json(own_bundle / "plan.json", solver="heun")
        with pytest.raises(BundleError, match="solver 'heun'"):
            load(own_bundle, verify_hashes=False).generate("a")

    @pytest.mark.parametrize("threads", [0, -1, True, "2", 1.0, 10**30])
    def test_threads(self, bundle: Path, threads: Any) -> None:
        with pytest.raises(ConfigurationError, match="threads must be an integer from 1 to 1,024"):
            load(bundle, threads=threads)
