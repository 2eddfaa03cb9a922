"""Patch embedding (ViT, Dosovitskiy et al. 2021): image to tokens, no im2col, no transpose.

    t = norm(conv(image; weight, stride, padding) + bias)       as tokens (B, N, C)
    tokens = [prefix, t] + pos_embed

pos_embed covers the N patch tokens, or prefix and patches (P + N). Input normalisation (image -
mean) / std is folded into weight and bias, which is exact as long as nothing is padded.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ._contract import (
    REFUSALS,
    are_plain,
    autocast,
    check_int,
    check_one_device,
    check_shape,
    check_tensor,
    define,
    differentiable,
    is_autocast_on,
    library,
    on_gpu,
    unpack_norm,
)
from .conv_stem import conv_backward, conv_reference, output_size, pack_conv, resolve_padding
from .linear import pack_linear


# meaning
def patch_embed_reference(
    image, weight, bias, norm_weight, norm_bias, eps, pos_embed, prefix, stride, padding
):
    x = (
        conv_reference(image.to(weight.dtype), weight, bias, stride, padding)
        .flatten(2)
        .transpose(1, 2)
    )
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    P = 0 if prefix is None else prefix.shape[0]
    if pos_embed is not None and pos_embed.shape[0] == x.shape[1]:
        x, pos_embed = x + pos_embed, None
    if P:
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
    return (x if pos_embed is None else x + pos_embed).contiguous()


# contract
ARGS = (
    "Tensor image, Tensor weight, Tensor? bias, Tensor? packed, Tensor? norm_weight, Tensor? "
    "norm_bias, float eps, "
    "Tensor? pos_embed, Tensor? prefix, int stride, SymInt[] padding"
)
define("patch_embed", f"({ARGS}) -> Tensor")


@torch.library.register_fake("hybridops::patch_embed", lib=library)
def _(image, weight, bias, packed, norm_weight, norm_bias, eps, pos_embed, prefix, stride, padding):
    vectors = (bias, packed, norm_weight, norm_bias, pos_embed, prefix)
    check_one_device("patch_embed", image, weight, *vectors)
    Ho, Wo = output_size(image.shape[2:], weight.shape[2:], stride, padding)
    P = 0 if prefix is None else prefix.shape[0]
    return weight.new_empty((image.shape[0], P + Ho * Wo, weight.shape[0]))


on_gpu("patch_embed", "patch_embed.forward", lambda image, weight, *_: (weight, 0))


# gradient: the convolution's in the kernel it shares with conv_stem, LayerNorm's in torch
def _setup(ctx, inputs, output):
    (
        image,
        weight,
        bias,
        _,
        norm_weight,
        norm_bias,
        ctx.eps,
        pos_embed,
        prefix,
        ctx.stride,
        ctx.padding,
    ) = inputs
    ctx.save_for_backward(image, weight, bias, norm_weight, norm_bias)
    ctx.prefix = 0 if prefix is None else prefix.shape[0]
    ctx.pos = None if pos_embed is None else pos_embed.shape[0]
    ctx.has_prefix = prefix is not None


def _gradient(ctx, dy):
    image, weight, bias, norm_weight, norm_bias = ctx.saved_tensors
    P, dz = ctx.prefix, dy[:, ctx.prefix :]
    dpos = dprefix = dnorm_weight = dnorm_bias = None
    if ctx.pos is not None:
        dpos = (dz if ctx.pos == dz.shape[1] else dy).sum(0)
    if ctx.has_prefix:
        dprefix = dy[:, :P].sum(0)
    if norm_weight is not None:
        t = _forward(
            image, weight, bias, None, None, None, 0.0, None, None, ctx.stride, ctx.padding
        )
        _, mean, rstd = torch.native_layer_norm(t, t.shape[-1:], norm_weight, norm_bias, ctx.eps)
        mask = [True, True, norm_bias is not None]
        dz, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
            dz.contiguous(), t, t.shape[-1:], mean, rstd, norm_weight, norm_bias, mask
        )
    needs_dimage = ctx.needs_input_grad[0]
    dimage, dweight, dbias = conv_backward(dz, image, weight, ctx.stride, ctx.padding, needs_dimage)
    return (
        dimage.permute(0, 3, 1, 2) if needs_dimage else None,
        dweight,
        dbias if bias is not None else None,
        None,
        dnorm_weight,
        dnorm_bias,
        None,
        dpos,
        dprefix,
        None,
        None,
    )


_recorded = differentiable("patch_embed", _setup, _gradient)

_forward = torch.ops.hybridops.patch_embed.default


def _at_once(image, weight, bias, stride, padding, norm, pos_embed, prefix, packed):
    """The kernel without the door's checks, for a call that is plain; raises for any other."""
    sides = padding if type(padding) is tuple else (padding,) * 4
    stride = weight.shape[2] if stride is None else stride
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    if not are_plain(stride, *sides) or type(eps) is not float:
        raise ValueError("not plain")
    with backend.below_autograd():
        return _forward(
            image,
            weight,
            bias,
            packed,
            norm_weight,
            norm_bias,
            eps,
            _two_dimensional(pos_embed),
            _two_dimensional(prefix),
            stride,
            sides,
        )


def _two_dimensional(rows):
    return rows[0] if rows is not None and rows.ndim == 3 and rows.shape[0] == 1 else rows


