"""Calling operators on fake tensors, each kind of call once.

Layers repeat one another, and passes run the same graph again and again, so that nearly every call is of an operator
on operands with the sizes, strides and dtypes of those of an earlier call; what it gives follows from these alone. Fake
tensors with symbols for sizes take up to a millisecond a call, a copy of what an earlier call gave a hundredth of that.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

#: What an operator gives depends on the values of its operands, too.
_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class RepeatedCalls(TorchFunctionMode):
    """Gives fake tensors for calls of operators, which it makes once for each kind of operands.

    While it is entered, all calls of operators by name (`torch.ops`) go through it. The tensors that it gives may share
    (fake) memory where the operator's own would not, and none of them may be changed in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[Hashable, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what `target` gives for these arguments."""
        key = call_key(target, args, kwargs)
        known = None if key is None else self._results.get(key)
        if known is not None:
            return _copied(known)
        result = target(*args, **kwargs)
        if key is not None and _is_new(result, pytree.tree_leaves((args, kwargs))):
            self._results[key] = result
        return result


def call_key(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Return what the metadata of a call's results follows from; None if that is not known."""
    if not isinstance(target, OpOverload) or not _is_told_by_metadata(target):
        return None
    try:
        named = tuple((name, _key(value)) for name, value in kwargs.items())
        return target, torch.get_default_dtype(), torch.is_inference_mode_enabled(), _key(args), named
    except _UnknownKindError:
        return None


@functools.cache
def _is_told_by_metadata(target: OpOverload) -> bool:
    """Tell whether an operator takes tensors, and gives new ones whose metadata follows from theirs."""
    schema = target._schema
    takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return takes_tensors and not schema.is_mutable and not any(tag in target.tags for tag in _BY_VALUE)


class _UnknownKindError(Exception):
    """An argument is of a kind of which it is not known what results' metadata follows from."""


def _key(argument: Any) -> Hashable:
    """Return what is equal for arguments that differ in nothing that results' metadata follows from."""
    if isinstance(argument, FakeTensor):
        return _tensor_key(argument)
    if isinstance(argument, torch.SymInt):
        return argument.node.expr
    if isinstance(argument, list | tuple):
        return tuple(map(_key, argument))
    if isinstance(argument, _PLAIN):
        return type(argument), argument  # 2, 2.0 and True are equal
    raise _UnknownKindError


def _tensor_key(tensor: FakeTensor) -> Hashable:
    if (
        tensor.constant is not None
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.layout is not torch.strided
    ):
        raise _UnknownKindError
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return (
        tensor.fake_mode,
        tensor.dtype,
        tensor.device,
        *(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes),
    )


def _is_new(result: Any, given: Sequence[Any]) -> bool:
    """Tell whether `result` is of plain fake tensors, of which none is one of those given."""
    results = result if isinstance(result, list | tuple) else [result]
    return all(
        type(one) is FakeTensor
        and one.constant is None
        and not one.requires_grad
        and all(one is not other for other in given)
        and not free_unbacked_symbols(
            one
        )  # sizes that follow from values, which a second call may find to be others
        for one in results
    )


def _copied(result: Any) -> Any:
    """Return other fake tensors with the metadata of those of `result`."""
    if not isinstance(result, FakeTensor):
        return type(result)(map(_copied, result))
    with no_dispatch():
        plain = Tensor.detach(result)
    return FakeTensor(result.fake_mode, plain, result.fake_device)
