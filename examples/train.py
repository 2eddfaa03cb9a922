#!/usr/bin/env python3
"""Train a small CPVT on scikit-learn's handwritten digits, from scratch, with hybridops' kernels.

1,797 real images of 8x8 pixels, enlarged to 32x32; 360 of them are for testing. Progress goes to
stderr; --out gets curves.json, curves.svg and checkpoint.pt.

A run is a function of its arguments: the loss of every step repeats bit for bit, also when the run
is killed in between and resumed. Two processes (torchrun, gloo) share each batch and give the loss
of one process, up to rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hybridops
from hybridops.models import Cpvt

EXAMPLE = """example:
  python examples/train.py --out digits
  python examples/train.py --out digits --resume            # after an interruption
  python examples/train.py --out digits-ref --backend reference --steps 200
  torchrun --nproc-per-node 2 examples/train.py --out digits-ddp
"""
SIZE, CLASSES, TEST_IMAGES = 32, 10, 360
SAME = ("steps", "batch", "lr", "seed", "backend", "threads")  # what a resumed run may not change


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2, with one line on stderr, for a request that cannot be served."""
    arguments = parse(argv)
    world = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    if world > 1:
        dist.init_process_group("gloo")
    try:
        torch.set_num_threads(arguments.threads)
        name = arguments.backend
        with contextlib.nullcontext() if name == "auto" else hybridops.use(name):
            Run(arguments, world).train()
        return 0
    except (UserError, hybridops.BackendUnavailable) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    finally:
        if world > 1:
            dist.destroy_process_group()


class UserError(Exception):
    """Something that the user can put right."""


