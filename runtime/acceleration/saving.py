"""Saving an accelerated model with its plan, and loading it without calibrating again."""

import dataclasses
import json
import math
import zlib
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.bind import Setting, refuse_overlap, spread, targets
from hasten.acceleration.calibration import score_name
from hasten.acceleration.install import install, plan_anatomy, state_of
from hasten.acceleration.modules import CatsMLP, SparseLinear
from hasten.acceleration.plan import Plan
from hasten.errors import SavedPlanError, StateError, UnsupportedModelError

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
        UnsupportedModelError: it is of a class that `transformers` does not have, so that `load` could not make it.
    """
    state = state_of(model)
    if state is None:
        raise StateError("the model is not accelerated: accelerate it first, or use its own save_pretrained")
    for edit in state.edits:
        edit.check(model)
    for module in model.modules():
        if isinstance(module, SparseLinear | CatsMLP):
            module.refuse_changed_weights(thorough=True)
    if getattr(transformers, type(model).__name__, None) is not type(model):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise UnsupportedModelError(
            "", kind, "transformers has no such class", "save it yourself and accelerate it anew"
        )
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
        dtype: "auto" for the saved one, or torch.float32, float16 or bfloat16; thresholds hold for any.
        device: where the model goes.

    Returns:
        the accelerated model, of the class that was saved, in eval mode, without gradients.

    Raises:
        ValueError: a dtype that is none of these.
        FileNotFoundError: no such folder, or no plan in it.
        SavedPlanError: the folder is damaged, its plan is of a newer version, or was made for other weights.
    """
    if dtype != "auto" and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f'dtype must be "auto", torch.float32, torch.float16 or torch.bfloat16, got {dtype!r}')
    directory = Path(directory)
    path = directory / PLAN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {PLAN_FILE}: it was not written by hasten.save")
    plan, settings, expected = _read_plan(path)
    model = _load_dense(directory)
    _matches(model, settings, expected, directory)
    model = model.to(device) if dtype == "auto" else model.to(device, dtype)
    try:
        anatomy = plan_anatomy(model, plan)
        _fit(plan, settings, anatomy, path)
        install(model, anatomy, plan, settings)
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
    if not 0 < setting.sparsity < 1 or not 0 <= setting.threshold < math.inf:
        raise ValueError(f"sparsity {setting.sparsity} and threshold {setting.threshold} of {setting.name}")
    return setting


def _fit(plan: Plan, settings: list[Setting], anatomy: Anatomy, path: Path) -> None:
    """Refuses settings that are not just those that the plan asks for on this anatomy."""
    try:
        refuse_overlap(plan, anatomy)
        expected = set()
        for technique in plan:
            if names := targets(technique, anatomy):
                sparsities = spread(technique.sparsity, names)
                expected |= {(score_name(technique), name) for name, sparsity in sparsities.items() if sparsity > 0}
    except ValueError as error:
        raise SavedPlanError(f"{path} does not fit the model beside it: {error}") from error
    found = [(setting.technique, setting.name) for setting in settings]
    greedy = any(getattr(technique, "allocation", None) == "greedy" for technique in plan)  # may leave modules dense
    if (
        len(set(found)) < len(found)
        or not set(found) <= expected
        or (set(found) != expected and not (greedy and found))
    ):
        raise SavedPlanError(f"{path} is damaged: its settings are not those that its plan asks for")


def _load_dense(directory: Path) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        model_class = getattr(transformers, config.architectures[0])
        model, loading = model_class.from_pretrained(directory, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise SavedPlanError(f"{directory} is damaged: transformers cannot load the model ({error})") from error
    if loading["missing_keys"]:
        raise SavedPlanError(f"{directory} is damaged: it lacks {sorted(loading['missing_keys'])[0]}")
    return model.eval().requires_grad_(False)


def _matches(model: nn.Module, settings: list[Setting], expected: dict[str, int], directory: Path) -> None:
    names = dict(model.named_modules())
    for setting in settings:
        if setting.name not in names or setting.name not in expected:
            raise SavedPlanError(f"the plan in {directory} belongs to another model: this one has no {setting.name}")
        if _checksum(names[setting.name]) != expected[setting.name]:
            raise SavedPlanError(
                f"the plan in {directory} belongs to another model: the weights of {setting.name} are not those it was made for"
            )
