"""Every causal-LM and image-text type of the installed transformers, under every technique that any model should take.

Each type is built tiny (`tiny_zoo`), accelerated, run, and reverted, through the public API. What comes of it:

- works: after `revert` every parameter's values, dtype, strides and flags and the module tree are what they were; the
  logits of exact techniques are within `TOLERANCE` of the untouched model's over a prefill, 20 decode steps, left
  padding and a batch of 3; Wina's agree after a prefill and differ in decode. Those of vision-token pruning, which is
  tried on image-text types alone, differ and are finite on a prompt with an image, and agree without one, and where all
  image tokens are kept.
- refused: an `UnsupportedModelError` that left the model as it was; the detail is its reason.
- error: anything else that was raised.
- silent: nothing was changed, or the outcome is wrong, without a word.
"""

import contextlib
import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hasten
from hasten.acceleration.image_tokens import deep_stack
from hasten.acceleration.inference import Inference, Inputs
from hasten.acceleration.techniques.base import Technique
from hasten.acceleration.undisturbed import undisturbed
from hasten.bench.runtime import tiny_inputs, tiny_zoo
from hasten.errors import UnsupportedModelError

PREFIX, STEPS = 16, 20
PADDING = (7, 3, 0)
CALIBRATION_ROWS, CALIBRATION_TOKENS = 6, 48
TOLERANCE = 1e-5
TECHNIQUES: dict[str, Callable[[nn.Module], Technique]] = {
    "DenseDecode": lambda model: hasten.DenseDecode(always=True),
    "Wina": lambda model: hasten.Wina(0.5),
    "FastLinearAttention": lambda model: hasten.FastLinearAttention(),
    "VisionTokens": lambda model: pruning(model, 0.5),
}
KINDS = {"VisionTokens": ("image-text",)}  # of types on which a technique is tried; all where it is not here
IMAGE_TOKENS, WITH_IMAGE = 16, 24  # of an image, and of what is read with it at once
EXACT = ("DenseDecode", "FastLinearAttention")
OUTCOMES = ("works", "refused", "error", "silent")
SECONDS = 120.0
# Fields that a configuration of one decoder has from the encoder-decoder around it.
OF_ENCODER_DECODERS = {"decoder_layers", "num_decoder_layers", "cross_attention_hidden_size"}


@dataclass(slots=True)
class Outcome:
    """What a technique did to a type: one of OUTCOMES, with the reason or the error in words.

    `distance` is that of the logits from the untouched model's, relative to the largest; of `called` modules with a
    weight that a decode step calls, `changed` were; `seconds` is the time of `accelerate`.
    """

    outcome: str
    detail: str = ""
    distance: float | None = None
    changed: int = 0
    called: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Record:
    """One type: how its model is made up, and what each technique did; `unbuilt` says why there is no model."""

    kind: str
    model_type: str
    made_up: str = ""
    unbuilt: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)


class Wrong(Exception):
    """What a technique did is wrong, in words."""


def pruning(model: nn.Module, share: float) -> hasten.VisionTokens:
    """Vision-token pruning from the first layer on that a model takes."""
    return hasten.VisionTokens({max(1, deep_stack(model.config)): share})


def sweep(
    chosen: Iterable[tuple[str, str]],
    workers: int = 2,
    frozen: bool = False,
    techniques: Iterable[str] = tuple(TECHNIQUES),
) -> Iterator[dict[str, Any]]:
    """The records of types, (kind, model type) each, in their order; every worker is a process of its own.

    A type that ends its process, or takes longer than SECONDS, is recorded as an error.

    Args:
        frozen: call `requires_grad_(False)` on the models first; otherwise they are as `from_pretrained` gives them.
        techniques: which of TECHNIQUES are tried.
    """
    techniques = tuple(techniques)
    own = threading.local()
    started: list[_Worker] = []

    def run(item: tuple[str, str]) -> dict[str, Any]:
        if not hasattr(own, "worker"):
            own.worker = _Worker(frozen, techniques)
            started.append(own.worker)
        return own.worker.ask(*item)

    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(run, chosen)
        finally:
            pool.shutdown(cancel_futures=True)
            for worker in started:
                worker.stop()


