"""transformers' CvT: queries, keys and values from depthwise convolutions with BatchNorm.

In inference the norm goes into the convolution, which runs on the tokens and passes the class
token by. Keys are scaled by the whole width, as the authors do.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.cvt.modeling_cvt import (
    CvtAttention,
    CvtConvEmbeddings,
    CvtDropPath,
    CvtIntermediate,
    CvtLayer,
    CvtOutput,
    CvtSelfAttention,
    CvtSelfAttentionConvProjection,
    CvtSelfAttentionLinearProjection,
    CvtSelfOutput,
)

from ..nn._derived import Weights, fold_behind
from ..ops import attention, mlp_layer, peg
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_activation,
    not_foldable_norm,
    not_layer_norm,
    not_one_of,
    not_plain_linear,
    one_dtype,
    packed_patch,
    scaled,
)
from .pyramid import embed, not_embedding
from .transformers_block import KEY_BIASES, Dense, DenseResidual, product

_NAMES = ("query", "key", "value")


def _not_projection(name, module):
    conv_norm = getattr(module, "convolution_projection", None)
    reason = not_one_of(
        f"{name}'s convolution", conv_norm, CvtSelfAttentionConvProjection
    ) or not_one_of(f"{name}'s tokens", module.linear_projection, CvtSelfAttentionLinearProjection)
    if reason:
        return reason
    conv = conv_norm.convolution
    square = len({*conv.kernel_size}) == len({*conv.stride}) == len({*conv.padding}) == 1
    plain = conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not (square and plain and conv.groups == conv.in_channels == conv.out_channels):
        return f"{name}'s convolution is not a square depthwise one"
    return not_foldable_norm(f"{name}'s norm", conv_norm.normalization, nn.BatchNorm2d)


class FastAttention(Fast, CvtSelfAttention):
    invisible = KEY_BIASES

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train" and module.dropout.p > 0:
            return f"attention dropout {module.dropout.p} in training"
        return first(
            (
                *(
                    _not_projection(n, getattr(module, f"convolution_projection_{n}"))
                    for n in _NAMES
                ),
                *(not_plain_linear(n, getattr(module, f"projection_{n}")) for n in _NAMES),
            )
        )

    def forward(self, hidden_state, height, width):
        plan = self._hybridops_plan
        weights = plan.derived(self, hidden_state)
        if weights is not None:
            return self._folded(hidden_state, (height, width), weights)
        if (self.dropout.training and self.dropout.p > 0) or not plan.intact():
            return CvtSelfAttention.forward(self, hidden_state, height, width)
        prefix = int(self.with_cls_token)  # BatchNorm trains, so the convolutions are called
        first_token, image = hidden_state.split([prefix, height * width], 1)
        image = image.transpose(1, 2).unflatten(2, (height, width))
        parts = []
        for name in _NAMES:
            tokens = getattr(self, f"convolution_projection_{name}")(image)
            linear = scaled(getattr(self, f"projection_{name}"))
            parts.append(product(torch.cat((first_token, tokens), 1), linear))
        return self._attend(*parts)

    def _folded(self, x, grid, weights):
        """The context (B, N, C), from the normed tokens."""
        prefix = int(self.with_cls_token)
        parts = []
        for weight, bias, stride, padding, linear in weights:
            tokens = peg(
                x,
                weight,
                bias,
                grid=grid,
                prefix=prefix,
                stride=stride,
                padding=padding,
                residual=False,
            )
            parts.append(product(tokens, linear))
        return self._attend(*parts)

    def _attend(self, *parts):
        q, k, v = (x.unflatten(2, (self.num_heads, -1)) for x in parts)
        return attention(q, k, v, scale=self.scale).flatten(2)

    def derive(self):
        found = []
        for name in _NAMES:
            part = getattr(self, f"convolution_projection_{name}").convolution_projection
            conv = part.convolution
            folded = fold_behind(conv.weight, conv.bias, part.normalization)
            linear = scaled(getattr(self, f"projection_{name}"))
            found.append((*folded, conv.stride[0], conv.padding[0], linear))
        return found


class FastSelfOutput(DenseResidual, CvtSelfOutput):
    adds = False  # the layer does


class FastIntermediate(Dense, CvtIntermediate):
    behind = "activation"


class FastOutput(DenseResidual, CvtOutput):
    pass


class FastEmbeddings(Fast, CvtConvEmbeddings):
    """Overlapping patches and their LayerNorm, as an image by view."""

    @classmethod
    def unserved(cls, module, mode):
        return not_embedding(module.projection, module.normalization)

    def forward(self, pixel_values):
        plan, conv = self._hybridops_plan, self.projection
        w = plan.derived(self, pixel_values)
        if w is None and not plan.intact():
            return CvtConvEmbeddings.forward(self, pixel_values)
        plain = Weights(conv.weight, conv.bias, None)
        tokens = embed(pixel_values, conv, self.normalization, w or plain, w is not None)
        sides = zip(pixel_values.shape[2:], conv.kernel_size, strict=True)
        step, pad = conv.stride[0], conv.padding[0]
        grid = [(n + 2 * pad - k) // step + 1 for n, k in sides]
        return tokens.transpose(1, 2).unflatten(2, grid)

    def derive(self):
        return packed_patch(self.projection)


class FastLayer(Fast, CvtLayer):
    """Residuals, the second norm and the perceptron inside the products."""

    invisible = KEY_BIASES

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the layer as it is; attention and perceptron are served"
        return first(
            (
                not_one_of("attention", module.attention, CvtAttention),
                not_one_of("attention.attention", module.attention.attention, CvtSelfAttention),
                FastAttention.unserved(module.attention.attention, mode),
                not_one_of("attention.output", module.attention.output, CvtSelfOutput),
                not_plain_linear("attention.output.dense", module.attention.output.dense),
                not_one_of("intermediate", module.intermediate, CvtIntermediate),
                not_plain_linear("intermediate.dense", module.intermediate.dense),
                not_activation("intermediate.activation", module.intermediate.activation),
                not_one_of("output", module.output, CvtOutput),
                not_plain_linear("output.dense", module.output.dense),
                not_layer_norm("layernorm_after", module.layernorm_after),
                not_one_of("drop_path", module.drop_path, nn.Identity, CvtDropPath),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.intermediate.activation)

    def forward(self, hidden_state, height, width):
        plan, attn = self._hybridops_plan, self.attention.attention
        weights = plan.derived(self, hidden_state) if isinstance(attn, FastAttention) else None
        if weights is None:
            return CvtLayer.forward(self, hidden_state, height, width)
        projections, out, fc1, fc2 = weights
        x = self.layernorm_before(hidden_state)
        x = product(attn._folded(x, (height, width), projections), out, residual=hidden_state)
        norm = norm_of(self.layernorm_after)
        return mlp_layer(x, fc1, fc2, norm=norm, activation=plan.facts, residual=True)

    def derive(self):
        attn, out = self.attention.attention, self.attention.output.dense
        up, down = self.intermediate.dense, self.output.dense
        if not one_dtype(layer.weight for layer in (out, up, down, self.layernorm_after)):
            return None
        return attn.derive(), scaled(out), scaled(up), scaled(down)
