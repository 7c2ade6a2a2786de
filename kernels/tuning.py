"""What was measured on this machine, kept from process to process:
for instance from which shape on a kernel is faster than torch's product.

One JSON file per CPU model, instruction set, number of threads and build, in the folder that the environment variable
HASTEN_CACHE names (empty: nothing is kept), else in $XDG_CACHE_HOME/hasten or ~/.cache/hasten.
A file may be deleted at any time.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import cpu


def remembered(key: str, measure: Callable[[], Any], *, every_isa: bool = False) -> Any:
    """What `measure` returned for this key on this machine: read from the file, or measured now and written to it.

    Args:
        key: names all that the measurement depends on but machine, threads and build: "linear 4096x4096 bfloat16".
        measure: returns what JSON can hold (tuples come back as lists). Its errors are the caller's,
            and nothing is kept then.
        every_isa: whatever the instruction set in use is.

    A file that is missing, broken or not writable is no error: it is measured again.
    """
    path = cache_file(every_isa)
    if path is None:
        return _as_read(measure())
    known = _read(path)
    if key not in known:
        value = _as_read(measure())
        known = _read(path) | {key: value}  # other processes may have written meanwhile
        _write(path, known)
    return known[key]


def cache_file(every_isa: bool = False) -> Path | None:
    """Where measurements of this machine, its threads as they are now, and this build are kept;
    None where nothing is."""
    folder = os.environ.get("HASTEN_CACHE")
    if folder == "":
        return None
    if folder is None:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hasten")
        except RuntimeError:  # no home
            return None
    instructions = "any" if every_isa else "torch" if cpu.reason() else cpu.isa()
    return Path(folder, f"{instructions}-{torch.get_num_threads()}-threads-{_build_and_processor()}.json")


@cache
def _build_and_processor() -> str:
    """A hash of the CPU's model, torch's version and the built library."""
    library = b"" if cpu.reason() else cpu.LIBRARY.read_bytes()
    text = "\n".join([cpu.processor(), torch.__version__, hashlib.sha256(library).hexdigest()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_read(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _checksum(measured: dict) -> str:
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is missing, or is not what `_write` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measured = content["measured"]
        return measured if isinstance(measured, dict) and content["checksum"] == _checksum(measured) else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _write(path: Path, measured: dict[str, Any]) -> None:
    """Replaces the file whole: who reads meanwhile reads the old one or the new one."""
    content = json.dumps({"measured": measured, "checksum": _checksum(measured)}, indent=1)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as part:
            try:
                part.write(content)
                part.close()
                os.replace(part.name, path)
            finally:
                Path(part.name).unlink(missing_ok=True)
