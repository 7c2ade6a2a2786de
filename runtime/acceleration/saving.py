"""Saving an accelerated model with its plan, and loading it without calibrating again.

A saved folder is an ordinary one of `transformers` with `hasten_plan.json` beside the model, and
`hasten_settings.safetensors` where settings hold tensors.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hasten.acceleration.arrangement import Assignment, arrange
from hasten.acceleration.checksums import sampled
from hasten.acceleration.inference import Inference
from hasten.acceleration.install import Installed, install, installed_on
from hasten.acceleration.plan import Plan
from hasten.acceleration.preflight import examine
from hasten.acceleration.saved_folder import PLAN_FILE, listed, move, verified, write_plan
from hasten.acceleration.techniques import Settings, Technique
from hasten.errors import SavedPlanError, StateError, UnsupportedModelError

TENSORS_FILE = "hasten_settings.safetensors"
EXAMPLE = "example"  # stands among the settings where the model was examined on what a processor returned


def save(model: nn.Module, directory: str | Path, tokenizer=None) -> None:
    """Saves an accelerated model as an ordinary dense Hugging Face folder, with its plan and settings beside it in
    `hasten_plan.json`.

    `transformers` loads the folder as the dense model; `hasten.load` loads it accelerated. What stood in the folder is
    kept until all is written; then files of the same name, and those of an earlier `save`, are replaced. Of a model
    that was calibrated with pictures or sound the first of these inputs is kept, with its values shuffled.

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
        kept = _kept(installed)
        _write_tensors(kept, new)
        saved = {
            "model": type(model).__name__,
            "dtypes": _dtypes(model),
            "checksum": sampled(model),
            "strict": installed.strict,
            "plan": installed.plan.to_dict(),
            "settings": {kind: dict(settings.values) for kind, settings in kept.items()},
            "files": listed(sorted(new.iterdir())),
        }
        _refuse_unreadable(saved, installed.plan)
        write_plan(new, saved)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        move(new, directory, set(saved["files"]))


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
        saved = verified(directory)
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


def _write_tensors(kept: dict[str, Settings], folder: Path) -> None:
    tensors = {
        f"{kind}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for kind, settings in kept.items()
        for name, tensor in settings.tensors.items()
    }
    if tensors:
        save_file(tensors, folder / TENSORS_FILE)


def _refuse_unreadable(saved: dict, plan: Plan) -> None:
    """Refuses a plan or settings that would not be read back as they are.

    Raises:
        ValueError: such as tuples, keys that are no strings, or what JSON does not have.
    """
    try:
        again = json.loads(json.dumps(saved, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the plan or its settings are no plain JSON: {error}") from error
    if again["settings"] != saved["settings"] or Plan.from_dict(again["plan"]) != plan:
        raise ValueError("the plan or its settings are no plain JSON: they would not be read back as they are")


def _read_settings(directory: Path, saved: dict, device: torch.device) -> dict[str, Settings]:
    """Settings by the class names of techniques, and the example, as they were saved."""
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


def _dtypes(model: nn.Module) -> dict[str, str]:
    """The dtypes of floating-point parameters and buffers by their names; under "" the model's,
    which is not repeated."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = {
        name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point() and tensor.dtype != model.dtype
    }
    return {name: str(dtype).removeprefix("torch.") for name, dtype in ({"": model.dtype} | found).items()}


def _load_dense(directory: Path, saved: dict, dtype: str | torch.dtype) -> nn.Module:
    """The dense model: bit for bit as it was saved, or as transformers loads it in another dtype."""
    model_class = getattr(transformers, saved["model"], None)
    if model_class is None:
        raise SavedPlanError(f"{directory} holds a {saved['model']}, which this transformers does not have")
    model, loading = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    if loading["missing_keys"]:
        raise SavedPlanError(f"{directory} is damaged: it lacks {sorted(loading['missing_keys'])[0]}")
    if dtype == "auto":
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(getattr(torch, saved["dtypes"].get(name, saved["dtypes"][""])))
        if sampled(model) != saved["checksum"]:
            reason = "this transformers makes other weights of it than were saved"
            raise SavedPlanError(f"{directory} cannot be loaded: {reason}; use the version that saved it")
    return model.eval().requires_grad_(False)
