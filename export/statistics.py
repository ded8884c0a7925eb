"""Statistics of programs and engines by component: operators, parameters, operations, memory traffic and rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flashu_compile.bundle.precision import OTHER
from flashu_compile.passes.editing import module_path, stack_at
from flashu_compile.program.program import Program
from flashu_compile.program.repeated_calls import call_key

_PICKING = (
    torch.ops.aten.embedding.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
)


def graph_statistics(program: Program, model: ir.Model) -> dict[str, Any]:
    """Count an engine's contents for a report: the entries of `program_statistics`, and those of the ONNX graph.

    `nodes` and `operators` count the ONNX graph; `parameters` (elements, a tied tensor once) are those it
    holds.
    """
    operators = Counter(node.op_type for node in model.graph)
    return {
        **program_statistics(program),
        "nodes": sum(operators.values()),
        "operators": dict(sorted(operators.items())),
        "parameters": _parameters(program, {_value_name(name) for name in model.graph.initializers}),
    }


def program_statistics(program: Program) -> dict[str, Any]:
    """Count a program's contents at the sizes of its sample.

    A component is the stack under whose root a module lies, or `OTHER`. `batch`: sequences or pictures in the sample.
    `operations`: calls in the traced graph. `parameters`: elements, by component. `flops`: by component, with
    a multiplication and an addition counted as two. `bytes`: what operators read and write, by component, as
    if nothing was fused and no cache helped; views move nothing, and picking rows reads those rows. `rows`:
    for every layer of a stack, how many rows its linear layers run on (the most, where they differ), over the
    whole batch. `decoder`: the stack whose rows are those of text and pictures.
    """
    counted = _run_on_shapes(program)
    return {
        "batch": _batch(program),
        "operations": sum(node.op == "call_function" for node in program.exported.graph.nodes),
        "parameters": _parameters(program, set(program.exported.state_dict)),
        "flops": dict(sorted(counted.flops.items())),
        "bytes": dict(sorted(counted.bytes.items())),
        "decoder": program.decoder,
        "rows": {stack: _rows(layers) for stack, layers in sorted(counted.rows.items())},
    }


def traced_statistics(program: Program) -> dict[str, Any]:
    """Count, as `graph_statistics` does, an engine that is the program's own graph, by its traced operators."""
    targets = [n.target for n in program.exported.graph.nodes if n.op == "call_function"]
    names = (str(getattr(t, "overloadpacket", None) or getattr(t, "__name__", t)) for t in targets)
    operators = Counter(name.removeprefix("aten.") for name in names)
    return {
        **program_statistics(program),
        "nodes": sum(operators.values()),
        "operators": dict(sorted(operators.items())),
    }


def _value_name(name: str) -> str:
    """Return the name of the weight that an initializer holds, which may be a shorter form of it."""
    for short in ("_int4", "_int8", "_float16", "_bfloat16"):
        name = name.removesuffix(short)
    return name


def component(path: str, stacks: Mapping[str, str]) -> str:
    """Return the stack whose root is `path` or a parent of it; the longest root if several are."""
    return stack_at(path, stacks) or OTHER


def _parameters(program: Program, names: set[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    seen: set[tuple[int, torch.Size]] = set()
    for name in sorted(names & program.exported.state_dict.keys()):
        tensor = program.exported.state_dict[name]
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:
            counts[component(name, program.stacks)] += tensor.numel()
            seen.add(place)
    return dict(sorted(counts.items()))


def _batch(program: Program) -> int:
    sizes = [
        program.sample[given.role].shape[given.axes.index("batch")]
        for given in program.inputs
        if "batch" in given.axes
    ]
    return sizes[0] if sizes else 1


def _rows(layers: Mapping[int, Mapping[str, int]]) -> list[int]:
    return [max(layers[layer].values()) for layer in sorted(layers)]


def _run_on_shapes(program: Program) -> _Counter:
    module, stored, inputs = program.exported.graph_module, program.stored(), iter(program.inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        arguments = []
        for node in module.graph.find_nodes(op="placeholder"):
            tensor = stored[node] if node in stored else program.sample[next(inputs).role]
            arguments.append(fake.from_tensor(tensor, static_shapes=True))
        counter = _Counter(module, program.stacks)
        with counter.mode:
            counter.run(*arguments)
    return counter


class _Counter(fx.Interpreter):
    """Runs a graph on shapes alone and adds the work of every node to its component.

    An operator is called once for each kind of operands; where it is called again, its result stands for the new one.
    """

    def __init__(self, module: fx.GraphModule, stacks: Mapping[str, str]) -> None:
        super().__init__(module)
        self.stacks = stacks
        self.mode = FlopCounterMode(display=False)
        self._called: dict[Hashable, tuple[Any, int]] = {}
        self._flops_of_call = 0
        self.flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        #: By stack, layer and weight: a weight may be used for one part of the rows after another.
        self.rows: defaultdict[str, defaultdict[int, Counter[str]]] = defaultdict(
            lambda: defaultdict(Counter)
        )

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        flops = self._flops_of_call
        if n.target is torch.ops.aten.scaled_dot_product_attention.default:
            # torch's registry knows the kernels of some devices only, and no grouped heads.
            query, key, value = (self.env[cast("fx.Node", node)] for node in n.args[:3])
            flops = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        where = component(module_path(n), self.stacks)
        if flops:
            self.flops[where] += flops
        moved = self._moved(n, result)
        if moved:
            self.bytes[where] += moved
        if n.target is torch.ops.aten.linear.default and where != OTHER:
            self._book_rows(n, where)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        key = call_key(target, args, kwargs)
        known = None if key is None else self._called.get(key)
        if known is None:
            before = self.mode.get_total_flops()
            result = super().call_function(target, args, kwargs)
            known = result, self.mode.get_total_flops() - before
            if key is not None:
                self._called[key] = known
        result, self._flops_of_call = known
        return result

    def _moved(self, node: fx.Node, result: Any) -> int:
        if not isinstance(result, Tensor) or _is_view(node.target):
            return 0
        if node.target in _PICKING:
            return 2 * _size(result)
        return _size(result) + sum(_size(self.env[source]) for source in node.all_input_nodes)

    def _book_rows(self, node: fx.Node, stack: str) -> None:
        layer = module_path(node)[len(self.stacks[stack]) + 1 :].split(".")[0]
        given, weight = node.all_input_nodes[:2]
        if layer.isdecimal():
            self.rows[stack][int(layer)][weight.name] += self.env[given].shape[:-1].numel()


def _is_view(target: Any) -> bool:
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
