"""Saving an accelerated model with its plan, and loading it without calibrating again."""

import dataclasses
import json
import zlib
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from hasten.acceleration import install, state_of
from hasten.anatomy import dissect
from hasten.bind import Setting
from hasten.errors import SavedPlanError, StateError, UnsupportedModelError
from hasten.plan import Plan

PLAN_FILE = "hasten_plan.json"


def save(model: nn.Module, directory: str | Path, tokenizer=None) -> None:
    """Saves an accelerated model as an ordinary dense Hugging Face folder, with its plan and thresholds beside it in `hasten_plan.json`.

    `transformers` loads the folder as the dense model; `hasten.load` loads it accelerated.

    Args:
        model: an accelerated `transformers` model.
        directory: a folder, made if need be.
        tokenizer: saved along if given.

    Raises:
        StateError: the model is not accelerated (use its own `save_pretrained`), or was changed since.
    """
    state = state_of(model)
    if state is None:
        raise StateError("the model is not accelerated: accelerate it first, or use its own save_pretrained")
    for edit in state.edits:
        edit.check(model)
    directory = Path(directory)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    saved = state.plan.to_dict() | {
        "settings": [dataclasses.asdict(setting) for setting in state.settings],
        "fingerprint": fingerprint(model, state.settings),
    }
    (directory / PLAN_FILE).write_text(json.dumps(saved, indent=2), encoding="utf-8")


def load(directory: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> nn.Module:
    """Loads a folder that `save` wrote: the same model with the same techniques and thresholds. Nothing is calibrated or measured for drift.

    Args:
        directory: the folder.
        dtype: as `from_pretrained`'s; thresholds hold for any dtype.
        device: where the model goes.

    Returns:
        the accelerated model, of the class that was saved, in eval mode, without gradients.

    Raises:
        FileNotFoundError: no such folder, or no plan in it.
        SavedPlanError: the folder is damaged, its plan is of a newer version, or was made for other weights.
    """
    directory = Path(directory)
    path = directory / PLAN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {PLAN_FILE}: it was not written by hasten.save")
    plan, settings, expected = _read_plan(path)
    model = _load_dense(directory, dtype).to(device)
    _matches(model, settings, expected, directory, exact=dtype == "auto")
    try:
        install(model, dissect(model), plan, settings)
    except UnsupportedModelError as error:
        raise SavedPlanError(f"{directory} holds a model that its plan does not fit: {error}") from error
    return model


def fingerprint(model: nn.Module, settings: list[Setting]) -> dict[str, int]:
    """A checksum per module of `settings` over the shapes and values of its weights in row order."""
    return {setting.name: _checksum(model.get_submodule(setting.name)) for setting in settings}


def _checksum(module: nn.Module) -> int:
    checksum = 0
    for weight in module.parameters():
        rows = weight.detach().contiguous().cpu()
        checksum = zlib.crc32(rows.view(torch.uint8).numpy(), zlib.crc32(str(tuple(rows.shape)).encode(), checksum))
    return checksum


def _read_plan(path: Path) -> tuple[Plan, list[Setting], dict[str, int]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SavedPlanError(f"{path} is damaged: it is not JSON ({error})") from error
    plan = Plan.from_dict(data)
    try:
        return plan, [_setting(entry) for entry in data["settings"]], dict(data["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise SavedPlanError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _setting(entry: dict) -> Setting:
    setting = Setting(**entry)
    if not 0 < setting.sparsity < 1 or not setting.threshold >= 0:
        raise ValueError(f"sparsity {setting.sparsity} and threshold {setting.threshold} of {setting.name}")
    return setting


def _load_dense(directory: Path, dtype) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        model_class = getattr(transformers, config.architectures[0])
        model, loading = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise SavedPlanError(f"{directory} is damaged: transformers cannot load the model ({error})") from error
    if loading["missing_keys"]:
        raise SavedPlanError(f"{directory} is damaged: it lacks {sorted(loading['missing_keys'])[0]}")
    return model.eval().requires_grad_(False)


def _matches(model: nn.Module, settings: list[Setting], expected: dict[str, int], directory: Path, exact: bool) -> None:
    names = dict(model.named_modules())
    for setting in settings:
        if setting.name not in names or setting.name not in expected:
            raise SavedPlanError(f"the plan in {directory} belongs to another model: this one has no {setting.name}")
        if exact and _checksum(names[setting.name]) != expected[setting.name]:
            raise SavedPlanError(
                f"the plan in {directory} belongs to another model: the weights of {setting.name} are not those it was made for"
            )
