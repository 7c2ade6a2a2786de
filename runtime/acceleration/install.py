"""`accelerate`, `revert` and `accelerated`: one reversible change of a model in place."""

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from hasten.acceleration import linear_layers, measure
from hasten.acceleration.anatomy import Anatomy, Projection, dissect
from hasten.acceleration.bind import Setting, dense_edit, left_dense, mlp_refusals, refuse_overlap, settle, sparse_edits
from hasten.acceleration.calibration import Statistics, gather, longest_input, score_name, vocabulary
from hasten.acceleration.edits import Edit, MarkStateful, ReplaceForward, apply_all, undo_all
from hasten.acceleration.modules import CatsMLP, DecodeLinear, SparseLinear
from hasten.acceleration.plan import Plan
from hasten.acceleration.preflight import refuse_unready
from hasten.acceleration.report import Report, Skip, TechniqueReport
from hasten.acceleration.techniques import DenseDecode, FastLinearAttention, Technique, is_sparse
from hasten.acceleration.windows import Texts, split_heldout, windows
from hasten.errors import HastenError, StateError
from hasten.kernels import backend
from hasten.kernels.storage import MAX_BATCH

logger = logging.getLogger("hasten")

# Relative distance of a module's output by kernel from its output by definition, on the same input.
SELF_CHECK_LIMIT = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SELF_CHECK_TOKENS = 17


@dataclass(slots=True)
class State:
    """What hasten keeps on an accelerated model, as `model._hasten`."""

    plan: Plan
    settings: list[Setting]
    edits: list[Edit] = field(default_factory=list)
    self_check: float = 0.0


def state_of(model: nn.Module) -> State | None:
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
) -> Report:
    """Makes a model's decode faster, in place; same class, same `generate`, and `revert` undoes it bit for bit.

    Everything is checked before anything is changed, and any error or interrupt restores the model. Sparse techniques change what the model computes
    in decode; how much is measured on held-out text and stands in the report.

    Args:
        model: a `transformers` causal language model, or a multimodal model around one, in eval mode, none of whose parameters requires grad, on one device.
        plan: one technique or several, e.g. `hasten.Wina(sparsity=0.5)`.
        calibration: texts, or token ids [T] or [B, T], from which sparse techniques learn thresholds: a few thousand tokens of typical use; or
            `hasten.Statistics` from `hasten.calibrate`. A tenth is set aside as held-out text unless `heldout` is given.
        tokenizer: the model's tokenizer, needed where texts are given.
        heldout: texts or token ids on which drift is measured.
        strict: raise on modules that cannot be changed; False leaves them as they are and lists them in the report.
        measure_speed: time prefill and decode before and after, with some 30 decode steps each.

    Returns:
        a `Report`; print it.

    Raises:
        ValueError, TypeError: wrong arguments; the message names the value.
        UnsupportedModelError: the model, or with `strict` a module of it, cannot be changed correctly.
        StateError: the model is accelerated already, in training mode, or a weight requires grad.
    """
    plan = Plan(plan)
    refuse_unready(model)
    anatomy = plan_anatomy(model, plan, strict)
    refuse_overlap(plan, anatomy)
    skipped = [*anatomy.skipped, *(refusal for technique in plan for refusal in mlp_refusals(technique, anatomy))]
    if strict and skipped:
        raise skipped[0]
    statistics, pieces, heldout_pieces = _data(model, plan, calibration, tokenizer, heldout)
    speed = measure.speed(model, vocabulary(model)) if measure_speed else None
    dense_logits = measure.heldout_logits(model, heldout_pieces)
    if statistics is None:
        statistics = gather(model, anatomy, plan, pieces)
    settings = [setting for technique in _sparse(plan) for setting in settle(model, technique, anatomy, statistics)]

    report = Report(plan, [], measure.memory(model), 0, 0.0, statistics.tokens)
    with contextlib.closing(_installed(model, anatomy, plan, settings, strict)) as entries:
        for entry in entries:
            if measure_speed:
                entry.before, entry.after = speed, measure.speed(model, vocabulary(model))
                speed = entry.after
            if heldout_pieces:
                entry.drift = measure.drift(dense_logits, measure.heldout_logits(model, heldout_pieces))
            report.memory_after = measure.memory(model)
            report.techniques.append(entry)
    report.techniques[0].skipped[:0] = [Skip(error.name, error.reason) for error in skipped]
    report.self_check = state_of(model).self_check
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
) -> Iterator[Report]:
    """`accelerate` for a `with` block, reverted at its end. Arguments and errors are those of `accelerate`; gives the `Report`."""
    report = accelerate(
        model,
        plan,
        calibration=calibration,
        tokenizer=tokenizer,
        heldout=heldout,
        strict=strict,
        measure_speed=measure_speed,
    )
    try:
        yield report
    finally:
        revert(model)


