"""conv_stem of the CPU on images so wide that its layers hold no more than a few rows at a time."""

from itertools import pairwise

import pytest
import torch
from check import accurate, same_bits

import hybridops
from hybridops.ops.conv_stem import ConvLayer, MaxPool, conv_stem, pack_conv

WIDE = 1300  # 131072 bytes, a band, are 8 rows of 3 channels and 3 of 8
#    channels, then (kernel, stride, padding, activation) of each layer, the pool, the height
STEMS = {
    "levit": ((3, 8, 16, 8), [(3, 2, 1, "hardswish")] * 2 + [(3, 2, 1, "none")], None, 45),
    "resnet": ((3, 24), [(7, 2, 3, "relu")], MaxPool(), 61),
    "deep": ((3, 8, 9, 16), [(3, 2, "same", "relu"), *[(3, 1, 1, "relu")] * 2], MaxPool(), 41),
    "one row at a time": ((3, 40, 40), [(3, 1, 1, "relu"), (3, 1, 1, "none")], MaxPool(5, 1, 2), 9),
    "rows that no patch sees": (
        (4, 8, 6, 5),
        [(2, 3, 0, "none"), (1, 2, 1, "silu"), (3, 4, (2, 0, 1, 3), "gelu")],
        MaxPool(1, 2, 0),
        97,
    ),
    "padding deeper than a band": ((3, 8, 4), [(3, 1, 20, "none"), (5, 2, 30, "relu")], None, 5),
}


def layers_of(name, dtype=torch.float32):
    channels, plan, pool, _ = STEMS[name]
    layers = []
    for (Ci, Co), (kernel, *rest) in zip(pairwise(channels), plan, strict=True):
        weight = torch.randn(Co, Ci, kernel, kernel).to(dtype) / (Ci * kernel**2) ** 0.5
        layers.append(ConvLayer(weight, torch.randn(Co).to(dtype), *rest))
    return layers, pool


def image_of(name, B, dtype=torch.float32):
    return torch.randn(B, STEMS[name][0][0], STEMS[name][3], WIDE).to(dtype)


def in_double(layers):
    return [x._replace(weight=x.weight.double(), bias=x.bias.double()) for x in layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("name", STEMS)
def test_a_wide_stem_is_as_right_as_torch(name, B, dtype, threads, cpu_library, nan_filled):
    layers, pool = layers_of(name, dtype)
    image = image_of(name, B, dtype)
    ours = conv_stem(image, [x._replace(packed=pack_conv(x.weight)) for x in layers], pool=pool)
    with hybridops.use("reference"):
        torchs = conv_stem(image, layers, pool=pool)
        exact = conv_stem(image.double(), in_double(layers), pool=pool)
    accurate(ours, torchs, exact, name)


@pytest.mark.parametrize("name", STEMS)
def test_threads_and_batches_change_no_bit(name, cpu_library):
    layers, pool = layers_of(name)
    image = image_of(name, 5)
    image = image.to(memory_format=torch.channels_last) if name == "deep" else image
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):  # an image each, or all threads for one
            torch.set_num_threads(count)
            found += [
                torch.cat([conv_stem(part, layers, pool=pool) for part in image.split(n)])
                for n in (1, 2, 5)
            ]
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(found[0], other) for other in found[1:])


@pytest.mark.parametrize("pool", [None, MaxPool()], ids=("tokens", "pooled"))
@pytest.mark.parametrize("channels", [(3, 0, 4), (0, 4), (3, 5, 0, 4, 6)], ids=str)
def test_packed_layers_without_channels(channels, pool, threads, cpu_library, nan_filled):
    """Their packed weights are empty: what such a layer gives is its bias."""
    weights = [torch.randn(Co, Ci, 3, 3) for Ci, Co in pairwise(channels)]
    layers = [ConvLayer(w, torch.randn(len(w)), 2, 1, "relu", pack_conv(w)) for w in weights]
    image = torch.randn(2, channels[0], 33, 37)
    ours = conv_stem(image, layers, pool=pool)
    with hybridops.use("reference"):
        torchs = conv_stem(image, layers, pool=pool)
        exact = conv_stem(image.double(), in_double(layers), pool=pool)
    accurate(ours, torchs, exact, str(channels))
