"""What a build hands to its page, written by hand: a lossy recipe for both tasks, with everything there is to show."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from flashu_compile.bundle.manifest import EngineSpec, Manifest
from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.bundle.settings import GenerationSettings, Template, UnderstandingSettings
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.report.pictures import Seen

LAYERS = 6


@dataclasses.dataclass(frozen=True)
class Shown:
    """As `flashu_compile.report.pictures.Comparison`."""

    text: str
    pictures: tuple[Image.Image, ...]
    kept: np.ndarray | None = None


def recipe() -> Recipe:
    kept = {"llm": {block: np.arange(48) for block in range(LAYERS)}}
    t2i = T2IConfig(
        points=13, guidance_scale=5.0, time_shift=3.0, guidance=((0, 0.75), (0.7, 1.0)), pruning={"llm": 0.25},
        full_ffn=0.25, layer_skipping={"llm": 0.2}, skipping_interval=6, head_cache=3, as_published=True,
    )  # fmt: skip
    phases = (Phase(0.0, {"llm": (1,)}), Phase(0.5, {"llm": (3,)}))
    return Recipe(
        "small",
        t2i,
        MMUConfig(pruning={"llm": 0.25}, token_pruning=0.5),
        {"t2i": Decisions(kept, phases), "mmu": Decisions(kept)},
        decoder="llm",
    )


def exact() -> Recipe:
    return Recipe("exact").resolved(points=13, guidance_scale=5.0, time_shift=3.0)


def plan(of: Recipe) -> StepPlan:
    return of.plan()


def manifest(of: Recipe) -> Manifest:
    steps = list(dict.fromkeys(step.engine for step in plan(of).steps))
    prologues = {step: f"{step}_prologue" for step in steps if step != "reuse"}
    schedules = {step: f"{step}_schedule" for step in steps}
    engines = [
        EngineSpec(name, "t2i", f"{name}.onnx", (), (), "", prologues.get(name), schedules.get(name))
        for name in (*prologues.values(), *schedules.values(), *steps, "vae_decode")
    ]
    engines += [
        EngineSpec("vision", "mmu", "vision.onnx", (), (), ""),
        EngineSpec("language_prologue", "mmu", "language_prologue.onnx", (), (), ""),
        EngineSpec("language", "mmu", "language.onnx", (), (), "", "language_prologue"),
    ]
    return Manifest(
        model="a model",
        tasks=("t2i", "mmu"),
        backend="onnxruntime",
        precision="float32",
        recipe=of.name,
        engines=tuple(engines),
        generation=GenerationSettings((3, 4, 4), 96, 18, 60, (8, 8), Template(after=(1,), picture=1), 0),
        understanding=UnderstandingSettings(Template(picture=0), (), 96, 30, pictures=PictureRules(8, 8, ())),
        versions={"flashu-compile": "0.1.0", "torch": "2.13.0"},
        files={},
    )


def counts(flops: int, rows: list[int], **more: Any) -> dict[str, Any]:
    return {
        "batch": 2,
        "operations": 100,
        "parameters": {"llm": 1_000_000},
        "flops": {"llm": flops},
        "bytes": {"llm": 50 * flops},
        "rows": {"llm": rows},
        "decoder": "llm",
        **more,
    }


def report(of: Recipe, *, lossy: bool) -> dict[str, Any]:
    sources = {"vae_decode": "vae_decode", "vision": "understand", "language": "understand"}
    engines = {
        e.name: counts(
            100_000_000, [200, 200, 100, 100, 100, 100], nodes=80, operators={"Gemm": 80}, errors={"out": 3e-7},
            captured=sources.get(e.name.removesuffix("_prologue"), "denoise"),
        )
        for e in manifest(of).engines
    }  # fmt: skip
    captured = {
        "denoise": counts(1_000_000_000, [904] * LAYERS),
        "vae_decode": counts(100_000_000, []),
        "understand": counts(700_000_000, [400] * LAYERS),
    }
    passes = [
        {"program": "denoise", "name": "RemoveDeadCode", "kind": "exact", "changes": ["x"], "error": 0.0}
    ]
    return {
        "engines": engines,
        "captured": captured,
        "published_points": 25,
        "passes": passes + (_lossy_passes() if lossy else []),
        "calibration": _calibration() if lossy else {},
        "cost": _cost() if lossy else {},
        "sizes": {"weights_bytes": 4_000_000, "graphs_bytes": 300_000, "checkpoint_bytes": 5_000_000},
        "weight_store": {},
    }  # fmt: skip


def _lossy_passes() -> list[dict[str, Any]]:
    changes = ["stack llm, block 0: 64 → 48 neurons", "stack llm, block 1: 64 → 48 neurons"]
    return [
        {
            "program": "denoise_pruned_skip1",
            "name": "PruneFFN",
            "kind": "lossy",
            "changes": changes,
            "error": 0.21,
        }
    ]


def _calibration() -> dict[str, Any]:
    importance = [0.31, 0.004, 0.08, 0.05, 0.11, 0.42]
    curve = [float(f"{value:.3g}") for value in np.exp(-np.linspace(0, 4, 41))]
    scores = {"llm": [{"block": b, "width": 64, "kept": 48, "curve": curve} for b in range(LAYERS)]}
    return {
        "t2i": {
            "samples": 2,
            "layer_importance": {
                "llm": [
                    {"start": 0.0, "importance": importance},
                    {"start": 0.5, "importance": importance[::-1]},
                ]
            },
            "neuron_scores": scores,
        },
        "mmu": {
            "samples": 2,
            "layer_importance": {"llm": importance},
            "neuron_scores": scores,
            "value_norms": [{"image": 4.0 + layer, "text": 2.0 + layer / 2} for layer in range(LAYERS)],
        },
    }


def _cost() -> dict[str, Any]:
    return {
        "t2i": {
            "samples": [
                {"prompt": "a red <circle>", "seed": 0, "error": 0.213},
                {"prompt": "two blue squares", "seed": 1, "error": 0.187},
            ],
            "error": 0.2,
            "techniques": [
                {"name": "FFN pruning", "error": 0.09},
                {"name": "layer skipping", "error": 0.12},
                {"name": "head cache", "error": 0.03},
            ],
            "evaluations": {"exact": 24, "recipe": 12},
            "held_out": True,
        },
        "mmu": {
            "samples": [
                {"question": "what color?", "answer": "red", "tokens": 2, "error": 0.4, "same_tokens": 1}
            ],
            "error": 0.4,
            "same_tokens": 1,
            "tokens": 2,
            "techniques": [{"name": "FFN pruning", "error": 0.1}, {"name": "token pruning", "error": 0.35}],
            "held_out": False,
        },
    }


def comparisons() -> dict[str, tuple[Shown, ...]]:
    colours = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    exact_one, lossy_one, other, asked = (Image.fromarray(value) for value in colours)
    kept = np.arange(16) % 2 == 0
    return {
        "t2i": (Shown("a red <circle>", (exact_one, lossy_one)), Shown("two blue squares", (other, other))),
        "mmu": (Shown("what color?", (asked,), kept),),
    }


def beside_exact() -> dict[str, Any]:
    def side(title: str, picture: float, evaluations: int) -> dict[str, Any]:
        return {
            "title": title,
            "seconds": {
                task: {"median": value, "low": value * 0.9, "high": value * 1.1}
                for task, value in (("t2i", picture), ("mmu", 0.12))
            },
            "load_seconds": 0.4,
            "peak_bytes": 300_000_000,
            "evaluations": evaluations,
        }

    def part(name: str, task: str, score: float, lowest: float) -> dict[str, Any]:
        return {
            "name": name,
            "task": task,
            "score": score,
            "other": 1.0,
            "kept": score,
            "lowest": lowest,
            "clusters": 40,
        }

    return {
        "speed": {
            "sides": [side("this bundle", 0.31, 15), side("exact", 0.961, 49)],
            "faster": {
                "t2i": {"median": 3.1, "low": 2.9, "high": 3.3},
                "mmu": {"median": 1.0, "low": 0.9, "high": 1.1},
            },
            "rounds": 9,
            "tokens": 32,
            "threads": 2,
            "machine": {"processor": "a <processor>", "cores": 2},
        },
        "quality": {
            "parts": [part("ssim", "t2i", 0.988, 0.8791), part("next_tokens", "mmu", 1.0, 0.9)],
            "data": "the neutral set",
            "split": "held-out",
            "seed": 0,
        },
    }


def seen() -> Seen:
    exact_one, own = (Image.new("RGB", (8, 8), colour) for colour in ((10, 20, 200), (15, 15, 0)))
    return Seen("a red <circle>", 3, exact_one, own, 0.91)
