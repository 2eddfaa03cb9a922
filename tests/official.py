"""Classes of the shape of the authors' LeViT, Twins and DETR: their names, their interface."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Linear_BN(nn.Sequential):
    def __init__(self, a, b):
        super().__init__()
        self.add_module("c", nn.Linear(a, b, bias=False))
        self.add_module("bn", nn.BatchNorm1d(b))

    def forward(self, x):
        y = self.c(x)
        return self.bn(y.flatten(0, 1)).view(y.shape)


class Conv2d_BN(nn.Sequential):
    def __init__(self, a, b, kernel=1, stride=1, padding=0):
        super().__init__()
        self.add_module("c", nn.Conv2d(a, b, kernel, stride, padding, bias=False))
        self.add_module("bn", nn.BatchNorm2d(b))


class BN_Linear(nn.Sequential):
    def __init__(self, a, b):
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(a))
        self.add_module("l", nn.Linear(a, b))


class Residual(nn.Module):
    def __init__(self, m, drop=0.0):
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x):
        return x + self.m(x)


class Subsample(nn.Module):
    def __init__(self, stride, resolution):
        super().__init__()
        self.stride, self.resolution = stride, resolution

    def forward(self, x):
        image = x.unflatten(1, (self.resolution, self.resolution))
        return image[:, :: self.stride, :: self.stride].flatten(1, 2)


class _Biased(nn.Module):
    """What LeViT's two attentions share: the table of biases, its index, the cache of eval mode."""

    def _table(self, heads, queries, keys, stride):
        offsets: dict[tuple[int, int], int] = {}
        index = []
        for qy, qx in ((y * stride, x * stride) for y in range(queries) for x in range(queries)):
            for ky, kx in ((y, x) for y in range(keys) for x in range(keys)):
                offset = abs(qy - ky), abs(qx - kx)
                index.append(offsets.setdefault(offset, len(offsets)))
        self.attention_biases = nn.Parameter(torch.zeros(heads, len(offsets)))
        table = torch.tensor(index).view(queries**2, keys**2)
        self.register_buffer("attention_bias_idxs", table)

    def train(self, mode=True):
        super().train(mode)
        self.ab = None if mode else self.attention_biases[:, self.attention_bias_idxs].detach()

    def _attend(self, q, k, v):
        bias = self.attention_biases[:, self.attention_bias_idxs] if self.training else self.ab
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(2, 3) * self.scale + bias
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Attention(_Biased):
    def __init__(self, dim, key_dim, num_heads, attn_ratio, activation, resolution):
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.d = attn_ratio * key_dim
        self.qkv = Linear_BN(dim, num_heads * (2 * key_dim + self.d))
        self.proj = nn.Sequential(activation(), Linear_BN(num_heads * self.d, dim))
        self._table(num_heads, resolution, resolution, 1)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (self.num_heads, -1))
        return self._attend(*qkv.split([self.key_dim, self.key_dim, self.d], 3))


class AttentionSubsample(_Biased):
    def __init__(self, a, b, key_dim, num_heads, attn_ratio, activation, resolution):
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.d = attn_ratio * key_dim
        self.kv = Linear_BN(a, num_heads * (key_dim + self.d))
        self.q = nn.Sequential(Subsample(2, resolution), Linear_BN(a, num_heads * key_dim))
        self.proj = nn.Sequential(activation(), Linear_BN(num_heads * self.d, b))
        self._table(num_heads, (resolution - 1) // 2 + 1, resolution, 2)

    def forward(self, x):
        kv = self.kv(x).unflatten(2, (self.num_heads, -1))
        k, v = kv.split([self.key_dim, self.d], 3)
        return self._attend(self.q(x).unflatten(2, (self.num_heads, -1)), k, v)


class LeViT(nn.Module):
    def __init__(self):
        super().__init__()
        act = nn.Hardswish
        convs = [Conv2d_BN(3, 12, 3, 2, 1), act(), Conv2d_BN(12, 32, 3, 2, 1)]
        self.patch_embed = nn.Sequential(*convs)
        mlp = nn.Sequential(Linear_BN(32, 64), act(), Linear_BN(64, 32))
        blocks = [Residual(Attention(32, 8, 3, 2, act, 5)), Residual(mlp)]
        blocks += [AttentionSubsample(32, 48, 8, 4, 4, act, 5)]
        blocks += [Residual(Attention(48, 8, 4, 2, act, 3))]
        self.blocks = nn.Sequential(*blocks)
        self.head = BN_Linear(48, 7)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))


