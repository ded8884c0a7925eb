"""Bundles that benchmarks build, kept in a folder by what went into them: built once, used by every later run."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import flashu_compile
from benchmarks.geometries import VAE, random_model, tokenizer
from benchmarks.measuring import seconds
from benchmarks.records import digest, recipe_digest, write_atomically
from flashu_compile.bundle.manifest import MANIFEST
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model, export
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.recipe.presets import find_recipe
from flashu_compile.recipe.recipe import Recipe

_SOURCE = Path(flashu_compile.__file__).resolve().parent
_SERVING = ("runtime", "cli")  # no bundle depends on what only serves it


class Bundles:
    """Bundles of one geometry's random model. A bundle is built anew where model, recipe or compiler differ."""

    def __init__(self, folder: Path, config: Showo2Config) -> None:
        self.folder, self.config = folder, config
        self.build_seconds: dict[str, float] = {}  # by recipe; the model is traced before, once
        self._captured: dict[str, CapturedModel] = {}

    def path(
        self, task: str, recipe: str | Recipe, precision: str = "float32", backend: str = "onnxruntime"
    ) -> Path:
        """The bundle's folder, built if it is not there."""
        chosen = find_recipe(recipe)
        built_by = [] if backend == "onnxruntime" else [backend]
        made_of = [self.config.to_dict(), task, recipe_digest(chosen, task), precision]
        name = digest(*made_of, *built_by, compiler_digest())
        title = "_".join([chosen.name, *[precision] * (precision != "float32"), *built_by])
        path, note = self.folder / f"{task}-{title}-{name}", self.folder / f"{task}-{title}-{name}.json"
        if not (path / MANIFEST).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            print(f"building {path.name}", flush=True)
            if task not in self._captured:
                self._captured[task] = capture_model(
                    random_model(self.config), task, vae=VAE, tokenizer=tokenizer()
                )
            model = self._captured[task]
            taken, _ = seconds(
                lambda: export(
                    model,
                    task,
                    recipe=chosen,
                    precision=precision,
                    backend=backend,
                    output=path,
                    cache=False,
                )
            )
            write_atomically(note, lambda draft: draft.write_text(json.dumps({"seconds": taken})))
        if note.is_file():
            self.build_seconds[title] = json.loads(note.read_text())["seconds"]
        return path


@functools.cache
def compiler_digest() -> str:
    """Names the code that bundles depend on, the making of models included."""
    files = {
        str(file.relative_to(_SOURCE)): file.read_text(encoding="utf-8")
        for folder in (_SOURCE, _SOURCE / "passes", _SOURCE / "exporters")
        for file in folder.rglob("*.py")
        if file.relative_to(_SOURCE).parts[0] not in _SERVING
    }
    return digest(files, Path(__file__).with_name("geometries.py").read_text(encoding="utf-8"))
