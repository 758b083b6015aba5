"""Settings for all tests: few threads, so that results and times depend little on the machine."""

import os
import signal
import tempfile

import pytest
import torch

import pergrad
from pergrad.factors import constants

# What was measured on this machine must not decide what is tested; inherited by every process.
os.environ["PERGRAD_COSTS"] = ""
# Compiled anew for this run, and for all processes that it starts. Empty: tests run without them.
if os.environ.get("PERGRAD_KERNELS") != "":
    _kernels = tempfile.TemporaryDirectory(prefix="pergrad-kernels-")
    os.environ["PERGRAD_KERNELS"] = _kernels.name


# Folders and pickles that earlier builds wrote, and the scripts that wrote them with those builds.
collect_ignore = ["data"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N",
                     help="run every N-th test; the others are reported as deselected")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in its background with Ctrl-C ignored, and so would every process be
    # that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    step = config.getoption("--every")
    if step > 1:
        config.hook.pytest_deselected(items=[t for k, t in enumerate(items) if k % step])
        items[:] = items[::step]


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _typical_costs():
    yield
    constants.forget()


@pytest.fixture
def quiet():
    """For models whose fallback is expected: the warning has tests of its own."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield
