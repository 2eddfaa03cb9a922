"""DETR's panoptic head: each query's attention over the image, refined to a mask at stride 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._fusion import fused_linear


class AttentionMap(nn.Module):
    """Softmax weights alone: x (B, Q, dim), memory (B, N, dim) -> (B, Q, heads, N).

    The weights of all heads of a query sum to 1 together, as in the authors' code.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.k_linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        q = fused_linear(self, "q_linear", x).unflatten(2, (self.heads, -1))
        k = fused_linear(self, "k_linear", memory).unflatten(2, (self.heads, -1))
        scores = torch.einsum("bqhd,bkhd->bqhk", q * q.shape[-1] ** -0.5, k)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], torch.finfo(scores.dtype).min)
        return scores.flatten(2).softmax(-1).view(scores.shape)


class MaskHead(nn.Module):
    """Convolutions over all queries' maps, upsampled beside the backbone's features.

    Names are the authors': lay and gn (convolution, GroupNorm), adapter (1x1, of the backbone).
    """

    def __init__(self, dim: int, heads: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (dim + heads, dim + heads, *(dim >> i for i in range(1, 5)))
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
            self.add_module(f"lay{i}", nn.Conv2d(before, after, 3, padding=1))
            self.add_module(f"gn{i}", nn.GroupNorm(min(8, after), after))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for i, (before, after) in enumerate(zip(channels[2::-1], widths[2:], strict=False), 1):
            self.add_module(f"adapter{i}", nn.Conv2d(before, after, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(
        self, source: Tensor, maps: Tensor, grid: tuple[int, int], features: list[Tensor]
    ) -> Tensor:
        """source (B, N, dim), maps (B, Q, heads, N), features at stride 16, 8, 4 -> (B, Q, H, W)"""
        B, Q = maps.shape[:2]
        tokens = source.transpose(1, 2)[:, None].expand(-1, Q, -1, -1)
        x = torch.cat([tokens, maps], dim=2).flatten(0, 1).unflatten(2, grid)
        x = self._refine(2, self._refine(1, x.contiguous(memory_format=torch.channels_last)))
        for i, feature in enumerate(features, 1):
            side = self.get_submodule(f"adapter{i}")(feature)
            x = F.interpolate(x, side.shape[-2:], mode="nearest")
            x = (x.unflatten(0, (B, Q)) + side[:, None]).flatten(0, 1)
            x = self._refine(i + 2, x)
        return self.out_lay(x).view(B, Q, *x.shape[-2:])

    def _refine(self, i: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"gn{i}")(self.get_submodule(f"lay{i}")(x)).relu()
