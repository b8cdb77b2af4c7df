"""A pretended GPU: tensors that say they are on ``cuda:0``, are computed on the CPU, and keep to a GPU's rules.

On the CPU a forgotten ``device=`` goes unnoticed; here an operation on tensors of both devices raises an error, as it
does on a GPU, and so does a generator of the CPU. What makes the host wait for the device is counted.

To Python a tensor is :class:`OnGPU`, whose ``device`` is the GPU; to torch's C++ it is one of the CPU, so that autograd
goes through it in the calling thread.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode

from tests.pretend_cuda_graph import CUDAGraph, forbid, leaves, mapped, pretended_graphs

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"}
"""Operations whose result, or its size, the host needs before it goes on."""
INDEXING = {"index", "index_put", "index_put_"}
"""Operations with a list of indices, which may lie on the CPU, and cost a wait if they are masks."""

waits: Counter[str] = Counter()
"""By what the host waited for the device, and how often."""


class OnGPU(Tensor):
    """A tensor of the pretended GPU, around one of the CPU."""

    on_cpu: Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> OnGPU:
        layout = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset(), "dtype": on_cpu.dtype}
        wrapper = Tensor._make_wrapper_subclass(cls, on_cpu.shape, **layout, device="cpu")
        wrapper.on_cpu = on_cpu
        return wrapper

    def get_device(self) -> int:
        return 0

    def numpy(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"{self.on_cpu!r} on {GPU}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        check_devices(name, args, kwargs)
        masks = [each for each in args[1] if each is not None and each.dtype == torch.bool] if name in INDEXING else []
        if name in SYNCS or masks:
            wait(name)
        if name == "cumsum" and args[0].is_floating_point() and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        on_cpu = mapped(on_host, args), mapped(on_host, kwargs)
        graph = CUDAGraph.recording
        out = func(*on_cpu[0], **on_cpu[1]) if graph is None else graph.record(func, *on_cpu)
        if name == "_local_scalar_dense":
            return out
        named = zip(func._schema.arguments, args, strict=False)
        written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
        same = {id(each.on_cpu): each for each in leaves((written, kwargs.get("out"))) if isinstance(each, OnGPU)}
        return mapped(lambda each: same.get(id(each), on_gpu(each)), out)


def wait(what: str) -> None:
    """Counts that the host waits for the device."""
    forbid(what)
    waits[what] += 1


def on_gpu(value: Any) -> Any:
    """A tensor on the pretended GPU, without a copy; anything else as it is."""
    return OnGPU(value) if isinstance(value, Tensor) and not isinstance(value, OnGPU) else value


def on_host(value: Any) -> Any:
    """What is computed with."""
    return value.on_cpu if isinstance(value, OnGPU) else value


def check_devices(name: str, args: Any, kwargs: Any) -> None:
    """Refuses tensors of both devices, but for what a GPU takes of the CPU too: one number, and the places to index."""
    if name in ("copy_", "_to_copy"):
        return
    looked_at = (args[0], *args[2:]) if name in INDEXING else args
    tensors = [each for each in leaves((looked_at, kwargs)) if isinstance(each, Tensor)]
    if strange := [list(each.shape) for each in tensors if not isinstance(each, OnGPU) and each.dim() > 0]:
        raise RuntimeError(f"{name}: expected all tensors to be on cuda:0, but of shape {strange} they are on the CPU")


class Moved(torch.autograd.Function):
    """A copy on the other device, and its gradient back."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        ctx.from_gpu = isinstance(tensor, OnGPU)
        if ctx.from_gpu:
            wait("copy to the CPU")
        forbid("copy from the CPU")
        copy = on_host(tensor).clone()
        return copy if ctx.from_gpu else on_gpu(copy)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return on_gpu(grad) if ctx.from_gpu else on_host(grad)


