"""Saving an accelerated model with its plan, and loading it without calibrating again.

A saved folder is an ordinary one of `transformers`, with `hasten_plan.json` beside the model, and
`hasten_settings.safetensors` where there are tensors to keep. The plan lists every file that loading reads, with
its size and digest, and closes with a digest of its own text. Nothing is parsed before its digest was compared.
"""

import contextlib
import fnmatch
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hasten.acceleration.arrangement import Assignment, arrange
from hasten.acceleration.checksums import of_files, sampled
from hasten.acceleration.inference import Inference
from hasten.acceleration.install import Installed, install, installed_on
from hasten.acceleration.plan import Plan
from hasten.acceleration.preflight import examine
from hasten.acceleration.techniques import Settings, Technique
from hasten.errors import SavedPlanError, StateError, UnsupportedModelError

VERSION = 2
PLAN_FILE = "hasten_plan.json"
TENSORS_FILE = "hasten_settings.safetensors"
LARGEST_PLAN = 1 << 26  # bytes
EXAMPLE = "example"  # stands among the settings where the model was examined on what a processor returned
SEAL = b',\n  "sha256": "'

# What transformers finds by its name in a model's folder: a file of these that was not saved would be read too, or instead.
READ_BY_NAME = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)


def save(model: nn.Module, directory: str | Path, tokenizer=None) -> None:
    """Saves an accelerated model as an ordinary dense Hugging Face folder, with its plan and settings beside it in
    `hasten_plan.json`.

    `transformers` loads the folder as the dense model; `hasten.load` loads it accelerated. What stood in the folder is
    kept until all is written; then files of the same name, and those of an earlier `save`, are replaced. Of a model that
    was calibrated with pictures or sound the first of these inputs is kept, with its values shuffled.

    Args:
        model: an accelerated `transformers` model.
        directory: a folder, made if need be.
        tokenizer: a tokenizer or processor, saved along if given.

    Raises:
        StateError: the model is not accelerated (use its own `save_pretrained`), or was changed since.
        UnsupportedModelError: it is of a class that `transformers` does not have, or has adapters, so that `load` could
            not make it.
        FileExistsError: the folder holds files of another model, which `transformers` would read.
        ValueError: a technique's settings are no plain JSON.
        OSError: the disk is full, or the like.
    """
    installed = installed_on(model)
    if installed is None:
        raise StateError("the model is not accelerated: accelerate it first, or use its own save_pretrained")
    for edit in installed.edits:
        edit.check(model)
        edit.check_weights()
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if getattr(transformers, type(model).__name__, None) is not type(model):
        remedy = "save it yourself and accelerate it anew"
        raise UnsupportedModelError("", kind, "transformers has no such class", remedy)
    if getattr(model, "_hf_peft_config_loaded", False):
        reason = "it has adapters, and transformers saves nothing but these"
        raise UnsupportedModelError("", kind, reason, "merge them into the weights before you accelerate it")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hasten-", dir=directory) as temporary:
        new = Path(temporary)
        model.save_pretrained(new)
        settings = _write_settings(_kept(installed), new)
        files = sorted(new.iterdir())
        saved = {
            "version": VERSION,
            "model": type(model).__name__,
            "checksum": sampled(model),
            "strict": installed.strict,
            "plan": installed.plan.to_dict(),
            "settings": settings,
            "files": {
                name: {"bytes": (new / name).stat().st_size, "digest": of} for name, of in of_files(files).items()
            },
        }
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / PLAN_FILE).write_bytes(_sealed(_json(saved, installed.plan)))
        _move(new, directory, set(saved["files"]))


