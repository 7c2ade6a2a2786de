"""The laws that hold for every technique. Some exist only here: nothing in hasten knows of them."""

import ast
import copy
import inspect
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import linear_models
import pytest
import tiny_models
import torch
from running import decode_logits as all_logits
from running import distance
from snapshots import assert_unchanged, snapshot
from tiny_models import token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hasten
from hasten.acceleration import install, measure
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.edits import Edit, Freeze, ReplaceForward, apply_all, undo_all
from hasten.acceleration.forwards import Forward, decode_rows
from hasten.acceleration.inference import Inference
from hasten.acceleration.techniques.base import Regime, Settings, Skip, Technique
from hasten.errors import SavedPlanError
from hasten.kernels import backend
from hasten.kernels.linear import linear


class RoundingLinear(Forward):
    """A projection whose inputs are rounded to multiples of `step` [1] in decode."""

    def __init__(self, module: nn.Module, name: str, step: torch.Tensor):
        super().__init__(module, name)
        self.step = step

    def is_own(self, x):
        return decode_rows(x) > 0

    def own(self, x):
        return linear((x / self.step).round() * self.step, self.module.weight, self.module.bias)

    def active(self, x):
        return (int((x.abs() * 2 > self.step).sum()), x.numel()) if decode_rows(x) else None


@dataclass(frozen=True, slots=True)
class Rounding(Technique):
    """Rounds the inputs of down projections to `steps` steps in their mean size, which calibration finds."""

    steps: int = 2

    calibrated: ClassVar[bool] = True

    def targets(self, anatomy):
        return tuple(p.name for p in anatomy.projections if p.role == "down")

    def listen(self, anatomy, statistics):
        sizes = statistics.gathered[type(self).__name__] = {name: [] for name in self.targets(anatomy)}
        for name, seen in sizes.items():
            module = anatomy.model.get_submodule(name)
            yield module.register_forward_pre_hook(lambda module, x, seen=seen: seen.append(float(x[0].abs().mean())))

    def settle(self, anatomy, statistics):
        sizes = {name: sum(seen) / len(seen) for name, seen in statistics.of(self).items()}
        steps = {f"step of {name}": torch.tensor([size / self.steps]) for name, size in sizes.items()}
        return Settings({"of": list(sizes), "steps": self.steps}, steps)

    def read(self, saved, anatomy):
        expected = {f"step of {name}" for name in self.targets(anatomy)}
        if saved.values.get("steps") != self.steps or saved.tensors.keys() != expected:
            raise SavedPlanError(f"the settings of Rounding are {saved}")
        return saved

    def edits(self, anatomy, settings):
        tensors = settings.tensors
        make = {name: partial(RoundingLinear, step=tensors[f"step of {name}"]) for name in settings.values["of"]}
        return [ReplaceForward(name, made) for name, made in make.items()]

    def skips(self, anatomy, settings):
        return [Skip(p.name, "it is no down projection") for p in anatomy.projections if p.role != "down"]

    def summary(self, settings):
        return f"{len(settings.values['of'])} rounded"

    def regimes(self, anatomy):
        return (Regime(context=9), Regime(batch=3, tokens=5, context=7))


class TurnedBack(Forward):
    """Whole layers or attention, whose output is reversed and reversed back, by two products: the same but
    for rounding."""

    def own(self, *arguments, **keywords):
        output = self.dense(*arguments, **keywords)
        first, *others = output if isinstance(output, tuple) else (output,)
        third = torch.eye(first.shape[-1], dtype=first.dtype).flip(0) / 3
        first = linear(linear(first.contiguous(), third), 9 * third)
        return (first, *others) if isinstance(output, tuple) else first


@dataclass(frozen=True, slots=True)
class TurningBack(Technique):
    """Exact: changes the modules inside every layer that are called `inner`, or the layers themselves."""

    inner: str = ""

    exact: ClassVar[bool] = True

    def targets(self, anatomy):
        return tuple(f"{block.name}.{self.inner}".rstrip(".") for block in anatomy.blocks)

    def edits(self, anatomy, settings):
        return [ReplaceForward(name, TurnedBack) for name in self.targets(anatomy)]


