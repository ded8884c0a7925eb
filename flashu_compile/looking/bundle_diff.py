"""Differences of two bundles: facts, recipe, step plan, and engines with their contents and work. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import RECIPE, Manifest, read_manifest
from flashu_compile.recipe import view as recipe_view
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.report.contents import read_report
from flashu_compile.runtime.parts import read_plan
from flashu_compile.system.paths import absolute

_FACTS = ("model", "tasks", "backend", "precision")


def bundle_recipe(files: BundleFiles) -> Recipe:
    """Read the recipe of a bundle. Raises `BundleError` or `RecipeError` if it is damaged."""
    for name in files.manifest.files:
        if Path(name).stem == Path(RECIPE).stem:
            files.path(name)  # its neurons lie in a file of their own
    return Recipe.load(files.directory / RECIPE)


class OpenBundle:
    """The parts of a bundle that describe it. Raises `BundleError` or `RecipeError` if one is damaged."""

    def __init__(self, directory: Path) -> None:
        directory = absolute(directory)
        self.manifest: Manifest = read_manifest(directory)
        files = BundleFiles(directory, self.manifest)
        self.recipe = bundle_recipe(files)
        self.report = read_report(files)
        self.plan = read_plan(files)

    @property
    def runs(self) -> dict[str, int]:
        """Return the number of evaluations in a trajectory by engine."""
        return dict(Counter(step.engine for step in self.plan.steps)) if self.plan else {}

    def figures(self, engine: str) -> dict[str, int]:
        """Return nodes, parameters, FLOPs and bytes moved of an engine, and the bytes of its graph."""
        counts: Mapping[str, Any] = self.report.get("engines", {}).get(engine, {})
        sums = {name: sum(counts.get(name, {}).values()) for name in ("parameters", "flops", "bytes")}
        graph = self.manifest.files.get(self.manifest.engine(engine).file)
        return {"nodes": counts.get("nodes", 0), **sums, "graph_bytes": 0 if graph is None else graph.bytes}

    def sizes(self) -> dict[str, int]:
        """Return the sizes in the report, and that of all files, in bytes."""
        total = sum(entry.bytes for entry in self.manifest.files.values())
        return {**self.report.get("sizes", {}), "all_files_bytes": total}


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Compare two bundles: by part, [in A, in B] of everything that differs; equal parts are empty.

    `facts`, `origins` (of the weights), `versions`, `plan` (evaluations by engine), `sizes`: by name.
    `recipe`: lines, as `recipe diff` prints. `engines`: those of one side alone, and for those of both the
    figures that differ. `contents`: names of files of both whose contents differ. `equal`: whether the
    manifests, and so all files, are equal.
    """
    one, two = OpenBundle(a), OpenBundle(b)
    names = [{engine.name for engine in side.manifest.engines} for side in (one, two)]
    return {
        "equal": one.manifest == two.manifest,
        "facts": _changed(*({name: getattr(s.manifest, name) for name in _FACTS} for s in (one, two))),
        "origins": _changed(_origins(one.manifest), _origins(two.manifest)),
        "versions": _changed(one.manifest.versions, two.manifest.versions),
        "recipe": recipe_view.diff(one.recipe, two.recipe),
        "plan": _changed(one.runs, two.runs),
        "sizes": _changed(one.sizes(), two.sizes()),
        "engines": {
            "only_in_a": sorted(names[0] - names[1]),
            "only_in_b": sorted(names[1] - names[0]),
            "changed": dict(_changed_engines(one, two, sorted(names[0] & names[1]))),
        },
        "contents": sorted(_other_contents(one.manifest, two.manifest)),
    }


def _origins(manifest: Manifest) -> dict[str, str | None]:
    """Return the manifest's facts about the weights of each part, by a name for each fact."""
    told: dict[str, str | None] = {}
    for part, origin in manifest.origins.items():
        told |= {f"{part} {name}": getattr(origin, name) for name in ("repository", "revision", "license")}
        if origin.files is None:
            told[f"{part} weights"] = "in memory"
        else:
            told |= {f"{part} {name}": entry.sha256 for name, entry in origin.files.items()}
    return told


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*a, *b])
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}


def _changed_engines(
    a: OpenBundle, b: OpenBundle, names: list[str]
) -> Iterator[tuple[str, dict[str, list[int]]]]:
    for name in names:
        changes = _changed(a.figures(name), b.figures(name))
        if changes:
            yield name, changes


def _other_contents(a: Manifest, b: Manifest) -> Iterator[str]:
    """Yield the names of files of both whose contents differ."""
    for name in a.files.keys() & b.files.keys():
        if a.files[name] != b.files[name]:
            yield name
