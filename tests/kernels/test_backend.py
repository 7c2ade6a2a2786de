"""Which implementation runs, and how the compiled library is found, loaded and named when it is missing."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from hasten.kernels import backend, cpu
from hasten.kernels.linear import linear

needs_library = pytest.mark.skipif(cpu.reason() is not None, reason="no compiled kernels")


def python(code, **environment):
    """The last line that a fresh process prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As if nothing had been built."""
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
    caches = (cpu._load, cpu.reason, cpu.isas, cpu.isa)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def test_available_names_every_backend():
    assert set(backend.available()) == {"reference", "cpu", "triton"}
    assert backend.available()["reference"] is None


def test_use_holds_within_the_block_and_the_thread():
    x = torch.ones(1)
    before = backend.choose(x)
    seen = []
    with pytest.raises(ZeroDivisionError), backend.use("reference"):
        assert backend.choose(x) == "reference"
        thread = threading.Thread(target=lambda: seen.append(backend.choose(x)))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert seen == [before]
    assert backend.choose(x) == before


def test_use_reference_changes_what_runs(monkeypatch):
    monkeypatch.setattr(cpu.Function, "__call__", lambda *arguments: pytest.fail("the compiled kernel ran"))
    with backend.use("reference"):
        assert linear(torch.ones(1, 3), torch.ones(2, 3)).tolist() == [[3, 3]]


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="'cuda': expected one of auto, reference, cpu, triton"), backend.use("cuda"):
        pass


def test_without_the_library_the_reference_runs_and_says_why(no_library):
    assert "not built" in backend.available()["cpu"]
    assert linear(torch.ones(1, 3), torch.ones(2, 3)).tolist() == [[3, 3]]
    with pytest.raises(RuntimeError, match="'cpu' cannot run here: not built"), backend.use("cpu"):
        pass


def test_the_build_leaves_its_reason(no_library):
    (no_library / "_cpu.txt").write_text("not built: cannot run c++\n")
    assert cpu.reason() == "not built: cannot run c++"


def test_a_library_that_does_not_load(no_library):
    (no_library / "_cpu.so").write_text("")
    assert cpu.reason().startswith("_cpu.so does not load: ")


@needs_library
def test_an_instruction_set_of_this_machine_is_used():
    plain = cpu.compiled()[-1]
    assert plain in ("neon", "scalar") and plain == cpu.isas()[-1]
    assert python("from hasten.kernels import cpu; print(cpu.isa())", HASTEN_CPU_ISA="") in cpu.isas()
    assert python("from hasten.kernels import cpu; print(cpu.isa())", HASTEN_CPU_ISA=plain) == plain


@needs_library
def test_an_unknown_instruction_set(monkeypatch):
    cpu.isa.cache_clear()
    monkeypatch.setenv("HASTEN_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"HASTEN_CPU_ISA='mmx': this machine has .*(neon|scalar)"):
        cpu.isa()


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_openmp_runtime_is_torchs():
    code = """
import torch
from hasten.kernels import cpu
from hasten.kernels.linear import linear
linear(torch.ones(1, 512), torch.ones(512, 512))
print(len(cpu.openmp_runtimes()), "torch" in cpu.openmp_runtimes()[0])
"""
    assert python(code) == "1 True"


@needs_library
def test_a_second_openmp_runtime_is_seen(monkeypatch):
    maps = "7f00-7f01 r-xp 0 0 1 /a/torch/lib/libgomp.so.1\n7f02-7f03 r-xp 0 0 1 /b/libiomp5.so\n"
    monkeypatch.setattr(cpu.Path, "read_text", lambda path: maps)
    assert cpu.openmp_runtimes() == ["/a/torch/lib/libgomp.so.1", "/b/libiomp5.so"]
