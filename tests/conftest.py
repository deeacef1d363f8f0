"""What every test runs under: Hypothesis draws the same examples each time, torch the same numbers.

A landing must not hang on the luck of a draw; `pytest --hypothesis-profile=default` draws new ones.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed what a test may draw from, whichever tests came before it in this process."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def torchvision() -> Iterator[None]:
    """Import torchvision, if it is there: transformers and timm do, though they need none of it.

    One that was built for GPUs does not find its kernels beside a torch without them, and then
    describes them to torch all the same; it can be imported once their names exist.
    """
    library = None
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    yield
    del library
