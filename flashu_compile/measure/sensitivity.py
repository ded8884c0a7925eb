"""The error of each linear layer of a program in int8, measured on calibration data.

Every layer is computed twice on the values that reach it in float32: in float32 and in int8. Its error is the
relative L2 distance of the two over all rows of all samples, so that errors of earlier layers do not count.
Layers whose error is above `LIMIT` stay in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.bundle.images import Picture
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.bundle.precision import OTHER
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import GenerationSettings, TextSettings, UnderstandingSettings
from flashu_compile.measure.asked import Asked, about_nothing, about_picture
from flashu_compile.measure.recorder import Recorder, RecordingEngine
from flashu_compile.operators.int8 import QUANTIZE, quantized_weight
from flashu_compile.passes.editing import GraphEditor, stack_of
from flashu_compile.passes.quantize_linears import is_quantizable, weight_name
from flashu_compile.program.program import Program, Role
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


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A captured program of a task, and what is run through it: `outputs` gives what a task makes of a recorder."""

    program: Program
    outputs: Callable[[Recorder], NDArray[Any]]

    def errors(self) -> tuple[tuple[LinearError, ...], NDArray[Any]]:
        """Measure the error of each layer that can be int8; return them with the outputs in float32."""
        watch = _Watch(self.program)
        outputs = self.outputs(watch)
        return watch.errors(), outputs


def generation_probe(
    program: Program, codec: TextCodec, settings: GenerationSettings, recipe: Recipe, prompts: Sequence[str]
) -> Probe:
    """Probe final latents of the captured generation step, or its velocity on its own sample if there are no prompts.

    `recipe` must be resolved; trajectories have its constant guidance scale, a few points, and no technique.
    """
    plan = compile_plan(recipe.t2i.published_sampler(), points=_POINTS)

    def outputs(recorder: Recorder) -> NDArray[Any]:
        if not prompts:
            return recorder.record(program.sample)[Role.VELOCITY].numpy()
        engine, latents = RecordingEngine(recorder, lambda _: None), []
        for index, prompt in enumerate(prompts):
            noise = initial_noise(index, 0, (1, *settings.latent_shape))
            latents.append(sample(engine, plan, prompt_pair(codec, settings, prompt), noise))
        return np.concatenate(latents)

    return Probe(program, outputs)


def understanding_probe(
    program: Program,
    codec: TextCodec,
    settings: UnderstandingSettings,
    questions: Sequence[tuple[Picture, str]],
) -> Probe:
    """Probe the logits of the next token after questions, or on the captured program's own sample if there are none."""
    return _answer_probe(program, [about_picture(codec, settings, *question) for question in questions])


def text_probe(program: Program, codec: TextCodec, settings: TextSettings, prompts: Sequence[str]) -> Probe:
    """Probe the logits of the next token as `understanding_probe` does, of the captured completion forward."""
    return _answer_probe(program, [about_nothing(codec, settings, prompt) for prompt in prompts])


def _answer_probe(program: Program, asked: Sequence[Asked]) -> Probe:
    given: Sequence[Mapping[str, Tensor]] = [question.inputs() for question in asked] or [program.sample]

    def outputs(recorder: Recorder) -> NDArray[Any]:
        return np.concatenate([recorder.record(inputs)[Role.LOGITS].numpy() for inputs in given])

    return Probe(program, outputs)


class Int8Recorder(Recorder):
    """Runs a program with the layers of some `weights` in int8 (None: every layer that can be).

    The same numbers as in `INT8_LINEAR`, but for the rounding of float32, at the price of a layer in float32.
    """

    def __init__(self, program: Program, weights: frozenset[str] | None = None) -> None:
        super().__init__(program, {})
        editor = GraphEditor(program)
        linears = editor.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        self._names = {
            n.name: name
            for n in linears
            if is_quantizable(editor, n) and (weights is None or weight_name(editor, n) in weights)
            for name in (weight_name(editor, n),)
        }
        self._layers = {n.name: n for n in linears if n.name in self._names}
        self._weights: dict[str, Tensor] = {}
        for name, node in self._layers.items():
            if self._names[name] not in self._weights:
                quantized, scale = quantized_weight(_stored(editor, node))
                self._weights[self._names[name]] = quantized * scale[:, None]

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, a layer from its weight and its input as bytes can tell them."""
        return self._in_int8(n) if n.name in self._layers else super().run_node(n)

    def _in_int8(self, n: fx.Node) -> Tensor:
        (x, _, *rest), _ = self.fetch_args_kwargs_from_env(n)
        q, scale, zero = QUANTIZE(x)
        return F.linear((q.float() - zero) * scale, self._weights[self._names[n.name]], *rest)


class _Watch(Int8Recorder):
    """Runs a program in float32 and sums the squares of values and int8 errors for every layer that can be int8."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def run_node(self, n: fx.Node) -> Any:
        value = Recorder.run_node(self, n)
        if n.name in self._layers:
            short = self._in_int8(n)
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
                found[weight] = LinearError(weight, stack_of(self.program, node) or OTHER, error)
        return tuple(found.values())


def _stored(editor: GraphEditor, node: fx.Node) -> Tensor:
    weight = editor.stored(node.args[1])  # type: ignore[arg-type]
    assert weight is not None
    return weight.detach()


def report(
    errors: Mapping[str, Sequence[LinearError]],
    precision: Callable[[str], str],
    samples: Mapping[str, int],
    kept: Mapping[str, frozenset[str]],
) -> dict[str, Any]:
    """Return the report's entry `int8`: the limit, and by task the samples, parts and layers.

    `precision` gives that of a part. `samples` are their numbers by task, 0 where random values were used. `kept` names
    the weights of layers that stay in float32.
    """
    tasks = {}
    for task, layers in errors.items():
        meant = [layer for layer in layers if precision(layer.part) == "int8"]
        tasks[task] = {
            "samples": samples[task],
            "parts": dict(_parts(meant, kept[task])),
            "layers": [{**dataclasses.asdict(x), "sensitive": x.weight in kept[task]} for x in meant],
        }
    return {"limit": LIMIT, "tasks": tasks}


def _parts(layers: Sequence[LinearError], kept: frozenset[str]) -> Iterator[tuple[str, dict[str, float]]]:
    for part in dict.fromkeys(layer.part for layer in layers):
        errors = [layer.error for layer in layers if layer.part == part]
        sensitive = sum(layer.weight in kept for layer in layers if layer.part == part)
        mean = float(f"{math.sqrt(sum(e * e for e in errors) / len(errors)):.2e}")
        yield part, {"layers": len(errors), "sensitive": sensitive, "mean": mean, "worst": max(errors)}
