"""Keep keys and values in buffers of fixed capacity that every call writes its own rows into.

Exact by composition.

For a program that continues from keys and values of earlier rows and outputs its own (`CacheRows`). Their
inputs become buffers with room for more rows, their outputs the same buffers updated, and a new input says
how many rows of the largest buffer are filled, for each element of the batch. So elements may differ in
length, nothing is copied from call to call where a runtime writes in place, and rows behind the filled ones
may hold anything.

Three things depend on the number of earlier rows, which was a size and becomes a value: where rows are
written; the mask, which lets them see all earlier rows, and of their own those that the program's mask
allows; and their positions. Positions are computed for each element by the operators that computed them for
all, vectorised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import networkx as nx
import sympy
import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from flashu_compile.bundle.signatures import updated
from flashu_compile.errors import StructureError
from flashu_compile.operators.write_rows import WRITE_ROWS
from flashu_compile.passes.analysis.attention import attention_mask
from flashu_compile.passes.analysis.graph import live_nodes, node_flow
from flashu_compile.passes.analysis.regions import downstream, upstream
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.cache_rows import new_rows
from flashu_compile.passes.editing import GraphEditor, module_path
from flashu_compile.passes.inlining import inline
from flashu_compile.program.program import Input, Program, Role

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_SCOPE = "earlier_rows"
_CAPACITY = "capacity"
#: Rows of the sample's buffers that stay free.
_ROOM = 3


@dataclasses.dataclass(frozen=True)
class UpdateInPlace(Pass):
    """Update buffers in place.

    `counter` is the role of the new input, the number of earlier rows, int64 [batch].

    Programs without such inputs and outputs are left alone. Raises `StructureError` where one has them and
    more than writes, masks and positions depends on the number of earlier rows, or where one takes other
    values of a prologue than those that become buffers: answers are decoded on buffers or not at all.
    """

    counter: str

    def call(self, program: Program) -> PassResult:
        """Turn the inputs of earlier keys and values, and the outputs of new ones, into buffers that are updated."""
        roles = tuple(role for role in program.input_roles if new_rows(role) in program.outputs)
        # All inputs but those that `HoistPrologue` has made are of a known kind.
        others = [role for role in program.input_roles if role not in roles and role not in set(Role)]
        if others:
            raise StructureError(
                f"{', '.join(others)} is computed once for earlier rows, but is no keys or values that new rows are "
                "joined to"
            )
        if not roles:
            return PassResult.unchanged(program)
        after = _Updating(program, roles, self.counter).run()
        changes = (f"{len(roles)} keys and values are buffers, written from {self.counter} on",)
        return PassResult((after,), changes, tuple(new_rows(role) for role in roles))


class _Updating:
    """The rewriting of one program whose inputs `roles` become buffers.

    Raises `StructureError` unless their numbers of rows differ by constants.
    """

    def __init__(self, program: Program, roles: tuple[str, ...], counter: str) -> None:
        self.program, self.roles, self.counter = program, roles, counter
        self.editor = GraphEditor(program)
        self.editor.remove_unused()
        nodes = self.editor.user_inputs()
        self.buffers = {role: nodes[role] for role in roles}
        self.rows = {role: _rows(node) for role, node in self.buffers.items()}
        symbols = {symbol for size in self.rows.values() for symbol in size.free_symbols}
        if len(symbols) != 1:
            raise StructureError("keys and values do not all have one number of rows, but for a constant")
        (self.symbol,) = symbols
        free = {size.subs(self.symbol, 0): size for size in self.rows.values()}
        if any(not (size - self.symbol).is_Integer for size in free.values()):
            raise StructureError("numbers of rows of keys and values do not differ by constants")
        self.most = free[max(free)]

    def run(self) -> Program:
        """Rewrite writes, masks and positions, and return the new program.

        Raises `StructureError` if anything else depends on the number of earlier rows.
        """
        count = self._add_counter()
        starts = {rows: self._start(count, rows) for rows in dict.fromkeys(self.rows.values())}
        self._write(starts)
        self._hide(starts)
        self.editor.remove_unused()  # masks over all rows, which are positions' readers too
        self._place(count)
        self.editor.remove_unused()
        for node in live_nodes(self.editor.graph):
            given = [source for source in node.all_input_nodes if self._is_size(source)]
            if given and isinstance(node.meta.get("val"), Tensor) and module_path(node) != _SCOPE:
                raise StructureError(f"{node.name} takes the number of earlier rows for something unknown")
        return self._finish()

    def _add_counter(self) -> fx.Node:
        """Add an input with one integer for each element of the batch."""
        buffer = next(iter(self.buffers.values())).meta["val"]
        return self.editor.add_input(self.counter, buffer.new_empty(buffer.shape[:1], dtype=torch.int64))

    def _start(self, count: fx.Node, rows: sympy.Expr) -> fx.Node:
        """Return where new rows are written in buffers of `rows` rows, given the number of rows in the largest ones."""
        fewer = int(self.most - rows)
        return self._insert(count, _aten.sub.Tensor, (count, fewer)) if fewer else count

    def _insert(self, after: fx.Node, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
        """Insert an operator of this pass after a node."""
        with self.editor.graph.inserting_after(after):
            node = self.editor.graph.call_function(target, arguments)
        node.meta = {"nn_module_stack": {_SCOPE: (_SCOPE, "")}}
        self.editor.propagate([node])
        return node

    def _write(self, starts: dict[sympy.Expr, fx.Node]) -> None:
        """Replace each concatenation of earlier and new rows by a buffer updated with the new ones, and output that.

        Raises `StructureError` where they are not concatenated in exactly one place.
        """
        outputs = self.editor.outputs()
        for role, buffer in self.buffers.items():
            own = outputs[new_rows(role)]
            joins = [user for user in buffer.users if user.target is _aten.cat.default]
            if len(joins) != 1 or list(cast("Sequence[fx.Node]", joins[0].args[0])) != [buffer, own]:
                raise StructureError(f"{role} and new rows are not joined in one place")
            joined = joins[0]
            with self.editor.graph.inserting_before(joined):
                node = self.editor.graph.call_function(WRITE_ROWS, (buffer, own, starts[self.rows[role]]))
            node.meta = {key: joined.meta[key] for key in ("nn_module_stack",) if key in joined.meta}
            self.editor.propagate([node])
            joined.replace_all_uses_with(node)
            self.editor.graph.erase_node(joined)
            outputs[new_rows(role)] = node
        self.editor.set_outputs(list(outputs.values()))

    def _hide(self, starts: dict[sympy.Expr, fx.Node]) -> None:
        """Replace masks over earlier and new rows by masks over buffers.

        Raises `StructureError` where attention has no mask, or one that hides earlier rows.
        """
        buffers = {rows: role for role, rows in self.rows.items()}
        made: dict[fx.Node, fx.Node] = {}
        for attention in [n for n in self.editor.graph.nodes if n.target is _ATTENTION]:
            mask = attention_mask(attention)
            if mask is None:
                raise StructureError(f"attention at {attention.name} has no mask")
            if mask not in made:
                before, own = _parts(mask)
                rows = sympy.expand(before.meta["val"].shape[-1].node.expr)
                if not _all_true(before) or rows not in starts:
                    raise StructureError(f"mask {mask.name} is not open to all earlier rows")
                arguments = [own, starts[rows], self.buffers[buffers[rows]]]
                made[mask] = inline(self.editor, _visible, arguments, after=_last(arguments), scope=_SCOPE)
            attention.replace_input_with(mask, made[mask])

    def _place(self, count: fx.Node) -> None:
        """Compute what depends on the positions of new rows for each element of the batch.

        Raises `StructureError` where the operators that do cannot be vectorised over it.
        """
        additions = self.editor.graph.find_nodes(op="call_function", target=_aten.add.Tensor)
        moved = {node for node in additions if self._is_size(node.args[1])}
        flow = node_flow(self.editor.graph)
        region = _without_data(flow, moved)
        exits = sorted(node for node in region if any(user not in region for user in node.users))
        for node in exits:
            if node.meta["val"].shape[:1] != (1,):
                raise StructureError(f"{node.name} has positions in another than the batch's dimension")
            needed = sorted(region & upstream(flow, [node], through=region.__contains__))
            outside = dict.fromkeys(s for n in needed for s in n.all_input_nodes if s not in region)
            given = [count, *(s for s in outside if isinstance(s.meta["val"], Tensor))]
            surplus = {m: self._surplus(m.args[1]) for m in moved}
            function = _for_each(needed, given[1:], surplus)
            try:
                made = inline(self.editor, function, given, after=_last(given), scope=_SCOPE)
            except RuntimeError as error:  # of an operator that cannot be vectorised, or not over these sizes
                raise StructureError(
                    f"{node.name} cannot be computed for each element of the batch: {error}"
                ) from error
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in region)

    def _is_size(self, argument: object) -> bool:
        """Tell whether an argument is a size that depends on the number of earlier rows."""
        value = argument.meta["val"] if isinstance(argument, fx.Node) else None
        return isinstance(value, torch.SymInt) and self.symbol in value.node.expr.free_symbols

    def _surplus(self, argument: object) -> int:
        """Return by how much a size exceeds the number of rows of the largest buffer.

        Raises `StructureError` unless that is a constant.
        """
        difference = sympy.expand(cast("fx.Node", argument).meta["val"].node.expr - self.most)
        if not difference.is_Integer:
            raise StructureError(f"positions move by {difference} more than there are rows")
        return int(difference)

    def _finish(self) -> Program:
        """Build the program with its new inputs, outputs and sample."""
        program = self.program
        first = next(role for role in self.roles if self.rows[role] == self.most)
        batch, _, count, _ = program.sample[first].shape
        room = self._new_rows(first) + _ROOM
        sample = dict(program.sample) | {self.counter: torch.full((batch,), count)}
        sample |= {role: pad(program.sample[role], (0, 0, 0, room)) for role in self.roles}
        axes = {given.role: given.axes for given in program.inputs}
        for role in self.roles:
            fewer = self.most - self.rows[role]
            capacity = f"{_CAPACITY} - {fewer}" if fewer else _CAPACITY
            axes[role] = (*axes[role][:2], capacity, *axes[role][3:])
        axes[self.counter] = axes[first][:1]
        became = {new_rows(role): updated(role) for role in self.roles}
        return self.editor.finish(
            inputs=tuple(Input(role, names) for role, names in axes.items()),
            outputs=tuple(became.get(role, role) for role in program.outputs),
            sample=sample,
        )

    def _new_rows(self, role: str) -> int:
        """Return how many rows the sample adds. Raises `StructureError` if no input has as many."""
        new = GraphEditor(self.program).outputs()[new_rows(role)].meta["val"].shape[2]
        for name, node in self.editor.user_inputs().items():
            for dim, size in enumerate(node.meta["val"].shape):
                if str(size) == str(new):
                    return int(self.program.sample[name].shape[dim])
        raise StructureError(f"no input has as many rows as {role} gains")


def _rows(buffer: fx.Node) -> sympy.Expr:
    """Return the symbolic number of rows of a buffer. Raises `StructureError` if it is fixed."""
    size = buffer.meta["val"].shape[2]
    if not isinstance(size, torch.SymInt):
        raise StructureError(f"{buffer.name} has a fixed number of rows")
    return sympy.expand(size.node.expr)


def _parts(mask: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the mask over earlier rows and that over new ones.

    Raises `StructureError` if there are no such two.
    """
    parts = cast("list[fx.Node]", mask.args[0]) if mask.target is _aten.cat.default else []
    if len(parts) != 2 or not isinstance(parts[0].meta["val"].shape[-1], torch.SymInt):
        raise StructureError(f"mask {mask.name} is not one of earlier rows and new ones")
    return parts[0], parts[1]


