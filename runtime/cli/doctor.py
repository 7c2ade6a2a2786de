"""`hasten doctor`: what is installed, which backends work here, and why one does not."""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hasten.cli import tables
from hasten.kernels import backend, cpu, tuning
from hasten.kernels.linear import linear

CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16", "asimd", "bf16")
STATES = {"ok": "", "note": "note", "broken": "BROKEN"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `note`: works, but slower or untested; `broken`: something that should work does not."""

    name: str
    value: str
    state: Literal["ok", "note", "broken"] = "ok"


def run(as_json: bool) -> int:
    """Prints all checks; the exit status: 1 if one is broken."""
    checks = list(examine())
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        rows = [(check.name, STATES[check.state], check.value) for check in checks]
        tables.show("hasten doctor", ("what", "", "found"), rows, labels=3)
    return int(any(check.state == "broken" for check in checks))


def examine() -> Iterator[Check]:
    """All checks, in the order in which they are shown."""
    yield from _versions()
    yield Check("machine", f"{platform.machine()}, {_cores()} cores, torch uses {torch.get_num_threads()}")
    yield Check("CPU features", " ".join(_cpu_features()) or "unknown on this system")
    yield from _library()
    yield _openmp()
    yield _measurements()
    for name, reason in backend.available().items():
        yield _backend(name, reason)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check("GPU", ", ".join(names) or "none")


def _versions() -> Iterator[Check]:
    distribution = metadata.distribution("hasten")
    yield Check("hasten", distribution.version)
    yield _version("python", platform.python_version(), SpecifierSet(distribution.metadata["Requires-Python"]))
    requirements = {requirement.name: requirement for requirement in map(Requirement, distribution.requires)}
    for name in ("torch", "triton", "transformers"):
        requirement = requirements[name]
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            yield _version(name, metadata.version(name), requirement.specifier)
        except metadata.PackageNotFoundError:
            yield Check(name, "not installed", "broken")


def _version(name: str, version: str, tested: SpecifierSet) -> Check:
    if tested.contains(version, prereleases=True):
        return Check(name, version)
    return Check(name, f"{version}, outside what hasten is made for: {tested}", "note")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_features() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [feature for feature in CPU_FEATURES if feature in flags]


def _library() -> Iterator[Check]:
    """Whether the C++ kernels were built, and the instruction set that they use here."""
    reason = cpu.reason()
    if reason:
        state = "broken" if cpu.LIBRARY.exists() else "note"
        yield Check("C++ kernels", f"{reason} (the plain torch definitions run instead)", state)
        return
    yield Check("C++ kernels", f"built, and run here for {', '.join(cpu.isas())}")
    try:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in cpu.rates().items())
        yield Check("instruction set", cpu.isa())
        yield Check("matrix products", f"{rates} GFLOP/s in one thread")
    except ValueError as error:
        yield Check("instruction set", str(error), "broken")


def _measurements() -> Check:
    """Where it is kept which kernels are faster on this machine."""
    try:
        file = tuning.cache_file()
    except ValueError as error:  # an instruction set that this machine lacks
        return Check("measurements", str(error), "broken")
    if file is None:
        return Check("measurements", "not kept: HASTEN_CACHE is empty, or there is no home folder", "note")
    return Check("measurements", f"{file} ({'exists' if file.exists() else 'nothing measured yet'})")


def _openmp() -> Check:
    runtimes = cpu.openmp_runtimes()
    if len(runtimes) > 1:
        return Check("OpenMP", f"{', '.join(runtimes)}: with more than one every switch costs milliseconds", "note")
    return Check("OpenMP", runtimes[0] if runtimes else "none found in this process")


def _backend(name: str, reason: str | None) -> Check:
    """Runs a small product on the backend where it says that it works, and compares it with the definition."""
    if reason:
        return Check(f"backend {name}", reason.splitlines()[0], "note")
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 96, generator=generator).to(device), torch.randn(80, 96, generator=generator).to(device)
    try:
        with backend.use(name):
            distance = float((linear(x, weight) - x @ weight.T).norm() / (x @ weight.T).norm())
    except Exception as error:
        return Check(f"backend {name}", f"{type(error).__name__}: {error}", "broken")
    if not distance < 1e-4:
        return Check(f"backend {name}", f"wrong by {distance:.2g} (relative) on {device}", "broken")
    return Check(f"backend {name}", f"works on {device}")
