"""The rules of the house: which way imports run, what the top level and a wheel hold, and that every example runs."""

import ast
import doctest
import importlib
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer

import hasten
from hasten.acceleration.techniques import Technique
from hasten.bench.cards import wrapped
from hasten.cli.app import app
from hasten.guidance.diffusion.guide import Guide
from hasten.guidance.text.constraints import Constraint

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "hasten": "runtime",
    "hasten.kernels": "kernels",
    "hasten.guidance": "guidance",
    "hasten.sparsity": "sparsity",
    "hasten.bench": "bench",
}
MAY_IMPORT = {
    "hasten.kernels": ("hasten.kernels",),
    "hasten.guidance": ("hasten.guidance", "hasten.kernels"),
    "hasten.sparsity": ("hasten.sparsity", "hasten.kernels"),
}
# Folders of a package that do not import each other; they share the package's own files. Beside them `hasten.models`
# holds model classes, which know no wing, and the command line sees all.
WINGS = {
    "hasten": ("hasten.acceleration", "hasten.pipelines", "hasten.generation"),
    "hasten.guidance": ("hasten.guidance.diffusion", "hasten.guidance.text"),
}
TOP_LEVEL = {
    *FOLDERS.values(), "tests", ".ci", "setup.py", "pyproject.toml", "constraints.txt",
    "README.md", "CHANGELOG.md", "LICENSE", ".gitignore",
}  # fmt: skip


def tracked() -> list[Path]:
    """The files that git knows, below ROOT."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


def modules(package: str) -> dict[str, Path]:
    """Module names and files of one of the packages of FOLDERS."""
    folder = Path(FOLDERS[package])
    found = {}
    for path in tracked():
        if path.suffix == ".py" and path.is_relative_to(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by absolute name."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def shared(package: str) -> dict[str, Path]:
    """The files of a package itself, which its wings share; not its public face."""
    own = modules(package).items()
    return {module: path for module, path in own if path.parent == Path(FOLDERS[package]) and module != package}


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def python(code: str, folder: Path, **environment: str) -> str:
    """The output of `code` in a fresh process that runs in `folder`."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_down(package):
    for module, path in modules(package).items():
        for name in imports(module, path):
            assert not inside(name, ("hasten",)) or inside(name, MAY_IMPORT[package]), f"{path} imports {name}"
            assert not inside(name, ("transformers", "diffusers")), f"{path} imports {name}"


@pytest.mark.parametrize(("package", "wing"), [(package, wing) for package in WINGS for wing in WINGS[package]])
def test_wings_do_not_import_each_other(package, wing):
    """A wing sees itself, the files that its package shares and the packages below;
    model classes are runtime's alone."""
    floors = tuple(floor for floor in FOLDERS if floor not in ("hasten", "hasten.bench", package))
    below = floors if package == "hasten" else MAY_IMPORT[package][1:]
    allowed = (wing, *shared(package), *below, *(("hasten.models",) if package == "hasten" else ()))
    found = {module: path for module, path in modules(package).items() if inside(module, (wing,))}
    assert len(found) > 1
    for module, path in found.items():
        for name in imports(module, path):
            assert not inside(name, ("hasten",)) or inside(name, allowed), f"{path} imports {name}"


def part_of(name: str) -> str | None:
    """The part of the house that a module or an imported name belongs to, as the drawing in runtime/README.md calls it;
    None for the files that a package's wings share, and for what is not ours."""
    wings = {wing: wing.removeprefix("hasten.") for package in WINGS for wing in WINGS[package]}
    parts = wings | {"hasten.models": "models", "hasten.cli": "cli"} | {floor: floor[7:] for floor in FOLDERS}
    return next((part for prefix, part in parts.items() if prefix != "hasten" and inside(name, (prefix,))), None)


def drawing() -> list[str]:
    """Lines of a Mermaid graph: who imports whom, without what the files that wings share are imported by."""
    arrows = set()
    for package in FOLDERS:
        for module, path in modules(package).items():
            for name in imports(module, path):
                arrow = part_of(module), part_of(name)
                if None not in arrow and arrow[0] != arrow[1]:
                    arrows.add(arrow)
    return [f"    {one} --> {other}" for one, other in sorted(arrows)]