class _Worker:
    """A process that tries one type after the other, and is started again when it dies."""

    def __init__(self, frozen: bool, techniques: tuple[str, ...]):
        self.frozen, self.techniques, self.process = frozen, techniques, None

    def ask(self, kind: str, model_type: str) -> dict[str, Any]:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.frozen, self.techniques), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.connection.send((kind, model_type))
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            detail = f"no answer within {SECONDS:.0f} seconds"
        except (EOFError, OSError):
            self.process.join(10)
            detail = f"the process ended with exit status {self.process.exitcode}"
        self.stop()
        return asdict(Record(kind, model_type, outcomes={name: Outcome("error", detail) for name in self.techniques}))

    def stop(self) -> None:
        """Ends the process: by itself when it waits for the next type, and by force otherwise."""
        if self.process is not None:
            self.connection.close()
            self.process.join(10)
            self.process.kill()
            self.process = None


def _serve(connection: Connection, frozen: bool, techniques: tuple[str, ...]) -> None:
    """The loop of a worker's process."""
    import transformers

    transformers.logging.set_verbosity_error()
    os.environ["HASTEN_DISABLE_PROGRESS"] = "1"
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(asdict(attempt(*connection.recv(), frozen, techniques)))


def attempt(kind: str, model_type: str, frozen: bool = False, techniques: Iterable[str] = tuple(TECHNIQUES)) -> Record:
    """Builds a type, and tries techniques on it, each on a model of its own."""
    record = Record(kind, model_type)
    if model_type in tiny_zoo.IMPOSSIBLE:
        record.unbuilt = tiny_zoo.IMPOSSIBLE[model_type]
        return record
    untouched = Untouched(kind, model_type)
    record.made_up = made_up(kind, untouched.model)
    for name in techniques:
        if kind not in KINDS.get(name, (kind,)):
            continue
        model = tiny_zoo.build(kind, model_type).requires_grad_(not frozen)
        record.outcomes[name] = try_technique(name, model, untouched)
    return record


class Untouched:
    """A model that no technique touches, its prompts, and what it makes of them."""

    def __init__(self, kind: str, model_type: str):
        self.model, self.type = tiny_zoo.build(kind, model_type), (kind, model_type)

    @cached_property
    def prompts(self) -> list[Inputs]:
        """A text of one row, and a batch with left padding, as far as the model takes it."""
        if self.type in tiny_inputs.NEEDED:
            return [tiny_inputs.INPUTS[self.type](self.model, rows, seed=9) for rows in (1, len(PADDING))]
        tokens = PREFIX + STEPS
        one, batch = tiny_inputs.text(1, tokens, seed=9), tiny_inputs.text(len(PADDING), tokens, seed=10)
        mask = torch.ones_like(batch)
        for row, padding in enumerate(PADDING):
            mask[row, :padding] = 0
        padded = {"input_ids": batch, "attention_mask": mask}
        try:
            Inference(self.model, padded).decode(padded, PREFIX)
        except UnsupportedModelError:
            return [one, batch]
        return [one, padded]

    @cached_property
    def logits(self) -> list[torch.Tensor]:
        """What follows each prompt, in decode."""
        return [Inference(self.model, prompt).decode(prompt, PREFIX) for prompt in self.prompts]

    @cached_property
    def called(self) -> set[str]:
        """The names of the linear modules that a decode step calls."""
        called: set[str] = set()
        run = Inference(self.model, self.prompts[0])
        with contextlib.ExitStack() as hooks, undisturbed(self.model):
            _, reading = run.prefill(run.example)
            for name, module in self.model.named_modules():
                if isinstance(module, nn.Linear | Conv1D):
                    hooks.callback(module.register_forward_hook(lambda *_, name=name: called.add(name)).remove)
            run.step(reading, reading.ids[:, -1:])
        return called

    @cached_property
    def with_images(self) -> list[Inputs]:
        """Prompts with tokens that stand for an image, in one row and, with pictures where `tiny_inputs` has them or
        else with left padding, in two."""
        if self.type in tiny_inputs.INPUTS:
            return [tiny_inputs.INPUTS[self.type](self.model, rows, seed=9) for rows in (1, 2)]
        ids = Inference(self.model).prompt(PREFIX + STEPS, batch=2, image=IMAGE_TOKENS)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        padded = {"input_ids": ids, "attention_mask": mask}
        try:
            Inference(self.model, padded).decode(padded, WITH_IMAGE)
        except UnsupportedModelError:
            return [ids[:1], ids]
        return [ids[:1], padded]

    def calibration(self, pictures: bool = False) -> Any:
        """Token ids, or dictionaries as the processor of the type returns them where it cannot be run without, or
        wherever it can be with `pictures`."""
        if self.type in tiny_inputs.NEEDED or (pictures and self.type in tiny_inputs.INPUTS):
            return [tiny_inputs.INPUTS[self.type](self.model, seed=seed) for seed in range(CALIBRATION_ROWS)]
        return tiny_inputs.text(CALIBRATION_ROWS, CALIBRATION_TOKENS)


