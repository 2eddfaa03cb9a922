"""Convolution bodies in inference: conv, folded norm, residual and activation in one call.

3 x 3 convolutions in fp32 are ours (`ops/conv3x3.py`), with a third of the products: 1.5 to 2.3
times oneDNN's speed. So are 1 x 1 on AVX2 (`ops/conv1x1.py`): 1.0 to 1.2 times on ResNet's layers,
and a GroupNorm behind one reads its image once less. All others are oneDNN's, given weights in its
own layout and images in channels_last: 90 to 100 % of a Zen 4's peak on ResNet's layers, fp32 and
bf16. What F.conv2d loses is the layout: it packs the weights again in every call (512 x 512 x 3 x 3
on 7 x 7: 1.5 ms against 0.9 fp32, 0.9 against 0.46 bf16). On a GPU the convolution is cuDNN's,
activation and residual passes of their own. Results are channels_last, so that the last ones are
tokens by view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend
from ..ops import ConvLayer, MaxPool, conv_stem, group_norm, pack_conv
from ..ops._contract import ACTIVATIONS
from ..ops.conv1x1 import GroupNorm, pack_conv1x1, run_conv1x1
from ..ops.conv3x3 import is_small, pack_conv3x3, run_conv3x3
from ._derived import _norm_sources, derived, fold_behind, in_graph

_PACKINGS = 2  # image shapes whose packed weights are kept: the layout may differ (1x1, fp32)
_FEW_CHANNELS = 4  # of images: more fill oneDNN's vectors
# conv3x3's weights are 24 numbers for every 9, which few pixels do not pay for once they come from
# DRAM: 512 channels of 7 x 7 at batch 1 are 25 MB and cost vit_small_r26 3 %.
_CACHED_WEIGHTS, _FEW_PIXELS = 1 << 21, 64
# Sums of fewer channels are short, and oneDNN's errors in them smaller than those of points: whole
# models of such layers had 2.3 to 3.3 times torch's error.
_LONG_SUMS = 64
# conv1x1's tiles of so few channels spend more on their ends than on products: 0.7 to 1.2 times
# oneDNN's speed at batch 1, 0.9 to 1.0 at 8; of more channels 1.1 to 1.9 and 1.0 to 1.7.
_SHORT_SUMS = 32
_UNARY: dict[str, tuple[str, list[Any], str | None]] = {  # oneDNN's words for our activations
    "none": ("none", [], None),
    "relu": ("relu", [], None),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], None),
    "hardswish": ("hardswish", [], None),
}


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's SAME: (before, behind) so that ceil(size / stride) windows fit."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def same_pad(x: Tensor, kernel: Any, stride: Any, dilation: Any = (1, 1), value: float = 0.0):
    """x (B, C, H, W) padded as TensorFlow's SAME does."""
    (top, bottom), (left, right) = (
        same_padding(*side) for side in zip(x.shape[-2:], kernel, stride, dilation, strict=True)
    )
    if not (top or bottom or left or right):
        return x
    return F.pad(x, (left, right, top, bottom), value=value)


_reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # torch's own stub lacks the shape


