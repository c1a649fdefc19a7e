"""One thread per test process, for models are tiny and processes share the cores; the same numbers each time."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws without a generator of its own does not depend on the day."""
    torch.manual_seed(0)
