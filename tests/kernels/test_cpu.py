"""Every C function's arguments: the struct in C++ and its twin in Python have the same fields in the same order, and
the same size."""

import ctypes
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from hasten import kernels
from hasten.kernels import cpu
from hasten.kernels.linear.cpu import LinearArguments

FOLDER = Path(kernels.__file__).parent
FIELD = re.compile(r"[\s*](\w+)\s*(?:,|$)")


def functions() -> dict[str, cpu.Function]:
    """Every function that an operator's cpu.py declares, by name."""
    found = {}
    for module in pkgutil.walk_packages([str(FOLDER)], "hasten.kernels."):
        if module.name.endswith(".cpu"):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, cpu.Function):
                    assert value.name not in found
                    found[value.name] = value
    return found


def structs() -> dict[str, list[str]]:
    """The names of the fields of every plain struct in the sources."""
    found = {}
    for path in [*FOLDER.rglob("*.h"), *FOLDER.rglob("*.cpp")]:
        text = re.sub(r"//.*", "", path.read_text())
        for name, body in re.findall(r"\bstruct (\w+) \{([^{}()]*)\}", text):
            assert name not in found
            found[name] = [field for line in body.split(";") for field in FIELD.findall(line.strip())]
    return found


def visible_to_the_linker(source: str) -> str:
    """What a source defines outside of anonymous namespaces and exported functions."""
    source = re.sub(r"//.*|^#(?:.*\\\n)*.*$|^HASTEN_SUPPORTED\(.*\)$", "", source, flags=re.MULTILINE)
    while block := re.search(r"(namespace|HASTEN_EXPORT\(\w+, \w+\)\(const \w+& in\)) (?=\{)", source):
        end, depth = block.end(), 0
        while end == block.end() or depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        source = source[: block.start()] + source[end:]
    return source.strip()


FUNCTIONS, STRUCTS = functions(), structs()
SOURCES = sorted([*FOLDER.rglob("*.h"), *FOLDER.rglob("*.cpp")])
TWINS = {function.arguments.__name__: function.arguments for function in FUNCTIONS.values()}


def nested(structure):
    """The structure and all that its fields are."""
    yield structure
    for _, kind in structure._fields_:
        if issubclass(kind, ctypes.Structure):
            yield from nested(kind)


def exported() -> set[str]:
    pattern = re.compile(r"^HASTEN_EXPORT\((\w+), (\w+)\)", re.MULTILINE)
    return {found for path in FOLDER.rglob("cpu.cpp") for found in pattern.findall(path.read_text())}


def test_every_exported_function_is_declared_with_its_struct():
    assert exported() == {(name, function.arguments.__name__) for name, function in FUNCTIONS.items()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_instruction_sets_share_nothing_but_what_is_exported(path):
    """Of an inline function that several objects define the linker keeps one, of whichever instruction set."""
    assert visible_to_the_linker(path.read_text()) == ""


def test_what_the_linker_would_merge_is_seen():
    merged = "struct A { int f() { return 1; } };"
    source = f"#define X(a) \\\n    a\nnamespace {{\nint g() {{ return 0; }}\n}}  // namespace\n{merged}"
    assert visible_to_the_linker(source) == merged


@pytest.mark.parametrize("name", TWINS)
def test_fields_have_the_same_names_in_the_same_order(name):
    for structure in nested(TWINS[name]):
        assert [field for field, _ in structure._fields_] == STRUCTS[structure.__name__]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_structs_have_the_same_size(name, isa):
    assert FUNCTIONS[name].struct_size() == ctypes.sizeof(FUNCTIONS[name].arguments)


@pytest.mark.parametrize("name", TWINS)
def test_no_struct_has_padding_or_takes_an_unknown_name(name):
    for structure in nested(TWINS[name]):
        assert ctypes.sizeof(structure) == sum(ctypes.sizeof(kind) for _, kind in structure._fields_)
        with pytest.raises(AttributeError):
            structure(wieght=1)


def test_what_a_function_returns_becomes_an_error(isa):
    x = torch.ones(1)
    pointers = dict.fromkeys(("y", "x", "weight"), x.data_ptr())
    with pytest.raises(RuntimeError, match="linear: code 1"):
        FUNCTIONS["linear"](LinearArguments(dtype=99, threads=1, rows=1, N=1, K=1, **pointers))


def test_an_address():
    x = torch.ones(3)
    assert cpu.address(x[1:]) == x.data_ptr() + 4 and cpu.address(None) is None
