"""No compiled kernel reads or writes beside its tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages by mprotect")
def test_nothing_beside_the_tensors_is_touched(isa):
    script = Path(__file__).with_name("guard_pages.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"HASTEN_CPU_ISA": isa}
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last}\n{done.stderr}"
    assert last[0].endswith(f"calls on {isa}: nothing beside the tensors was touched")