def revert(model: nn.Module) -> None:
    """Undoes `accelerate`, bit for bit. A weight that was changed since keeps its new value.

    Raises:
        StateError: the model is not accelerated, or a module was replaced since, so that the old one cannot be put back; nothing is changed then.
    """
    state = state_of(model)
    if state is None:
        raise StateError("the model is not accelerated: there is nothing to revert")
    for edit in state.edits:
        edit.check(model)
    undo_all(model, state.edits)
    del model._hasten


def plan_anatomy(model: nn.Module, plan: Plan, strict: bool = True) -> Anatomy:
    """`dissect`, for a plan that changes projections; linear-attention layers are found by their classes (`hasten.acceleration.linear_layers`)."""
    if all(isinstance(technique, FastLinearAttention) for technique in plan):
        linear_layers.edits(model, strict)
        return Anatomy(model.config.model_type, (), None)
    return dissect(model, strict=strict)


def install(model: nn.Module, anatomy: Anatomy, plan: Plan, settings: list[Setting]) -> None:
    """Carries out a plan whose settings are known, with the self-check and nothing measured but which dense products are faster."""
    for _ in _installed(model, anatomy, plan, settings, strict=True):
        pass


def _installed(
    model: nn.Module, anatomy: Anatomy, plan: Plan, settings: list[Setting], strict: bool
) -> Iterator[TechniqueReport]:
    """Applies one technique after the other; each is yielded when the model runs with it. Whatever stops this, the caller too, restores the model."""
    state = State(plan, settings)
    dense = left_dense(anatomy, settings)
    # What sparse techniques leave dense is decoded as DenseDecode does, by the last of them if the plan has no DenseDecode.
    deciding = next((t for t in reversed(plan) if isinstance(t, DenseDecode)), None) or next(
        (t for t in reversed(plan) if is_sparse(t)), None
    )
    try:
        for technique in plan:
            own = [setting for setting in settings if setting.technique == score_name(technique)]
            edits, skipped = sparse_edits(anatomy, own), []
            if isinstance(technique, FastLinearAttention):
                edits, refusals = linear_layers.edits(model, strict)
                edits = [*edits, *([] if getattr(model, "_is_stateful", True) else [MarkStateful()])]
                skipped = [Skip(refusal.name, refusal.reason) for refusal in refusals]
            if technique is deciding:
                dense_edits, skipped = _dense_edits(
                    dense, always=isinstance(technique, DenseDecode) and technique.always
                )
                edits += dense_edits
            apply_all(model, edits, state.edits)
            for module in model.modules():
                if isinstance(module, SparseLinear | CatsMLP):
                    module.watch.restart()
            edited = list(dict.fromkeys(edit.name for edit in edits if edit.name))
            yield TechniqueReport(technique, edited, own, skipped)
        state.self_check = _self_check(model, state.edits)
    except BaseException:
        undo_all(model, state.edits)
        raise
    model._hasten = state


def _dense_edits(projections: list[Projection], always: bool) -> tuple[list[Edit], list[Skip]]:
    """Dense decode for the projections on whose shape it beats torch; the others are left, with the ratio that says why."""
    shapes: dict[tuple, list[Projection]] = {}
    for projection in projections:
        weight = projection.module.weight
        shapes.setdefault((*weight.shape, weight.dtype, projection.module.bias is None), []).append(projection)
    edits, skipped = [], []
    for (outputs, inputs, *_), alike in shapes.items():
        max_batch, ratio = (MAX_BATCH, 0.0) if always else measure.faster_up_to(alike)
        if max_batch:
            edits += [dense_edit(projection, max_batch) for projection in alike]
        else:
            reason = f"torch's product of {outputs} x {inputs} is as fast here (hasten's: {ratio:.2f}x)"
            skipped += [Skip(projection.name, reason) for projection in alike]
    return edits, skipped


