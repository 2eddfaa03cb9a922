"""What verify() measures: calls of a layer, their error against float64, and planted faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

RATIO, FLOOR = 2.0, 4.0
FAULTS = 4  # tensors of a layer that get a planted fault, in turn
JITTER = 2.0**-8  # relative change of an input that is measured again: other roundings, same size


@dataclass(frozen=True)
class Errors:
    """Largest and rms error, ours and torch's, relative to the rms of the worst output."""

    ours: float = 0.0
    torchs: float = 0.0
    ours_rms: float = 0.0
    torchs_rms: float = 0.0
    floor: float = 0.0
    problem: str | None = None

    @property
    def allowed(self) -> float:
        return RATIO * self.torchs + self.floor

    @property
    def ok(self) -> bool:
        rms_ok = self.ours_rms <= RATIO * self.torchs_rms + self.floor
        return self.problem is None and rms_ok and self.ours <= self.allowed

    def worst(self, other: Errors) -> Errors:
        """Each number's larger one: over inputs the rule compares worst with worst."""
        return Errors(
            max(self.ours, other.ours),
            max(self.torchs, other.torchs),
            max(self.ours_rms, other.ours_rms),
            max(self.torchs_rms, other.torchs_rms),
            max(self.floor, other.floor),
            self.problem or other.problem,
        )


class Call(NamedTuple):
    """A call of one method of a layer."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def on(self, module: nn.Module) -> list[Tensor]:
        """The tensors that the call returns."""
        tree = getattr(module, self.method)(*self.args, **self.kwargs)
        return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]

    def doubled(self) -> Call:
        """The call with its floating-point tensors in float64."""
        return self._with(_double)

    def jittered(self, generator: torch.Generator) -> Call:
        """The call with its floating-point tensors changed a little."""

        def jitter(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
            return x * (1 + JITTER * noise)

        return self._with(jitter)

    def stirred(self, generator: torch.Generator) -> Call:
        """The call with noise of ordinary size added to its floating-point tensors.

        Tokens that are zero or all alike hide what attention does with them: DETR's decoders start
        with such. A mask that is added to scores, 0 or very negative, hides what it hid.
        """

        def stir(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            return x + torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

        return self._with(stir)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Call:
        return Call(self.method, *pytree.tree_map_only(Tensor, change, (self.args, self.kwargs)))


class ChannelsLast(TorchFunctionMode):
    """fp32 convolutions as torch's own packed channels_last ones, which torch.compile runs too.

    oneDNN sums all products of an output there in one chain, and by 16 channels in NCHW: at 512
    channels of 3x3 the rounding is 5 times as large (7 times at its largest). Rules that run on
    that very kernel are compared with it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        x = args[0] if args else None
        if func is not torch.conv2d or x is None or kwargs:
            return func(*args, **(kwargs or {}))
        x, weight, bias, stride, padding, dilation, groups = args
        if x.dtype != torch.float32 or not x.is_cpu or isinstance(padding, str):
            return func(*args)
        geometry = (padding, stride, dilation, groups)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed = reorder(weight.contiguous().to_mkldnn(), *geometry, x.shape)
        return torch.ops.mkldnn._convolution_pointwise.default(
            x.contiguous(memory_format=torch.channels_last),
            packed,
            bias,
            *geometry,
            "none",
            [],
            None,
        )


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@torch.no_grad()
def capture(
    model: nn.Module, args: tuple[Any, ...], layers: dict[str, Any], **kwargs: Any
) -> dict[str, Call]:
    """The first call of each layer's method, in one run of the original model."""
    calls: dict[str, Call] = {}

    def recorded(fqn, method):
        def call(*args, **kwargs):
            if fqn not in calls:
                args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
                asked = layers[fqn].as_called(args, kwargs)
                calls[fqn] = Call(layers[fqn].overrides, *asked)
            return method(*args, **kwargs)

        return call

    peers = {fqn: model.get_submodule(fqn) for fqn in layers}
    for fqn, peer in peers.items():
        name = layers[fqn].overrides
        peer.__dict__[name] = recorded(fqn, getattr(peer, name))
    mha: Any = torch.backends.mha
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)  # nn.TransformerEncoderLayer would not call its attention
    try:
        model(*args, **kwargs)
    finally:
        mha.set_fastpath_enabled(fast)
        for fqn, peer in peers.items():
            peer.__dict__.pop(layers[fqn].overrides, None)
    return calls


def compare(ours: list[Tensor], eager: list[Tensor], reference: list[Tensor]) -> Errors:
    """The errors of what a replaced layer and the original returned."""
    if len(ours) != len(eager):
        return Errors(problem=f"returns {len(ours)} tensors in place of {len(eager)}")
    found = Errors()
    for y, e, r in zip(ours, eager, reference, strict=True):
        if (y.shape, y.dtype, y.device) != (e.shape, e.dtype, e.device):
            got, want = (f"{tuple(t.shape)} {t.dtype}" for t in (y, e))
            return Errors(problem=f"returns {got} in place of {want}")
        if not torch.equal(y.isfinite(), e.isfinite()):
            return Errors(problem="has NaN or Inf where torch has none, or the reverse")
        if not y.is_floating_point() or not y.numel():
            continue
        size = r.square().mean().sqrt().item()
        if not size > 0:
            return Errors(problem="the output is zero, which proves nothing")
        d_ours, d_torchs = y.double() - r, e.double() - r
        now = Errors(
            _largest(d_ours) / size,
            _largest(d_torchs) / size,
            _rms(d_ours) / size,
            _rms(d_torchs) / size,
            FLOOR * torch.finfo(y.dtype).eps,
        )
        if found.floor == 0 or now.ours / now.allowed > found.ours / found.allowed:
            found = now
    return found


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def plant(module: Any, seed: int) -> Iterator[str]:
    """Disturb a few of the layer's tensors, one at a time; yields while the fault is in place."""
    own = [(name, t) for name, t in _own_tensors(module) if t.is_floating_point() and t.numel()]
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in own[:: max(1, -(-len(own) // FAULTS))]:
        # fp32: 0.4 %, bf16: as large as the tensor itself
        size = min(1.0, 2.0**15 * torch.finfo(tensor.dtype).eps)
        healthy = tensor.detach().clone()
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        with torch.no_grad():
            tensor.add_(noise * healthy.square().mean().sqrt().clamp_min(0.1) * size)
        yield name
        with torch.no_grad():
            tensor.copy_(healthy)


def _own_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """What the rule computes with: the layer's own tensors, and its bypassed children's."""
    below = [m for child in type(module).bypassed(module) for m in child.modules()]
    bypassed = set(map(id, below))
    invisible = tuple(n for m in (module, *below) for n in getattr(m, "invisible", ()))
    for prefix, part in module.named_modules():
        if part is module or id(part) in bypassed:
            for name, tensor in [
                *part.named_parameters(recurse=False),
                *part.named_buffers(recurse=False),
            ]:
                fqn = f"{prefix}.{name}".lstrip(".")
                if not fqn.endswith(invisible):
                    yield fqn, tensor
