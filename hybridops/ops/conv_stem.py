"""Fused convolution stem: a chain of conv + folded norm + activation, max-pool, out as tokens.

    x_0 = image;  x_{l+1} = activation_l(conv(x_l; weight_l, stride_l, padding_l) + bias_l)
    tokens = maxpool(x_L) as (B, H*W, C)

Norms that a convolution cannot absorb follow their layer as `GroupNorm` (BiT: conv, norm,
activation) or `affine` (CMT: conv, activation, BatchNorm). Tokens (B, H*W, C) and a channels_last
image (B, C, H, W) are the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from . import _by_torch
from ._contract import (
    CODES,
    LARGEST_PADDING,
    REFUSALS,
    activate,
    activation_backward,
    activation_code,
    are_plain,
    autocast,
    check_eps,
    check_int,
    check_one_device,
    check_shape,
    check_tensor,
    define,
    differentiable_once,
    is_autocast_on,
    library,
    on_gpu,
)
from .linear import pack_linear


class ConvLayer(NamedTuple):
    """One convolution of a stem.

    weight (Co, Ci, Kh, Kw), bias (Co,); padding: an int, (top, left, bottom, right), or "same"
    (TensorFlow's, which pads the end more); packed: pack_conv(weight); group_norm: (groups, weight,
    bias, eps) between conv and activation; affine: (scale, shift), each (Co,), behind the
    activation.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: int | str | tuple[int, int, int, int] = 0
    activation: str = "none"
    packed: Tensor | None = None
    group_norm: tuple[int, Tensor, Tensor, float] | None = None
    affine: tuple[Tensor, Tensor] | None = None


class MaxPool(NamedTuple):
    """Max-pool behind a stem; padding as in ConvLayer (padded cells never win)."""

    kernel: int = 3
    stride: int = 2
    padding: int | str | tuple[int, int, int, int] = 1


# meaning
def conv_stem_reference(image, layers, pool=None):
    return stem_image(image, layers, pool).flatten(2).transpose(1, 2).contiguous()


def stem_image(image, layers, pool):
    """layers: (weight, bias, stride, padding (4), activation code, group_norm, affine)."""
    x = image
    for weight, bias, stride, padding, activation, group_norm, affine in layers:
        x = conv_reference(x, weight, bias, stride, padding)
        if group_norm is not None:
            x = F.group_norm(x, *group_norm)
        x = activate(x, activation)
        if affine is not None:
            x = x * affine[0][:, None, None] + affine[1][:, None, None]
    return x if pool is None else _pool_reference(x, *pool)


def conv_reference(x, weight, bias, stride, padding):
    top, left, bottom, right = padding
    if weight.numel() == 0:  # torch's conv2d refuses no channels; a sum over none is 0
        y = weight.sum((1, 2, 3)) if bias is None else weight.sum((1, 2, 3)) + bias
        size = output_size(x.shape[2:], weight.shape[2:], stride, padding)
        return y[:, None, None].expand(x.shape[0], -1, *size)
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, bias, stride, (top, left))
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride)


def _pool_reference(x, kernel, stride, padding):
    top, left, bottom, right = padding
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-torch.inf), kernel, stride)