def test_the_drawing_of_the_imports_is_that_of_the_code():
    text = (ROOT / "runtime/README.md").read_text(encoding="utf-8")
    drawn = re.search(r"```mermaid\ngraph TD\n(.*?)\n```", text, re.DOTALL).group(1).split("\n")
    assert drawn == drawing(), "\n".join(drawing())


@pytest.mark.parametrize("package", WINGS)
def test_what_wings_share_imports_none_of_them(package):
    others = {module: path for module, path in modules(package).items() if inside(module, ("hasten.models",))}
    assert shared(package) and (others or package != "hasten")
    for module, path in (shared(package) | others).items():
        for name in imports(module, path):
            assert not inside(name, (*WINGS[package], "hasten.cli")), f"{path} imports {name}"


def test_the_public_face_names_what_the_wings_hold():
    named = {module.partition(".")[0] for module in hasten._WHERE}
    assert named >= {"acceleration", "pipelines", "generation", "guidance"}
    assert imports("hasten", Path("runtime/__init__.py")) == {"importlib"}


def test_only_the_command_line_imports_the_benchmarks():
    for module, path in modules("hasten").items():
        if not module.startswith("hasten.cli"):
            assert not any(inside(name, ("hasten.bench",)) for name in imports(module, path)), path


def test_an_import_is_seen_in_every_form():
    seen = imports("hasten.kernels.linear.op", Path("kernels/linear/op.py"))
    assert {"torch", "hasten.kernels.storage", "hasten.kernels.linear.reference"} <= seen


@pytest.mark.parametrize("folder", ["kernels", "guidance", "sparsity", "bench"])
def test_packages_open_with_a_docstring_alone(folder):
    body = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0].value.value, str)


def test_the_top_level_is_fixed():
    assert {path.parts[0] for path in tracked()} <= TOP_LEVEL
    assert not (ROOT / "conftest.py").exists()


def test_import_is_light_and_complete_outside_the_repository(tmp_path):
    code = "import sys, hasten; print([name for name in ('torch', 'transformers', 'typer') if name in sys.modules])"
    assert python(code, tmp_path).strip() == "[]"
    python("import hasten; [getattr(hasten, name) for name in hasten.__all__]", tmp_path)
    assert set(hasten.__all__) <= set(dir(hasten))
    with pytest.raises(AttributeError, match="no attribute 'wina'"):
        hasten.wina  # noqa: B018


