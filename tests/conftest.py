"""What holds for every test: no network, no progress bars, measurements kept in a folder of their own, a fixed seed."""

import os
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HASTEN_DISABLE_PROGRESS"] = "1"
os.environ["HASTEN_CACHE"] = tempfile.mkdtemp(prefix="hasten-tests-")


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(0)
