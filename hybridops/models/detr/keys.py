"""The names that the authors' code and transformers give to a DETR's tensors, as ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..fit import join

Renames = tuple[tuple[str, str], ...]

OFFICIAL: Renames = (
    (r"^detr\.", ""),  # a model with a mask head wraps one without
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^transformer\.", ""),
)
# transformers 5, and in brackets what hub checkpoints still carry from before
TRANSFORMERS: Renames = (
    (r"^detr\.", ""),
    (r"^model\.", ""),
    (r"^backbone\.(conv_encoder\.)?model\.", "backbone."),
    (r"^input_projection\.", "input_proj."),
    (r"^query_position_embeddings\.", "query_embed."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"^decoder\.layernorm\.", "decoder.norm."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\..*)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"\.o_proj\.", ".out_proj."),
    (r"(\.layers\.\d+)\.(mlp\.)?fc([12])\.", r"\1.linear\3."),
    (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"^mask_head\.conv([12])\.conv\.", r"mask_head.lay\1."),
    (r"^mask_head\.conv([12])\.norm\.", r"mask_head.gn\1."),
    *(
        (rf"^mask_head\.fpn_stages\.{i}\.{theirs}\.", f"mask_head.{ours}.")
        for i in range(3)
        for theirs, ours in (
            ("fpn_adapter", f"adapter{i + 1}"),
            (r"refine\.conv", f"lay{i + 3}"),
            (r"refine\.norm", f"gn{i + 3}"),
        )
    ),
    (r"^mask_head\.output_conv\.", "mask_head.out_lay."),
)
FAMILIES = {"official": OFFICIAL, "transformers": TRANSFORMERS, "hybridops": ()}
_FIRST = (
    ("official", r"^(detr\.)?transformer\.encoder\."),
    ("transformers", r"(^|\.)query_position_embeddings\."),
    ("hybridops", r"^query_embed\."),
)


def family_of(state: Mapping[str, Tensor]) -> str | None:
    """Whose names these are, or None."""
    for family, pattern in _FIRST:
        if any(re.search(pattern, key) for key in state):
            return family
    return None


def own_keys(family: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under our names, transformers' three projections as torch's packed one.

    What no rule knows keeps its own name; what cannot be packed stays apart.
    """
    renamed = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):  # of a norm that does not move
            continue
        for pattern, ours in FAMILIES[family]:
            key = re.sub(pattern, ours, key)
        renamed[key] = value
    return join(renamed)