def try_technique(name: str, model: nn.Module, untouched: Untouched) -> Outcome:
    """Accelerates, runs and reverts a model, and compares it with what it was before and with the untouched one."""
    before = Photograph(model)
    try:
        start = time.perf_counter()
        try:
            hasten.accelerate(
                model,
                TECHNIQUES[name](model),
                calibration=untouched.calibration(pictures=name == "VisionTokens"),
                measure_speed=False,
                measure_drift=False,
            )
        except UnsupportedModelError as refusal:
            before.compare(model)
            return Outcome("refused", f"{refusal.kind}: {refusal.reason}")
        seconds = time.perf_counter() - start
        changed = before.changed(model)
        if not changed:
            raise Wrong("nothing was changed")
        distance = compare_pruned(model, untouched) if name == "VisionTokens" else compare(name, model, untouched)
        hasten.revert(model)
        before.compare(model)
        return Outcome("works", "", distance, len(changed & untouched.called), len(untouched.called), seconds)
    except Wrong as wrong:
        return Outcome("silent", str(wrong))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Outcome("error", f"{type(error).__name__}: {lines[0]}")


def compare(name: str, model: nn.Module, untouched: Untouched) -> float:
    """The largest distance of an accelerated model's logits from the untouched one's, relative to the largest logit.

    Raises:
        Wrong: an exact technique's are further than TOLERANCE, or Wina's differ after a prefill or never.
    """
    largest, differs = 0.0, False
    for prompt, expected in zip(untouched.prompts, untouched.logits, strict=True):
        found = Inference(model, prompt).decode(prompt, PREFIX)
        finite = expected.abs() < torch.finfo(torch.float32).max / 2  # the others are suppressed by the model
        distances = ((found - expected) * finite).abs().amax((0, 2)) / expected[finite].abs().max()
        largest = max(largest, float(distances.max()))
        if name in EXACT and not largest <= TOLERANCE:
            raise Wrong(f"logits are {largest:.2g} from the untouched model's")
        if name not in EXACT and not float(distances[0]) <= TOLERANCE:
            raise Wrong(f"logits after a prefill are {float(distances[0]):.2g} from the untouched model's")
        differs |= bool((distances[1:] > TOLERANCE).any())
    if name not in EXACT and not differs:
        # A model without a cache reads its whole text in every step; a text of one token is a decode step for any.
        run = Inference(model, untouched.prompts[0])
        token = run.cut(untouched.prompts[0], 1)
        differs = not torch.equal(run.forward(token), Inference(untouched.model, token).forward(token))
        if not differs:
            raise Wrong("logits in decode are the untouched model's")
    return largest


