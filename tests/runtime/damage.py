"""Ways to damage a saved folder: each is a name and a function that changes the files of a folder in place."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Damage = tuple[str, Callable[[Path], None]]

PLAN = "hasten_plan.json"
WRONG = (None, 0, -1, 1e308, True, "x", "", [], {}, [0], {"a": 0}, 10**400)
# What transformers, or a person, might put beside a model.
BESIDE = (
    *("README.md", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", ".gitattributes", "x.onnx"),
    *("model.safetensors", "model.safetensors.index.json", "model-00001-of-00009.safetensors", "head.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors"),
    *("hasten_settings.safetensors", "shard-00001-model-00001-of-00001.safetensors", "config.4.0.0.json"),
    *("modeling_llama.py", "configuration_llama.py", "custom_generate/generate.py", "original/model.safetensors"),
    *("tf_model.h5", "flax_model.msgpack", "model.gguf", "params.json", "chat_template.jinja", "hasten_plan.json.bak"),
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    """Makes `folder` hold `files` and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def reseal(folder: Path) -> None:
    """Writes the digests of the files as they are now into the plan, as `hasten.save` does."""
    plan = json.loads((folder / PLAN).read_bytes())
    plan.pop("sha256", None)
    for name in plan.get("files") or ():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            pieces = [data[i : i + (1 << 24)] for i in range(0, max(1, len(data)), 1 << 24)]
            digests = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
            plan["files"][name] = {"bytes": len(data), "digest": hashlib.sha256(digests).hexdigest()}
    text = json.dumps(plan, indent=2).removesuffix("\n}").encode()
    seal = hashlib.sha256(text).hexdigest()
    (folder / PLAN).write_bytes(text + f',\n  "sha256": "{seal}"\n}}\n'.encode())


