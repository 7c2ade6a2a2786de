"""Saving an accelerated model with its plan, and loading it without calibrating again."""

import json
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from hasten.acceleration.arrangement import arrange
from hasten.acceleration.checksums import full
from hasten.acceleration.inference import Inference
from hasten.acceleration.install import install, installed_on
from hasten.acceleration.plan import Plan
from hasten.acceleration.preflight import examine
from hasten.acceleration.techniques import Settings
from hasten.errors import SavedPlanError, StateError, UnsupportedModelError

PLAN_FILE = "hasten_plan.json"


def save(model: nn.Module, directory: str | Path, tokenizer=None) -> None:
    """Saves an accelerated model as an ordinary dense Hugging Face folder, with its plan and settings beside it in
    `hasten_plan.json`.

    `transformers` loads the folder as the dense model; `hasten.load` loads it accelerated.

    Args:
        model: an accelerated `transformers` model.
        directory: a folder, made if need be.
        tokenizer: saved along if given.

    Raises:
        StateError: the model is not accelerated (use its own `save_pretrained`), or was changed since.
        UnsupportedModelError: it is of a class that `transformers` does not have, so that `load` could not make it.
    """
    installed = installed_on(model)
    if installed is None:
        raise StateError("the model is not accelerated: accelerate it first, or use its own save_pretrained")
    for edit in installed.edits:
        edit.check(model)
    if getattr(transformers, type(model).__name__, None) is not type(model):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        remedy = "save it yourself and accelerate it anew"
        raise UnsupportedModelError("", kind, "transformers has no such class", remedy)
    directory = Path(directory)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    settings = {
        type(t).__name__: dict(installed.settings[type(t).__name__].values) for t in installed.plan if t.portable
    }
    saved = installed.plan.to_dict() | {"settings": settings, "checksum": full(model.state_dict().items())}
    (directory / PLAN_FILE).write_text(json.dumps(saved, indent=2), encoding="utf-8")


def load(directory: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> nn.Module:
    """Loads a folder that `save` wrote: the same model with the same techniques and settings. Nothing is calibrated or
    measured for drift.

    Args:
        directory: the folder.
        dtype: "auto" for the saved one, or torch.float32, float16 or bfloat16; settings hold for any.
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
    data = json.loads(path.read_text(encoding="utf-8"))
    plan = Plan.from_dict(data)
    model = _load_dense(directory)
    if full(model.state_dict().items()) != data["checksum"]:
        raise SavedPlanError(f"the plan in {directory} belongs to another model")
    model = model.to(device) if dtype == "auto" else model.to(device, dtype)
    try:
        inference = Inference(model)
        assignments = arrange(plan, examine(inference))
        settings = []
        for each in assignments:
            saved = data["settings"].get(type(each.technique).__name__)
            own = (
                each.technique.settle(each.anatomy, None)
                if saved is None
                else each.technique.read(Settings(saved), each.anatomy)
            )
            settings.append(own)
        install(inference, plan, assignments, settings)
    except (UnsupportedModelError, ValueError) as error:
        raise SavedPlanError(f"{directory} holds a model that its plan does not fit: {error}") from error
    return model


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
