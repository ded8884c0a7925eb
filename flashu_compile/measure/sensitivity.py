"""The error of each linear layer of a program in int8, and with weights in 4 bits, measured on calibration data.

Every layer is computed on the values that reach it in float32: in float32 and in int8, and where weights may be read in
few bits, as those layers are computed. Its errors are the relative L2 distances from the first over all rows of all
samples, so that errors of earlier layers do not count. Layers whose error is above `LIMIT` stay in float32, and those
whose error by 4 bits is above `INT4_LIMIT` have 8.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.bundle.agreement import rounded
from flashu_compile.bundle.images import Picture
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.bundle.precision import FEW_BITS, OTHER
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import GenerationSettings, TextSettings, UnderstandingSettings
from flashu_compile.measure.asked import Asked, about_nothing, about_picture
from flashu_compile.measure.recorder import Recorder, RecordingEngine
from flashu_compile.operators.int4 import WIDENED, Int4Weight, in_blocks
from flashu_compile.operators.int8 import QUANTIZE, quantized_weight
from flashu_compile.passes.editing import GraphEditor, stack_of
from flashu_compile.passes.quantize_linears import QuantizedWeights, is_quantizable, weight_name
from flashu_compile.program.program import Program, Role
from flashu_compile.recipe.plan import compile_plan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.sampler import prompt_pair, sample

#: The largest relative error of a layer that is computed in int8.
LIMIT = 0.05
#: The largest relative error in int8 of a layer whose weight may be read instead. This takes
#: longer for many rows, but an outlying activation spoils the bytes of one block of a row alone.
READ_LIMIT = 0.02
#: The largest relative error of a layer by a weight of 4 bits. Normal weights have 0.11, one of sixteen steps in blocks
#: with an outlier more.
INT4_LIMIT = 0.2
#: How many prompts and questions it is measured on; a layer sees hundreds of rows of each.
SAMPLES = 3
_POINTS = 8  # of the trajectory that is looked at


@dataclasses.dataclass(frozen=True)
class LinearError:
    """A layer's error. `weight`: its name in the checkpoint. `part`: stack, or "other". `error`: relative L2 in int8.

    `read_error`, `int4_error`: those by a weight that is read in 8 and 4 bits, if they were measured. `size`: elements
    of the weight.
    """

    weight: str
    part: str
    error: float
    read_error: float | None = None
    int4_error: float | None = None
    size: int = 0

    @property
    def sensitive(self) -> bool:
        """Return whether the error is above `LIMIT` or not a number, where the weight is read if it may be."""
        # Not `error > LIMIT`: a NaN is sensitive too.
        return not (self.error if self.read_error is None else self.read_error) <= LIMIT

    @property
    def only_read(self) -> bool:
        """Return whether the weight may be in few bits, but the bytes of the layer's input cannot have one scale."""
        return self.read_error is not None and not (self.sensitive or self.error <= READ_LIMIT)

    @property
    def spoiled(self) -> bool:
        """Return whether `only_read` holds, and the bytes of the layer's input may have one scale at a loss."""
        return self.only_read and self.error <= LIMIT

    def loss(self, read: Container[str]) -> float:
        """Return the error of the layer in 8 bits: of reading its weight if that is in `read`, else in int8."""
        return self.read_error if self.weight in read and self.read_error is not None else self.error

    @property
    def bears_int4(self) -> bool:
        """Return whether the weight may be in 4 bits."""
        return self.int4_error is not None and self.int4_error <= INT4_LIMIT


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A captured program of a task, and what is run through it: `outputs` gives what a task makes of a recorder.

    `weights` holds the forms in few bits of the program's weights.
    """

    program: Program
    outputs: Callable[[Recorder], NDArray[Any]]
    weights: QuantizedWeights = dataclasses.field(default_factory=QuantizedWeights)

    def errors(
        self, read: Callable[[str], bool] = lambda part: False
    ) -> tuple[tuple[LinearError, ...], NDArray[Any]]:
        """Measure the error of each layer that can be int8; return them with the outputs in float32.

        `read` tells of which parts weights may be read in few bits, which is measured too.
        """
        watch = _Watch(self.program, read, self.weights)
        outputs = self.outputs(watch)
        return watch.errors(), outputs

    def recorder(self, weights: frozenset[str], int4: frozenset[str], read: frozenset[str]) -> Int8Recorder:
        """Return a recorder of the program with these weights in few bits."""
        return Int8Recorder(self.program, weights, int4, read, self.weights)


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

    The same numbers as in `INT8_LINEAR`, but for the rounding of float32, at the price of a layer in float32. Weights
    named in `int4` are in 4 bits, in the form that `forms` have, and those in `read` are read: ONNX Runtime rounds what
    they meet in blocks of a row.
    """

    def __init__(
        self,
        program: Program,
        weights: frozenset[str] | None = None,
        int4: frozenset[str] = frozenset(),
        read: frozenset[str] = frozenset(),
        forms: QuantizedWeights | None = None,
    ) -> None:
        super().__init__(program, {})
        self._read = read
        forms = forms or QuantizedWeights()
        editor = GraphEditor(program)
        linears = editor.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        self._names = {
            n.name: name
            for n in linears
            if is_quantizable(editor, n) and (weights is None or weight_name(editor, n) in weights)
            for name in (weight_name(editor, n),)
        }
        self._layers = {n.name: n for n in linears if n.name in self._names}
        self._full = {self._names[name]: _stored(editor, node) for name, node in self._layers.items()}
        self._weights = {
            name: _in_int4(forms.in_int4(weight)) if name in int4 else _in_int8(weight)
            for name, weight in self._full.items()
        }

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, a layer from its weight and its input as bytes can tell them."""
        if n.name not in self._layers:
            return super().run_node(n)
        name = self._names[n.name]
        return self._short(n, self._weights[name], read=name in self._read)

    def _short(self, n: fx.Node, weight: Tensor, *, read: bool) -> Tensor:
        (x, _, *rest), _ = self.fetch_args_kwargs_from_env(n)
        if read:
            return F.linear(in_blocks(x), weight, *rest)
        q, scale, zero = QUANTIZE(x)
        return F.linear((q.float() - zero) * scale, weight, *rest)


class _Watch(Int8Recorder):
    """Runs a program in float32 and sums the squares of values and errors for every layer that can be int8."""

    def __init__(self, program: Program, read: Callable[[str], bool], forms: QuantizedWeights) -> None:
        super().__init__(program)
        self._parts = {name: stack_of(program, node) or OTHER for name, node in self._layers.items()}
        meant = {self._names[name] for name, part in self._parts.items() if read(part)}
        self._int4 = {name: _in_int4(forms.in_int4(self._full[name])) for name in meant}
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])

    def run_node(self, n: fx.Node) -> Any:
        value = Recorder.run_node(self, n)
        if n.name in self._layers:
            sums, name = self._sums[n.name], self._names[n.name]
            weight = self._weights[name]
            sums[0] += _squares(value)
            sums[1] += _squares(self._short(n, weight, read=False) - value)
            if name in self._int4:
                sums[2] += _squares(self._short(n, weight, read=True) - value)
                sums[3] += _squares(self._short(n, self._int4[name], read=True) - value)
        return value

    def errors(self) -> tuple[LinearError, ...]:
        """Return the errors in graph order; of layers that share a weight, the largest."""
        found: dict[str, LinearError] = {}
        for name in self._layers:
            whole, *off = self._sums[name]
            error, *others = (rounded(math.sqrt(part / whole) if whole else 0.0) for part in off)
            weight = self._names[name]
            read, int4 = others if weight in self._int4 else (None, None)
            if weight not in found or error > found[weight].error:
                size = self._full[weight].numel()
                found[weight] = LinearError(weight, self._parts[name], error, read, int4, size)
        return tuple(found.values())


def _in_int8(weight: Tensor) -> Tensor:
    """Return what a weight [out, in] in 8 bits stands for, float32."""
    quantized, scale = quantized_weight(weight)
    return quantized * scale[:, None]


def _in_int4(form: Int4Weight) -> Tensor:
    """Return what a weight in 4 bits stands for, float32 [out, in]."""
    return WIDENED(form.values, form.factors) * form.scale[:, None]


def _squares(values: Tensor) -> float:
    return values.double().square().sum().item()


def _stored(editor: GraphEditor, node: fx.Node) -> Tensor:
    weight = editor.stored(node.args[1])  # type: ignore[arg-type]
    assert weight is not None
    return weight.detach()


def report(
    errors: Mapping[str, Sequence[LinearError]],
    precision: Callable[[str], str],
    samples: Mapping[str, int],
    kept: Mapping[str, frozenset[str]],
    int4: Mapping[str, frozenset[str]],
    read: Mapping[str, frozenset[str]],
) -> dict[str, Any]:
    """Return the report's entry `int8`: the limit, and by task the samples, parts and layers.

    `precision` gives that of a part. `samples` are their numbers by task, 0 where random values were used. `kept` names
    the weights of layers that stay in float32, `int4` those in 4 bits, `read` those that every engine reads.
    """
    tasks = {}
    for task, layers in errors.items():
        meant = [layer for layer in layers if precision(layer.part) in FEW_BITS]
        tasks[task] = {
            "samples": samples[task],
            "parts": dict(_parts(meant, kept[task], int4[task], read[task])),
            "layers": [_layer(x, kept[task], int4[task]) for x in meant],
        }
    return {"limit": LIMIT, "int4_limit": INT4_LIMIT, "tasks": tasks}


def _layer(layer: LinearError, kept: frozenset[str], int4: frozenset[str]) -> dict[str, Any]:
    bits = 32 if layer.weight in kept else 4 if layer.weight in int4 else 8
    return {**dataclasses.asdict(layer), "sensitive": layer.weight in kept, "bits": bits}


def _parts(
    layers: Sequence[LinearError], kept: frozenset[str], int4: frozenset[str], read: frozenset[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    for part in dict.fromkeys(layer.part for layer in layers):
        those = [layer for layer in layers if layer.part == part]
        errors = [_error_kept(layer, int4, read) for layer in those]
        yield (
            part,
            {
                "layers": len(those),
                "sensitive": sum(layer.weight in kept for layer in those),
                "mean": rounded(math.sqrt(sum(e * e for e in errors) / len(errors))),
                "worst": max(errors),
                "int4": sum(layer.weight in int4 for layer in those),
                "int4_share": share_in_int4(those, int4),
            },
        )


def _error_kept(layer: LinearError, int4: frozenset[str], read: frozenset[str]) -> float:
    """Return the error of a layer in the bits that it has, or would have in int8."""
    error = layer.int4_error if layer.weight in int4 else None
    return layer.loss(read) if error is None else error


def share_in_int4(layers: Sequence[LinearError], int4: frozenset[str]) -> float:
    """Return the share of the layers' weights, by elements, that is in 4 bits."""
    total = sum(layer.size for layer in layers)
    return round(sum(layer.size for layer in layers if layer.weight in int4) / total, 4) if total else 0.0
