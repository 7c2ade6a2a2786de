"""Metadata and the build: the packages' folders, and one library of CPU kernels compiled once per instruction set."""

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOTS = {
    "hasten": "runtime",
    "hasten.kernels": "kernels",
    "hasten.guidance": "guidance",
    "hasten.sparsity": "sparsity",
    "hasten.bench": "bench",
}

DIFFUSERS = "diffusers>=0.42,<0.43"  # the versions in runtime/pipelines/families.py

# Instruction sets, best first; kernels/cpu.py picks one at run time. Every set contains the one after it.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
NEON = {"neon_bf16": ["-march=armv8.2-a+bf16"], "neon": []}
ISAS = {"scalar": []}
if platform.machine().lower() in ("aarch64", "arm64"):
    ISAS = NEON
elif platform.machine().lower() in ("x86_64", "amd64"):
    AVX512BF16 = [*AVX512, "-mavx512bf16"]
    ISAS = {
        "amx": [*AVX512BF16, "-mamx-tile", "-mamx-bf16"],
        "avx512bf16": AVX512BF16,
        "avx512": AVX512,
        "avx2": AVX2,
        "scalar": [],
    }


def packages() -> list[str]:
    """Every folder with an __init__.py below the roots."""
    found = []
    for name, root in ROOTS.items():
        for folder in sorted(path.parent for path in Path(root).rglob("__init__.py")):
            found.append(".".join([name, *folder.relative_to(root).parts]))
    return found


class BuildKernels(build_ext):
    """Compiles each source once per instruction set and links all of them into one library with a plain C ABI.

    Without a compiler the install goes on (the extension is optional); `<library>.txt` keeps the reason for
    `hasten doctor`.
    """

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        reason = library.with_suffix(".txt")
        reason.unlink(missing_ok=True)
        try:
            self.compile(ext, library)
        except Exception as error:
            reason.write_text(f"not built: {error}\n")
            raise CompileError(f"{ext.name}: {error}") from error

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        built = Path(self.get_ext_fullpath(self.extensions[0].name)).with_suffix(".txt")
        left = Path("kernels", built.name)
        left.unlink(missing_ok=True)
        if built.exists():
            self.copy_file(str(built), str(left))

    def compile(self, ext, library):
        compiler, linker = (getattr(self.compiler, name, None) for name in ("compiler_so", "linker_so"))
        if not compiler or not linker:
            raise RuntimeError(f"the {self.compiler.compiler_type} compiler is not supported, only gcc and clang are")
        flags = [
            "-std=c++17",
            "-O3",
            "-g0",
            "-fPIC",
            "-fvisibility=hidden",
            "-fno-exceptions",
            "-fno-rtti",
            "-Wall",
            "-Wno-psabi",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
        ]
        openmp = self.openmp(compiler, linker)
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)

        def compile_one(job):
            source, isa = job
            target = Path(self.build_temp, f"{source.replace('/', '_')}.{isa}.o")
            run([*compiler, *flags, *openmp, *ISAS[isa], f"-DHASTEN_ISA={isa}", "-c", source, "-o", str(target)])
            return str(target)

        jobs = [("kernels/cpu.cpp", list(ISAS)[-1])]
        jobs += [(source, isa) for source in ext.sources if source != "kernels/cpu.cpp" for isa in ISAS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        run([*linker, *objects, *openmp, "-lm", "-o", str(library)])

    @staticmethod
    def openmp(compiler, linker) -> list[str]:
        """The flag for OpenMP, or none if compiler or linker have no OpenMP (the kernels then use one thread)."""
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "probe.cpp"), str(Path(folder, "probe"))
            source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
            try:
                run([*compiler, "-fPIC", "-fopenmp", "-c", str(source), "-o", target + ".o"])
                run([*linker, target + ".o", "-fopenmp", "-o", target + ".so"])
            except RuntimeError:
                return []
        return ["-fopenmp"]


def run(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    sys.stderr.write(done.stderr)


library = Extension(
    "hasten.kernels._cpu",
    sources=sorted(path.as_posix() for path in Path("kernels").rglob("cpu.cpp")),
    depends=sorted(path.as_posix() for path in Path("kernels").rglob("*.h")),
    optional=True,
)

setup(
    name="hasten",
    version="0.1.0",
    description="Makes generative models that you already have faster, and controls what they emit",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; sys_platform == 'linux'",
        "numpy",
        "safetensors",
        "transformers>=5.17,<5.24",
        "packaging",
        "tqdm",
        "typer>=0.19",
        "rich",
        "llguidance>=1.9,<2",
    ],
    extras_require={
        "diffusers": [DIFFUSERS],
        "plot": ["matplotlib"],
        "search": ["scikit-learn"],
        "test": [
            *("pytest", "pytest-xdist", "pytest-benchmark", "ruff", "accelerate", "matplotlib", "setuptools>=77"),
            *(DIFFUSERS, "jsonschema", "pydantic", "scikit-learn"),
        ],
    },
    entry_points={"console_scripts": ["hasten = hasten.cli:main"]},
    packages=packages(),
    package_dir=ROOTS,
    package_data={"hasten": ["models/**"]},
    ext_modules=[library],
    cmdclass={"build_ext": BuildKernels},
    zip_safe=False,
)