def _all_true(mask: fx.Node) -> bool:
    """Tell whether a mask is the constant true, expanded or viewed."""
    while mask.target in (_aten.expand.default, _aten.unsqueeze.default, _aten.view.default):
        mask = cast("fx.Node", mask.args[0])
    return mask.target is _aten.full.default and mask.args[1] is True


def _visible(own: Tensor, start: Tensor, buffer: Tensor) -> Tensor:
    """Return the mask of new rows over a buffer: they see all rows before `start`, and of their own what `own` allows.

    `own` is [new, new], or [b or 1, 1, new, new].
    """
    new = own.shape[-1]
    while own.ndim < 4:
        own = own[None]
    place = torch.arange(buffer.shape[2]) - start[:, None]
    column = place.clamp(0, new - 1)[:, None, None, :]
    shape = (start.shape[0], 1, new, buffer.shape[2])
    among_own = own.expand(start.shape[0], -1, -1, -1).gather(3, column.expand(shape))
    earlier, behind = (place < 0)[:, None, None, :], (place >= new)[:, None, None, :]
    return earlier | (among_own & ~behind)


def _last(nodes: Sequence[fx.Node]) -> fx.Node:
    """Return the node that is last in graph order."""
    return max(nodes)


def _without_data(flow: nx.DiGraph, sources: set[fx.Node]) -> set[fx.Node]:
    """Return `sources` and the nodes that depend on them and constants alone."""
    # Sizes are no way for data; the parts of a split value, which is several tensors, are one.
    tensors = flow.subgraph(
        [node for node in flow if isinstance(node.meta.get("val"), Tensor | list | tuple)]
    )
    data = downstream(tensors, filter(_is_data, tensors), through=lambda node: node not in sources)
    return (downstream(tensors, sources) - data) | sources