# door
def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | None = None,
    padding: int | str | tuple[int, int, int, int] = 0,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """image (B, Ci, H, W), any memory format, float or uint8 -> tokens (B, P + Ho*Wo, C).

    weight (C, Ci, Kh, Kw), bias (C,), stride: default Kh, norm = (weight (C,), bias (C,) or None,
    eps), pos_embed (N or P + N, C) or with a leading 1, prefix tokens (P, C) or (1, P, C). mean,
    std (Ci,): the image enters as (image - mean) / std; a uint8 image is divided by 255 first.
    packed = pack_patch(weight), without mean and std only.

    fp32 and bf16 (fp32 accumulation) have a CPU kernel, and with fp16 a GPU one; other dtypes go to
    the reference.
    Raises ValueError for shapes that do not fit, TypeError for dtypes.
    """
    op = "patch_embed"
    if mean is None and std is None and backend.runs_at_once(image):
        with suppress(*REFUSALS):
            return _at_once(image, weight, bias, stride, padding, norm, pos_embed, prefix, packed)
    if not isinstance(image, Tensor):
        raise TypeError(f"{op}: image must be a Tensor, got {type(image).__name__}")
    norm_weight, norm_bias, eps = unpack_norm(op, norm)
    if is_autocast_on(image):
        given = weight
        weight, bias, norm_weight, norm_bias, pos_embed, prefix = autocast(
            weight, bias, norm_weight, norm_bias, pos_embed, prefix
        )
        packed = packed if weight is given else None  # it packs the weight as it was
        image = image if image.dtype == torch.uint8 else image.to(weight.dtype)
    check_tensor(op, "weight", weight, 4)
    if image.dtype != torch.uint8:
        check_tensor(op, "image", image, 4, like=weight)
    elif image.ndim != 4:
        raise ValueError(f"{op}: image must have 4 dimensions, got shape {tuple(image.shape)}")
    elif image.device != weight.device:
        raise ValueError(f"{op}: image must be on {weight.device} like weight, got {image.device}")
    C, Ci, *kernel = weight.shape
    if image.shape[1] != Ci or 0 in kernel:
        raise ValueError(
            f"{op}: weight must be (C, {image.shape[1]}, Kh, Kw), got {tuple(weight.shape)}"
        )
    stride = kernel[0] if stride is None else stride
    check_int(op, "stride", stride, 1)
    sides = resolve_padding(op, padding, kernel, stride, tuple(image.shape[2:]))
    Ho, Wo = output_size(image.shape[2:], kernel, stride, sides)
    if Ho < 1 or Wo < 1:
        raise ValueError(
            f"{op}: weight {tuple(weight.shape)} does not fit image {tuple(image.shape)}"
        )
    for name, vector in (("bias", bias), ("norm weight", norm_weight), ("norm bias", norm_bias)):
        if vector is not None:
            check_tensor(op, name, vector, 1, like=weight)
            check_shape(op, name, vector, (C,))
    prefix = _rows(op, "prefix", prefix, weight, None)
    P = 0 if prefix is None else prefix.shape[0]
    pos_embed = _rows(op, "pos_embed", pos_embed, weight, (Ho * Wo, P + Ho * Wo))
    if packed is not None:
        check_tensor(op, "packed", packed, None)
    if (mean is None) != (std is None):
        raise ValueError(f"{op}: mean and std come together, got only one")
    if mean is not None:
        if packed is not None:
            raise ValueError(f"{op}: packed excludes mean and std: fold them before packing")
        image, weight, bias = _fold_normalisation(op, image, weight, bias, mean, std, sides)
    if backend.which(op, weight) == "reference":
        return patch_embed_reference(
            image, weight, bias, norm_weight, norm_bias, eps, pos_embed, prefix, stride, sides
        )
    return _recorded(
        image, weight, bias, packed, norm_weight, norm_bias, eps, pos_embed, prefix, stride, sides
    )


def _rows(op, name, x, like, counts):
    """x as (rows, C): a leading dimension of 1 goes away."""
    if x is None:
        return None
    check_tensor(op, name, x, None, like=like)
    x = _two_dimensional(x)
    if (
        x.ndim != 2
        or x.shape[1] != like.shape[0]
        or (counts is not None and x.shape[0] not in counts)
    ):
        rows = "P" if counts is None else f"{counts[0]} or {counts[1]}"
        raise ValueError(f"{op}: {name} must be ({rows}, {like.shape[0]}), got {tuple(x.shape)}")
    return x


def _fold_normalisation(op, image, weight, bias, mean, std, sides):
    for name, vector in (("mean", mean), ("std", std)):
        check_tensor(op, name, vector, 1)
        check_shape(op, name, vector, (weight.shape[1],))
    unit = 255.0 if image.dtype == torch.uint8 else 1.0
    mean, std = mean.to(weight.dtype), std.to(weight.dtype)
    if any(sides):  # padding is zero after normalisation, so the fold would be wrong at the border
        image = (image.to(weight.dtype) / unit - mean[:, None, None]) / std[:, None, None]
        return image, weight, bias
    scaled = weight / std[:, None, None]
    shift = -(scaled * mean[:, None, None]).sum((1, 2, 3))
    return image, scaled / unit, shift if bias is None else bias + shift


def is_planar(weight):
    """Few channels, wide patches: the kernel reads runs of Kw pixels from the NCHW planes."""
    return weight.shape[1] <= 4 and weight.shape[3] >= 8


def pack_patch(weight: Tensor) -> Tensor | None:
    """weight (C, Ci, Kh, Kw) in the CPU kernel's panel order; None if no library serves it."""
    check_tensor("pack_patch", "weight", weight, 4)
    if is_planar(weight):
        return pack_linear(weight.flatten(1), runs=max(weight.shape[1] * weight.shape[2], 1))
    return pack_conv(weight)
