"""The folder of a saved model: an ordinary one of `transformers`,
with a plan file beside the model that vouches for it.

The plan file lists every file that loading reads, with its size and digest, and closes with a digest of its own text.
Nothing is parsed before its digest was compared, and no path leads out of the folder.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from hasten.acceleration.checksums import of_files
from hasten.errors import SavedPlanError

VERSION = 2
PLAN_FILE = "hasten_plan.json"
LARGEST_PLAN = 1 << 26  # bytes
SEAL = b',\n  "sha256": "'

# What transformers finds by its name beside a model: a file of these that was not saved would be read too, or instead.
READ_BY_NAME = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)


def listed(paths: Iterable[Path]) -> dict[str, dict]:
    """Sizes and digests of files by their names, as they stand in the plan file under "files"."""
    paths = list(paths)
    digests = of_files(paths)
    return {path.name: {"bytes": path.stat().st_size, "digest": digests[path.name]} for path in paths}


def write_plan(folder: Path, saved: dict) -> None:
    """Writes the plan file, of a record that `json` reads back as it is.

    Raises:
        ValueError: it is too long.
    """
    text = json.dumps({"version": VERSION} | saved, indent=2).removesuffix("\n}").encode()
    data = _sealed(text)
    if len(data) > LARGEST_PLAN:
        raise ValueError(
            f"the settings make {len(data)} bytes of JSON, at most {LARGEST_PLAN} can be saved: use tensors"
        )
    (folder / PLAN_FILE).write_bytes(data)


def read_plan(directory: Path) -> dict:
    """The content of the plan file.

    Raises:
        SavedPlanError: it was changed, or is of another version.
    """
    path = _inside(directory, PLAN_FILE)
    if (size := path.stat().st_size) > LARGEST_PLAN:
        raise SavedPlanError(f"{path} has {size} bytes: hasten.save did not write it")
    data = path.read_bytes()
    version = re.match(rb'\s*\{\s*"version":\s*(\d{1,9})\b', data)
    if version and int(version[1]) != VERSION:
        remedy = "update hasten" if int(version[1]) > VERSION else "accelerate the model and save it again"
        raise SavedPlanError(f"{path} is of version {int(version[1])}, this hasten reads version {VERSION}: {remedy}")
    if _sealed(data.rpartition(SEAL)[0]) != data:
        raise SavedPlanError(f"{path} is damaged or was edited: accelerate the model and save it again")
    saved = json.loads(data)
    if not isinstance(saved.get("files"), dict) or any(name != Path(name).name for name in saved["files"]):
        raise SavedPlanError(f"{path} is damaged: its files are not those of one folder")
    return saved


def verified(directory: Path) -> dict:
    """The content of the plan file, once all files that it lists were found unchanged, and no other that would be read.

    Raises:
        SavedPlanError: that is not so; the message names the file.
    """
    saved = read_plan(directory)
    paths = [_inside(directory, name) for name in saved["files"]]
    if strays := _strays(directory, saved["files"]):
        raise SavedPlanError(f"{directory} holds {strays[0]}, which was not saved with the model: take it out")
    for path in paths:
        size, expected = path.stat().st_size, saved["files"][path.name]["bytes"]
        if size != expected:
            raise SavedPlanError(f"{path} is damaged: it has {size} bytes, {expected} were saved")
    for name, digest in of_files(paths).items():
        if digest != saved["files"][name]["digest"]:
            raise SavedPlanError(f"{directory / name} is damaged or was edited: accelerate the model and save it again")
    for name in fnmatch.filter(saved["files"], "*.index.json"):
        shards = json.loads((directory / name).read_bytes())["weight_map"].values()
        if outside := set(shards) - saved["files"].keys():
            raise SavedPlanError(f"{directory / name} names {min(outside)}, which was not saved with the model")
    return saved


def move(new: Path, directory: Path, files: set[str]) -> None:
    """Moves everything in the folder `new`, with the listed `files`, into `directory`, in place of what an earlier plan
    listed. The plan comes last: what an interruption leaves is a mixture that `verified` refuses.

    Raises:
        FileExistsError: `directory` holds other files that transformers would read.
    """
    try:
        earlier = set(read_plan(directory)["files"])
    except (OSError, SavedPlanError):
        earlier = set()
    if strays := _strays(directory, earlier | files):
        raise FileExistsError(
            f"{directory} holds {strays[0]}, which transformers would read with what is saved: save to another folder"
        )
    for path in new.rglob("*"):
        if path.is_file() and path.name != PLAN_FILE:
            target = directory / path.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    for name in earlier - files:
        (directory / name).unlink(missing_ok=True)
    (new / PLAN_FILE).replace(directory / PLAN_FILE)


def _sealed(text: bytes) -> bytes:
    """A JSON object without its closing brace, closed by a digest of that text."""
    return text + SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def _inside(directory: Path, name: str) -> Path:
    """The path of the file `name` of the folder.

    Raises:
        SavedPlanError: there is none, or it lies elsewhere.
    """
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise SavedPlanError(f"{path} leads out of the folder, to {path.resolve()}: put the file itself there")
    if not path.is_file():
        raise SavedPlanError(f"{directory} is damaged: it lacks {name}")
    return path


def _strays(directory: Path, files: Iterable[str]) -> list[str]:
    """What transformers would find in the folder beside `files`."""
    present = [path.name for path in directory.iterdir()]
    return sorted({name for pattern in READ_BY_NAME for name in fnmatch.filter(present, pattern)} - set(files))
