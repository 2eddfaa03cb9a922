"""LeViT's attention: a bias per head and relative offset, wide values, Hardswish before proj."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, ops
from ._derived import derived
from ._fusion import SEQUENTIALS, activation_name, finish, is_plain
from .linear import LinearNorm, folded, linear_norm


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class RelPosAttention(nn.Module):
    """timm's levit.Attention: tokens (B, H*W, dim) of a `resolution` grid -> the same shape.

    Queries and keys have key_dim features per head, values attn_ratio * key_dim. Score (i, j) of a
    head gets its bias for |dy|, |dx| between the two tokens.
    """

    attention_bias_idxs: Tensor

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4.0,
        resolution: int | tuple[int, int] = 14,
        act_layer: Callable[..., nn.Module] = nn.Hardswish,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.key_dim = key_dim
        self.key_attn_dim = key_dim * num_heads
        self.val_dim = int(attn_ratio * key_dim)
        self.val_attn_dim = self.val_dim * num_heads
        self.resolution = _pair(resolution)
        self.qkv = LinearNorm(dim, self.val_attn_dim + 2 * self.key_attn_dim, **where)
        self.proj = nn.Sequential()
        self.proj.add_module("act", act_layer())
        self.proj.add_module("ln", LinearNorm(self.val_attn_dim, dim, bn_weight_init=0, **where))
        _add_biases(self, 1, where)

    def init_non_persistent_buffers(self) -> None:
        """Fill what a state_dict does not carry (after a move from the meta device)."""
        idxs = self.attention_bias_idxs
        idxs.copy_(_offsets(self.resolution, 1, idxs.device))

    def forward(self, x: Tensor) -> Tensor:
        return rel_pos_attention(self, x)


class Subsample(nn.Module):
    """Every stride-th token along both sides of the grid: (B, H*W, C) -> (B, H'*W', C).

    use_pool averages 3 x 3 neighbourhoods in place of picking.
    """

    def __init__(
        self, stride: int, resolution: int | tuple[int, int], use_pool: bool = False
    ) -> None:
        super().__init__()
        self.stride = stride
        self.resolution = _pair(resolution)
        self.pool = None
        if use_pool:
            self.pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        grid = x.view(B, *self.resolution, C)
        if self.pool is not None:
            grid = self.pool(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            grid = grid[:, :: self.stride, :: self.stride]
        return grid.reshape(B, -1, C)


class RelPosAttentionDownsample(nn.Module):
    """timm's levit.AttentionDownsample: queries from every stride-th token, keys and values of all.

    (B, H*W, in_dim) -> (B, ceil(H / stride) * ceil(W / stride), out_dim)
    """

    attention_bias_idxs: Tensor

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 2.0,
        stride: int = 2,
        resolution: int | tuple[int, int] = 14,
        use_pool: bool = False,
        act_layer: Callable[..., nn.Module] = nn.Hardswish,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.stride = stride
        self.resolution = _pair(resolution)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.key_attn_dim = key_dim * num_heads
        self.val_dim = int(attn_ratio * key_dim)
        self.val_attn_dim = self.val_dim * num_heads
        self.scale = key_dim**-0.5
        self.kv = LinearNorm(in_dim, self.val_attn_dim + self.key_attn_dim, **where)
        self.q = nn.Sequential()
        self.q.add_module("down", Subsample(stride, self.resolution, use_pool))
        self.q.add_module("ln", LinearNorm(in_dim, self.key_attn_dim, **where))
        self.proj = nn.Sequential()
        self.proj.add_module("act", act_layer())
        self.proj.add_module("ln", LinearNorm(self.val_attn_dim, out_dim, **where))
        _add_biases(self, stride, where)

    def init_non_persistent_buffers(self) -> None:
        """Fill what a state_dict does not carry (after a move from the meta device)."""
        idxs = self.attention_bias_idxs
        idxs.copy_(_offsets(self.resolution, self.stride, idxs.device))

    def forward(self, x: Tensor) -> Tensor:
        return rel_pos_attention_downsample(self, x)


def _offsets(resolution, stride, device=None):
    """(Nq, Nk): |dy| * W + |dx| between query and key, a row per head of attention_biases."""
    H, W = resolution

    def grid(step):
        y = torch.arange(0, H, step, device=device)
        x = torch.arange(0, W, step, device=device)
        return y.repeat_interleave(len(x)), x.repeat(len(y))

    (qy, qx), (ky, kx) = grid(stride), grid(1)
    return (qy[:, None] - ky).abs() * W + (qx[:, None] - kx).abs()


def _add_biases(module, stride, where):
    H, W = module.resolution
    module.attention_biases = nn.Parameter(torch.zeros(module.num_heads, H * W, **where))
    index = _offsets(module.resolution, stride, where["device"])
    module.register_buffer("attention_bias_idxs", index, persistent=False)


def _at_once(module, x, residual):
    """rel_pos_attention() in one dispatch, or None where it takes several."""
    proj = module._modules["proj"]
    if not is_plain(proj, SEQUENTIALS) or (residual is not None and residual is not x):
        return None
    activation = activation_name(proj._modules["act"])
    qkv, out = folded(module._modules["qkv"]), folded(proj._modules["ln"])
    if activation is None or qkv is None or out is None:
        return None
    return ops.attention_layer(
        x,
        qkv,
        out,
        heads=module.num_heads,
        key_dim=module.key_dim,
        scale=module.scale,
        interleaved=True,
        bias=_dense_bias(module),
        activation=activation,
        residual=residual is not None,
    )


def _dense_bias(module):
    """The bias of every score, (1, H, Nq, Nk), read out of the table once."""
    biases, index = module.attention_biases, module.attention_bias_idxs
    return derived(module, "bias", (biases, index), lambda: biases[:, index][None])


def rel_pos_attention(module: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """module(x) + residual for a RelPosAttention (timm's or ours)."""
    if backend.runs_at_once(x):
        y = _at_once(module, x, residual)
        if y is not None:
            return y
    B, N, _ = x.shape
    D, Dv = module.key_dim, module.val_dim
    qkv = linear_norm(module._modules["qkv"], x).view(B, N, module.num_heads, -1)
    q, k, v = qkv.split((D, D, Dv), dim=3)
    return _attend(module, q, k, v, residual)


def rel_pos_attention_downsample(module: Any, x: Tensor) -> Tensor:
    """The forward of a RelPosAttentionDownsample (timm's or ours)."""
    B, N, _ = x.shape
    D, Dv, H = module.key_dim, module.val_dim, module.num_heads
    kv = linear_norm(module._modules["kv"], x).view(B, N, H, -1)
    k, v = kv.split((D, Dv), dim=3)
    queries = module._modules["q"]
    if is_plain(queries, SEQUENTIALS):
        q = linear_norm(queries._modules["ln"], queries._modules["down"](x))
    else:
        q = queries(x)
    return _attend(module, q.view(B, -1, H, D), k, v, None)


def _attend(module, q, k, v, residual):
    proj = module._modules["proj"]
    plain = is_plain(proj, SEQUENTIALS)
    act = proj._modules["act"] if plain else None
    biases, index = module.attention_biases, module.attention_bias_idxs
    if backend.reference_forced():
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * module.scale + biases[:, index]
        out = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        return finish(proj(out), residual=residual)
    name = activation_name(act) if plain else None
    if torch.is_grad_enabled() and biases.requires_grad:  # the kernel has the table's gradient
        bias = biases
    else:
        bias, index = _dense_bias(module), None
    out = ops.attention(
        q, k, v, bias=bias, bias_index=index, scale=module.scale, activation=name or "none"
    ).flatten(2)
    if not plain:
        return finish(proj(out), residual=residual)
    return linear_norm(proj._modules["ln"], act(out) if name is None else out, residual=residual)