def _sparse(plan: Plan) -> list[Technique]:
    return [technique for technique in plan if is_sparse(technique)]


def _data(
    model, plan, calibration, tokenizer, heldout
) -> tuple[Statistics | None, list[torch.Tensor], list[torch.Tensor]]:
    """Statistics if they were given or nothing needs them, windows to calibrate on, and windows to measure drift on."""
    longest = longest_input(model)
    heldout_pieces = [] if heldout is None else windows(heldout, tokenizer, vocabulary(model), "heldout", longest)
    if isinstance(calibration, Statistics):
        return calibration, [], heldout_pieces
    if calibration is None:
        if sparse := _sparse(plan):
            raise ValueError(
                f"{type(sparse[0]).__name__} needs calibration=: texts with tokenizer=, or tensors of token ids"
            )
        return Statistics(), [], heldout_pieces
    pieces = windows(calibration, tokenizer, vocabulary(model), longest=longest)
    if not _sparse(plan):
        return Statistics(), [], heldout_pieces or pieces
    if heldout is None:
        pieces, heldout_pieces = split_heldout(pieces)
    return None, pieces, heldout_pieces


@torch.no_grad()
def _self_check(model: nn.Module, edits: list[Edit]) -> float:
    """Runs a short prefill and a decode step and recomputes edited modules on their own input by the definitions.

    Returns:
        the largest relative distance.

    Raises:
        HastenError: it is over SELF_CHECK_LIMIT: a kernel is wrong on this machine.
    """
    worst = 0.0

    def compare(name: str, output: torch.Tensor, expected: torch.Tensor) -> None:
        nonlocal worst
        if not expected.isfinite().all():
            raise HastenError(
                f"self-check: {name} overflows in {output.dtype} by its definition too; the model was left as it was"
            )
        distance = float((output - expected).float().norm() / expected.float().norm().clamp(min=1e-30))
        if not distance <= SELF_CHECK_LIMIT[output.dtype]:
            raise HastenError(
                f"self-check: {name} differs from its definition by {distance:.2g} (relative); the model was left as it was"
            )
        worst = max(worst, distance)

    def projection(name: str):
        def hook(module, arguments, output):
            # The gate decides what CatsMLP skips: both must decide on the same values, for rounding tips those at the threshold.
            gate = [module.gate(*arguments)] if isinstance(module, CatsMLP) else []
            with backend.use("reference"):
                expected = module.skip(*arguments, *gate) if gate else module.forward(*arguments)
            compare(name, output, expected)

        return hook

    def layer(name: str, hooks: contextlib.ExitStack):
        module, before = model.get_submodule(name), {}

        def remember(_, arguments, keywords):  # a step changes the cache
            before["call"] = copy.deepcopy((arguments, keywords))

        def hook(_, arguments, keywords, output):
            arguments, keywords = before.pop("call")
            with backend.use("reference"):
                expected = module.forward(*arguments, **keywords)
            outputs = [x[0] if isinstance(x, tuple) else x for x in (output, expected)]
            compare(name, *outputs)

        hooks.callback(module.register_forward_pre_hook(remember, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    names = {edit.name for edit in edits if not isinstance(edit, ReplaceForward)}
    layers = [edit.name for edit in edits if isinstance(edit, ReplaceForward)]
    tokens = torch.zeros(1, SELF_CHECK_TOKENS, dtype=torch.int64, device=measure.device_of(model))
    with torch.autocast(tokens.device.type, enabled=False):
        if layers:
            with contextlib.ExitStack() as hooks:
                for name in layers:
                    layer(name, hooks)
                model(input_ids=tokens, use_cache=False)
            cache = model(input_ids=tokens, use_cache=True)
            with contextlib.ExitStack() as hooks:
                layer(layers[0], hooks)  # for every layer, the whole cache would be copied
                model(input_ids=tokens[:, :1], use_cache=True, **measure.cache_of(cache))
        with contextlib.ExitStack() as hooks:
            for name, module in model.named_modules():
                if name in names and isinstance(module, DecodeLinear | SparseLinear | CatsMLP):
                    hooks.callback(module.register_forward_hook(projection(name)).remove)
            model(input_ids=tokens[:, :1], use_cache=True)
    return worst
