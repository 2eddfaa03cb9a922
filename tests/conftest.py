"""What every test needs: few threads, a seed, NaN in fresh memory, an importable timm."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton; no GPU is needed

import pytest
import torch

from hybridops import backend
from hybridops.compat import import_timm


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
    config.addinivalue_line("markers", "models: a model at its real size; make test-models")
    config.addinivalue_line("markers", "wide: larger cases of the GPU kernels, by make wide")
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items):
    """The longest tests come first: at the end one worker would be left alone with them."""
    items.sort(key=lambda item: item.path.name != "test_triton_aot.py")


def pytest_report_header(config):
    served = backend.ISA or f"none ({backend.why_no_library()})"
    return f"hybridops: C++ library {served}, {torch.get_num_threads()} threads"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def nan_filled():
    """torch.empty gives NaN (integers: their maximum), so that a value never written shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "reference"])
def each_backend(request) -> str:
    """Each backend for CPU tensors; the C++ one is skipped, with the reason, where it is not."""
    if request.param not in backend.available():
        pytest.skip(f"no C++ library: {backend.why_no_library()}")
    return request.param


@pytest.fixture
def best_backend() -> str:
    """What serves CPU tensors in this process: the C++ library, or the reference without one."""
    return backend.available()[0]


@pytest.fixture
def cpu_library() -> str:
    """The name of the C++ library; the test is skipped, with the reason, where there is none."""
    if backend.ISA is None:
        pytest.skip(f"no C++ library: {backend.why_no_library()}")
    return backend.ISA


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    """How many threads torch and the kernels use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timm():
    """timm, also beside a torchvision that does not import by itself; skips where it is absent."""
    try:
        return import_timm()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def torchs_fp32():
    """Both sides in IEEE fp32: torch's convolutions would use TF32."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = kept


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request) -> str:
    if backend.why_absent(request.param):
        pytest.skip(f"{request.param}: {backend.why_absent(request.param)}")
    return request.param
