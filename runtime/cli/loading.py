"""What the user names on the command line: a model, and texts to calibrate on or to measure with."""

import contextlib
import sys
from collections.abc import Iterator
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
        ValueError: a plan for a folder that holds one; a model that is no causal language model; files that
            transformers cannot load, or that lack weights.
        OSError: no such model.
        SavedPlanError: as `hasten.load`.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    source = _source(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(source, Path) and (source / PLAN_FILE).is_file():
        if plan:
            raise ValueError(f"{name} holds a plan of hasten.save: leave out the options that choose techniques")
        model = hasten.load(source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device)
        return model, _tokenizer(name, source)
    with _named(name):
        config = transformers.AutoConfig.from_pretrained(source)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        remedy = "load it in Python, and accelerate it by hasten.accelerate"
        raise ValueError(f"{name} is no causal language model, its type is {config.model_type}: {remedy}")
    tokenizer = _tokenizer(name, source)
    with _named(name), _without_load_report():
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    for key, saved, expected in sorted(loaded["mismatched_keys"]):
        raise ValueError(f"{name}: {key} is saved as {list(saved)}, its config.json asks for {list(expected)}")
    for key in sorted(loaded["missing_keys"]):
        raise ValueError(f"{name} lacks the weight {key}, which its config.json asks for")
    return model.to(device).eval().requires_grad_(False), tokenizer


def _tokenizer(name: str, source: Path | str) -> transformers.PreTrainedTokenizerBase:
    with _named(name):
        return transformers.AutoTokenizer.from_pretrained(source)


def _source(name: str) -> Path | str:
    """The folder that `name` is, or a Hugging Face id.

    Raises:
        ValueError: the embedded model of that name writes no text; there is no name.
        OSError: it looks like a folder, and there is no model in it.
    """
    if not name:
        raise ValueError("MODEL is empty: give a Hugging Face id, a folder, or stdlib-llama")
    if name == "digit-diffusion":
        raise ValueError("digit-diffusion draws digits and writes no text: see hasten demo guidance")
    if name == EMBEDDED:
        return hasten.embedded_model()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"there is no model in the folder {name}: it has no config.json")
        return folder
    if folder.exists() or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no folder {name}")
    return name


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Lets what keeps transformers from loading the model called `name` be an error that names it.

    Raises:
        ValueError: for whatever is no OSError.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{name} cannot be loaded: {error}") from error
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{name} cannot be loaded: {kind}{error}") from error


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps transformers from printing its table of weights that do not fit: the first is an error here."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def calibration_text(plan: list[Technique], file: Path | None) -> str | None:
    """The text of `file`, or text that comes with hasten; None where no technique of `plan` is calibrated.

    Raises:
        ValueError: a file for nothing; a file that is empty, or no UTF-8.
        OSError: it cannot be read.
    """
    if any(technique.calibrated for technique in plan):
        if file is not None:
            return sample(file)
        tables.say("calibrating on Python sources that come with hasten; --calibration FILE takes text of your own use")
        return read(hasten.embedded_model() / "heldout.txt")[:CALIBRATION_CHARACTERS]
    if file is not None:
        needing = techniques.options("sparsity")
        raise ValueError(f"--calibration is for {needing}: give one of them, or leave it out")
    return None


def sample(file: Path) -> str:
    """The text of a file that something is measured on.

    Raises:
        ValueError: it is empty, or no UTF-8.
        OSError: it cannot be read.
    """
    text = read(file)
    if not text.strip():
        raise ValueError(f"{file} is empty: give a few thousand tokens of typical text")
    return text


def read(file: Path) -> str:
    """A file's text.

    Raises:
        ValueError: it is no UTF-8.
        OSError: it cannot be read.
    """
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file}")
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder, a file is needed")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8: {error}") from error