class Conv:
    """One convolution as inference runs it; weight (Co, Ci / groups, kh, kw), bias (Co,) or None.

    padding: (rows, columns), or "SAME" as TensorFlow means it. again(): a weight that can be made
    again, and so is not kept beside its packed copy.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        again: Callable[[], Tensor] | None = None,
    ) -> None:
        self._weight: Tensor | None = weight
        self.channels_out, self.channels = weight.shape[:2]
        self._again = again
        self.bias, self.kernel, self.dtype = bias, weight.shape[2:], weight.dtype
        self.same = padding == "SAME"
        self.padding: Any = (0, 0) if self.same else padding
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self._packings: dict[torch.Size, Tensor] = {}
        self._stem: ConvLayer | None = None
        self._points: Tensor | None = None  # pack_conv3x3(weight)
        self._panels: Tensor | None = None  # pack_conv1x1(weight)

    @property
    def weight(self) -> Tensor:
        if self._weight is None:
            assert self._again is not None
            with torch.inference_mode(False), torch.no_grad():
                self._weight = self._again()
        return self._weight

    def __call__(
        self,
        x: Tensor,
        activation: str = "none",
        residual: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """x (B, Ci, H, W) -> activation(conv(x) + residual), (B, Co, H', W').

        overwrite: the residual's memory may be the result's. 55 MB of fresh memory (ResNet's first
        stage at 800 x 1066) cost more in page faults than their convolution in arithmetic.
        The residual comes before the activation, as in ResNets. Runs in plain torch where oneDNN
        cannot serve, and while gradients are recorded or a graph is traced.
        """
        if self._runs_packed(x, residual):
            if self.filters(x):
                return self._filtered(x, activation, residual)
            if self.multiplies(x):
                return self._multiplied(x, activation, residual, None, overwrite)
        if self.same:
            x = same_pad(x, self.kernel, self.stride, self.dilation)
        if not self._runs_packed(x, residual):
            if x.is_cuda:  # what cuDNN's kernels for tensor cores read
                x = x.contiguous(memory_format=torch.channels_last)
            y = self.plain(x)
            return ACTIVATIONS[activation](y if residual is None else y + residual)
        x = x.contiguous(memory_format=torch.channels_last)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        packed, bias = self._packed(x.shape), self.bias
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise.default(
                x, packed, bias, *geometry, *_UNARY[activation]
            )
        # of grouped ones in bf16 oneDNN has no sum; of activations behind the sum only this one
        if self.groups == 1 and activation in ("none", "relu"):
            residual = residual.contiguous(memory_format=torch.channels_last)
            behind = None if activation == "none" else activation
            if overwrite:
                return torch.ops.mkldnn._convolution_pointwise_.binary(
                    residual, x, packed, bias, *geometry, "add", 1.0, behind, [], None
                )
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, packed, bias, *geometry, "add", 1.0, behind, [], None
            )
        y = torch.ops.mkldnn._convolution_pointwise.default(
            x, packed, bias, *geometry, *_UNARY["none"]
        )
        return ACTIVATIONS[activation](y.add_(residual))

    def pooled(self, x: Tensor, activation: str, pool: nn.MaxPool2d) -> Tensor:
        """pool(activation(conv(x))).

        Of an image (few channels in) one kernel of ours where it can: what lies between the two is
        the largest result of a ResNet, 55 MB at 800 x 1066, and need not leave the cache.
        """
        kernel = max_pool_of(pool)
        stem = None if kernel is None else self._as_stem(x, activation)
        if stem is None:
            return pool(self(x, activation))
        return conv_stem(x, [stem], pool=kernel, layout="image")

    def _as_stem(self, x: Tensor, activation: str) -> ConvLayer | None:
        if (
            self.same
            or self.groups != 1
            or self.dilation != (1, 1)
            or self.stride[0] != self.stride[1]
            or self.channels > _FEW_CHANNELS
            or not self._runs_packed(x, None)
        ):
            return None
        if self._stem is None:
            packed = pack_conv(self.weight)
            if packed is None:
                return None
            sides = self.padding * 2  # top and left, bottom and right
            self._stem = ConvLayer(self.weight, self.bias, self.stride[0], sides, packed=packed)
        return self._stem._replace(activation=activation)

    def filters(self, x: Tensor) -> bool:
        """Whether conv3x3 can run this convolution, and is faster than oneDNN."""
        return (
            self.kernel == (3, 3)
            and self.stride in ((1, 1), (2, 2))
            and self.dilation == (1, 1)
            and self.groups == 1
            and max(self.padding) <= 2
            and self.dtype == torch.float32
            and self.channels >= _LONG_SUMS
            and min(x.shape[-2:]) >= 3
            and not is_small(x)
            and (
                24 * self.channels * self.channels_out <= _CACHED_WEIGHTS
                or x.shape[0] * x.shape[-2] * x.shape[-1] > _FEW_PIXELS * self.stride[0] ** 2
            )
        )

    def _filtered(self, x, activation, residual):
        stride, (rows, columns) = self.stride[0], self.padding
        sides = (rows, columns, rows, columns)
        if self.same:
            (top, bottom), (left, right) = (same_padding(n, 3, stride, 1) for n in x.shape[2:])
            sides = (top, left, bottom, right)
        if self._points is None:
            self._points = pack_conv3x3(self.weight, stride)
            self._drop_weight()
        end = (self.bias, stride, sides, activation, residual)
        return run_conv3x3(x, self._points, self.channels_out, *end)

    def normed(
        self, x: Tensor, norm: GroupNorm, activation: str = "none", residual: Tensor | None = None
    ) -> Tensor:
        """activation(norm(conv(x)) + residual), norm: (groups, weight, bias, eps), a GroupNorm."""
        _, *vectors, _ = norm
        learns = torch.is_grad_enabled()
        apart = any(
            v is not None and (v.dtype != self.dtype or (learns and v.requires_grad))
            for v in vectors
        )
        if not apart and self._runs_packed(x, residual) and self.multiplies(x):
            return self._multiplied(x, activation, residual, norm, False)
        y = self(x)
        return group_norm(y, *norm, activation=activation, residual=residual, overwrite=True)

    def multiplies(self, x: Tensor) -> bool:
        """Whether conv1x1 can run this convolution, and is faster than oneDNN."""
        return (
            self.kernel == (1, 1)
            and self.stride[0] == self.stride[1]
            and self.padding == (0, 0)  # SAME adds none either
            and self.groups == 1
            and self.dtype == torch.float32
            and self.channels > _SHORT_SUMS
            and x.ndim == 4
            and backend.ISA == "avx2"
        )

    def _multiplied(self, x, activation, residual, norm, overwrite):
        if self._panels is None:
            self._panels = pack_conv1x1(self.weight)
            self._drop_weight()
        end = (self.bias, self.stride[0], activation, residual, norm, overwrite)
        return run_conv1x1(x, self._panels, self.channels_out, *end)

    def plain(self, x: Tensor) -> Tensor:
        """conv(x) by torch's convolution, in the memory format that it gives; SAME pads before."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, self.weight, self.bias, *geometry)

    def _runs_packed(self, x, residual):
        if backend.is_captured() or backend.reference_forced():
            return False
        if torch.is_grad_enabled():
            tensors = (x, self._weight, self.bias, residual)
            if any(t is not None and t.requires_grad for t in tensors):
                return False
        return (
            x.is_cpu
            and x.numel() > 0
            and (x.ndim != 4 or x.shape[1] == self.channels * self.groups)  # else torch says why
            and x.dtype == self.dtype
            and (residual is None or residual.dtype == x.dtype)
            and _has_onednn(x.dtype)
            and not torch.is_autocast_enabled("cpu")
        )

    def _packed(self, shape: torch.Size) -> Tensor:
        packed = self._packings.get(shape)
        if packed is None:
            while len(self._packings) >= _PACKINGS:
                self._packings.pop(next(iter(self._packings)))
            with torch.no_grad():
                packed = _reorder(
                    self.weight.detach().contiguous().to_mkldnn(),
                    self.padding,
                    self.stride,
                    self.dilation,
                    self.groups,
                    shape,
                )
            self._packings[shape] = packed
            self._drop_weight()
        return packed

    def _drop_weight(self) -> None:
        if self._again is not None:
            self._weight = None