def damages(files: dict[str, bytes], others: dict[str, bytes], count: int, seed: int) -> list[Damage]:
    """`count` damages: all whole files that can be, and fields and bytes at random."""
    chosen, generator = list(_files(files, others)), random.Random(seed)
    fields = fields_of(files)
    chosen += generator.sample(fields, min(len(fields), (count - len(chosen)) // 2))
    chosen += generator.sample(spots := list(_bytes(files)), min(len(spots), count - len(chosen)))
    return chosen[:count]


def fields_of(files: dict[str, bytes]) -> list[Damage]:
    """Every field of every JSON file removed, doubled, or given another value."""
    return [damage for name, data in files.items() if name.endswith(".json") for damage in _fields(name, data)]


def monsters_of(files: dict[str, bytes]) -> list[Damage]:
    """Every JSON file very deep, very long, or with paths that lead elsewhere."""
    return [
        (f"{name}: {what}", _writer(name, text))
        for name, data in files.items()
        if name.endswith(".json")
        for what, text in _monsters(data)
    ]


def _bytes(files: dict[str, bytes]) -> Iterator[Damage]:
    """Bytes flipped, lost and added at spread positions."""
    for name, data in files.items():
        for part in range(101):
            at = (len(data) - 1) * part // 100
            flipped = data[:at] + bytes([data[at] ^ 1 << part % 8]) + data[at + 1 :]
            yield f"{name}: bit {part % 8} of byte {at} flipped", _writer(name, flipped)
        for size in (0, 1, 8, len(data) // 2, len(data) - 1):
            yield f"{name}: cut to {size} bytes", _writer(name, data[:size])
        for more in (b"\0", b"\n", b" {}", data):
            yield f"{name}: {len(more)} bytes added", _writer(name, data + more)
        for part in range(1, 10):
            at = len(data) * part // 10
            yield f"{name}: 8 zeros at byte {at}", _writer(name, data[:at] + bytes(8) + data[at + 8 :])
            yield f"{name}: byte {at} lost", _writer(name, data[:at] + data[at + 1 :])


def _fields(name: str, data: bytes) -> Iterator[Damage]:
    original = json.loads(data)
    for path in _paths(original):
        place = f"{name}: {'.'.join(map(str, path))}"
        value = _at(original, path)
        for other in [*WRONG, *_near(value)]:
            yield f"{place} = {str(other)[:20]!r}", _writer(name, _dumped(_changed(original, path, other)))
        yield f"{place} removed", _writer(name, _dumped(_changed(original, path)))
        if isinstance(path[-1], str):
            key = json.dumps(path[-1]).encode() + b":"
            yield f"{place} doubled before", _writer(name, data.replace(key, key + b" 0, " + key, 1))
            again = data.rstrip()[:-1].rstrip() + b", " + key + b" 0}"
            yield f"{place} doubled at the end", _writer(name, again)


def _files(files: dict[str, bytes], others: dict[str, bytes]) -> Iterator[Damage]:
    """Whole files lost, exchanged, linked, added, or huge."""
    for name, data in files.items():
        yield f"{name} lost", lambda folder, name=name: (folder / name).unlink()
        yield f"{name} renamed", lambda folder, name=name: (folder / name).rename(folder / f"_{name}")
        yield f"{name} a folder", lambda folder, name=name: _as_folder(folder / name)
        yield f"{name} a pipe", lambda folder, name=name: _as(folder / name, os.mkfifo)
        yield f"{name} linked outside", lambda folder, name=name, data=data: _linked_outside(folder / name, data)
        yield f"{name} linked inside", lambda folder, name=name, data=data: _linked_inside(folder / name, data)
        for target in ("/dev/zero", "nowhere", name, "/etc/hostname"):
            yield (
                f"{name} -> {target}",
                lambda folder, name=name, target=target: _as(folder / name, lambda path: path.symlink_to(target)),
            )
        for other, content in others.items():
            if other == name or other.rpartition(".")[2] == name.rpartition(".")[2]:
                yield f"{name} from {other} of another folder", _writer(name, content)
    yield from monsters_of(files)
    for name in BESIDE:
        if name not in files:
            content = others.get(name, others["config.json"] if name.endswith("json") else b"raise SystemExit")
            yield f"{name} added", _writer(name, content)
    yield "README.md and a folder added", lambda folder: (folder / "images").mkdir()


def _monsters(data: bytes) -> Iterator[tuple[str, bytes]]:
    body = data.rstrip()[:-1].rstrip()
    yield "deep lists", b"[" * 100_000 + b"]" * 100_000
    yield "a deep field", body + b', "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "deep objects", b'{"a":' * 50_000
    yield "a long number", body + b', "long": ' + b"1" * 1_000_000 + b"}"
    yield "a long string", body + b', "long": "' + b"x" * 5_000_000 + b'"}'
    yield "many fields", body + b"".join(b', "f%d": 0' % i for i in range(10_000)) + b"}"
    yield "no object", b"[]"
    yield "UTF-16", data.decode().encode("utf-16")
    for target in ("/etc/hostname", "../other/model.safetensors", "..\\model.safetensors", "\0"):
        for path in _paths(original := json.loads(data)):
            if str(path[-1]).endswith(".safetensors") or str(_at(original, path)).endswith(".safetensors"):
                yield f"{path[-1]} is {target}", _dumped(_changed(original, path, target))
                break


def _as(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def _as_folder(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.mkdir()
    (path / path.name).write_bytes(data)


def _linked_outside(path: Path, data: bytes) -> None:
    outside = path.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / path.name).write_bytes(data)
    _as(path, lambda path: path.symlink_to(outside / path.name))


def _linked_inside(path: Path, data: bytes) -> None:
    (path.parent / f"{path.name}.copy").write_bytes(data)
    _as(path, lambda path: path.symlink_to(f"{path.name}.copy"))


def _writer(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return write


def _dumped(value) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _paths(value, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all fields and items of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def _at(value, path: tuple):
    for key in path:
        value = value[key]
    return value


def _changed(original, path: tuple, *value):
    """A copy of a JSON value with another value at `path`, or none."""
    copied = json.loads(json.dumps(original))
    container = _at(copied, path[:-1])
    if value:
        container[path[-1]] = value[0]
    else:
        del container[path[-1]]
    return copied


def _near(value) -> list:
    """Values that are easily taken for this one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value * 1.0001, -value]
    return [value + "x", value.upper()] if isinstance(value, str) else []
