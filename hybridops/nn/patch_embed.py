"""Image to tokens: patch convolution, norm, position embedding and prefix tokens in one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend, ops
from ..ops import pack_patch
from ._derived import folded_weights, patch_weights
from ._fusion import CONVS, is_plain, keeps_fp32, norm_args

Size = int | tuple[int, int]


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class PatchEmbed(nn.Module):
    """timm's PatchEmbed: image (B, in_chans, H, W) -> tokens (B, N, embed_dim).

    With mean and std (in_chans values) the image enters as (image - mean) / std, and may be uint8
    (divided by 255 first): the arithmetic is folded into the convolution.
    flatten=False gives (B, embed_dim, H', W') instead.
    img_size=None takes any size; strict_img_size=False any multiple of the patch, and
    dynamic_img_pad pads the right and bottom to one. Raises ValueError for other sizes.
    """

    def __init__(
        self,
        img_size: Size | None = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("PatchEmbed: mean and std come together, got only one")
        where = {"device": device, "dtype": dtype}
        self.patch_size = _pair(patch_size)
        self._set_sizes(None if img_size is None else _pair(img_size))
        self.flatten = flatten
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        patch = self.patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch, stride=patch, bias=bias, **where)
        self.norm = norm_layer(embed_dim, **where) if norm_layer else nn.Identity()
        for name, values in (("mean", mean), ("std", std)):
            vector = None if values is None else torch.tensor(values, **where)
            self.register_buffer(name, vector, persistent=False)

    def _set_sizes(self, img_size):
        self.img_size = img_size
        self.grid_size = self.num_patches = None
        if img_size is not None:
            rows, columns = (s // p for s, p in zip(img_size, self.patch_size, strict=True))
            self.grid_size, self.num_patches = (rows, columns), rows * columns

    def set_input_size(self, img_size: Size) -> None:
        """Expect images of another size from now on."""
        self._set_sizes(_pair(img_size))

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens for an image of that (height, width)."""
        (H, W), (h, w) = img_size, self.patch_size
        return (-(-H // h), -(-W // w)) if self.dynamic_img_pad else (H // h, W // w)

    def forward(
        self, x: Tensor, pos_embed: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        """prefix tokens (1, P, C) go first, pos_embed (1, N or P + N, C) is added."""
        self._check_size(x)
        (H, W), (h, w) = x.shape[-2:], self.patch_size
        padding = (0, 0, -H % h, -W % w) if self.dynamic_img_pad else (0, 0, 0, 0)
        conv = self.proj
        if backend.reference_forced() or h != w or not is_plain(conv, CONVS):
            return self._plainly(x, padding, pos_embed, prefix)
        norm: nn.Module | None = None if type(self.norm) is nn.Identity else self.norm
        affine = None if norm is None else norm_args(norm, conv.weight)
        if not self.flatten or keeps_fp32(x) or (norm is not None and affine is None):
            y = self._tokens(x, padding)
            if not self.flatten:
                grid = (H + padding[2]) // h, (W + padding[3]) // w
                y = y.unflatten(1, grid).permute(0, 3, 1, 2)
            return with_prefix(y if norm is None else norm(y), pos_embed, prefix)
        return self._tokens(x, padding, norm=affine, pos_embed=pos_embed, prefix=prefix)

    def _check_size(self, x):
        if self.img_size is None:
            return
        size = tuple(x.shape[-2:])
        if self.strict_img_size:
            if size != self.img_size:
                raise ValueError(f"PatchEmbed: image must be {self.img_size}, got {size}")
        elif not self.dynamic_img_pad and any(
            s % p for s, p in zip(size, self.patch_size, strict=True)
        ):
            raise ValueError(
                f"PatchEmbed: image must be a multiple of the patch {self.patch_size}, got {size}"
            )

    def _tokens(self, x, padding, **more):
        mean = self._buffers.get("mean")
        if mean is not None and any(padding):  # the border is zero behind the normalisation
            x, mean = self._normalised(x), None
        if mean is None:
            w = patch_weights(self, "patch", self.proj)
        else:
            w = self._folded(x.dtype == torch.uint8)
        return ops.patch_embed(
            x, w.weight, w.bias, stride=self.patch_size[0], padding=padding, packed=w.packed, **more
        )

    def _folded(self, is_bytes):
        """The convolution of raw pixels: weight / (unit * std), bias - weight @ (mean / std)."""
        weight, bias, mean, std = self.proj.weight, self.proj.bias, self.mean, self.std

        def fold():
            wide = weight.double() / std.double()[:, None, None]
            shift = -(wide * mean.double()[:, None, None]).sum((1, 2, 3))
            shift = shift if bias is None else shift + bias.double()
            folded = (wide / 255 if is_bytes else wide).to(weight.dtype)
            return folded, shift.to(weight.dtype)

        name = "bytes" if is_bytes else "floats"
        return folded_weights(self, name, (weight, bias, mean, std), fold, pack_patch)

    def _normalised(self, x):
        unit = 255 if x.dtype == torch.uint8 else 1
        x = x.to(self.mean.dtype) / unit
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def _plainly(self, x, padding, pos_embed, prefix):
        if self._buffers.get("mean") is not None:
            x = self._normalised(x)
        if any(padding):
            x = F.pad(x, (0, padding[3], 0, padding[2]))
        x = self.proj(x)
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)
        return with_prefix(self.norm(x), pos_embed, prefix)


def with_prefix(x: Tensor, pos_embed: Tensor | None, prefix: Tensor | None) -> Tensor:
    """prefix tokens in front of x (B, N, C); pos_embed (1, N, C) spares them, (1, P + N, C) not."""
    if pos_embed is not None and pos_embed.shape[-2] == x.shape[1]:
        x, pos_embed = x + pos_embed, None
    if prefix is not None:
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
    return x if pos_embed is None else x + pos_embed