class Devices(TorchFunctionMode):
    """Leads every ``device=`` to the pretended GPU or away from it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            return _backward(*args, **kwargs)
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _to(func, *args, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.tolist and isinstance(args[0], OnGPU):
            wait("tolist")
            return args[0].on_cpu.tolist()
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            first = int(func is Tensor.new_tensor)
            for each in leaves(args[first:]):
                if isinstance(each, OnGPU):
                    wait("values of a list")
            if kwargs.get("device") is not None or isinstance(args[0], OnGPU):
                forbid("values of a list")
            args = (*args[:first], *mapped(on_host, args[first:]))
        return _on_device(func, args, kwargs)


def _on_device(func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a function, with its result where ``device=`` or its first tensor says."""
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
        kwargs["device"] = CPU if wanted.type == "cuda" else wanted
    elif func.__name__.startswith("new_") and isinstance(args[0], OnGPU):
        wanted = GPU
    generator = kwargs.get("generator")
    if generator is not None and wanted is not None and generator.device.type != wanted.type:
        raise RuntimeError(f"{func.__name__}: expected a {wanted.type!r} generator but found {generator.device.type!r}")
    out = func(*args, **kwargs)
    if wanted is None or not isinstance(out, Tensor) or isinstance(out, OnGPU) == (wanted.type == "cuda"):
        return out
    if wanted.type != "cuda":
        return on_host(out)
    if CUDAGraph.recording is not None:
        CUDAGraph.recording.refill(out)
    return on_gpu(out.detach()).requires_grad_(out.requires_grad)


def _to(func: Callable, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``, ``cuda`` and ``cpu``."""
    device = {Tensor.cpu: CPU, Tensor.cuda: GPU}.get(func, kwargs.pop("device", None))
    dtype = kwargs.pop("dtype", None)
    for each in args:
        if isinstance(each, str | torch.device):
            device = torch.device(each)
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, Tensor):
            device, dtype = each.device, each.dtype
    if device is not None and isinstance(tensor, OnGPU) != (torch.device(device).type == "cuda"):
        tensor = Moved.apply(tensor)
    return tensor if dtype is None or tensor.dtype == dtype else tensor.type(dtype)


def _backward(tensor: Tensor, gradient: Tensor | None = None, **kwargs: Any) -> None:
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    run = Variable._execution_engine.run_backward
    with Devices():  # a mode is off while it handles a function, and what backward calls must find it
        run((tensor,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


class Generator(torch.Generator):
    """A generator that remembers the device that it was made for."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.made_for = GPU if torch.device(device).type == "cuda" else CPU
        return made

    device = property(lambda self: self.made_for)


class PretendedGPU(Accelerator):
    """The pretended GPU, as Lightning's Trainer takes it."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [GPU]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretended"


class OnPretendedGPU(SingleDeviceStrategy):
    """``--trainer.strategy pretended_gpu``."""

    accelerator = property(lambda self: PretendedGPU(), lambda self, value: None)

    def __init__(self) -> None:
        super().__init__(device=GPU)

    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        return self.precision_plugin.tensor_init_context()  # transformers loads in threads, which know of no mode

    def model_to_device(self) -> None:
        super().model_to_device()
        self.lightning_module.model.tie_weights()  # a parameter of another class is another parameter


StrategyRegistry.register("pretended_gpu", OnPretendedGPU)


@contextmanager
def pretended_gpu() -> Iterator[Counter[str]]:
    """A pretended GPU for as long as it lasts; counts what the host waits for."""
    waits.clear()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    replaced = {
        "torch.Generator": Generator,
        "torch.cuda.get_rng_state": lambda device=None: torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda state, device=None: None,
        "torch.cuda.max_memory_allocated": lambda device=None: 0,
        "torch.cuda.get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        # Gradient checkpointing keeps the random state of a GPU; the pretended one draws from the CPU's.
        "torch.utils.checkpoint._infer_device_type": lambda *args: "cpu",
        "torch.utils.checkpoint.get_device_states": lambda *args: ([], []),
    }
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")  # torch sees no accelerator
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.enter_context(pretended_graphs())
        stack.enter_context(Devices())
        yield waits