def compare_pruned(model: nn.Module, untouched: Untouched) -> float:
    """The largest distance of the logits of a model that drops image tokens from the untouched one's, relative to the
    largest logit.

    Raises:
        Wrong: they are the same on a prompt with an image, or not finite; or they are not the same without an image, or
            where all image tokens are kept.
    """
    largest, kept = 0.0, tiny_zoo.build(*untouched.type)
    hasten.accelerate(kept, pruning(kept, 1.0), measure_speed=False, measure_drift=False)
    for prompt in untouched.with_images:
        expected, found, whole = (
            Inference(each, prompt).decode(prompt, WITH_IMAGE) for each in (untouched.model, model, kept)
        )
        distance = relative(found, expected)
        if not TOLERANCE < distance < float("inf"):
            raise Wrong(f"logits after an image are {distance:.2g} from the untouched model's")
        if not relative(whole, expected) <= TOLERANCE:
            raise Wrong("logits are not the untouched model's where all image tokens are kept")
        largest = max(largest, distance)
    for prompt, expected in zip(untouched.prompts, untouched.logits, strict=True):
        text = untouched.type not in tiny_inputs.NEEDED
        if text and not relative(Inference(model, prompt).decode(prompt, PREFIX), expected) <= TOLERANCE:
            raise Wrong("logits are not the untouched model's without an image")
    return largest


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance of logits from others, relative to the largest of these that the model does not suppress."""
    finite = expected.abs() < torch.finfo(torch.float32).max / 2
    return float(((found - expected) * finite).abs().max() / expected[finite].abs().max())


class Photograph:
    """What a model consists of: its modules, and each parameter and buffer with its values, layout and flags."""

    def __init__(self, model: nn.Module):
        self.modules = {name: (module, type(module), _own(module)) for name, module in model.named_modules()}
        self.tensors = {name: (tensor.detach().clone(), _layout(tensor)) for name, tensor in _tensors(model)}

    def changed(self, model: nn.Module) -> set[str]:
        """The names of modules that were replaced, or whose class, forward or weights' layout is another."""
        now = Photograph(model)
        changed = {name for name in self.modules if now.modules.get(name) != self.modules[name]}
        changed |= {
            name.rpartition(".")[0]
            for name, (_, layout) in self.tensors.items()
            if name not in now.tensors or now.tensors[name][1][:2] != layout[:2]
        }
        return changed | (now.modules.keys() - self.modules.keys())

    def compare(self, model: nn.Module) -> None:
        """Raises Wrong, with a name, unless the model is bit for bit what was photographed."""
        now = Photograph(model)
        if names := sorted(
            {*self.modules, *now.modules} - {n for n in self.modules if now.modules.get(n) == self.modules[n]}
        ):
            raise Wrong(f"after revert, {names[0] or 'the model'} is another module, and {len(names) - 1} more")
        if self.tensors.keys() != now.tensors.keys():
            raise Wrong(
                f"after revert, there are other tensors: {sorted(self.tensors.keys() ^ now.tensors.keys())[:3]}"
            )
        for name, (values, layout) in self.tensors.items():
            found, its_layout = now.tensors[name]
            if its_layout != layout:
                raise Wrong(f"after revert, {name} is {its_layout} and was {layout}")
            if not torch.equal(_bits(values), _bits(found)):
                raise Wrong(f"after revert, {name} has other values")


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _own(module: nn.Module) -> tuple[object, ...]:
    """What a module has that its class does not give it, and that changes how it runs."""
    return vars(module).get("forward"), module.training


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.stride(), tuple(tensor.shape), tensor.requires_grad


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def made_up(kind: str, model: nn.Module) -> str:
    """How a model is made up, for the summary."""
    config = model.config.get_text_config(decoder=True)
    layers = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    classes = {type(module).__name__.lower() for module in model.modules()}
    if layers & {"linear_attention", "conv", "hybrid", "hybrid_sliding"} or any(
        part in name for name in classes for part in ("mamba", "rwkv", "xlstm", "rglru")
    ):
        return "hybrid or recurrent"
    if any("expert" in name or "moe" in name for name in classes):
        return "mixture of experts"
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    if kind == "causal" and vars(model.config).keys() & OF_ENCODER_DECODERS:
        return "decoder of an encoder-decoder"
    return "encoder as decoder" if getattr(model.config, "is_decoder", False) else "dense"


def summary(records: Iterable[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of counts: for each kind, make-up and technique, how many types came to which outcome."""
    counts: Counter[tuple[str, ...]] = Counter()
    for record in records:
        for name, outcome in record["outcomes"].items():
            for made_of in (record["made_up"], "all"):
                counts[record["kind"], made_of, name, outcome["outcome"]] += 1
    order = list(TECHNIQUES)
    groups = sorted({key[:3] for key in counts}, key=lambda k: (k[0], k[1] == "all", k[1], order.index(k[2])))
    rows = []
    for group in groups:
        numbers = [counts[(*group, outcome)] for outcome in OUTCOMES]
        rows.append((*group, str(sum(numbers)), *map(str, numbers)))
    return ("kind", "made up as", "technique", "types", *OUTCOMES), rows


def types_by_outcome(records: Iterable[dict[str, Any]], technique: str) -> list[str]:
    """Lines that name the types of each outcome of a technique: those that work in one, the others by their reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record["unbuilt"]:
            found.setdefault(("not built", record["unbuilt"]), []).append(record["model_type"])
        elif outcome := record["outcomes"].get(technique):
            # The class before the colon and what stands in quotes are names out of the model.
            reason = outcome["detail"].partition(": ")[2] or outcome["detail"]
            reason = re.sub(r"'[^']*'", "'...'", reason)
            found.setdefault((outcome["outcome"], reason), []).append(record["model_type"])
    order = (*OUTCOMES, "not built")
    lines = []
    for (outcome, reason), names in sorted(found.items(), key=lambda item: (order.index(item[0][0]), -len(item[1]))):
        lines.append(f"{outcome}{f' ({reason})' if reason else ''}: {', '.join(sorted(set(names)))}")
    return lines


def versions() -> dict[str, str]:
    import transformers

    return {"hasten": hasten.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
