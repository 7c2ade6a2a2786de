"""The checks of test_gpu*.py under Triton's interpreter, on the CPU.

In a process of their own, since kernels are made for the interpreter or for a GPU when they are imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="here the checks themselves are interpreted")
@pytest.mark.parametrize(
    "checks",
    [
        "test_gpu.py",
        "test_gpu_conv.py",
        "test_gpu_experts.py",
        "test_gpu_recurrences.py",
        "test_gpu_selective_scan.py",
        "test_gpu_token_scores.py",
        "test_gpu_wkv.py",
    ],
)
def test_interpreted(checks):
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", checks]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert " passed" in done.stdout