class GroupAttention(nn.Module):
    def __init__(self, dim, num_heads, ws, attn_drop=0.0):
        super().__init__()
        self.num_heads, self.ws, self.scale = num_heads, ws, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=True)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, H, W):
        B, N, C = x.shape
        s = self.ws
        grid = x.view(B, H // s, s, W // s, s, C).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        qkv = self.qkv(grid).unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        weights = (qkv[0] @ qkv[1].transpose(-2, -1) * self.scale).softmax(-1)
        y = (self.attn_drop(weights) @ qkv[2]).transpose(2, 3).flatten(3)
        y = y.view(B, H // s, W // s, s, s, C).transpose(2, 3).reshape(B, N, C)
        return self.proj_drop(self.proj(y))


def subsampled(attention_class_name="Attention"):
    """Twins' and PVT's Attention, whose name LeViT's has too."""

    class Subsampled(nn.Module):
        def __init__(self, dim, num_heads, sr_ratio=1):
            super().__init__()
            self.num_heads, self.scale, self.sr_ratio = (
                num_heads,
                (dim // num_heads) ** -0.5,
                sr_ratio,
            )
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
            self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
            self.proj = nn.Linear(dim, dim)
            if sr_ratio > 1:
                self.sr, self.norm = nn.Conv2d(dim, dim, sr_ratio, sr_ratio), nn.LayerNorm(dim)

        def forward(self, x, H, W):
            q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            if self.sr_ratio > 1:
                image = x.transpose(1, 2).unflatten(2, (H, W))
                x = self.norm(self.sr(image).flatten(2).transpose(1, 2))
            k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights = self.attn_drop((q @ k.transpose(2, 3) * self.scale).softmax(-1))
            return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))

    Subsampled.__name__ = Subsampled.__qualname__ = attention_class_name
    return Subsampled


class PosCNN(nn.Module):
    def __init__(self, a, b, s=1):
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(a, b, 3, s, 1, groups=b))
        self.s = s

    def forward(self, x, H, W):
        image = x.transpose(1, 2).unflatten(2, (H, W))
        y = self.proj(image)
        return (y + image if self.s == 1 else y).flatten(2).transpose(1, 2)


class Twins(nn.Module):
    def __init__(self, attention=None):
        super().__init__()
        attention = attention or subsampled()
        self.local, self.pos = GroupAttention(24, 3, 3), PosCNN(24, 24)
        self.far, self.near, self.end = attention(24, 3, 3), attention(24, 2), PosCNN(24, 24, 2)

    def forward(self, x):
        for layer in (self.local, self.pos, self.far, self.near):
            x = x + layer(x, 6, 9)
        return self.end(x, 6, 9)


class _DetrLayer(nn.Module):
    def __init__(self, dim, heads, hidden, attentions, normalize_before):
        super().__init__()
        for name in attentions:
            setattr(self, name, nn.MultiheadAttention(dim, heads))
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout, self.activation = nn.Dropout(0.0), F.relu
        self.normalize_before = normalize_before
        for i in range(1, len(attentions) + 2):
            setattr(self, f"norm{i}", nn.LayerNorm(dim))
            setattr(self, f"dropout{i}", nn.Dropout(0.0))

    def _branch(self, i, x, branch):
        norm, drop = getattr(self, f"norm{i}"), getattr(self, f"dropout{i}")
        if self.normalize_before:
            return x + drop(branch(norm(x)))
        return norm(x + drop(branch(x)))

    def _feed_forward(self, x):
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(_DetrLayer):
    def __init__(self, dim, heads, hidden, normalize_before=False):
        super().__init__(dim, heads, hidden, ["self_attn"], normalize_before)

    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        def attend(x):
            q = k = x if pos is None else x + pos
            masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
            return self.self_attn(q, k, value=x, **masks)[0]

        return self._branch(2, self._branch(1, src, attend), self._feed_forward)


class TransformerDecoderLayer(_DetrLayer):
    def __init__(self, dim, heads, hidden, normalize_before=False):
        super().__init__(dim, heads, hidden, ["self_attn", "multihead_attn"], normalize_before)

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        pos=None,
        query_pos=None,
    ):
        def plus(x, positions):
            return x if positions is None else x + positions

        def own(x):
            masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask}
            q = k = plus(x, query_pos)
            return self.self_attn(q, k, value=x, **masks)[0]

        def cross(x):
            masks = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask}
            q, k = plus(x, query_pos), plus(memory, pos)
            return self.multihead_attn(query=q, key=k, value=memory, **masks)[0]

        x = self._branch(2, self._branch(1, tgt, own), cross)
        return self._branch(3, x, self._feed_forward)


class Detr(nn.Module):
    """An encoder layer, two decoder layers; the second image of a batch is padded."""

    def __init__(self, normalize_before=False):
        super().__init__()
        self.encoder = TransformerEncoderLayer(24, 3, 40, normalize_before)
        self.first = TransformerDecoderLayer(24, 3, 40, normalize_before)
        self.decoder = TransformerDecoderLayer(24, 3, 40, normalize_before)
        self.padding = torch.arange(7) >= torch.tensor([[7], [4]])

    def forward(self, x, pos, queries):
        memory = self.encoder(x, src_key_padding_mask=self.padding, pos=pos)
        zeros = torch.zeros_like(queries)
        kwargs = {"memory_key_padding_mask": self.padding, "pos": pos, "query_pos": queries}
        return self.decoder(self.first(zeros, memory, **kwargs), memory, **kwargs)


def _detr_inputs():
    return torch.randn(7, 2, 24), torch.randn(7, 2, 24), torch.randn(5, 2, 24)


MODELS = {  # name -> constructor, function giving the arguments of a call
    "levit": (LeViT, lambda: (torch.randn(3, 3, 20, 20),)),
    "twins": (Twins, lambda: (torch.randn(2, 54, 24),)),
    "detr": (Detr, _detr_inputs),
    "detr pre-norm": (lambda: Detr(True), _detr_inputs),
}
