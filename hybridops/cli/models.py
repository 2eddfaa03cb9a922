"""Models by name, with weights from the hub where one answers and seeded live ones elsewhere."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hybridops.models

from ..compat import import_timm
from ..optimize.gates import SEED, make_live
from . import UserError
from .images import IMAGENET_MEAN, IMAGENET_STD, Photograph, to_tensor

_ANSWER_SECONDS = 3.0  # a hub that takes longer to say anything counts as absent
_WEIGHTS = "model.safetensors"  # never a pickle


class Loaded(NamedTuple):
    """A model in eval mode, where its weights are from, and the prepared images."""

    model: nn.Module
    weights: str  # "hub" or "seeded"
    detail: str  # the same in a sentence
    images: list[Tensor]  # the photographs, each (1, 3, size, size) fp32


def resolve(model: str) -> tuple[str, str]:
    """("timm" or "hybridops", name). Raises UserError for a name that neither of them has."""
    source, colon, name = model.partition(":")
    if not colon:
        source, name = "", model
    if source not in ("", "timm", "hybridops"):
        raise UserError(f"unknown model {model!r}: it must start with timm: or hybridops:")
    ours = hybridops.models.list_models()
    if source == "hybridops" or (not source and name in ours and not _has_timm()):
        if name in ours:
            return "hybridops", name
        raise UserError(_unknown(model, name, ours))
    timm = import_timm()
    if timm.is_model(name):
        return "timm", name
    if not source and name in ours:
        return "hybridops", name
    known = timm.list_models() + ([] if source else ours)
    raise UserError(_unknown(model, name, known))


def _has_timm() -> bool:
    try:
        import_timm()
    except ImportError:
        return False
    return True


def _unknown(model: str, name: str, known: list[str]) -> str:
    if Path(model).is_file():
        return f"{model} is a file, not a model (images are named before --models)"
    close = difflib.get_close_matches(name, sorted(set(known)), n=3)
    return f"unknown model {model!r}" + (f"; close to {', '.join(close)}" if close else "")


class Hub:
    """The Hugging Face hub, if it answers. All waiting together is bounded.

    Its own client retries for minutes where there is no network, so it is asked only after a plain
    request was answered, and then in a child process that can be stopped.
    """

    def __init__(self, download_seconds: float) -> None:
        self._left = float(download_seconds)
        self._silent: str | None = None  # why the hub gives nothing; "" when it answers

    def fetch(self, repo: str) -> tuple[Path | None, str]:
        """(weights file, "") from the local cache or the hub, or (None, why there is none)."""
        try:
            from huggingface_hub import constants, try_to_load_from_cache
        except ImportError:
            return None, "huggingface_hub is not installed"
        cached = try_to_load_from_cache(repo, _WEIGHTS)
        if isinstance(cached, str):
            return Path(cached), ""
        if self._silent is None:
            self._silent = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
            self._silent = self._silent or why_silent(constants.ENDPOINT)
        return (None, self._silent) if self._silent else self._download(repo)

    def _download(self, repo: str) -> tuple[Path | None, str]:
        code = (  # whoever can write into the cache chooses our weights
            "import os, sys; os.umask(0o077); import huggingface_hub as h; "
            "print(h.hf_hub_download(*sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, repo, _WEIGHTS]
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=self._left
            )
        except subprocess.TimeoutExpired:
            self._silent = "the download took too long (--download-seconds allows more)"
            return None, self._silent
        self._left = max(1.0, self._left - (time.monotonic() - start))
        path = Path(done.stdout.strip().rpartition("\n")[2])
        if done.returncode or not path.is_file():
            return None, f"the hub has no {_WEIGHTS} for {repo} that it gives us"
        return path, ""


def why_silent(endpoint: str) -> str:
    """Why nothing can be had from a hub, or "" when it answers; never waits long."""
    outcome = [f"the hub did not answer within {_ANSWER_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS):
                outcome[0] = ""
        except (OSError, ValueError):
            outcome[0] = "no hub can be reached"

    # A thread, because a look-up of the hub's address has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return outcome[0]


def load(model: str, hub: Hub, photographs: list[Photograph]) -> Loaded:
    """Build a model in eval mode, with hub weights or, where there are none, seeded live ones.

    Raises UserError for an unknown name.
    """
    source, name = resolve(model)
    if source == "timm":
        timm = import_timm()
        config = timm.models.get_pretrained_cfg(name)
        path, why = None, "no published weights"
        if config is not None and config.hf_hub_id:
            path, why = hub.fetch(config.hf_hub_id)
        if path is not None:
            try:
                overlay = {"file": str(path)}
                net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
            except Exception as error:  # a damaged file: safetensors, timm and torch each differ
                why = f"{path} does not load: {str(error).splitlines()[0]}"
            else:
                images = _prepare(net.eval(), photographs)
                return Loaded(net, "hub", f"hub weights {config.hf_hub_id}", images)
        create = timm.create_model
    else:
        create, why = hybridops.models.create_model, "no published weights"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = create(name)
    images = _prepare(net, photographs)
    make_live(net, torch.cat(images))
    return Loaded(net, "seeded", f"seeded random weights with live gates ({why})", images)


def class_name(loaded: Loaded, label: int) -> str | None:
    """What an ImageNet class is called; None where the weights know nothing of the world."""
    if loaded.weights != "hub" or getattr(loaded.model, "num_classes", 0) != 1000:
        return None
    return import_timm().data.ImageNetInfo().index_to_description(label)


def _prepare(net: nn.Module, photographs: list[Photograph]) -> list[Tensor]:
    """The photographs as this model wants them: timm says so in pretrained_cfg."""
    config = getattr(net, "pretrained_cfg", {})
    size = config.get("input_size", (3, 224, 224))[-1]
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return [
        to_tensor(image, size, config.get("crop_pct", 0.875), mean, std) for _, image in photographs
    ]
