"""The perceptron of transformer blocks: norm, activation and residual inside its two products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import backend, ops
from ._fusion import activation_name, fused_linear, is_off, norm_args, plain_linears


class Mlp(nn.Module):
    """timm's Mlp on tokens: fc1, activation, dropout, optional norm, fc2, dropout.

    x (..., in_features) -> (..., out_features). bias and drop: one value, or one per layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        biases = bias if isinstance(bias, tuple) else (bias, bias)
        drops = drop if isinstance(drop, tuple) else (drop, drop)
        where = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, hidden_features, bias=biases[0], **where)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drops[0])
        self.norm = norm_layer(hidden_features, **where) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features, bias=biases[1], **where)
        self.drop2 = nn.Dropout(drops[1])

    def forward(self, x: Tensor) -> Tensor:
        return mlp(self, x)


def _at_once(module, x, norm, residual):
    """mlp() in one dispatch, or None where it takes several."""
    children = module._modules
    affine = None if norm is None else norm_args(norm, x)
    activation = activation_name(children["act"])
    if activation is None or (norm is not None and affine is None):
        return None
    if residual is not None and residual is not x:
        return None
    if type(children["norm"]) is not nn.Identity:
        return None
    if not (is_off(children["drop1"]) and is_off(children["drop2"])):
        return None
    layers = plain_linears(module, "fc1", "fc2")
    if layers is None:
        return None
    return ops.mlp_layer(
        x, *layers, activation=activation, norm=affine, residual=residual is not None
    )


def mlp(
    module: Any, x: Tensor, norm: nn.Module | None = None, residual: Tensor | None = None
) -> Tensor:
    """module(norm(x)) + residual for an Mlp (timm's or ours), in two products."""
    if backend.runs_at_once(x):
        y = _at_once(module, x, norm, residual)
        if y is not None:
            return y
    children = module._modules
    act = children["act"]
    name = activation_name(act)
    h = fused_linear(module, "fc1", x, norm=norm, activation=name or "none")
    if name is None:
        h = act(h)
    if not is_off(children["drop1"]):
        h = children["drop1"](h)
    inner = children["norm"]
    if type(inner) is nn.Identity:
        inner = None
    if is_off(children["drop2"]):
        return fused_linear(module, "fc2", h, norm=inner, residual=residual)
    y = children["drop2"](fused_linear(module, "fc2", h, norm=inner))
    return y if residual is None else residual + y
