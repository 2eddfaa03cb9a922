"""From an image's tokens to logits: what our vision transformers with a class token share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .. import backend
from ..nn import Block
from ..nn._fusion import fused_linear, is_hooked, is_ours
from ..nn.block import first_tokens


class Classifier(nn.Module):
    """Base of the models whose head reads the class token, or the mean of the tokens without one.

    A subclass makes `blocks`, `norm`, `head`, `cls_token` and `num_classes`, and says with
    `_tokens` what the blocks compute. What follows the last block passes the class token through.

    `prune_last_block = True` spares an evaluation what the class token does not need: queries,
    projection and perceptron of the other tokens in the last block. The result is the same;
    `forward_features` is always complete.
    """

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    cls_token: nn.Parameter | None
    num_classes: int
    prune_last_block = False

    def _tokens(self, x: Tensor, count: int) -> Tensor:
        """images -> the tokens behind the first `count` blocks, (B, prefix + h*w, C)"""
        raise NotImplementedError

    def _run(self, x: Tensor) -> Callable[[Tensor, int, int], Tensor]:
        """run(tokens, start, stop), which calls blocks start ... stop - 1, in this call for x."""
        return self._run_blocks

    def _run_blocks(self, x, start, stop):
        for i in range(start, stop):
            x = self.blocks[i](x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """images -> all tokens, normed: (B, 1 + h*w, C), or (B, h*w, C) without a class token"""
        return self.norm(self._tokens(x, len(self.blocks)))

    def forward_head(self, x: Tensor) -> Tensor:
        """tokens as forward_features gives them -> logits"""
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        if not self._prunes():
            return self.forward_head(self.forward_features(x))
        x = self._tokens(x, len(self.blocks) - 1)
        x = first_tokens(self.blocks[-1], x)[:, 0]
        if self.num_classes == 0:
            return self.norm(x)
        return fused_linear(self, "head", x, norm=self.norm)

    def _prunes(self):
        """Neither hooks nor a reference run may miss what pruning leaves out."""
        if not self.prune_last_block or self.training or self.cls_token is None:
            return False
        last, norm = self.blocks[-1], self.norm
        return not (backend.reference_forced() or is_hooked(norm)) and is_ours(last, Block)


def init_linear(module: nn.Module) -> None:
    """DeiT's initialisation of linear layers, for nn.Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