def resolve_padding(op, padding, kernel, stride, size):
    """(top, left, bottom, right) for an input of that (H, W)."""
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"{op}: padding must be an int, four ints or 'same', got {padding!r}")
        need = [
            max((-(-n // stride) - 1) * stride + k - n, 0)
            for n, k in zip(size, kernel, strict=True)
        ]
        return need[0] // 2, need[1] // 2, need[0] - need[0] // 2, need[1] - need[1] // 2
    if isinstance(padding, (tuple, list)):
        if len(padding) != 4:
            raise ValueError(f"{op}: padding must be (top, left, bottom, right), got {padding!r}")
        four = tuple(padding)
    else:
        four = (padding,) * 4
    for side in four:
        check_int(op, "padding", side, 0, LARGEST_PADDING)
    return four


def output_size(size, kernel, stride, padding):
    """(Ho, Wo) of a convolution or pool with padding (top, left, bottom, right)."""
    top, left, bottom, right = padding
    return (size[0] + top + bottom - kernel[0]) // stride + 1, (
        size[1] + left + right - kernel[1]
    ) // stride + 1


# contract
define(
    "conv_stem",
    "(Tensor image, Tensor[] weights, Tensor[] biases, Tensor[] packed, int[] strides, "
    "SymInt[] paddings, "
    "int[] activations, SymInt[] pool) -> Tensor",
)
define(
    "conv_backward",
    "(Tensor dz, Tensor image, Tensor weight, int stride, SymInt[] padding, bool "
    "needs_dimage) "
    "-> (Tensor, Tensor, Tensor)",
)


def _sizes(image, weights, strides, paddings, pool):
    """The (H, W) behind every layer, and behind the pool where there is one."""
    size, sizes = tuple(image.shape[2:]), []
    for i, weight in enumerate(weights):
        size = output_size(size, weight.shape[2:], strides[i], paddings[4 * i : 4 * i + 4])
        sizes.append(size)
    if len(pool):
        size = output_size(size, (pool[0], pool[0]), pool[1], pool[2:])
        sizes.append(size)
    return sizes


@torch.library.register_fake("hybridops::conv_stem", lib=library)
def _(image, weights, biases, packed, strides, paddings, activations, pool):
    check_one_device("conv_stem", image, *weights, *biases, *packed)
    H, W = _sizes(image, weights, strides, paddings, pool)[-1]
    return weights[0].new_empty((image.shape[0], H * W, weights[-1].shape[0]))


@torch.library.register_fake("hybridops::conv_backward", lib=library)
def _(dz, image, weight, stride, padding, needs_dimage):
    B, Ci, H, W = image.shape
    dimage = dz.new_empty((B, H, W, Ci) if needs_dimage else (0,))
    return dimage, weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


on_gpu("conv_stem", "conv_stem.forward", lambda image, weights, *_: (weights[0], 0))
on_gpu(
    "conv_backward",
    "conv_backward.backward",
    lambda dz, image, weight, *_: (weight, 0),
    torchs=("cuDNN", _by_torch.conv_backward),
)


# gradient: intermediates are recomputed layer by layer; the convolutions run in the kernel
def _setup(ctx, inputs, output):
    image, weights, biases, _, ctx.strides, ctx.paddings, ctx.activations, ctx.pool = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(image, *weights, *biases)


def _gradient(ctx, dy):
    L = ctx.layers
    image, *rest = ctx.saved_tensors
    weights, biases = rest[:L], rest[L:]
    sizes = _sizes(image, weights, ctx.strides, ctx.paddings, ctx.pool)
    inputs, outputs = [image], []
    last = not ctx.activations[-1] and not len(ctx.pool)  # whose result nobody asks for
    for i in range(L - last):
        padding = ctx.paddings[4 * i : 4 * i + 4]
        z = _forward(
            inputs[i],
            weights[i : i + 1],
            biases[i : i + 1],
            [],
            ctx.strides[i : i + 1],
            padding,
            [0],
            [],
        )
        outputs.append(z)
        inputs.append(as_image(activate(z, ctx.activations[i]), sizes[i]))
    d = dy
    if len(ctx.pool):
        with torch.enable_grad():
            x = inputs[-1].detach().requires_grad_()
            pooled = _pool_reference(x, ctx.pool[0], ctx.pool[1], ctx.pool[2:])
        (d,) = torch.autograd.grad(pooled, x, as_image(dy, sizes[-1]))
        d = d.flatten(2).transpose(1, 2)
    dweights, dbiases = [None] * L, [None] * L
    for i in reversed(range(L)):
        dz = d.contiguous()
        if ctx.activations[i]:
            dz = activation_backward(dz, outputs[i], ctx.activations[i])
        needs_dinput = i > 0 or ctx.needs_input_grad[0]
        padding = ctx.paddings[4 * i : 4 * i + 4]
        d, dweights[i], dbiases[i] = conv_backward(
            dz, inputs[i], weights[i], ctx.strides[i], padding, needs_dinput
        )
        if i > 0:
            d = d.flatten(1, 2)
    dimage = d.permute(0, 3, 1, 2) if ctx.needs_input_grad[0] else None
    dpool = None if len(ctx.pool) else []  # torch takes any empty list for one of tensors
    return dimage, dweights, dbiases, [None] * ctx.npacked, None, None, None, dpool


def _setup_counting_packed(ctx, inputs, output):
    ctx.npacked = len(inputs[3])
    _setup(ctx, inputs, output)


torch.library.register_autograd(
    "hybridops::conv_stem", _gradient, setup_context=_setup_counting_packed, lib=library
)
conv_backward = differentiable_once("conv_backward")

_forward = torch.ops.hybridops.conv_stem.default


def as_image(tokens, size):
    """Tokens (B, H*W, C) as a channels_last image (B, C, H, W): a view."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def _at_once(image, layers, pool, layout):
    """The kernel without the door's checks, for layers that are plain; raises for any other."""
    if pool is not None or not layers:
        raise ValueError("not plain")
    weights, biases, all_packed, strides, paddings, codes = [], [], [], [], [], []
    _, _, H, W = image.shape
    for weight, bias, stride, padding, activation, packed, group_norm, affine in layers:
        if group_norm or affine or bias is None or not are_plain(stride, padding):
            raise ValueError("not plain")
        _, _, Kh, Kw = weight.shape
        H, W = (H + 2 * padding - Kh) // stride + 1, (W + 2 * padding - Kw) // stride + 1
        weights.append(weight)
        biases.append(bias)
        all_packed.append(packed)
        strides.append(stride)
        paddings += (padding, padding, padding, padding)
        codes.append(CODES[activation])
    if H < 1 or W < 1:
        raise ValueError("not plain")
    with backend.below_autograd():
        tokens = _forward(image, weights, biases, all_packed, strides, paddings, codes, [])
    return tokens if layout == "tokens" else as_image(tokens, (H, W))


# door
def conv_stem(
    image: Tensor,
    layers: Sequence[ConvLayer],
    *,
    pool: MaxPool | None = None,
    layout: str = "tokens",
) -> Tensor:
    """image (B, Ci, H, W), any memory format, float or uint8 -> tokens (B, Ho*Wo, C), contiguous.

    layout="image" gives the same bytes as a channels_last image (B, C, Ho, Wo). uint8 images enter
    as their values 0 … 255 (fold a normalisation into the first layer's weight and bias).

    fp32 and bf16 (fp32 accumulation) have a CPU kernel, and with fp16 a GPU one, for layers without
    group_norm and affine; the rest goes to the reference. Raises ValueError for shapes that do not
    fit, TypeError for dtypes.
    """
    if layout not in ("tokens", "image"):
        raise ValueError(f"conv_stem: layout must be 'tokens' or 'image', got {layout!r}")
    if backend.runs_at_once(image):
        with suppress(*REFUSALS):
            return _at_once(image, layers, pool, layout)
    if not isinstance(layers, (tuple, list)) or not all(isinstance(x, ConvLayer) for x in layers):
        raise TypeError("conv_stem: layers must be a list of ConvLayer")
    if not layers:
        raise ValueError("conv_stem: layers must hold at least one ConvLayer, got none")
    if not isinstance(image, Tensor):
        raise TypeError(f"conv_stem: image must be a Tensor, got {type(image).__name__}")
    first = layers[0].weight
    if is_autocast_on(image):
        layers = [_autocast_layer(layer) for layer in layers]
        first = layers[0].weight
        image = image if image.dtype == torch.uint8 else image.to(first.dtype)
    if image.dtype != torch.uint8:
        check_tensor(
            "conv_stem", "image", image, 4, like=first if isinstance(first, Tensor) else None
        )
    elif image.ndim != 4:
        raise ValueError(f"conv_stem: image must have 4 dimensions, got shape {tuple(image.shape)}")
    elif isinstance(first, Tensor) and image.device != first.device:
        raise ValueError(
            f"conv_stem: image must be on {first.device} like the weights, got {image.device}"
        )
    size, channels, plan = tuple(image.shape[2:]), image.shape[1], []
    for i, layer in enumerate(layers):
        plan.append(_check_layer(f"layer {i}", layer, first, channels, size))
        weight, _, stride, padding = plan[-1][:4]
        size, channels = output_size(size, weight.shape[2:], stride, padding), weight.shape[0]
        _check_fits(f"layer {i}", size, image)
    pooling = None
    if pool is not None:
        if not isinstance(pool, MaxPool):
            raise TypeError(f"conv_stem: pool must be a MaxPool, got {type(pool).__name__}")
        check_int("conv_stem", "pool kernel", pool.kernel, 1)
        check_int("conv_stem", "pool stride", pool.stride, 1)
        kernel = (pool.kernel, pool.kernel)
        pooling = (
            pool.kernel,
            pool.stride,
            resolve_padding("conv_stem", pool.padding, kernel, pool.stride, size),
        )
        size = output_size(size, kernel, pool.stride, pooling[2])
        _check_fits("pool", size, image)
    if backend.which("conv_stem", first, _unserved(layers)) == "reference":
        x = image if image.dtype != torch.uint8 else image.to(first.dtype)
        tokens = conv_stem_reference(x, plan, pooling)
    else:
        packed = [layer.packed for layer in layers]
        tokens = _forward(
            image,
            [layer[0] for layer in plan],
            [
                layer[1] if layer[1] is not None else layer[0].new_zeros(layer[0].shape[0])
                for layer in plan
            ],
            [] if None in packed else packed,
            [layer[2] for layer in plan],
            [side for layer in plan for side in layer[3]],
            [layer[4] for layer in plan],
            [] if pooling is None else [*pooling[:2], *pooling[2]],
        )
    return tokens if layout == "tokens" else as_image(tokens, size)


def pack_conv(weight: Tensor) -> Tensor | None:
    """weight (Co, Ci, Kh, Kw) in the CPU kernel's panel order; None if no library serves it."""
    check_tensor("pack_conv", "weight", weight, 4)
    return pack_linear(weight.permute(0, 2, 3, 1).flatten(1), runs=max(weight.shape[2], 1))


def _autocast_layer(layer):
    if not isinstance(layer.weight, Tensor):
        return layer
    weight, bias = autocast(layer.weight, layer.bias)
    packed = layer.packed if weight is layer.weight else None  # it packs the weight as it was
    return layer._replace(weight=weight, bias=bias, packed=packed)


def _check_layer(name, layer, first, channels, size):
    op, (weight, bias, stride, padding) = "conv_stem", layer[:4]
    check_tensor(op, f"{name} weight", weight, 4, like=first)
    if weight.shape[1] != channels or 0 in weight.shape[2:]:
        raise ValueError(
            f"{op}: {name} weight must be (Co, {channels}, Kh, Kw), got {tuple(weight.shape)}"
        )
    check_int(op, f"{name} stride", stride, 1)
    out = weight.shape[:1]
    vectors = {"bias": bias}
    if layer.affine is not None:
        if not isinstance(layer.affine, (tuple, list)) or len(layer.affine) != 2:
            raise ValueError(f"{op}: {name} affine must be (scale, shift)")
        vectors |= {"affine scale": layer.affine[0], "affine shift": layer.affine[1]}
    if layer.group_norm is not None:
        if not isinstance(layer.group_norm, (tuple, list)) or len(layer.group_norm) != 4:
            raise ValueError(f"{op}: {name} group_norm must be (groups, weight, bias, eps)")
        groups, norm_weight, norm_bias, eps = layer.group_norm
        check_eps(op, f"{name} group_norm eps", eps)
        check_int(op, f"{name} group_norm groups", groups, 1)
        if out[0] % groups:
            raise ValueError(
                f"{op}: {name} group_norm groups must divide {out[0]} channels, got {groups}"
            )
        vectors |= {"group_norm weight": norm_weight, "group_norm bias": norm_bias}
    for what, vector in vectors.items():
        if vector is not None:
            check_tensor(op, f"{name} {what}", vector, 1, like=first)
            check_shape(op, f"{name} {what}", vector, tuple(out))
    if layer.packed is not None:
        check_tensor(op, f"{name} packed", layer.packed, None)
    padding = resolve_padding(op, padding, tuple(weight.shape[2:]), stride, size)
    return (
        weight,
        bias,
        stride,
        padding,
        activation_code(op, layer.activation),
        layer.group_norm,
        layer.affine,
    )


def _check_fits(name, size, image):
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"conv_stem: {name} does not fit: image {tuple(image.shape)} leaves it an output of "
            f"{size}"
        )


def _unserved(layers):
    if any(layer.group_norm is not None or layer.affine is not None for layer in layers):
        return "group_norm or affine"
    return None
