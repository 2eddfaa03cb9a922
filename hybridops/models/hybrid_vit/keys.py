"""Other spellings of a hybrid ViT's tensors as ours, which are timm's: JAX's .npz, MobileCLIP's.

https://github.com/google-research/vision_transformer names and lays out its arrays Flax's way:
convolutions (height, width, in, out), linear layers (in, out), attention by heads.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

from ..fit import State, is_dense, join
from .model import HybridVit, resize_positions

_BLOCK = "patch_embed.backbone.stages.{}.blocks.{}."
_JAX = (
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm."),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"LayerNorm_0/", "norm1."),
    (r"LayerNorm_2/", "norm2."),
    (r"MultiHeadDotProductAttention_1/out/", "attn.proj."),
    (r"MultiHeadDotProductAttention_1/(\w+)/", r"attn.\1."),
    (r"MlpBlock_3/Dense_0/", "mlp.fc1."),
    (r"MlpBlock_3/Dense_1/", "mlp.fc2."),
    (r"^embedding/", "patch_embed.proj."),
    (r"^cls$", "cls_token"),
    (r"conv_proj/", "downsample.conv."),
    (r"gn_proj/", "downsample.norm."),
    (r"\.gn(\d)/", r".norm\1."),
    (r"\.conv(\d)/", r".conv\1."),
    (r"^head/", "head."),
    (r"(scale|kernel)$", "weight"),
)
_MOBILECLIP = (
    (r"^image_encoder\.model\.", ""),
    (r"^patch_emb\.", "patch_embed.backbone."),
    (r"\.block\.conv\.", ".conv."),
    (r"\.block\.norm\.", ".bn."),
    (r"^post_transformer_norm\.", "norm."),
    (r"^transformer\.", "blocks."),
    (r"\.pre_norm_mha\.0\.", ".norm1."),
    (r"\.pre_norm_mha\.1\.qkv_proj\.", ".attn.qkv."),
    (r"\.pre_norm_mha\.1\.out_proj\.", ".attn.proj."),
    (r"\.pre_norm_ffn\.0\.", ".norm2."),
    (r"\.pre_norm_ffn\.1\.", ".mlp.fc1."),
    (r"\.pre_norm_ffn\.4\.", ".mlp.fc2."),
    (r"^pos_embed\.pos_embed\.pos_embed$", "pos_embed"),
    (r"^classifier\.proj$", "head.weight"),
)
_FIRST = (
    ("jax", r"^(opt/target/)?conv_root/kernel$"),
    ("mobileclip", r"^image_encoder\.model\.patch_emb\."),
    ("timm", r"^patch_embed\.backbone\."),
)


def family_of(state: State) -> str | None:
    """Whose names these are, or None."""
    for family, pattern in _FIRST:
        if any(re.search(pattern, key) for key in state):
            return family
    return None


def own_keys(model: HybridVit, family: str, state: State) -> dict[str, Tensor]:
    """The state dict under our names; what no rule knows keeps its own.

    A position embedding of another square grid is interpolated to the model's.
    """
    own = dict(state)
    if family == "jax":
        own = _from_jax(state)
    elif family == "mobileclip":
        own = _from_mobileclip(state)
    positions = own.get("pos_embed")
    if positions is not None and _is_grid(positions, model):
        side = math.isqrt(positions.shape[1] - model.class_position)
        own["pos_embed"] = resize_positions(positions, (side, side), model.grid)
    return own


def _is_grid(positions: Tensor, model: HybridVit) -> bool:
    """Whether these are real numbers of a square grid that can be interpolated."""
    if not is_dense(positions) or not positions.is_floating_point() or positions.ndim != 3:
        return False
    cells = positions.shape[1] - model.class_position
    alike = positions.shape[::2] == model.pos_embed.shape[::2]
    return alike and cells > 0 and math.isqrt(cells) ** 2 == cells


def _renamed(key, patterns):
    for pattern, ours in patterns:
        key = re.sub(pattern, ours, key)
    return key


def _from_jax(state: State) -> dict[str, Tensor]:
    """Flax's arrays; of a training run's, what lies below opt/target/."""
    prefix = "opt/target/" if any(key.startswith("opt/target/") for key in state) else ""
    arrays = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    whole = any(key.startswith("block1/") for key in arrays)  # more than the stem
    stem = "patch_embed.backbone." + "stem." * whole
    own = {}
    for key, value in arrays.items():
        key = re.sub(r"^conv_root/", f"{stem}conv.", key)
        key = re.sub(r"^gn_root/", f"{stem}norm.", key)
        unit = re.match(r"block(\d+)/unit(\d+)/", key)
        if unit:
            stage, block = (int(number) - 1 for number in unit.groups())
            key = _BLOCK.format(stage, block) + key[unit.end() :]
        key = _renamed(key, _JAX)
        own[key] = _from_flax(key, value)
    return join(own)


def _from_flax(key: str, value: Tensor) -> Tensor:
    """The tensor laid out as torch's layer of that name wants it."""
    if key in ("cls_token", "pos_embed") or not is_dense(value):
        return value
    if not key.endswith(".weight") or "norm" in key:  # by heads; GroupNorm's are (1, 1, 1, C)
        return value.flatten()
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)
    if value.ndim == 3:  # of attention: (in, heads, size), or (heads, size, out)
        value = value.flatten(0, 1) if ".proj." in key else value.flatten(1)
    return value.t() if value.ndim == 2 else value


def _from_mobileclip(state: State) -> dict[str, Tensor]:
    """The image encoder of Apple's checkpoints; the text encoder is left out."""
    own = {
        _renamed(key, _MOBILECLIP): value
        for key, value in state.items()
        if key.startswith("image_encoder.model.")
    }
    positions, head = own.get("pos_embed"), own.get("head.weight")
    if positions is not None and is_dense(positions):
        own["pos_embed"] = positions.squeeze(0)
    if head is not None and is_dense(head) and head.ndim == 2:  # a projection without bias
        own["head.weight"] = head.t()
        own["head.bias"] = head.new_zeros(head.shape[1])
    return own