def _is_data(node: fx.Node) -> bool:
    """Tell whether `node` is an input, or an operator that this pass inserted."""
    return (node.op == "placeholder" and not _is_stored(node)) or module_path(node) == _SCOPE


def _is_stored(node: fx.Node) -> bool:
    """Tell whether `node` is a placeholder of static shape, which stands for a stored tensor."""
    return node.op == "placeholder" and not any(
        isinstance(size, torch.SymInt) for size in node.meta["val"].shape
    )


def _for_each(
    nodes: Sequence[fx.Node], given: Sequence[fx.Node], surplus: dict[fx.Node, int]
) -> Callable[..., Tensor]:
    """Make a function from counts [b] and the values `given` to the last of `nodes` [b, ...], computed per count.

    Nodes in `surplus` add the count and a number to their first argument.
    """

    def positions(counts: Tensor, *values: Tensor) -> Tensor:
        known = {
            str(size): found.shape[d]
            for node, found in zip(given, values, strict=True)
            for d, size in enumerate(node.meta["val"].shape)
        }

        def for_one(count: Tensor) -> Tensor:
            made: dict[fx.Node, Any] = dict(zip(given, values, strict=True))

            def value(node: fx.Node) -> Any:
                if node in made:
                    return made[node]
                size = str(node.meta["val"])
                if size not in known:
                    raise StructureError(
                        f"positions follow from {node.name}, a size of nothing that is given ({size})"
                    )
                return known[size]

            for node in nodes:
                if node in surplus:
                    made[node] = value(cast("fx.Node", node.args[0])) + (count + surplus[node])
                else:
                    arguments, keywords = fx.map_arg((node.args, node.kwargs), value)
                    made[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
            return made[nodes[-1]]

        return torch.vmap(for_one)(counts).squeeze(1)

    return positions
