"""What the user names on the command line: a model, and texts to calibrate on or to measure with."""

import sys
from pathlib import Path

import torch
import transformers
from torch import nn

import hasten
from hasten.acceleration.saved_folder import PLAN_FILE
from hasten.acceleration.techniques import Technique
from hasten.cli import tables, techniques

EMBEDDED = "stdlib-llama"
CALIBRATION_CHARACTERS = 20_000


def load(name: str, plan: list[Technique], dtype: str) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """A model in eval mode without gradients, on the GPU if there is one, and its tokenizer.

    A folder that `hasten.save` wrote comes accelerated; then there can be no other `plan`.

    Raises:
        ValueError: a plan for a folder that holds one.
        OSError: no such model.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder {name}")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    folder = hasten.embedded_model() if name == EMBEDDED else Path(name).expanduser()
    source = folder if folder.is_dir() else name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if (folder / PLAN_FILE).is_file():
        if plan:
            raise ValueError(f"{name} holds a plan of hasten.save: leave out the options that choose techniques")
        return hasten.load(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device), tokenizer
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(device).eval().requires_grad_(False), tokenizer


def calibration_text(plan: list[Technique], file: Path | None) -> str | None:
    """The text of `file`, or text that comes with hasten; None where no technique of `plan` is calibrated.

    Raises:
        ValueError: a file for nothing; a file that is no UTF-8.
        OSError: it cannot be read.
    """
    if any(technique.calibrated for technique in plan):
        if file is not None:
            return read(file)
        tables.say("calibrating on Python sources that come with hasten; --calibration FILE takes text of your own use")
        return read(hasten.embedded_model() / "heldout.txt")[:CALIBRATION_CHARACTERS]
    if file is not None:
        needing = techniques.options("sparsity")
        raise ValueError(f"--calibration is for {needing}: give one of them, or leave it out")
    return None


def read(file: Path) -> str:
    """A file's text.

    Raises:
        ValueError: it is no UTF-8.
        OSError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8: {error}") from error
