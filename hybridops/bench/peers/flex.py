"""torch's FlexAttention, compiled: bias, table and padding as its score_mod."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention.flex_attention import flex_attention

from ..plain import plain_torch
from ..task import Candidate, Skip, Task

SUMMARY = "torch's FlexAttention, compiled; bias, table and padding as score_mod"
INSTALL = None


def build(task: Task) -> Candidate:
    if (task.kind, task.name) != ("op", "attention"):
        raise Skip("only for the op attention")
    if task.rehearsal and task.differentiates:
        raise Skip("torch has no backward of FlexAttention on a CPU")
    flex = flex_attention if task.rehearsal else torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v, bias, bias_index, key_padding_mask, scale):
        if bias is not None and bias_index is None:
            bias = bias.expand(*q.shape[:3], k.shape[2])

        def score_mod(score, b, h, i, j):
            if bias_index is not None:
                score = score + bias[h, bias_index[i, j]]
            elif bias is not None:
                score = score + bias[b, h, i, j]
            if key_padding_mask is not None:
                score = torch.where(key_padding_mask[b, j], -float("inf"), score)
            return score

        plain = bias is None and key_padding_mask is None
        return flex(q, k, v, score_mod=None if plain else score_mod, scale=scale)

    return task.candidate("flex", task.cast_module(), world=partial(plain_torch, attend))
