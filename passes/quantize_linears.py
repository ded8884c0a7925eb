"""Quantize linear layers to int8: weights per output channel at compile time, activations at run time. Lossy.

Looks for linear layers with stored float32 weights that are wide enough to pay, and replaces each by the
integer product of its quantized input (`int8.py`); layers that read the same value share its quantization.
Weights may be stored in 4 bits (`int4.py`), and `products` left to the runtime: then layers read float32.
Layers whose weights are named in `keep` stay as they are, and so do those that a sort or top-k depends on
(such as the choice of tokens that stay): a small error in a score would change which rows are chosen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from flashu_compile.operators.int4 import DEQUANTIZED_LINEAR, WIDENED, Int4Weight, int4_weight
from flashu_compile.operators.int8 import INT8_LINEAR, QUANTIZE, QUANTIZE_ROWS, quantized_weight
from flashu_compile.passes.analysis.graph import node_flow
from flashu_compile.passes.analysis.regions import upstream
from flashu_compile.passes.base import Kind, Pass, PassResult
from flashu_compile.passes.editing import GraphEditor, stack_of
from flashu_compile.passes.whole_weights import WholeWeights, place_of
from flashu_compile.program.program import Program

_LINEAR = torch.ops.aten.linear.default
_ORDERING = {torch.ops.aten.topk, torch.ops.aten.sort, torch.ops.aten.argsort}

#: Narrower layers gain nothing over float32: reading, scaling and writing their values costs what the product saves.
#: 498 rows on one AVX2 core: 512 to 512 takes 3.1 ms in float32 and 1.7 in int8; 128 to 128 about the same in both.
MIN_WIDTH = 128


class QuantizedWeights(WholeWeights):
    """Weights in 8 and 4 bits, computed once for all programs of a model.

    A weight that is a part of a whole one, such as that of the kept neurons of a layer, becomes the same part
    of the whole one's form, so that engines share its bytes. Any other weight is quantized by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._made_int4: dict[tuple[Any, ...], tuple[Tensor, Int4Weight]] = {}
        self._fitted: dict[tuple[Any, ...], tuple[Tensor, Int4Weight]] = {}
        self._by_hash = weakref.WeakValueDictionary[str, Int4Weight]()
        #: A hash of the forms that were fitted, "" if there are none.
        self.fitted = ""

    def with_fitted(self, forms: Iterable[tuple[Tensor, Int4Weight]]) -> QuantizedWeights:
        """Return these weights, whose 4-bit forms are the given ones where there is one; other forms are shared.

        A form that was given before is kept, so that engines that were made with it share its bytes.
        """
        copy = QuantizedWeights()
        copy._known, copy._made, copy._made_int4 = self._known, self._made, self._made_int4
        copy._by_hash = self._by_hash
        hashes = []
        for weight, form in forms:
            hashes.append(form.digest())
            kept = self._by_hash.setdefault(hashes[-1], form)
            copy._fitted[place_of(weight.detach())] = (weight.detach(), kept)
        copy.fitted = hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else ""
        return copy

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the int8 form [out, in] and the scales float32 [out] of a float32 weight [out, in]."""
        whole, part = self.part(weight)
        if (key := place_of(whole)) not in self._made:
            # The weight is kept with it: while it lives, nothing else can have its address.
            self._made[key] = (whole, *quantized_weight(whole))
        _, quantized, scale = self._made[key]
        return quantized[part], scale[part[:1]]

    def in_int4(self, weight: Tensor) -> Int4Weight:
        """Return the 4-bit form of a float32 weight [out, in]."""
        whole, part = self.part(weight)
        found = self._int4(whole).part(part)
        return self._int4(weight.detach()) if found is None else found

    def _int4(self, weight: Tensor) -> Int4Weight:
        if (key := place_of(weight)) in self._fitted:
            return self._fitted[key][1]
        if key not in self._made_int4:
            self._made_int4[key] = (weight, int4_weight(weight))
        return self._made_int4[key][1]


@dataclasses.dataclass(frozen=True)
class QuantizeLinears(Pass):
    """Quantize linear layers. `keep`: names of weights that stay in float32.

    `stacks`: the stacks whose layers are quantized, "" for layers outside of all (None: all layers). `by_row`: each row
    has a scale of its own, so that it does not depend on others. `int4`: names of weights in 4 bits. `read`:
    names of weights that are read as they are stored, by layers that are given float32; so are all without `products`.
    """

    keep: frozenset[str] = frozenset()
    stacks: frozenset[str] | None = None
    by_row: bool = False
    int4: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    products: bool = True
    weights: QuantizedWeights = dataclasses.field(default_factory=QuantizedWeights, compare=False, repr=False)
    kind: ClassVar[Kind] = "lossy"

    def call(self, program: Program) -> PassResult:
        """Replace every layer that is quantizable and not to be kept by an integer product."""
        editor = GraphEditor(program)
        linears = editor.graph.find_nodes(op="call_function", target=_LINEAR)
        inputs: dict[fx.Node, list[fx.Node]] = {}
        kept = 0
        deciding = _deciding(editor)
        chosen = [n for n in linears if n not in deciding and self._is_meant(program, editor, n)]
        for node in chosen:
            if weight_name(editor, node) in self.keep:
                kept += 1
            else:
                self._replace(editor, node, inputs)
        sensitive = (
            (f"{kept} of {len(linears)} linear layers are sensitive and stay in float32",) if kept else ()
        )
        if len(chosen) == kept:
            return PassResult.declined(program, *sensitive)
        editor.remove_unused()
        return PassResult(
            (editor.finish(),), (self._change(len(chosen) - kept, len(linears)),), reasons=sensitive
        )

    def _change(self, count: int, total: int) -> str:
        told = f"{count} of {total} linear layers"
        made = f"computes {told} in int8" if self.products else f"reads the weights of {told} in few bits"
        return made + (", some in 4 bits" if self.int4 else "")

    def _is_meant(self, program: Program, editor: GraphEditor, node: fx.Node) -> bool:
        """Tell whether a layer is quantizable and lies in one of the chosen stacks."""
        return is_quantizable(editor, node) and (
            self.stacks is None or stack_of(program, node) in self.stacks
        )

    def _replace(self, editor: GraphEditor, node: fx.Node, inputs: dict[fx.Node, list[fx.Node]]) -> None:
        """Make a linear layer one of few bits; what integer products read is taken from `inputs` or added there."""
        value, stored, *rest = node.args
        assert isinstance(value, fx.Node)
        assert isinstance(stored, fx.Node)
        bias = rest[0] if rest else None
        reads = not self.products or weight_name(editor, node) in self.read
        short, scale = self._short(editor, node, stored, reads=reads)
        # The same node: engines of other precisions are compared with this one by its name.
        if reads:
            node.target, node.args = DEQUANTIZED_LINEAR, (value, short, scale, bias)
            editor.propagate([node])
            return
        if value not in inputs:
            inputs[value] = _quantized(editor, value, node, QUANTIZE_ROWS if self.by_row else QUANTIZE)
        node.target, node.args = INT8_LINEAR, (*inputs[value], short, scale, bias)
        editor.propagate([node])

    def _short(
        self, editor: GraphEditor, node: fx.Node, stored: fx.Node, *, reads: bool
    ) -> tuple[fx.Node, fx.Node]:
        """Add the constants of a layer's weight in few bits; return the nodes of values and scales for the layer."""
        weight, name = editor.stored(stored), editor.name(stored)
        assert weight is not None

        def constant(kind: str, tensor: Tensor) -> fx.Node:
            return editor.add_constant(f"{name}_{kind}", tensor, stored)

        if weight_name(editor, node) not in self.int4:
            quantized, scale = self.weights.of(weight)
            return constant("int8", quantized), constant("scale", scale)
        made = self.weights.in_int4(weight)
        values = constant("int4", made.values)
        if reads:
            return values, constant("scales", made.scales)
        factors = constant("factors", made.factors)
        with editor.graph.inserting_before(node):
            wide = editor.graph.create_node(
                "call_function", WIDENED, (values, factors), name=f"{node.name}_widened"
            )
        wide.meta = _origin(node)
        editor.propagate([wide])
        return wide, constant("scale", made.scale)


