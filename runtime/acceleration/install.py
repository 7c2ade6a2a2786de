"""`accelerate`, `revert` and `accelerated`: one reversible change of a model in place."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hasten.acceleration import measure
from hasten.acceleration.arrangement import Assignment, arrange
from hasten.acceleration.calibration import gather
from hasten.acceleration.checksums import sampled
from hasten.acceleration.edits import Edit, Freeze, apply_all, undo_all
from hasten.acceleration.inference import Inference, Inputs
from hasten.acceleration.plan import Plan
from hasten.acceleration.preflight import check_flags, examine, refuse_unready
from hasten.acceleration.report import Report, TechniqueReport
from hasten.acceleration.self_check import self_check
from hasten.acceleration.statistics import Statistics
from hasten.acceleration.techniques import Settings, Technique
from hasten.acceleration.techniques.base import Skip
from hasten.acceleration.windows import Texts, split_heldout, windows
from hasten.errors import StateError
from hasten.model_facts import longest_input, vocabulary


@dataclass(slots=True)
class Installed:
    """What hasten keeps on an accelerated model, as `model._hasten`."""

    plan: Plan
    settings: dict[str, Settings] = field(default_factory=dict)  # by the class names of techniques
    edits: list[Edit] = field(default_factory=list)
    strict: bool = True  # whether nothing was left out
    example: Mapping[str, Any] | None = None  # what a processor returned, if the model was examined on that
    self_check: float | None = None


def installed_on(model: nn.Module) -> Installed | None:
    """What hasten keeps on `model`, None if it is not accelerated."""
    return vars(model).get("_hasten")


def accelerate(
    model: nn.Module,
    plan: Plan | Technique | Iterable[Technique],
    *,
    calibration: Texts | Statistics | None = None,
    tokenizer=None,
    heldout: Texts | None = None,
    strict: bool = True,
    measure_speed: bool = True,
    measure_drift: bool = True,
) -> Report:
    """Makes a model faster, in place; same class, same `generate`, and `revert` undoes it bit for bit.

    Everything is checked before anything is changed, and any error or interrupt restores the model. Techniques that are
    not exact change what the model computes; how much is measured on held-out text and stands in the report. Parameters
    that require grad are frozen until `revert`.

    Args:
        model: a `transformers` language model, or a multimodal or encoder-decoder model around one, in eval mode, on
            one device.
        plan: one technique or several, e.g. `hasten.Wina(sparsity=0.5)`.
        calibration: texts, token ids ([T], [B, T] or lists), or what a processor returns, from which calibrated
            techniques learn: a few thousand tokens of typical use; or `hasten.Statistics` from `hasten.calibrate`. A
            tenth is set aside as held-out text unless `heldout` is given.
        tokenizer: the model's tokenizer, needed where texts are given.
        heldout: texts or token ids on which drift is measured.
        strict: raise on modules that cannot be changed; False leaves them as they are and lists them in the report.
        measure_speed: time the model before and after, in the regimes that the techniques name.
        measure_drift: compare predictions before and after on held-out text.

    Returns:
        a `Report`; print it.

    Raises:
        ValueError, TypeError: wrong arguments; the message names the value.
        UnsupportedModelError: the model, or with `strict` a module of it, cannot be changed correctly.
        StateError: the model is accelerated already, or in training mode.
    """
    plan = Plan(plan)
    check_flags({"strict": strict, "measure_speed": measure_speed, "measure_drift": measure_drift})
    refuse_unready(model)
    statistics, pieces, heldout_pieces = _data(model, plan, calibration, tokenizer, heldout)
    example = next(iter([*pieces, *heldout_pieces]), None)
    inference = Inference(model, example)
    anatomy = examine(inference, example)
    assignments = arrange(plan, anatomy, strict)
    asked = [regime for each in assignments for regime in each.technique.regimes(each.anatomy)]
    regimes = dict.fromkeys(measure.possible(inference, regime) for regime in asked) if measure_speed else {}
    before = measure.times(inference, regimes) if measure_speed else {}
    dense_logits = measure.heldout_logits(inference, heldout_pieces) if measure_drift else []
    with_images = any(inference.image_length_of(piece) for piece in heldout_pieces)
    no_drift = _why_no_drift(measure_drift, heldout_pieces, dense_logits)
    if statistics is None:
        statistics = gather(inference, assignments, pieces)
    settings = [each.technique.settle(each.anatomy, statistics) for each in assignments]

    report = Report(plan, [], measure.memory(model), 0, None, statistics.tokens)
    with contextlib.closing(_installed(inference, plan, assignments, settings)) as entries:
        for entry, edits in entries:
            if measure_speed:
                after = measure.times(inference, regimes)
                entry.timings = [measure.Timing(regime, before[regime], after[regime]) for regime in regimes]
                before = after
            entry.no_drift = no_drift
            if entry.technique.of_images and dense_logits and not with_images:
                entry.no_drift = "no held-out text has an image: give heldout= as a processor returns it"
            elif dense_logits and not (entry.technique.exact and report.drift):
                with measure.counted(edits) as activity:
                    entry.drift = measure.drift(dense_logits, measure.heldout_logits(inference, heldout_pieces))
                entry.active_share = activity.share
            report.memory_after = measure.memory(model)
            report.techniques.append(entry)
    report.techniques[0].skipped[:0] = [Skip(refusal.name, refusal.reason) for refusal in anatomy.refusals]
    report.self_check = installed_on(model).self_check
    installed_on(model).strict = strict
    installed_on(model).example = example if isinstance(example, Mapping) else None
    return report


@contextlib.contextmanager
def accelerated(
    model: nn.Module,
    plan: Plan | Technique | Iterable[Technique],
    *,
    calibration: Texts | Statistics | None = None,
    tokenizer=None,
    heldout: Texts | None = None,
    strict: bool = True,
    measure_speed: bool = True,
    measure_drift: bool = True,
) -> Iterator[Report]:
    """`accelerate` for a `with` block, reverted at its end. Arguments and errors are those of `accelerate`;
    gives the `Report`."""
    report = accelerate(
        model,
        plan,
        calibration=calibration,
        tokenizer=tokenizer,
        heldout=heldout,
        strict=strict,
        measure_speed=measure_speed,
        measure_drift=measure_drift,
    )
    try:
        yield report
    finally:
        revert(model)


def revert(model: nn.Module) -> None:
    """Undoes `accelerate`, bit for bit. A weight that was changed since keeps its new value.

    Raises:
        StateError: the model is not accelerated, or a module was replaced since, so that the old one cannot be put
            back; nothing is changed then.
    """
    installed = installed_on(model)
    if installed is None:
        raise StateError("the model is not accelerated: there is nothing to revert")
    for edit in installed.edits:
        edit.check(model)
    undo_all(model, installed.edits)
    del model._hasten


def install(inference: Inference, plan: Plan, assignments: list[Assignment], settings: list[Settings]) -> None:
    """Carries out techniques whose settings are known, with the self-check and nothing measured."""
    for _ in _installed(inference, plan, assignments, settings):
        pass


def _installed(
    inference: Inference, plan: Plan, assignments: list[Assignment], settings: list[Settings]
) -> Iterator[tuple[TechniqueReport, list[Edit]]]:
    """Applies one technique after the other; each is given, with its edits, when the model runs with it. Whatever stops
    this, the caller too, restores the model."""
    model, installed = inference.model, Installed(plan)
    edits_of: dict[str, list[Edit]] = {}
    try:
        apply_all(model, [Freeze()], installed.edits)
        for assignment, own in zip(assignments, settings, strict=True):
            technique, anatomy = assignment.technique, assignment.anatomy
            edits = technique.edits(anatomy, own)
            apply_all(model, edits, installed.edits)
            installed.settings[type(technique).__name__] = own
            edited = list(dict.fromkeys(edit.part for edit in edits if edit.part))
            entry = TechniqueReport(technique, edited, own, technique.skips(anatomy, own), implied=assignment.implied)
            edits_of[type(technique).__name__] = edits
            yield entry, edits
        image = any(regime.image for each in assignments for regime in each.technique.regimes(each.anatomy))
        installed.self_check = self_check(inference, edits_of, image)
    except BaseException:
        undo_all(model, installed.edits)
        raise
    model._hasten = installed


def _why_no_drift(wanted: bool, pieces: list[Inputs], logits: list) -> str:
    """Why drift is not measured; nothing where it is."""
    if logits:
        return ""
    if not wanted:
        return "measure_drift=False"
    if not pieces:
        return "there is no held-out text, and a tenth of calibration could not be set aside: give heldout="
    return (
        f"no held-out text has {measure.FEWEST_TARGETS} tokens after those of its prefill, which reaches to the end of "
        "the last picture: give longer ones as heldout="
    )


def _data(model, plan, calibration, tokenizer, heldout) -> tuple[Statistics | None, list[Inputs], list[Inputs]]:
    """Statistics if they were given or nothing needs them, windows to calibrate on, and windows to measure drift on."""
    longest = longest_input(model)
    calibrated = [technique for technique in plan if technique.calibrated]
    heldout_pieces = [] if heldout is None else windows(heldout, tokenizer, vocabulary(model), "heldout", longest)
    if isinstance(calibration, Statistics):
        if calibration.model is not None and calibration.model != sampled(model):
            raise ValueError("the statistics were gathered on other weights: calibrate this model")
        return calibration, [], heldout_pieces
    if calibration is None:
        if calibrated:
            kind = type(calibrated[0]).__name__
            raise ValueError(f"{kind} needs calibration=: texts with tokenizer=, or tensors of token ids")
        return Statistics(), [], heldout_pieces
    pieces = windows(calibration, tokenizer, vocabulary(model), longest=longest)
    if not calibrated:
        return Statistics(), [], heldout_pieces or pieces
    if heldout is None:
        pieces, heldout_pieces = split_heldout(pieces)
    return None, pieces, heldout_pieces
