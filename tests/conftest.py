"""One thread per test process, for models are tiny and processes share the cores; the same numbers each time.

Only tests marked gpu see a GPU, and only in a run that selects them with `-m gpu`. Everything else is about the CPU,
where `--device auto` must mean the same on every machine.
"""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs in front of any use of CUDA, from this process and from all that it starts."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws without a generator of its own does not depend on the day."""
    torch.manual_seed(0)