def _deciding(editor: GraphEditor) -> set[fx.Node]:
    """Return the nodes that a sort or top-k depends on."""
    ordering = [n for n in editor.graph.nodes if getattr(n.target, "overloadpacket", None) in _ORDERING]
    return upstream(node_flow(editor.graph), ordering)


def is_quantizable(editor: GraphEditor, node: fx.Node) -> bool:
    """Tell whether a linear layer has a stored float32 weight that is wide enough to pay."""
    stored = node.args[1]
    weight = editor.stored(stored) if isinstance(stored, fx.Node) else None
    return weight is not None and weight.dtype == torch.float32 and min(weight.shape) >= MIN_WIDTH


def weight_name(editor: GraphEditor, node: fx.Node) -> str:
    """Return the checkpoint's name of a layer's weight.

    A copy that a pass made for some readers has the same name with `_` appended, which is removed.
    """
    stored = node.args[1]
    assert isinstance(stored, fx.Node)
    return editor.name(stored).rstrip("_")


def _quantized(
    editor: GraphEditor, value: fx.Node, reader: fx.Node, operator_: Callable[..., Any]
) -> list[fx.Node]:
    """Insert the quantization of `value` right after it, and return the nodes of its bytes, scale and zero point."""
    graph = editor.graph
    behind = value if value.op != "placeholder" else graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(behind):
        packed = graph.create_node("call_function", operator_, (value,), name=f"{reader.name}_quantized")
    with graph.inserting_before(packed.next):
        made = [
            graph.create_node(
                "call_function", operator.getitem, (packed, index), name=f"{packed.name}_{part}"
            )
            for index, part in enumerate(("bytes", "scale", "zero_point"))
        ]
    for node in (packed, *made):
        node.meta = _origin(reader)
    editor.propagate([packed, *made])
    return made


def _origin(node: fx.Node) -> dict[str, Any]:
    """Return the metadata that a node made in place of `node` inherits: its module path."""
    return {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