def load(directory: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> nn.Module:
    """Loads a folder that `save` wrote: the same model with the same techniques and settings. Nothing is calibrated or
    measured for drift.

    Args:
        directory: the folder. It may have been moved or renamed, and may hold other files, such as a README or a
            tokenizer; those that were saved must be as they were.
        dtype: "auto" for the saved one, or torch.float32, float16 or bfloat16; settings hold for any.
        device: where the model goes.

    Returns:
        the accelerated model, of the class that was saved, in eval mode, without gradients.

    Raises:
        ValueError: a dtype or device that is none of these.
        FileNotFoundError: no such folder, or no plan in it.
        SavedPlanError: a file is missing, or is not as it was saved; a file that was not saved would be read too; the
            plan is of another version; or whatever else keeps `transformers` or a technique from taking the folder.
    """
    if dtype != "auto" and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f'dtype must be "auto", torch.float32, torch.float16 or torch.bfloat16, got {dtype!r}')
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch's, got {device!r}") from error
    directory = Path(directory)
    if not (directory / PLAN_FILE).is_file():
        raise FileNotFoundError(f"{directory} holds no {PLAN_FILE}: it was not written by hasten.save")
    with _as_saved_plan_error(directory):
        saved = _verified(directory)
        plan = Plan.from_dict(saved["plan"])
        model = _load_dense(directory, saved, dtype)
    model = model.to(device)
    with _as_saved_plan_error(directory):
        settings = _read_settings(directory, saved, device)
        example = settings.pop(EXAMPLE, None)
        example = None if example is None else _example(example, None if dtype == "auto" else dtype)
        inference = Inference(model, example)
        assignments = arrange(plan, examine(inference, example), saved["strict"])
        install(inference, plan, assignments, _settled(assignments, settings))
    installed = installed_on(model)
    installed.strict, installed.example = saved["strict"], example
    return model


@contextlib.contextmanager
def _as_saved_plan_error(directory: Path) -> Iterator[None]:
    """Turns any error into `SavedPlanError`."""
    try:
        yield
    except SavedPlanError:
        raise
    except Exception as error:
        raise SavedPlanError(f"{directory} cannot be loaded: {type(error).__name__}: {error}") from error


def _json(saved: dict, plan: Plan) -> bytes:
    """The content of the plan file, without its closing brace.

    Raises:
        ValueError: the plan and its settings would not be read back as they are.
    """
    try:
        text = json.dumps(saved, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the plan or its settings are no plain JSON: {error}") from error
    again = json.loads(text)
    if again["settings"] != saved["settings"] or Plan.from_dict(again["plan"]) != plan or len(text) > LARGEST_PLAN:
        raise ValueError(
            "the plan or its settings are no plain JSON that is read back as it was (tuples, keys that are no strings), "
            f"or more than {LARGEST_PLAN} characters, which should be tensors"
        )
    return text.removesuffix("\n}").encode()


def _sealed(text: bytes) -> bytes:
    """A JSON object without its closing brace, closed by a digest of that text."""
    return text + SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def _kept(installed: Installed) -> dict[str, Settings]:
    """What is saved beside the plan: the settings of techniques, by their class names, and the example.

    Floating-point inputs of the example, pictures and sound, are shuffled: how large they are is all that matters.
    """
    kept = {kind: own for kind, own in installed.settings.items() if Technique.known[kind].portable}
    if installed.example is not None:
        tensors = {name: value for name, value in installed.example.items() if isinstance(value, torch.Tensor)}
        values = {name: value for name, value in installed.example.items() if name not in tensors}
        generator = torch.Generator().manual_seed(0)
        for name, value in tensors.items():
            if value.is_floating_point():
                order = torch.randperm(value.numel(), generator=generator)
                tensors[name] = value.cpu().reshape(-1)[order].reshape(value.shape)
        kept[EXAMPLE] = Settings(values, tensors)
    return kept


def _example(kept: Settings, dtype: torch.dtype | None) -> dict[str, Any]:
    """The example as a model of this dtype takes it, None for the one that was saved."""
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.tensors.items()}
    return {**kept.values, **tensors}


def _write_settings(settings: dict[str, Settings], folder: Path) -> dict[str, dict]:
    """Writes the tensors of settings into TENSORS_FILE, and returns their values."""
    tensors = {
        f"{kind}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for kind, own in settings.items()
        for name, tensor in own.tensors.items()
    }
    if tensors:
        save_file(tensors, folder / TENSORS_FILE)
    return {kind: dict(own.values) for kind, own in settings.items()}


