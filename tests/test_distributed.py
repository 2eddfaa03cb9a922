"""DDP and FSDP2 on two gloo processes: the gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from check import same_bits
from composed import build, first
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

NAMES = ("cpvt", "vit")
KINDS = [(name, kind) for name in NAMES for kind in ("ddp", "fsdp2")]
DEFAULT = "vit", "fsdp2, optimized for inference"  # FSDP2 wraps a class around each rule


def loss(model, images):
    return first(model(images)).square().mean()


def gradients(model):
    grads = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            grads[name.removeprefix("module.")] = whole
    return grads


def work(rank, path):
    """In each of two processes: half of the images through DDP, then through FSDP2."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    found = {}
    for name in NAMES:
        model, images = build(name, "train")
        wrapped = DistributedDataParallel(model.train())
        loss(wrapped, images[rank::2]).backward()
        found[name, "ddp"] = gradients(wrapped)
        model, images = build(name, "train")
        mesh = init_device_mesh("cpu", (2,))
        for block in model.train().blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        loss(model, images[rank::2]).backward()
        found[name, "fsdp2"] = gradients(model)
    model, images = build("vit")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        found["logits"] = model(images)
    loss(model.train(), images[rank::2]).backward()
    found[DEFAULT] = gradients(model)
    if rank == 0:
        torch.save(found, f"{path}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    path = tmp_path_factory.mktemp("gloo")
    mp.spawn(work, (str(path),), nprocs=2)
    return torch.load(path / "found.pt", weights_only=True)


@pytest.mark.parametrize(("name", "kind"), [*KINDS, DEFAULT])
def test_two_processes_have_the_gradients_of_one(timm, found, name, kind):
    model, images = build(name, "inference" if (name, kind) == DEFAULT else "train")
    loss(model.train(), images).backward()
    expected = gradients(model)
    assert set(found[name, kind]) == set(expected)
    largest = max(grad.abs().max() for grad in expected.values()).item()
    for key, grad in found[name, kind].items():
        torch.testing.assert_close(
            grad, expected[key], rtol=1e-4, atol=1e-5 * largest, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_sharded_inference_is_that_of_one_process(timm, found):
    assert same_bits(found["logits"], build("vit")())
