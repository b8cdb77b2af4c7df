"""Pretended CUDA graphs, streams included, for the pretended GPU of pretend_gpu.py.

As on a GPU nothing is computed while a graph is recorded: results are garbage (NaN) until it is replayed. That computes
from what its inputs hold by then, and writes to the same places each time. What a recording may not do raises an error:
to wait for the device, to copy from or to the host, to begin on the default stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor


class Stream:
    """A stream; all of them do their work at once."""

    current: Stream

    def __init__(self, device: torch.device | None = None) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    @staticmethod
    @contextmanager
    def use(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        try:
            yield
        finally:
            Stream.current = before


DEFAULT = Stream.current = Stream()


class CUDAGraph:
    """A graph: the operations that were recorded, and the tensors that they read and write."""

    recording: CUDAGraph | None = None
    num_replays = 0
    underway: ClassVar[list[Any]] = []
    """Pools that the allocator takes memory from; one whose recording failed stays among them until it is told."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []
        self.is_broken = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if Stream.current is DEFAULT:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        assert CUDAGraph.recording is None, "one graph at a time"
        CUDAGraph.recording = self
        CUDAGraph.underway.append(pool)
        self.used_pool = pool

    def capture_end(self) -> None:
        CUDAGraph.recording = None
        if self.is_broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        CUDAGraph.underway.remove(self.used_pool)

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        CUDAGraph.num_replays += 1
        with torch.no_grad():
            for call in self.calls:
                call()

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Records an operation on tensors of the CPU; gives what will hold its result."""
        arguments = func._schema.arguments
        written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
        if written:
            self.calls.append(lambda: func(*args, **kwargs))
            by_name = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
            return by_name[written[0]] if len(written) == 1 else tuple(by_name[name] for name in written)
        results = func(*args, **kwargs)
        inputs = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        outputs = [each for each in _tensors(results) if each.untyped_storage().data_ptr() not in inputs]
        if outputs:  # what is no view
            self.calls.append(lambda: _copy(_tensors(func(*args, **kwargs)), _tensors(results)))
            for each in outputs:
                if each.is_floating_point():
                    each.fill_(torch.nan)
        return results

    def refill(self, made: Tensor) -> None:
        """Records that a tensor is made, with these values."""
        values = made.clone()
        self.calls.append(lambda: made.copy_(values))


def forbid(what: str) -> None:
    """Raises an error if a graph is being recorded, which is of no use then."""
    if CUDAGraph.recording is not None:
        CUDAGraph.recording.is_broken = True
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dictionaries hold; torch's own ``tree_leaves`` takes several times as long."""
    if isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
    else:
        yield value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The value, or lists, tuples and dictionaries of values, with a function of each."""
    if isinstance(value, dict):
        return {name: mapped(function, each) for name, each in value.items()}
    return type(value)(mapped(function, each) for each in value) if type(value) in (list, tuple) else function(value)


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in leaves(values) if isinstance(each, Tensor)]


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)


@contextmanager
def pretended_graphs() -> Iterator[None]:
    """Graphs and streams of ``torch.cuda`` are pretended for as long as it lasts."""
    replaced = {
        "torch.cuda.CUDAGraph": CUDAGraph,
        "torch.cuda.Stream": Stream,
        "torch.cuda.stream": Stream.use,
        "torch.cuda.current_stream": lambda device=None: Stream.current,
        "torch.cuda.default_generators": (torch.Generator(),),
        "torch._C._cuda_endAllocateToPool": lambda device, pool: CUDAGraph.underway.remove(pool),
    }
    CUDAGraph.num_replays = 0
    CUDAGraph.underway.clear()
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value, create=name.startswith("torch._C")))
        yield