def _read_settings(directory: Path, saved: dict, device: torch.device) -> dict[str, Settings]:
    """The inverse of `_write_settings`."""
    tensors: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in saved["settings"]}
    if TENSORS_FILE in saved["files"]:
        for key, tensor in load_file(directory / TENSORS_FILE, str(device)).items():
            kind, _, name = key.partition("/")
            tensors[kind][name] = tensor
    return {kind: Settings(values, tensors[kind]) for kind, values in saved["settings"].items()}


def _settled(assignments: list[Assignment], saved: dict[str, Settings]) -> list[Settings]:
    """The settings of every assignment: as saved, validated by its technique, or settled anew where they hold on one
    machine only."""
    portable = {type(each.technique).__name__ for each in assignments if each.technique.portable}
    if portable != saved.keys():
        raise SavedPlanError(f"the plan asks for settings of {sorted(portable)}, saved are those of {sorted(saved)}")
    return [
        each.technique.read(saved[type(each.technique).__name__], each.anatomy)
        if each.technique.portable
        else each.technique.settle(each.anatomy, None)
        for each in assignments
    ]


def _move(new: Path, directory: Path, files: set[str]) -> None:
    """Moves everything in `new` into `directory`, the plan last: an interruption leaves a mixture that its plan refuses."""
    try:
        earlier = set(_record(directory)["files"])
    except (OSError, SavedPlanError):
        earlier = set()
    if strays := sorted(_strays(directory, earlier | files)):
        raise FileExistsError(
            f"{directory} holds {strays[0]}, which transformers would read with what is saved: save to another folder"
        )
    paths = [path for path in new.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name == PLAN_FILE):
        target = directory / path.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for name in earlier - files:
        (directory / name).unlink(missing_ok=True)


def _strays(directory: Path, files: Iterable[str]) -> set[str]:
    """What transformers would find in the folder beside `files`."""
    present = [path.name for path in directory.iterdir()]
    return {name for pattern in READ_BY_NAME for name in fnmatch.filter(present, pattern)} - set(files)


def _record(directory: Path) -> dict:
    """The content of the plan file.

    Raises:
        SavedPlanError: it was changed, or is of another version.
    """
    path = _inside(directory, PLAN_FILE)
    if (size := path.stat().st_size) > 2 * LARGEST_PLAN:
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


def _verified(directory: Path) -> dict:
    """The content of the plan file, once every file that it lists was found unchanged, and no other that would be read."""
    saved = _record(directory)
    paths = [_inside(directory, name) for name in saved["files"]]
    if strays := sorted(_strays(directory, saved["files"])):
        raise SavedPlanError(f"{directory} holds {strays[0]}, which was not saved with the model: take it out")
    for path in paths:
        if path.stat().st_size != (size := saved["files"][path.name]["bytes"]):
            raise SavedPlanError(f"{path} is damaged: it has {path.stat().st_size} bytes, {size} were saved")
    for name, digest in of_files(paths).items():
        if digest != saved["files"][name]["digest"]:
            raise SavedPlanError(f"{directory / name} is damaged or was edited: accelerate the model and save it again")
    for name in fnmatch.filter(saved["files"], "*.index.json"):
        shards = json.loads((directory / name).read_bytes())["weight_map"].values()
        if outside := set(shards) - saved["files"].keys():
            raise SavedPlanError(f"{directory / name} names {min(outside)}, which was not saved with the model")
    return saved


def _load_dense(directory: Path, saved: dict, dtype: str | torch.dtype) -> nn.Module:
    model_class = getattr(transformers, saved["model"], None)
    if model_class is None:
        raise SavedPlanError(f"{directory} holds a {saved['model']}, which this transformers does not have")
    model, loading = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    if loading["missing_keys"]:
        raise SavedPlanError(f"{directory} is damaged: it lacks {sorted(loading['missing_keys'])[0]}")
    if dtype == "auto" and sampled(model) != saved["checksum"]:
        raise SavedPlanError(f"transformers makes other weights of {directory} than were saved: save it again")
    return model.eval().requires_grad_(False)
