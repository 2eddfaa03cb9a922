"""Tasks made from whole models: the model as it comes against hybridops.optimize(model)."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..compat import import_timm
from ..models import list_models
from ..optimize import optimize
from ..optimize.explain import create
from ..optimize.gates import make_live
from .op_task import naming_what_ran, skip_unless_there
from .plain import plain_torch
from .task import Candidate, Skip, Task

SIZE = 224
Size = int | tuple[int, int]  # of images: the side of square ones, or (height, width)
_SIZE = re.compile(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?")


def full_name(name: str) -> str:
    """timm:NAME, hf:NAME or hybridops:NAME; a plain name is looked up in timm, then in ours."""
    if ":" in name:
        return name
    try:
        if import_timm().is_model(name):
            return f"timm:{name}"
    except ImportError:
        pass
    if name in list_models():
        return f"hybridops:{name}"
    raise ValueError(f"neither timm nor hybridops has a model {name!r} (write hf:NAME for others)")


def read_size(text: Any) -> Size:
    """An image size as people write it: 224, "224" or "800x1066", height first.

    Raises ValueError for anything else.
    """
    found = _SIZE.fullmatch(str(text))
    if not found or type(text) not in (int, str):
        raise ValueError(f"size: must be a side such as 224, or HxW such as 800x1066, got {text!r}")
    height, width = int(found[1]), int(found[2] or found[1])
    return height if height == width else (height, width)


def written(size: Size) -> str:
    """The size as read_size() takes it."""
    return str(size) if isinstance(size, int) else "{}x{}".format(*size)


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def build_model(name: str, size: Size | None = None) -> tuple[nn.Module, Size]:
    """A named model in eval mode, fp32, with seeded live weights, and the image size it takes.

    Nothing is downloaded: times do not depend on what the weights are, and errors are the harder
    to hide for weights whose every branch counts. Raises ValueError for an unknown name and for a
    size that the model does not take.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = _create(name, size)
        config = getattr(model, "pretrained_cfg", None) or {}
        takes = size or getattr(getattr(model, "config", None), "image_size", None)
        takes = takes or config.get("input_size", (3, SIZE))[-1]
        takes = takes if size or isinstance(takes, int) else takes[0]
        height, width = _sides(takes)
        images = torch.randn(2, 3, height, width)
        try:
            make_live(model.eval(), images)
            with torch.inference_mode():
                model(images)
        except Exception as error:  # a model of text, say, where anything may be raised
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} does not take {height} x {width} images: {why}") from None
    return model.eval(), takes


def _create(name: str, size: Size | None) -> nn.Module:
    if size is None:
        return create(name)
    key = "image_size" if name.startswith(("hf:", "transformers:")) else "img_size"
    try:
        return create(name, **{key: size})
    except TypeError:  # convolutional models take any size as they are
        return create(name)


def model_task(
    name: str,
    model: nn.Module,
    *,
    size: Size = SIZE,
    batch: int = 1,
    dtype: str = "fp32",
    mode: str = "infer",
    threads: int = 1,
    seed: int = 0,
    device: str = "cpu",
    graph: bool = False,
    freeze: bool = False,
    offload: bool = False,
) -> Task:
    """The task of running `model`, which stays as it is, on `batch` images of that size.

    device: where the model is. graph: ours replays a CUDA graph. freeze, offload: as for
    optimize().
    """
    native = type(model).__module__.startswith("hybridops.")
    height, width = _sides(size)
    world: Any = plain_torch if native else nullcontext

    def draw(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(batch, 3, height, width, generator=generator).to(device)]

    def ours(task: Task) -> Candidate:
        if graph:
            return captured(task, optimized(task, freeze=freeze))
        return through(task, "auto", freeze, offload)

    repro = f"hybridops bench model {name} --batch {batch} --size {written(size)} --dtype {dtype}"
    repro += " --device cuda" * (device == "cuda") + " --graph" * graph
    how = "offload" if offload else "freeze"
    repro += f" --{how}" * freeze
    return Task(
        kind="model",
        name=name,
        case=written(size) + (" offloaded" if offload else " frozen" * freeze),
        dtype=dtype,
        mode=mode,
        threads=threads,
        module=without_dropout(model) if mode == "train" else model,
        draw=draw,
        ours=ours,
        batch=batch,
        world=world,
        repro=f"{repro} --mode {mode} --threads {threads}",
        seed=seed,
    )


def optimized(
    task: Task, backend: str = "auto", *, freeze: bool = False, offload: bool = False
) -> nn.Module:
    """An optimized copy of the task's model, in the task's dtype and mode."""
    twin = task.cast_module()
    mode = "train" if task.mode == "train" else "inference"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # built of our modules: nothing to replace is no news
        twin.train(mode == "train")
        how: Any = {"freeze": freeze, "offload": offload, "backend": backend}
        return optimize(twin, mode, strict=False, **how)


def through(task: Task, backend: str, freeze: bool = False, offload: bool = False) -> Candidate:
    """Ours with one backend forced, or with "auto" through those that the table chooses."""
    skip_unless_there(backend)
    if backend != "auto":
        world = partial(backends.use, backend)
        return task.candidate("hybridops", optimized(task), backend, world=world)
    ran = "cpu, frozen" if freeze else "cpu"
    twin = optimized(task, freeze=freeze, offload=offload)
    candidate = task.candidate("hybridops", twin, ran)
    return naming_what_ran(candidate) if task.on_gpu else candidate


def captured(task: Task, module: nn.Module) -> Candidate:
    """The module as a CUDA graph, replayed on a copy of the inputs: one launch in place of all.

    A rehearsal runs it without. Raises Skip for training, and on a CPU.
    """
    if task.differentiates:
        raise Skip("a graph is captured of inference only")
    if task.rehearsal:
        return task.candidate("ours-graph", module)
    if not task.on_gpu:
        raise Skip("only on a GPU")
    held = [x.clone() for x in task.inputs]
    ran = naming_what_ran(task.candidate("ours-graph", module)).backend  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with task.no_gradients(), torch.cuda.graph(graph):
        results = module(*held)

    def replay(*inputs):
        for copy, x in zip(held, inputs, strict=True):
            copy.copy_(x)
        graph.replay()
        return results

    return task.candidate("ours-graph", module, f"{ran}, graph", call=replay)


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy in which nothing is random: two candidates can be compared in training too."""
    copy = deepcopy(model)
    for module in copy.modules():
        for key in ("p", "drop_prob", "attn_drop", "dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return copy
