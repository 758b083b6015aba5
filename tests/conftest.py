"""Settings for all tests: few threads, so that results and times depend little on the machine."""

import pytest
import torch

import pergrad


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture
def quiet():
    """For models whose fallback is expected: the warning has tests of its own."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield
