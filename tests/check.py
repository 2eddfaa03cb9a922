"""When is a result right: its error against float64 is at most twice torch's own in the same dtype.

    e(y) = max |y - y64| / max(rms(y64), tiny)          accepted:  e(ours) <= 2 e(torch) + 4 eps

and the same for the root mean square in place of the maximum; three times as much for gradients.
y64 and torch's own result are the reference, in float64 and in the dtype of the inputs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

import hybridops
from hybridops.bench.case import Case, Inputs, lay_out

GRAD_LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "offset")


def run(
    case: Case, inputs: Inputs, backend: str, dy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of case.call, and the gradient of every floating-point input where dy is given.

    backend "auto" forces none.
    """
    leaves, differentiable = {}, []
    for name, value in inputs.items():
        leaves[name] = value
        if dy is not None and value.is_floating_point():
            leaves[name] = value.detach().requires_grad_()
            differentiable.append(name)
    with nullcontext() if backend == "auto" else hybridops.use(backend):
        y = case.call(leaves)
        if dy is None:
            return y, {}
        # A gradient that is None counts as zero, here and in the reference.
        found = torch.autograd.grad(
            y, [leaves[n] for n in differentiable], dy, allow_unused=True, materialize_grads=True
        )
    return y.detach(), dict(zip(differentiable, found, strict=True))


def make_dy(case: Case, inputs: Inputs, grad_layout: str = "contiguous") -> Tensor:
    """A gradient for the case's output; "expanded" is what `y.sum().backward()` hands over."""
    y, _ = run(case, inputs, "reference")
    if grad_layout == "expanded":
        return torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return lay_out(values.to(y.dtype), grad_layout).to(y.device)


def outputs_and_gradients(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    layout: str | None = None,
    grad_layout: str = "contiguous",
    device: str = "cpu",
) -> None:
    """Fails unless `backend` is right on the case, repeats bit for bit and writes only outputs."""
    inputs = {n: t.to(device) for n, t in case.make_inputs(dtype, layout).items()}
    before = {name: value.clone() for name, value in inputs.items()}
    dy = make_dy(case, inputs, grad_layout)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}

    y64, grads64 = run(case, wide, "reference", dy.double())
    torchs, torchs_grads = run(case, inputs, "reference", dy)
    y, grads = run(case, inputs, backend, dy)
    again, grads_again = run(case, inputs, backend, dy)

    assert strides(y) == strides(torchs), f"{case}: {y.stride()}, reference {torchs.stride()}"
    assert y.is_contiguous() or is_channels_last(y), f"{case}: strides {y.stride()}"
    accurate(y, torchs, y64, f"{case} output")
    scale = dy.double().square().mean().sqrt().item() if dy.numel() else 0.0
    for name, dx in grads.items():
        what = f"{case} gradient of {name}"
        accurate(dx, torchs_grads[name], grads64[name], what, factor=3, scale=scale)

    assert same_bits(y, again), f"{case}: a second run gives other bits"
    with torch.inference_mode():
        assert same_bits(y, run(case, inputs, backend)[0]), f"{case}: other bits in inference mode"
    for name, dx in grads.items():
        assert same_bits(dx, grads_again[name]), f"{case}: a second backward gives another d{name}"
    for name, value in inputs.items():
        assert same_bits(value, before[name]), f"{case}: input {name} was written to"
        shared = y.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        assert not shared or not y.numel(), f"{case}: the output shares memory with {name}"


def strides(y: Tensor) -> list[int]:
    """The strides that say where an element is: not those of sizes 0 and 1."""
    return [
        stride for stride, size in zip(y.stride(), y.shape, strict=True) if size > 1 and y.numel()
    ]


def is_channels_last(y: Tensor) -> bool:
    return y.ndim == 4 and y.is_contiguous(memory_format=torch.channels_last)


def accurate(
    ours: Tensor, torchs: Tensor, y64: Tensor, what: str, factor: int = 2, scale: float = 0.0
) -> None:
    """ours is as right as torch's own result, both measured against y64.

    scale: the size of what a gradient was made from. A gradient that is zero by cancellation
    (softmax over one key) leaves only rounding, which is measured against that instead.
    """
    assert ours.shape == torchs.shape, f"{what}: shape {tuple(ours.shape)} != {tuple(torchs.shape)}"
    assert ours.dtype == torchs.dtype, f"{what}: {ours.dtype}, torch gives {torchs.dtype}"
    assert torch.equal(ours.isnan(), torchs.isnan()), f"{what}: NaN elsewhere than in torch's"
    assert torch.equal(ours.isinf(), torchs.isinf()), f"{what}: Inf elsewhere than in torch's"
    finite = torchs.isfinite() & y64.isfinite()
    if not finite.any():
        return
    y64 = y64[finite]
    size = rms(y64)
    if size < 1e-12 * scale:
        size = scale
    size = max(size, torch.finfo(torch.float64).tiny)
    difference = (ours.double()[finite] - y64).abs()
    baseline = (torchs.double()[finite] - y64).abs()
    floor = (4 if factor == 2 else 12) * torch.finfo(ours.dtype).eps
    for measure, name in ((Tensor.max, "largest"), (rms, "RMS")):
        error, own = (float(measure(d)) / size for d in (difference, baseline))
        if error > factor * own + floor:
            worst = int(difference.argmax())
            index = tuple(finite.nonzero()[worst].tolist())
            raise AssertionError(
                f"{what}: {name} error {error:.3g}, torch's own {own:.3g}, allowed {factor} times "
                f"that + {floor:.1g}; the worst of {tuple(ours.shape)} is {index}: "
                f"{ours[index].item():.6g} for {y64[worst].item():.6g}"
            )


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))
