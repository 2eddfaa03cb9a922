"""What the op files share: activations by name, checks with one wording, autocast."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend

# The position is the code that crosses into C++ (csrc/simd/activation.h).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
ACTIVATION_NAMES = tuple(ACTIVATIONS)
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
# What a call raises that the kernel or the dispatcher refuses; the door's checks then name the
# reason.
REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    ZeroDivisionError,
)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**31 - 1
LARGEST_PADDING = 2**15  # so that no product of two sides of an output overflows 64 bits

library = torch.library.Library("hybridops", "DEF")
cuda_library = torch.library.Library("hybridops_cuda", "DEF")  # the same schemas: csrc/cuda/*.cu
ON_GPU: dict[str, Callable] = {}  # op -> what its CUDA key runs


def define(name: str, signature: str) -> None:
    """One contract, under its own name and for its CUDA C++ twin."""
    for one in (library, cuda_library):
        one.define(name + signature)


def on_gpu(
    name: str,
    kernel: str,
    key: Callable[..., tuple[Tensor, float]],
    torchs: tuple[str, Callable] | None = None,
) -> None:
    """Registers what serves hybridops::name on a GPU.

    `kernel` is the Triton one, "file.function" in hybridops.kernels, imported by the first call.
    key(*args) gives a tensor that speaks for the call, and the size that `backend.GPU` compares.
    torchs: whose product stands for "torch" in that table, as `backend.served` names it, and the
    function that calls it.
    What is served raises BackendUnavailable where the reference is due, in a backward inside
    use("reference") say: there the doors alone have it.
    """
    twin = _cuda_twin(name)
    module, function = kernel.split(".")

    def serve(*args):
        x, size = key(*args)
        chosen = backend.which(name, x, size=size)
        if chosen == "cuda":
            backend.served[name, "cuda"] += 1
            return twin(*args)
        if torchs is not None and chosen != "triton":
            backend.served[name, torchs[0]] += 1
            return torchs[1](*args)
        if chosen == "reference":  # a door's choice: it comes no further, but backwards do
            forced = "inside use('reference')" if backend.reference_forced() else None
            reason = forced or backend._kernels(name, x, size)[1]
            raise backend.BackendUnavailable(f"{name}: no kernel may serve this call: {reason}")
        backend.served[name, "triton"] += 1
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return getattr(importlib.import_module(f"hybridops.kernels.{module}"), function)(*args)

    library.impl(name, serve, "CUDA")
    ON_GPU[name] = serve


def _cuda_twin(name: str) -> Callable:
    """hybridops_cuda::name, entered in backend.CUDA_OPS where the CUDA library has it."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"hybridops_cuda::{name}", "CUDA"):
        backend.CUDA_OPS.add(name)
    return getattr(torch.ops.hybridops_cuda, name).default


def differentiable(name: str, setup: Callable, gradient: Callable) -> Callable:
    """Registers an op's gradient with torch, and returns the op as its door calls it.

    torch records a registered gradient in Python behind its dispatcher, 100 us of a call and its
    backward on Zen 3. Where nobody captures or transforms the call, the door records the same
    gradient in one step.
    """
    op = getattr(torch.ops.hybridops, name).default
    torch.library.register_autograd(
        f"hybridops::{name}", gradient, setup_context=setup, lib=library
    )

    def forward(ctx, *args):
        with backend.below_autograd():
            output = op(*args)
        setup(ctx, args, output)
        return output

    both = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    record: Any = type(f"hybridops_{name}_", (torch.autograd.Function,), both)

    def call(*args):
        if backend.is_captured() or torch._C._are_functorch_transforms_active():
            return op(*args)
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return record.apply(*args)
        with backend.below_autograd():
            return op(*args)

    return call


def differentiable_once(backward: str) -> Callable:
    """A second derivative through that op raises; torch alone would warn and leave it out.

    Returns the op as gradients call it, which passes by that word where nothing is recorded.
    """
    op = getattr(torch.ops.hybridops, backward).default

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"hybridops::{backward} has no gradient of its own: the ops are differentiable once"
        )

    torch.library.register_autograd(f"hybridops::{backward}", refuse, lib=library)

    def call(*args):
        if torch.is_grad_enabled() or backend.is_captured():
            return op(*args)
        with backend.below_autograd():
            return op(*args)

    return call


def activation_code(op: str, name: str) -> int:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATION_NAMES.index(name)


def activate(x: Tensor, code: int) -> Tensor:
    return ACTIVATIONS[ACTIVATION_NAMES[code]](x)


def activation_backward(dy: Tensor, z: Tensor, code: int) -> Tensor:
    """Gradient of activation `code` at its input z."""
    aten = torch.ops.aten
    match ACTIVATION_NAMES[code]:
        case "none":
            return dy
        case "relu":
            return aten.threshold_backward(dy, z, 0)
        case "gelu":
            return aten.gelu_backward(dy, z)
        case "gelu_tanh":
            return aten.gelu_backward(dy, z, approximate="tanh")
        case "silu":
            return aten.silu_backward(dy, z)
        case _:
            return aten.hardswish_backward(dy, z)


def check_tensor(
    op: str, name: str, x: object, ndim: int | None, like: Tensor | None = None
) -> None:
    """x is a floating-point tensor of that rank, with the dtype and device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {x.dtype}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {tuple(x.shape)}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype} like the input, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the input, got {x.device}")


def check_shape(op: str, name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(x.shape)}")


def check_one_device(op: str, *inputs: object) -> None:
    """For fakes: torch calls the fake as soon as one tensor of several is on meta."""
    devices = {str(x.device) for x in inputs if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"{op}: tensors on different devices: {', '.join(sorted(devices))}")


def check_int(op: str, name: str, value: object, low: int, high: int = LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in [{low}, {high}], got {value}")


def are_plain(*values: object) -> bool:
    """Whether integers need no word from the door: neither bools nor symbols nor hostile ones."""
    for value in values:  # noqa: SIM110 - all() of a generator takes three times as long
        if type(value) is not int or value > LARGEST:
            return False
    return True


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def unpack_norm(op: str, norm: object) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps) of a LayerNorm, or nothing; the caller checks the tensors."""
    if norm is None:
        return None, None, 0.0
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        got = f"{len(norm)} values" if isinstance(norm, (tuple, list)) else type(norm).__name__
        raise ValueError(f"{op}: norm must be (weight, bias or None, eps), got {got}")
    weight, bias, eps = norm
    check_tensor(op, "norm weight", weight, 1)
    check_eps(op, "norm eps", eps)
    return weight, bias, eps


def plain_norm(norm: Any) -> tuple[Tensor | None, Tensor | None, float]:
    """The same where a kernel looks first: raises one of REFUSALS for what is left to the door."""
    if norm is None:
        return None, None, 0.0
    weight, bias, eps = norm
    if type(eps) is not float:
        raise TypeError("not plain")
    return weight, bias, eps


def check_eps(op: str, name: str, eps: object) -> None:
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:  # math.isfinite would end a graph in which eps is a symbol
        raise ValueError(f"{op}: {name} must be finite and not negative, got {eps}")


def is_plain(scale: object) -> bool:
    """Whether a scale needs no word from the door: None, or a finite float."""
    return scale is None or (type(scale) is float and math.isfinite(scale))


def is_autocast_on(x: object) -> bool:
    """Whether autocast is on for x's device; meta, which knows none, answers no."""
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(x: Any, *others: Any) -> Any:
    """Under autocast, tensors in autocast's dtype, as torch's own matrix products take them."""
    if not is_autocast_on(x):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    wide = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in wide else t for t in (x, *others))