class Run:
    """Model, optimizer and everything random, and the way from one step to the next."""

    def __init__(self, arguments: argparse.Namespace, world: int) -> None:
        self.arguments, self.world = arguments, world
        self.rank = dist.get_rank() if world > 1 else 0
        self.config = {name: getattr(arguments, name) for name in SAME} | {"world": world}
        if arguments.batch % world:
            raise UserError(f"--batch {arguments.batch} cannot be shared by {world} processes")
        self.train_set, self.test_set = digits()
        torch.manual_seed(arguments.seed)  # initial weights, and whatever draws while training
        self.model = Cpvt(
            96,
            3,
            4,
            patch_size=4,
            in_chans=1,
            num_classes=CLASSES,
            mlp_ratio=2.0,
            global_pool="avg",
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.05)
        self.draw = torch.Generator().manual_seed(arguments.seed)  # order and distortions of images
        self.order: list[int] = []  # of the images left in this epoch
        self.step = 0
        self.losses: list[float] = []  # one per step
        self.tests: list[tuple[int, float]] = []  # (step, accuracy on the test images)
        if arguments.resume:
            self.load()

    def train(self) -> None:
        """From the present step to the last, with a checkpoint now and then."""
        arguments, start = self.arguments, time.monotonic()
        wrapped = DistributedDataParallel(self.model) if self.world > 1 else self.model
        per_epoch = len(self.train_set[0]) // arguments.batch
        while self.step < arguments.steps:
            self.one_step(wrapped)
            if self.step % per_epoch == 0 or self.step == arguments.steps:
                self.tests.append((self.step, accuracy(self.model, *self.test_set)))
                self.say(self.progress(time.monotonic() - start))
            if self.step % arguments.checkpoint_every == 0 or self.step == arguments.steps:
                self.save()
        if self.rank == 0:
            self.finish()

    def one_step(self, model: nn.Module) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = schedule(self.step, self.arguments.steps, self.arguments.lr)
        images, labels = self.next_batch()
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        mean = loss.detach()
        if self.world > 1:  # equal shares, so the batch's loss is the mean of theirs
            dist.all_reduce(mean)
            mean /= self.world
        self.losses.append(mean.item())
        self.step += 1

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This process's share. All processes draw the same batch, so their number is no matter."""
        images, labels = self.train_set
        if len(self.order) < self.arguments.batch:
            self.order = torch.randperm(len(images), generator=self.draw).tolist()
        chosen = torch.tensor(self.order[: self.arguments.batch])
        self.order = self.order[self.arguments.batch :]
        distorted = distort(images[chosen], self.draw)
        return distorted[self.rank :: self.world], labels[chosen][self.rank :: self.world]

    @property
    def checkpoint(self) -> Path:
        return self.arguments.out / "checkpoint.pt"

    def save(self) -> None:
        """All that the next step depends on. The schedule is a function of step and arguments."""
        random: list[Any] = [torch.get_rng_state()] * self.world
        if self.world > 1:
            dist.all_gather_object(random, torch.get_rng_state())
        if self.rank:
            return
        state = {
            "config": self.config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random,
            "draw": self.draw.get_state(),
            **{name: getattr(self, name) for name in ("order", "step", "losses", "tests")},
        }
        write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def load(self) -> None:
        if not self.checkpoint.is_file():
            raise UserError(f"{self.checkpoint}: there is no checkpoint to resume from")
        try:
            state = torch.load(self.checkpoint, weights_only=True)
        except Exception as error:  # readers of zip files and pickles raise a dozen kinds
            raise UserError(f"{self.checkpoint}: cannot be read: {type(error).__name__}") from None
        for name, value in self.config.items():
            if state["config"][name] != value:
                was = state["config"][name]
                raise UserError(f"the checkpoint is of a run with {name} {was}, not {value}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draw.set_state(state["draw"])
        for name in ("order", "step", "losses", "tests"):
            setattr(self, name, state[name])
        torch.set_rng_state(state["random"][self.rank])
        self.say(f"resumed behind step {self.step}")

    def progress(self, seconds: float) -> str:
        step, accuracy = self.tests[-1]
        return (
            f"step {step:4}/{self.arguments.steps}  loss {self.losses[-1]:.4f}  "
            f"test {accuracy:.2%}  {seconds:.0f} s"
        )

    def finish(self) -> None:
        """Curves, and the accuracy of the model as it would be deployed."""
        fast = copy.deepcopy(self.model).eval()
        if self.arguments.backend != "reference":
            hybridops.optimize(fast)
        optimized = accuracy(fast, *self.test_set)
        curves = {
            "config": self.config,
            "losses": self.losses,
            "tests": self.tests,
            "accuracy": self.tests[-1][1],
            "optimized_accuracy": optimized,
        }
        text = json.dumps(curves, indent=1) + "\n"
        out = self.arguments.out
        write_atomically(out / "curves.json", lambda file: file.write(text.encode()))
        write_atomically(
            out / "curves.svg", lambda file: draw_curves(self.losses, self.tests, file)
        )
        self.say(f"test accuracy {curves['accuracy']:.2%}, optimize()d {optimized:.2%}; see {out}/")

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (N, 1, 32, 32) of mean 0, labels (N,)) to train on and to test with, always split
    the same way.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("scikit-learn is not installed: pip install 'hybridops[demo]'") from None
    found = load_digits()
    small = torch.from_numpy(found.images).float()[:, None] / 16
    images = F.interpolate(small, SIZE, mode="bilinear", align_corners=False)
    images, labels = (images - 0.3) / 0.35, torch.from_numpy(found.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[TEST_IMAGES:], order[:TEST_IMAGES]
    return (images[train], labels[train]), (images[test], labels[test])


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 11 degrees, scaled by up to 10 % and moved by up to 2 pixels."""
    angle, scale, right, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = angle * 0.2, 1 + scale * 0.1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, right / 8], 1), torch.stack([sin, cos, down / 8], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def schedule(step: int, steps: int, peak: float) -> float:
    """The learning rate: up in a straight line for 40 % of the steps, down along a cosine.

    So slowly because at 5e-4 and more the first 200 steps are chaotic: two runs that differ by a
    rounding are then apart by 1e-3 to 1e-1 (measured), and nobody could compare their curves.
    """
    warm_up = max(1, round(0.4 * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model names right. The model's mode is as before."""
    training = model.training
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train(training)
    return right


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """The whole file or the old one, whenever the machine stops; readable by its owner alone."""
    file, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
    try:
        with open(file, "wb") as opened:
            write(opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, is on the disk
    finally:
        os.close(folder)


def draw_curves(losses: list[float], tests: list[tuple[int, float]], file: Any) -> None:
    """Loss of every step (left axis) and share of test images named wrong (right), as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(range(1, len(losses) + 1), losses, color="#b8bec7", lw=1)
    steps, shares = zip(*tests, strict=True)
    right.semilogy(steps, [max(1 - share, 1e-3) for share in shares], ".-", color="#d9572b")
    left.set(xlabel="step", ylabel="training loss (grey)")
    right.set_ylabel("test images named wrong", color="#d9572b")
    right.yaxis.set_major_formatter(lambda share, _: f"{share:.1%}")
    right.axhline(0.03, color="#d9572b", ls=":", lw=1)
    figure.savefig(file, format="svg", metadata={"Date": None})


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{summary}\n\n{details}",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if missing")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    parser.add_argument("--steps", type=whole, default=1100, metavar="N", help="default: 1100")
    parser.add_argument("--batch", type=whole, default=64, metavar="N", help="of all processes")
    parser.add_argument("--lr", type=float, default=1e-3, metavar="X", help="default: 0.001")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "cpu", "reference"),
        help="whose kernels; reference: plain torch (default: auto, the fastest here)",
    )
    parser.add_argument("--checkpoint-every", type=whole, default=50, metavar="N", help="steps")
    parser.add_argument("--threads", type=whole, default=2, metavar="N", help="default: 2")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
