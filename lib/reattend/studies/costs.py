"""Costs of a layer, forward and backward: peak memory, counted; work for the clock."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Largest sum of bytes of the tensors that were made inside and are alive at one time.

    Counted by storages, not read from an allocator: exact, and the same on every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = tree_leaves((args, kwargs))
        given = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), given)
        return out

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key not in self.alive and key not in given:
            self.alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def backward_pass(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function that runs the layer on x forward and backward."""

    def run() -> None:
        layer.zero_grad()
        layer(x).sum().backward()

    return run


def peak_megabytes(run: Callable[[], object]) -> float:
    """Peak memory of the tensors that `run` makes, in millions of bytes."""
    with PeakMemory() as memory:
        run()
    return memory.peak / 1e6