@dataclass(frozen=True)
class Case:
    """A technique, and a tiny model on which it acts."""

    technique: Technique
    build: Callable[[], nn.Module]
    image: int | None = None  # the token that stands for a piece of an image, in models whose prompts have one
    kernels: bool = True  # whether it runs kernels of hasten's

    def model(self) -> nn.Module:
        """The model as from_pretrained returns one: its parameters require grad."""
        return self.build().requires_grad_(True)

    def ids(self, rows: int = 1, length: int = 20, seed: int = 0) -> torch.Tensor:
        """Token ids [rows, length], some of them for an image where prompts have one."""
        ids = token_ids(rows, length, seed)
        if self.image is not None:
            ids[:, 2:10] = self.image
        return ids

    def inputs(self, rows: int = 1, length: int = 20, seed: int = 0) -> torch.Tensor | dict[str, torch.Tensor]:
        """The ids, with the pictures that these have."""
        ids = self.ids(rows, length, seed)
        return {"input_ids": ids} | found if (found := pictures(ids)) else ids

    def accelerate(self, model: nn.Module, **settings) -> hasten.Report:
        settings = {
            "calibration": self.inputs(1, 64, seed=1),
            "heldout": self.inputs(1, 24),
            "measure_speed": False,
        } | settings
        return hasten.accelerate(model, self.technique, **settings)

    def __str__(self) -> str:
        return f"{type(self.technique).__name__}-{self.build.args[0]}"


llama, phi3, mixtral, llava = (partial(tiny_models.build, name) for name in ("llama", "phi3", "mixtral", "llava"))
CASES = [
    Case(hasten.DenseDecode(always=True), llama),
    Case(hasten.DenseDecode(always=True), mixtral),
    Case(hasten.Wina(0.5), llama),
    Case(hasten.Wina(0.5), mixtral),
    Case(hasten.Teal(0.5), llama),
    Case(hasten.Cats(0.5), llama),
    Case(hasten.Cats(0.5), phi3),
    Case(hasten.FastLinearAttention(), partial(linear_models.build, "mamba2")),
    Case(hasten.FastLinearAttention(), partial(linear_models.build, "mamba")),
    Case(hasten.FastLinearAttention(), partial(linear_models.build, "qwen3_next")),
    Case(hasten.VisionTokens({1: 0.5}), llava, image=299),
    Case(hasten.DistinctTiles(), partial(tiny_models.build, "paligemma"), image=298, kernels=False),
    Case(TurningBack("self_attn"), llama),
    Case(TurningBack(), partial(linear_models.build, "bamba")),
    Case(Rounding(), llama),
]
pytestmark = pytest.mark.usefixtures("no_contest")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_case_with_kernels = pytest.mark.parametrize("case", [case for case in CASES if case.kernels], ids=str)