def max_pool_of(pool: Any) -> MaxPool | None:
    """The pool as conv_stem takes it, or None where it cannot."""
    square = all(isinstance(v, int) for v in (pool.kernel_size, pool.stride, pool.padding))
    if not square or pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        return None
    if 2 * pool.padding > pool.kernel_size:  # which torch refuses
        return None
    return MaxPool(pool.kernel_size, pool.stride, pool.padding)


def is_channels_last(x: Tensor) -> bool:
    """Whether an image, or a convolution's weight, lies in that format and in no other."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _has_onednn(dtype):
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def not_bare_conv(conv: nn.Conv2d) -> str | None:
    """Why `Conv` cannot run this convolution, or None."""
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    return f"padding {conv.padding!r}" if isinstance(conv.padding, str) else None


def standardise(weight: Tensor, eps: float) -> Tensor:
    """Each output channel of a convolution's weight with mean 0 and variance 1 (BiT)."""
    wide = weight.double().flatten(1)
    var, mean = torch.var_mean(wide, 1, correction=0, keepdim=True)
    return ((wide - mean) * (var + eps).rsqrt()).view_as(weight).to(weight.dtype)


class StdConv2dSame(nn.Conv2d):
    """timm's: a convolution with standardised weight and SAME padding, without bias.

    x (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)). Weight
    standardisation: Qiao et al. 2019. `conv_of` standardises once per change of the weight.
    """

    same_pad = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        eps: float = 1e-8,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, bias=False, device=device, dtype=dtype
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        channels = self.weight.reshape(1, self.out_channels, -1)  # torch's fastest, with gradient
        weight = F.batch_norm(channels, None, None, training=True, momentum=0.0, eps=self.eps)
        x = same_pad(x, self.kernel_size, self.stride)
        weight = weight.view_as(self.weight)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def folded_conv(
    conv: Any,
    norm: Any = None,
    standardised: bool = False,
    same: bool = False,
    channels_last: bool = True,
) -> Conv:
    """An nn.Conv2d with the eval-mode BatchNorm behind it (or None) as one Conv.

    standardised: whether it standardises its weight, with its own eps. same: whether it pads as
    TensorFlow's SAME, where its same_pad does not say so. channels_last: whether the
    weight is so on a GPU, where it makes the images so.
    """

    def fold():
        weight = standardise(conv.weight, conv.eps) if standardised else conv.weight
        return fold_behind(weight, conv.bias, norm)

    weight, bias = fold()
    again = None
    if not in_graph(weight):
        if weight.is_cpu and weight is not conv.weight:
            again = lambda: fold()[0]  # noqa: E731
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if channels_last and weight.is_cuda:
            weight = weight.contiguous(memory_format=torch.channels_last)
    padding = "SAME" if same or getattr(conv, "same_pad", False) else conv.padding
    return Conv(weight, bias, conv.stride, padding, conv.dilation, conv.groups, again)


def conv_of(owner: nn.Module, name: str, conv: Any, norm: Any = None) -> Conv:
    """folded_conv(conv, norm), cached on `owner` until a tensor that it is made from changes."""
    sources = (conv.weight, conv.bias, *_norm_sources(norm))

    def make():
        return folded_conv(conv, norm, isinstance(conv, StdConv2dSame))

    return derived(owner, name, sources, make)
