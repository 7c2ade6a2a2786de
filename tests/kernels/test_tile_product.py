"""The products of tiles that kernels share, and the choice of an instruction set by them."""

import os
import subprocess
import sys

import pytest
import torch
from harness import assert_close

from hasten.kernels import cpu
from hasten.kernels.tile_product.cpu import launch


@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (32, 32, 32), (33, 31, 65), (70, 200, 17), (128, 128, 128)])
def test_is_the_product(isa, M, K, N, poisoned):
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    assert_close(launch(a, b), a.double() @ b.double())


def test_beside_torch_in_the_same_threads(isa):
    """Both set up the matrix units for themselves."""
    a, b = torch.randn(2, 96, 96).bfloat16()
    expected, theirs = launch(a, b), a @ b
    for _ in range(50):
        assert torch.equal(a @ b, theirs) and torch.equal(launch(a, b), expected)


@pytest.mark.skipif(cpu.reason() is not None, reason="no compiled kernels")
class TestTheChoice:
    def test_is_the_fastest(self, monkeypatch):
        monkeypatch.delenv("HASTEN_CPU_ISA", raising=False)
        for fastest in cpu.isas():
            monkeypatch.setattr(
                cpu, "rates", lambda fastest=fastest: {name: 1 + (name == fastest) for name in cpu.isas()}
            )
            assert cpu.isa.__wrapped__() == fastest

    def test_holds_in_a_process_that_only_reads_it(self, tmp_path):
        code = (
            "import torch; from hasten.kernels.tile_product.cpu import launch; x = torch.ones(32, 32).bfloat16();"
            "print(launch(x, x).sum().item())"
        )
        for _ in range(2):
            environment = os.environ | {"HASTEN_CACHE": str(tmp_path)}
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert done.stdout == "32768.0\n", (done.returncode, done.stderr)

    def test_does_not_depend_on_defaults_of_torch(self):
        code = (
            "import torch; torch.set_default_dtype(torch.bfloat16); torch.set_default_device('meta');"
            "from hasten.kernels import cpu; print(cpu.isa())"
        )
        environment = os.environ | {"HASTEN_CACHE": ""}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() in cpu.isas(), (done.returncode, done.stderr)

    def test_every_set_is_measured(self):
        rates = cpu.rates.__wrapped__()
        assert tuple(rates) == cpu.isas() and min(rates.values()) > 0

    @pytest.mark.parametrize("isa", cpu.ISAS)
    def test_may_be_named(self, isa):
        code = "from hasten.kernels import cpu; print(cpu.isa())"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"HASTEN_CPU_ISA": isa}, capture_output=True, text=True
        )
        if isa in cpu.isas():
            assert done.stdout == f"{isa}\n"
        else:
            assert f"HASTEN_CPU_ISA='{isa}': this machine has " in done.stderr