def pictures(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The pictures of image tokens 298 in `ids` [B, T], four a picture, all alike; nothing without any."""
    count = int((ids == 298).sum()) // 4
    one = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": one.repeat(count, 1, 1, 1)} if count else {}


def decode_logits(model: nn.Module, ids: torch.Tensor, prefix: int) -> torch.Tensor:
    """Those of a prefill of `prefix` tokens and then single ones; 0 for tokens without a prediction, which are NaN."""
    return all_logits(model, ids, prefix, **pictures(ids)).nan_to_num()


def test_every_technique_is_here():
    """A new technique gets its laws by an entry in CASES."""
    known = {kind for kind in Technique.known.values() if kind.__module__.startswith("hasten.")}
    missing = {kind for kind in known if not inspect.isabstract(kind)} - {type(case.technique) for case in CASES}
    assert not missing


def test_nothing_outside_knows_a_kind_of_technique():
    """Neither a technique nor what one installs is named in the code that carries them out."""
    folder = Path(inspect.getfile(install)).parent
    own = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (folder / "techniques").glob("*.py")}
    classes = {node.name for path in own for node in own[path].body if isinstance(node, ast.ClassDef)}
    kinds = classes - {
        node.name for node in own[folder / "techniques" / "base.py"].body if isinstance(node, ast.ClassDef)
    }
    assert kinds > {"Wina", "SparseLinear", "LinearAttentionLayer"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = {getattr(node, field, None) for field in ("id", "attr", "name")}
            assert not named & kinds, f"{path} names {named & kinds}"


@every_case
def test_revert_is_bit_exact(case):
    model, ids = case.model(), case.ids(2, 24)
    expected, before = decode_logits(model, ids, 16), snapshot(model)
    report = case.accelerate(model)
    assert report.techniques[0].edited
    assert not any(parameter.requires_grad for parameter in model.parameters())
    fast = decode_logits(model, ids, 16)
    assert not case.kernels or not torch.equal(fast, expected)
    assert_bounds(fast, expected, case)
    hasten.revert(model)
    assert_unchanged(model, before)
    assert torch.equal(decode_logits(model, ids, 16), expected)


def assert_bounds(fast, expected, case):
    if case.technique.exact:
        assert distance(fast, expected) < 1e-5
    elif case.image is not None:
        assert distance(fast[:, :2], expected[:, :2]) < 1e-5, "text before the image stays as it is"
        assert distance(fast[:, 15:], expected[:, 15:]) > 1e-3
    else:
        assert distance(fast[:, :16], expected[:, :16]) < 1e-5, "prefill stays dense"
        assert distance(fast[:, 16:], expected[:, 16:]) > 1e-3


class Halt(Edit):
    """An edit that is interrupted at its end, or, undone, at its beginning."""

    def __init__(self, inner: Edit, forth: bool):
        self.inner, self.name, self.halting = inner, inner.name, "apply" if forth else "undo"

    part = property(lambda self: self.inner.part)

    def apply(self, model):
        self.inner.apply(model)
        self.halt("apply")

    def check(self, model):
        self.inner.check(model)

    def undo(self, model):
        self.halt("undo")
        self.inner.undo(model)

    def halt(self, where):
        if where == self.halting:
            self.halting = None
            raise KeyboardInterrupt


@every_case
def test_an_interrupt_at_any_edit_leaves_the_model(case, monkeypatch):
    model = case.model()
    before = snapshot(model)
    report = case.accelerate(model, measure_drift=False)
    hasten.revert(model)
    anatomy, own = Anatomy(model), report.techniques[0].settings
    for position in range(len(case.technique.edits(anatomy, own))):
        for forth in (True, False):
            done: list[Edit] = []
            edits = case.technique.edits(anatomy, own)
            edits[position] = Halt(edits[position], forth)
            with pytest.raises(KeyboardInterrupt):
                apply_all(model, [Freeze(), *edits], done)
                undo_all(model, done)
            undo_all(model, done)
            assert_unchanged(model, before)

    halted = [*edits[:-1], Halt(edits[-1], True)]
    monkeypatch.setattr(type(case.technique), "edits", lambda *arguments: halted)
    with pytest.raises(KeyboardInterrupt):
        case.accelerate(model)
    assert_unchanged(model, before)


@every_case
@pytest.mark.parametrize("seam", ["calibrating", "settling", "measuring", "checking"])
def test_an_interrupt_between_leaves_the_model(case, seam, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    model = case.model()
    before = snapshot(model)
    if seam == "calibrating":
        monkeypatch.setattr(type(model), "forward", interrupt)
    elif seam == "settling":
        monkeypatch.setattr(type(case.technique), "settle", interrupt)
    elif seam == "measuring":
        monkeypatch.setattr(measure, "drift", interrupt)
    else:
        monkeypatch.setattr(install, "self_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.accelerate(model)
    assert_unchanged(model, before)


@every_case
def test_a_second_accelerate_is_refused(case):
    model, ids = case.model(), case.ids(1, 20)
    case.accelerate(model)
    before, expected = snapshot(model), decode_logits(model, ids, 16)
    for work in (partial(case.accelerate, model), partial(hasten.calibrate, model, case.technique, ids)):
        with pytest.raises(hasten.StateError, match=r"accelerated already.*revert"):
            work()
    assert_unchanged(model, before)
    assert torch.equal(decode_logits(model, ids, 16), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.technique.calibrated], ids=str)
def test_calibration_changes_nothing(case):
    model = case.model()
    before = snapshot(model)
    statistics = hasten.calibrate(model, case.technique, case.ids(2, 64))
    assert statistics.tokens == 128
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=rf"{type(case.technique).__name__} needs calibration="):
        hasten.accelerate(model, case.technique)
    with pytest.raises(ValueError, match=rf"hold nothing for {type(case.technique).__name__}"):
        hasten.accelerate(model, case.technique, calibration=hasten.Statistics())


@every_case
def test_loaded_is_what_was_saved(case, tmp_path):
    model, ids = case.model(), case.ids(1, 24)
    case.accelerate(model)
    expected = decode_logits(model, ids, 16)
    hasten.save(model, tmp_path)
    loaded = hasten.load(tmp_path)
    assert loaded._hasten.plan == model._hasten.plan
    kind = type(case.technique).__name__
    saved, read = model._hasten.settings[kind], loaded._hasten.settings[kind]
    assert read.values == saved.values and read.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in saved.tensors.items())
    assert torch.equal(decode_logits(loaded, ids, 16), expected)
    hasten.revert(loaded)
    hasten.revert(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@every_case
def test_settings_are_json_and_tensors(case):
    """What `settle` gives outlives JSON, and `read` takes it."""
    model = case.model()
    case.accelerate(model)
    technique, anatomy = case.technique, Anatomy(case.model())
    settings = model._hasten.settings[type(technique).__name__]
    again = Settings(json.loads(json.dumps(settings.values)), settings.tensors)
    assert again.values == settings.values
    if technique.portable:
        assert technique.read(again, anatomy) == again
        with pytest.raises(SavedPlanError):
            technique.read(Settings(again.values | {"unknown": 1}, again.tensors | {"unknown": torch.ones(1)}), anatomy)


class WrongKernels(TorchDispatchMode):
    """Operators of hasten write values that are off by a hundredth of their neighbours, integers those of their
    neighbours, except by their definition.

    Args:
        written: the operator and the number of what it writes (a result, or an argument that it changes); None for none.
    """

    def __init__(self, written: tuple[str, int] | None = None):
        super().__init__()
        self.written, self.seen = written, {}

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        if operator.namespace == "hasten" and not backend.is_reference():
            writes = [*(result if isinstance(result, tuple | list) else (result,))]
            for argument, value in zip(operator._schema.arguments, arguments, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    writes.append(value)
            for number, tensor in enumerate(writes):
                self.seen[operator._schema.name, number] = None
                if self.written == (operator._schema.name, number):
                    if tensor.is_floating_point():
                        tensor.add_(tensor.roll(1, -1), alpha=0.01)
                    else:
                        tensor.copy_(tensor.roll(1, -1))
        return result


@every_case_with_kernels
def test_the_self_check_catches_any_wrong_kernel(case):
    """Whichever of the tensors that its kernels write is wrong, unless nothing reads it."""
    model, ids = case.model(), case.ids(1, 20)
    before = snapshot(model)
    statistics = hasten.calibrate(model, case.technique, case.inputs(1, 64))
    settings = {"calibration": statistics, "measure_drift": False}
    with WrongKernels() as right:
        case.accelerate(model, **settings)
    expected = decode_logits(model, ids, 16)
    hasten.revert(model)
    caught = 0
    for written in right.seen:
        try:
            with WrongKernels(written):
                case.accelerate(model, **settings)
                assert torch.equal(decode_logits(model, ids, 16), expected), f"{written} is wrong and was not noticed"
            hasten.revert(model)
        except hasten.HastenError as error:
            assert re.search("self-check: .* differs from its definition", str(error))
            caught += 1
        assert_unchanged(model, before)
    assert caught


@every_case
def test_every_regime_is_measured(case):
    model, shapes = case.model(), []
    inference = Inference(model, case.inputs(1, 64, seed=1))
    regimes = [measure.possible(inference, regime) for regime in case.technique.regimes(Anatomy(model))]
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, x: shapes.append(tuple(x[0].shape)))
    report = case.accelerate(model, measure_speed=True, measure_drift=False)
    handle.remove()
    for entry in report.techniques:
        assert {timing.regime for timing in entry.timings} >= set(regimes)
        assert all(timing.before > 0 and timing.after > 0 for timing in entry.timings)
    for regime in regimes:
        runs = [(regime.batch, regime.tokens)]
        if regime.context:
            runs.insert(0, (regime.batch, regime.context))
        at = [i for i in range(len(shapes)) if shapes[i : i + len(runs)] == runs]
        assert at, f"{regime} was not run"
        assert str(regime) in str(report)
    data = json.loads(report.to_json())
    assert data["techniques"][0]["technique"] == type(case.technique).__name__
    assert [timing["regime"] for timing in data["techniques"][0]["timings"]] == [
        str(timing.regime) for timing in report.techniques[0].timings
    ]


@every_case
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_accelerated_and_of_its_own(case, way):
    model, ids = case.model(), case.ids(1, 24)
    dense = decode_logits(model, ids, 16)
    case.accelerate(model)
    expected = decode_logits(model, ids, 16)
    with WrongKernels() as original:
        decode_logits(model, ids, 16)
    twin = way(model)
    hasten.revert(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    with WrongKernels() as copied:
        assert torch.equal(decode_logits(twin, ids, 16), expected)
    assert copied.seen.keys() == original.seen.keys()
    hasten.revert(twin)
    assert torch.equal(decode_logits(twin, ids, 16), dense)
    assert all(parameter.requires_grad for parameter in twin.parameters())


@every_case
@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_hooks_fire_as_often_as_in_the_dense_model(case, when):
    model, ids, calls = case.model(), case.ids(1, 20), []
    names = {module: name for name, module in model.named_modules()}

    def listen():
        for module in model.modules():
            module.register_forward_hook(lambda module, x, y: calls.append(names[module]))

    if when == "before":
        listen()
    case.accelerate(model, measure_drift=False)
    if when == "afterwards":
        listen()
    calls.clear()
    decode_logits(model, ids, 16)
    accelerated = sorted(calls)
    hasten.revert(model)
    calls.clear()
    decode_logits(model, ids, 16)
    assert accelerated == sorted(calls)


@every_case
def test_the_state_dict_is_the_dense_models(case):
    model = case.model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    case.accelerate(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@every_case
def test_weights_that_are_thawed_are_refused(case):
    model, ids = case.model(), case.ids(1, 20)
    case.accelerate(model, measure_drift=False)
    with WrongKernels() as outside:
        cache = model(input_ids=ids[:, :16], use_cache=True)
        name = "past_key_values" if hasattr(cache, "past_key_values") else "cache_params"
        model(input_ids=ids[:, 16:17], use_cache=True, **{name: getattr(cache, name)})
    assert outside.seen or not case.kernels, "a plain call outside no_grad runs the kernels"
    for thawed in (model.get_input_embeddings(), model.get_output_embeddings(), model):
        thawed.requires_grad_(True)
        with pytest.raises(hasten.StateError, match=r"requires grad since .*requires_grad_\(False\).*revert"):
            model(input_ids=ids)
        decode_logits(model, ids, 16)
        model.requires_grad_(False)
    hasten.revert(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("case", [c for c in CASES if not c.technique.exact and c.image is None], ids=str)
def test_the_decoder_alone_refuses_what_was_thawed(case):
    """Its forward has no hook of hasten: the kernels notice. What begins with a pass of the model does not run there."""
    model, ids = case.model(), case.ids(1, 1)
    case.accelerate(model, measure_drift=False)
    model.requires_grad_(True)
    with pytest.raises(hasten.StateError, match=r"requires grad since .*requires_grad_\(False\).*revert"):
        model.model(input_ids=ids)


@every_case
def test_what_is_changed_takes_the_keywords_of_its_class(case):
    """As every module of the dense model does that is called with a few tensors: in decode and in prefill."""
    model, calls = case.model(), []
    names = case.accelerate(model, measure_drift=False).techniques[0].edited

    def keep(name, module, arguments, keywords, output):
        if isinstance(output, torch.Tensor) and not keywords:
            calls.append((name, module, arguments, output))

    for name in names:
        model.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True)
    decode_logits(model, case.ids(1, 18), 16)
    with torch.no_grad():
        for name, module, arguments, output in list(calls):
            words = list(inspect.signature(type(module).forward).parameters)[1:]
            again = module(**dict(zip(words, arguments, strict=False)))
            assert torch.equal(again, output), name


def test_the_report_counts_what_was_active():
    case = CASES[-1]
    model, counts = case.model(), []
    report = case.accelerate(model, heldout=token_ids(1, 40))
    for name in report.techniques[0].edited:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda module, x: (
                counts.append((x[0].abs() * 2 > module.forward.step).float().mean()) if x[0].shape[1] == 1 else None
            )
        )
    decode_logits(model, token_ids(1, 40)[:, :-1], 16)
    assert report.techniques[0].active_share == pytest.approx(float(torch.stack(counts).mean()), abs=1e-6)
    assert "2 rounded" in str(report) and "no down projection" in str(report)
