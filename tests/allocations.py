"""What torch allocates on the CPU while something runs, and what autograd keeps of it."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operators make, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given | self._alive:
                self._begin(storage)
        return result

    def _begin(self, storage: torch.UntypedStorage) -> None:
        size, number = storage.nbytes(), storage._cdata
        self._alive.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, number, size)

    def _end(self, number: int, size: int) -> None:
        self._alive.discard(number)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(tree) if isinstance(value, Tensor)]


def peak_bytes(action: Callable[[], object]) -> int:
    """Most bytes of tensors that ``action`` had made and not yet let go; what it was given and what
    an operator uses within itself is not counted."""
    with _Live() as live:
        action()
    return live.peak


def saved_bytes(action: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps of ``action``, and of its result.

    Those of ``known``, parameters and inputs, are left out.
    """
    before = {value.untyped_storage().data_ptr() for value in known}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        keep(action())
    return sum(kept.values())
