"""The error of each linear layer of a program in int8, measured on calibration data.

Every layer is computed twice on the values that reach it in float32: in float32 and in int8. Its error is the
relative L2 distance of the two over all rows of all samples, so that errors of earlier layers do not count.
Layers whose error is above `LIMIT` stay in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashu_compile.bundle.images import Picture
from flashu_compile.bundle.manifest import GenerationSettings, TextSettings, UnderstandingSettings
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.bundle.prompts import PromptCodec, TextCodec
from flashu_compile.measure.asked import Asked, about_nothing, about_picture
from flashu_compile.measure.recorder import Recorder, RecordingEngine
from flashu_compile.operators.int8 import INT8_LINEAR, QUANTIZE, quantized_weight
from flashu_compile.passes.editing import GraphEditor, stack_of
from flashu_compile.passes.quantize_linears import is_quantizable, weight_name
from flashu_compile.program.program import Program
from flashu_compile.recipe.plan import compile_plan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.sampler import prompt_pair, sample

#: The largest relative error of a layer that is computed in int8.
LIMIT = 0.05
#: How many prompts and questions it is measured on; a layer sees hundreds of rows of each.
SAMPLES = 3
_POINTS = 8  # of the trajectory that is looked at


@dataclasses.dataclass(frozen=True)
class LinearError:
    """A layer's error. `weight`: its name in the checkpoint. `part`: stack, or "other". `error`: relative L2."""

    weight: str
    part: str
    error: float

    @property
    def sensitive(self) -> bool:
        """Return whether the error is above `LIMIT` or not a number."""
        # Not `error > LIMIT`: a NaN is sensitive too.
        return not self.error <= LIMIT


def generation_errors(
    program: Program, codec: PromptCodec, settings: GenerationSettings, recipe: Recipe, prompts: Sequence[str]
) -> tuple[LinearError, ...]:
    """Measure on trajectories of the captured generation step, or on its own sample if there are no prompts.

    `recipe` must be resolved; trajectories have its constant guidance scale, a few points, and no technique.
    """
    watch = _Watch(program)
    if not prompts:
        watch.record(program.sample)
    plan = compile_plan(recipe.t2i.published_sampler(), points=_POINTS)
    for index, prompt in enumerate(prompts):
        noise = initial_noise(index, 0, (1, *settings.latent_shape))
        sample(RecordingEngine(watch, lambda _: None), plan, prompt_pair(codec, settings, prompt), noise)
    return watch.errors()


def understanding_errors(
    program: Program,
    codec: PromptCodec,
    settings: UnderstandingSettings,
    questions: Sequence[tuple[Picture, str]],
) -> tuple[LinearError, ...]:
    """Measure on questions through the captured understanding forward, or on its own sample if there are none."""
    return _answering_errors(program, (about_picture(codec, settings, *question) for question in questions))


def text_errors(
    program: Program, codec: TextCodec, settings: TextSettings, prompts: Sequence[str]
) -> tuple[LinearError, ...]:
    """Measure on questions through the captured completion forward, or on its own sample if there are none."""
    return _answering_errors(program, (about_nothing(codec, settings, prompt) for prompt in prompts))


def _answering_errors(program: Program, asked: Iterable[Asked]) -> tuple[LinearError, ...]:
    watch = _Watch(program)
    samples: list[Mapping[str, Tensor]] = [question.inputs() for question in asked]
    for inputs in samples or [program.sample]:
        watch.record(inputs)
    return watch.errors()


class _Watch(Recorder):
    """Runs a program and sums the squares of values and int8 errors for every layer that can be int8."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, {})
        editor = GraphEditor(program)
        linears = editor.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        self._layers = {n.name: n for n in linears if is_quantizable(editor, n)}
        self._names = {name: weight_name(editor, node) for name, node in self._layers.items()}
        self._weights = {name: quantized_weight(_stored(editor, node)) for name, node in self._layers.items()}
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._layers:
            (x, _, *rest), _ = self.fetch_args_kwargs_from_env(n)
            bias = rest[0] if rest else None
            short = INT8_LINEAR(*QUANTIZE(x), *self._weights[n.name], bias)
            sums = self._sums[n.name]
            sums[0] += (short - value).double().square().sum().item()
            sums[1] += value.double().square().sum().item()
        return value

    def errors(self) -> tuple[LinearError, ...]:
        """Return the errors in graph order; of layers that share a weight, the largest."""
        found: dict[str, LinearError] = {}
        for name, node in self._layers.items():
            off, size = self._sums[name]
            error = float(f"{math.sqrt(off / size) if size else 0.0:.2e}")
            weight = self._names[name]
            if weight not in found or error > found[weight].error:
                found[weight] = LinearError(weight, stack_of(self.program, node) or "other", error)
        return tuple(found.values())


def _stored(editor: GraphEditor, node: fx.Node) -> Tensor:
    weight = editor.stored(node.args[1])  # type: ignore[arg-type]
    assert weight is not None
    return weight.detach()


def report(
    errors: Mapping[str, Sequence[LinearError]], parts: Mapping[str, str], samples: Mapping[str, int]
) -> dict[str, Any]:
    """Return the report's entry `int8`: the limit, and by task the samples, parts and layers.

    `samples` are their numbers by task, 0 where random values were used.
    """
    tasks = {}
    for task, layers in errors.items():
        meant = [layer for layer in layers if parts[layer.part] == "int8"]
        tasks[task] = {
            "samples": samples[task],
            "parts": dict(_parts(meant)),
            "layers": [{**dataclasses.asdict(layer), "sensitive": layer.sensitive} for layer in meant],
        }
    return {"limit": LIMIT, "tasks": tasks}


def _parts(layers: Sequence[LinearError]) -> Iterator[tuple[str, dict[str, float]]]:
    for part in dict.fromkeys(layer.part for layer in layers):
        errors = [layer.error for layer in layers if layer.part == part]
        sensitive = sum(layer.sensitive for layer in layers if layer.part == part)
        mean = float(f"{math.sqrt(sum(e * e for e in errors) / len(errors)):.2e}")
        yield part, {"layers": len(errors), "sensitive": sensitive, "mean": mean, "worst": max(errors)}
