"""References to parts of a model's own tensors, so that a cached engine holds no copy of the weights."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashu_compile.compiler.fingerprints import named_tensors
from flashu_compile.passes.order_neurons import OrderedWeights, ordered_weight

#: A reference as a JSON value: the name of a whole tensor, and which part of it.
Reference = dict[str, Any]


class WeightSources:
    """The tensors of a model, and those made by ordering its neurons, to refer to.

    `orders` holds the neuron orders that references name. Store them together with the references.
    """

    def __init__(
        self, module: nn.Module, ordered: OrderedWeights, orders: Mapping[str, Tensor] | None = None
    ) -> None:
        self._named = _Places((n, t.detach()) for n, t in named_tensors(module).items())
        self._ordered = ordered
        self.orders: dict[str, Tensor] = dict(orders or {})

    def reference(self, tensor: Tensor) -> Reference | None:
        """Return a reference to `tensor`, or None if it is memory of its own."""
        found = self._named.holder(tensor)
        if found is not None:
            return {"of": found, **_part(tensor, self._named.tensors[found])}
        entry = next((entry for entry in self._ordered.values() if _holds(entry.ordered, tensor)), None)
        whole = None if entry is None else self.reference(entry.weight)
        if entry is None or whole is None:
            return None
        order = self._named_order(entry.order)
        turned = {"weight": whole, "order": order, "by_columns": entry.by_columns}
        return {"ordered": turned, **_part(tensor, entry.ordered)}

    def tensor(self, reference: Reference) -> Tensor:
        """Return the tensor of a reference. Raises `KeyError` or `ValueError` if there is no such thing."""
        if "of" in reference:
            whole = self._named.tensors[reference["of"]]
        else:
            turned = reference["ordered"]
            whole = ordered_weight(
                self.tensor(turned["weight"]),
                self.orders[turned["order"]],
                by_columns=turned["by_columns"],
                shared=self._ordered,
            )
        shape, stride = tuple(reference["shape"]), tuple(reference["stride"])
        first = whole.storage_offset() + reference["start"]
        try:
            part = whole.as_strided(shape, stride, first)
        except RuntimeError as error:  # beyond the end of the memory
            raise ValueError(f"{reference} is not a part of {tuple(whole.shape)}") from error
        if not _holds(whole, part):
            raise ValueError(f"{reference} is not a part of {tuple(whole.shape)}")
        return part

    def _named_order(self, order: Tensor) -> str:
        for name, known in self.orders.items():
            if torch.equal(known, order):
                return name
        name = f"order/{len(self.orders)}"
        self.orders[name] = order
        return name


class _Places:
    """Named tensors by their place in memory; none overlap, except tied ones, which are the same memory."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.tensors = dict(tensors)
        # Tied ones begin at one address, and of these the first to hold a tensor is as good as the others.
        self._starts = sorted(
            (t.data_ptr(), -t.nbytes, name) for name, t in self.tensors.items() if t.numel()
        )

    def holder(self, tensor: Tensor) -> str | None:
        """Return the name of a tensor whose memory contains `tensor`, or None."""
        after = bisect.bisect_right(self._starts, tensor.data_ptr(), key=lambda place: place[0])
        if after == 0:
            return None
        first = bisect.bisect_left(self._starts, self._starts[after - 1][0], key=lambda place: place[0])
        names = [name for _, _, name in self._starts[first:after]]
        return next((name for name in names if _holds(self.tensors[name], tensor)), None)


def _holds(whole: Tensor, part: Tensor) -> bool:
    if whole.dtype != part.dtype or whole.device != part.device or part.numel() == 0 or whole.numel() == 0:
        return False
    (start, end), (first, last) = _span(whole), _span(part)
    return start <= first and last <= end and (first - start) % part.element_size() == 0


def _span(tensor: Tensor) -> tuple[int, int]:
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()


def _part(tensor: Tensor, whole: Tensor) -> Reference:
    start = (tensor.data_ptr() - whole.data_ptr()) // tensor.element_size()
    return {"start": start, "shape": list(tensor.shape), "stride": list(tensor.stride())}
