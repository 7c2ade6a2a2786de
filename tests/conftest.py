"""What holds for every test: no network, no progress bars, a fixed seed."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HASTEN_DISABLE_PROGRESS"] = "1"


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(0)
