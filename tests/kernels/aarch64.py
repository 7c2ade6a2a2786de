"""The kernels compiled for aarch64 and run by a user-mode emulator, called by the public operators on this machine.

Whatever an operator's launcher passes to a C function goes to a process of the emulator instead: the struct as it is,
and the memory of every tensor and number whose address stands in it. What the process writes is copied back.
"""

import ast
import ctypes
import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from hasten import kernels
from hasten.kernels import cpu

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = Path(kernels.__file__).parent
DRIVER = Path(__file__).with_name("aarch64_driver.cpp")
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fopenmp"),
    *("-Wall", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
PROCESSORS = {"neon_bf16": "max", "neon": "cortex-a57"}  # the second is an ARMv8.0 and executes nothing newer


def missing() -> str | None:
    """What this machine lacks to compile for aarch64 and to run it."""
    lacking = [program for program in (COMPILER, EMULATOR) if not shutil.which(program)]
    return f"needs {' and '.join(lacking)}" if lacking else None


def instruction_sets() -> dict[str, list[str]]:
    """Those of aarch64 and the compiler's flags for them, as setup.py has them."""
    for statement in ast.parse((SOURCES.parent / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "NEON":
            return ast.literal_eval(statement.value)
    raise AssertionError("setup.py has no NEON")


def build(folder: Path) -> None:
    """The library of every kernel in every instruction set, and the driver that calls it, in `folder`."""
    rooms = [path for path in sorted(SOURCES.rglob("cpu.cpp")) if path != SOURCES / "cpu.cpp"]
    jobs = [(source, isa, flags) for source in rooms for isa, flags in instruction_sets().items()]
    jobs.append((SOURCES / "cpu.cpp", "neon", []))

    def compile_one(job) -> str:
        source, isa, flags = job
        target = str(folder / f"{source.parent.name}.{isa}.o")
        _run([COMPILER, *FLAGS, *flags, f"-DHASTEN_ISA={isa}", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    _run([COMPILER, "-shared", *objects, "-fopenmp", "-lm", "-o", str(folder / "kernels.so")])
    _run(
        [
            COMPILER,
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Werror",
            "-fopenmp",
            str(DRIVER),
            "-ldl",
            "-o",
            str(folder / "driver"),
        ]
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Memory:
    begin: int
    size: int
    owner: object  # alive until the call


@dataclass
class Machine:
    """An emulated CPU.

    Args:
        folder: of what `build` made.
        isa: the instruction set whose functions the operators call.
        control: the floating-point control register of every thread before a call; it has to be the same after it.
    """

    folder: Path
    isa: str
    control: int = 0
    calls: int = 0
    memory: dict[int, Memory] = field(default_factory=dict)  # of what addresses were asked for

    def patch(self, monkeypatch) -> None:
        """Has the public operators call this machine."""
        data_ptr, addressof = torch.Tensor.data_ptr, ctypes.addressof

        def of_tensor(tensor):
            found, storage = data_ptr(tensor), tensor.untyped_storage()
            self.memory[found] = Memory(storage.data_ptr(), storage.nbytes(), tensor)
            return found

        def of_number(number):
            found = addressof(number)
            self.memory[found] = Memory(found, ctypes.sizeof(number), number)
            return found

        monkeypatch.setattr(torch.Tensor, "data_ptr", of_tensor)
        monkeypatch.setattr(ctypes, "addressof", of_number)
        monkeypatch.setattr(cpu, "reason", lambda: None)
        monkeypatch.setattr(cpu, "isa", lambda: self.isa)
        monkeypatch.setattr(cpu.Function, "__call__", lambda function, arguments: self.call(function, arguments))

    def call(self, function: cpu.Function, arguments: cpu.Arguments) -> None:
        """As cpu.Function does, with its errors."""
        buffers, pointers = {}, []
        for at in pointer_fields(type(arguments)):
            address = ctypes.c_void_p.from_buffer(arguments, at).value
            if address:
                found = self.memory[address]
                buffers[found.begin] = found.size
                pointers.append((at, list(buffers).index(found.begin), address - found.begin))
        memory = [(ctypes.c_char * size).from_address(begin) for begin, size in buffers.items()]
        code, contents = self.run(
            f"hasten_{function.name}_{self.isa}",
            bytes(arguments),
            [bytes(m) for m in memory],
            pointers,
            getattr(arguments, "threads", 1),
        )
        for own, content in zip(memory, contents, strict=True):
            own[:] = content
        self.memory.clear()
        if code == 2:
            raise MemoryError(f"no memory for {function.name}")
        if code:
            raise (ValueError if code == 3 else RuntimeError)(f"{function.name}: code {code}")

    def run(
        self, name: str, arguments: bytes = b"", buffers=(), pointers=(), threads: int = 1
    ) -> tuple[int, list[bytes]]:
        """What the C function `name` returns, and the buffers after the call.

        Args:
            pointers: for each where it stands in `arguments`, the number of its buffer and its byte there.
        """
        self.calls += 1
        request = [struct.pack("<6q", len(name), len(arguments), len(buffers), len(pointers), self.control, threads)]
        request += [name.encode(), arguments, *(struct.pack("<3q", *pointer) for pointer in pointers)]
        for buffer in buffers:
            request += [struct.pack("<q", len(buffer)), buffer]
        command = [EMULATOR, "-cpu", PROCESSORS[self.isa], "-L", libraries(), "driver", "./kernels.so"]
        done = subprocess.run(command, input=b"".join(request), capture_output=True, cwd=self.folder)
        assert done.returncode == 0, f"{name}: code {done.returncode} {done.stderr.decode()}"
        code, *controls = struct.unpack_from(f"<{1 + threads}q", done.stdout)
        assert controls == [self.control] * threads
        contents, at = [], 8 * (1 + threads)
        for buffer in buffers:
            contents.append(done.stdout[at : at + len(buffer)])
            at += len(buffer)
        return code, contents


@cache
def libraries() -> str:
    """The folder in which lib/ has the C library of aarch64."""
    return str(Path(_run([COMPILER, "-print-file-name=libc.so.6"]).strip()).resolve().parents[1])


def pointer_fields(kind: type[cpu.Arguments], at: int = 0):
    """Where the pointers stand in a struct, in bytes."""
    for name, of in kind._fields_:
        begin = at + getattr(kind, name).offset
        if of is cpu.POINTER:
            yield begin
        elif issubclass(of, ctypes.Structure):
            yield from pointer_fields(of, begin)