@pytest.mark.parametrize("folder", ["root", "elsewhere"])
def test_the_console_script_runs_anywhere(folder, tmp_path):
    script = Path(sys.executable).with_name("hasten")
    folder = ROOT if folder == "root" else tmp_path
    done = subprocess.run([script, "--version"], cwd=folder, capture_output=True, text=True)
    assert done.stdout == f"hasten {hasten.__version__}\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the files that git knows, built where there is no C++ compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / "source" / path)
    build = "pip wheel --quiet --no-index --no-build-isolation --no-deps --wheel-dir . ./source"
    command = [sys.executable, "-m", *build.split()]
    environment = os.environ | {"CC": "no-compiler", "CXX": "no-compiler", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_package_and_nothing_else(wheel):
    expected = {
        "/".join([*package.split("."), str(path.relative_to(folder))])
        for package, folder in FOLDERS.items()
        for path in modules(package).values()
    }
    models = [path.relative_to("runtime") for path in tracked() if path.is_relative_to("runtime/models")]
    expected |= {f"hasten/{path}" for path in models}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {name.split("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name}
    assert held == expected | {"hasten/kernels/_cpu.txt"}
    assert {"entry_points.txt", "licenses/LICENSE"} <= metadata


def test_without_a_compiler_the_wheel_works_and_says_why(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import torch
from hasten.kernels import backend, cpu
from hasten.kernels.linear import linear
print(cpu.__file__)
print(cpu.reason())
print(float((linear(torch.ones(1, 3), torch.ones(2, 3)) - 3).abs().max()), backend.choose(torch.ones(1)))
"""
    where, *why, what = python(code, tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert where.startswith(str(tmp_path))
    assert "no-compiler" in " ".join(why)
    assert what == "0.0 reference"


def readmes() -> list[Path]:
    """The README of the repository, and those of its folders."""
    return [path for path in tracked() if path.name == "README.md" and len(path.parts) <= 2]


def text_of(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def examples(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(path), flags=re.DOTALL | re.MULTILINE)


def test_every_package_has_a_readme():
    assert set(readmes()) == {Path("README.md"), *(Path(folder, "README.md") for folder in FOLDERS.values())}


# What the examples of a README print, as far as their comments or the text beside them say it.
PRINTED = {
    "README.md": ["drift    KL", "\n1000\n810\n"],
    "runtime/README.md": ["drift    KL", "DropMLPs(count=1): 1 modules"],
    "guidance/README.md": ["1000\n810\n750\n144\n"],
    "sparsity/README.md": [" of the inputs are skipped\n", "\n2 4\n", "\n{2: 0.5} Stages(", "\nmean share 0.25\n"],
}


@pytest.mark.parametrize("path", readmes(), ids=str)
def test_the_examples_of_a_readme_run(path, tmp_path):
    assert examples(path)
    printed = python("\n".join(examples(path)), tmp_path, HASTEN_CACHE=str(tmp_path))
    for text in PRINTED.get(str(path), []):
        assert text in printed


def test_the_example_of_the_package_is_part_of_the_first_one_that_runs():
    accelerate = [line.partition("  #")[0] for line in examples(Path("README.md"))[0].splitlines()]
    _, package = hasten.__doc__.split("\n\n")
    assert set(package.strip().splitlines()) <= set(accelerate)


def test_the_command_lines_of_the_readmes_are_understood():
    """Every `hasten ...` in a README names a command that there is, with arguments and options that it takes."""
    commands = typer.main.get_command(app)
    shells = [re.findall(r"^```bash\n(.*?)^```$", text_of(path), flags=re.DOTALL | re.MULTILINE) for path in readmes()]
    found = [
        line for block in itertools.chain(*shells) for line in re.findall(r"^hasten .*$", block, flags=re.MULTILINE)
    ]
    assert len(found) > 5
    for line in found:
        _, name, *arguments = shlex.split(line, comments=True)
        assert name in commands.commands, line
        commands.commands[name].make_context(name, arguments)


def test_the_examples_in_docstrings_run():
    for package in FOLDERS:
        for module, path in modules(package).items():
            if ">>>" in text_of(path):
                assert doctest.testmod(importlib.import_module(module)).failed == 0, module


def test_the_readme_is_short_and_leads_with_two_commands():
    readme = text_of(Path("README.md"))
    commands = re.findall(r"^<!-- command:(\w+) -->\n```bash\n.+\n```$", readme, flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    assert readme.index("<!-- command:test -->") < readme.index("\n## ")
    assert readme.count("\n") <= 200


def test_every_technique_guide_and_constraint_is_in_a_readme():
    kinds = (Technique, Guide, Constraint)
    public = {name for name in hasten.__all__ if inspect.isclass(getattr(hasten, name))}
    named = {name for name in public if issubclass(getattr(hasten, name), kinds)}
    assert {"Wina", "AdaptiveGuidance", "JsonSchema"} <= named
    written = "\n".join(map(text_of, readmes()))
    assert {name for name in named if not re.search(rf"\b{name}\b", written)} == set()


def test_prose_in_readmes_is_wrapped():
    """At 120 columns; a row of a table and a line that is one link have to be as long as they are."""
    for path in readmes():
        for number, line in enumerate(text_of(path).splitlines(), 1):
            assert len(line) <= 120 or line.startswith("|") or " " not in line.strip(), f"{path}:{number}"


def test_cards_of_models_are_wrapped_as_their_scripts_write_them():
    cards = [path for path in tracked() if path.match("runtime/models/*/README.md")]
    assert len(cards) == 3
    for path in cards:
        assert wrapped(text_of(path)) == text_of(path)


def test_lines_of_the_kernels_sources_are_wrapped():
    """At 120 columns, which ruff holds for Python."""
    for path in tracked():
        if path.suffix in (".cpp", ".h"):
            for number, line in enumerate(text_of(path).splitlines(), 1):
                assert len(line) <= 120, f"{path}:{number}"


def test_links_in_readmes_lead_somewhere():
    for path in readmes():
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of(path)):
            assert (ROOT / path.parent / target).exists(), f"{path} links {target}"


def test_no_test_module_imports_another():
    for path in tracked():
        if path.parts[0] == "tests" and path.suffix == ".py":
            names = imports(path.stem, path)
            assert not [name for name in names if any(part.startswith("test_") for part in name.split("."))], path
