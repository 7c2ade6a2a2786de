"""Schedules: which share of a prompt's image tokens each layer of a decoder sees. Shares never increase with depth,
since a token that was dropped before one layer is missing in all layers after it."""

import dataclasses
import itertools
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

# A token is scored by the attention of the layer before, so nothing can be dropped before the first layer.
FIRST = 1
LEAST = 1e-6  # where a sigmoid without a floor would round to no share at all


class Schedule(ABC):
    """The base of all schedules, which are frozen dataclasses. Layers count from 0; what is dropped before layer 2 is
    missing in layer 2 and those after it.

    A schedule is saved as the dictionary of its fields, one of which, `kind`, names its class: `to_dict` and
    `dataclasses.asdict`, also of what holds a schedule, give what `schedule` reads, before and after JSON.
    """

    __slots__ = ()
    known: ClassVar[dict[str, type["Schedule"]]] = {}

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        Schedule.known[cls.__name__] = cls

    @abstractmethod
    def shares(self, layers: int) -> tuple[float, ...]:
        """The share of the image tokens that each of `layers` layers sees, in (0, 1] and never increasing.

        Raises:
            ValueError: `layers` is no integer of at least 1, or the schedule names layers that there are not.
        """

    def stages(self, layers: int) -> dict[int, float]:
        """The layers before which tokens are dropped, each with the share (of all image tokens) that it then sees.
        Empty where nothing is dropped.

        Raises:
            ValueError: as `shares`.
        """
        shares = self.shares(layers)
        return {layer: shares[layer] for layer in range(1, layers) if shares[layer] < shares[layer - 1]}

    def to_dict(self) -> dict:
        """Its fields as plain values, of which `schedule` makes it again."""
        return dataclasses.asdict(self)


def schedule(value: Schedule | Mapping) -> Schedule:
    """A schedule as users and saved plans write it.

    Args:
        value: a Schedule, which is returned as it is; what `Schedule.to_dict` gives; or a mapping from layers to
            shares, as `Stages` takes it. Layers may be strings of digits, which JSON makes of them.

    Raises:
        ValueError: it is none of these, is of an unknown kind, or has a field that its kind does not have.
    """
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"a schedule is one such as FastV(layer=2, keep=0.5), or a mapping from layers to shares such as "
            f"{{2: 0.5, 8: 0.25}}, got {value!r}"
        )
    if "kind" not in value:
        return Stages(value)
    if not isinstance(value["kind"], str) or value["kind"] not in Schedule.known:
        raise ValueError(f"unknown kind of schedule {value['kind']!r}, known are {', '.join(sorted(Schedule.known))}")
    kind = Schedule.known[value["kind"]]
    fields = {entry.name: entry for entry in dataclasses.fields(kind) if entry.init}
    if unknown := value.keys() - fields.keys() - {"kind"}:
        raise ValueError(f"{kind.__name__} has no field {', '.join(map(repr, sorted(unknown, key=str)))}")
    needed = {name for name, entry in fields.items() if entry.default is dataclasses.MISSING}
    if missing := needed - value.keys():
        raise ValueError(f"{kind.__name__} needs the field {', '.join(map(repr, sorted(missing)))}, got {dict(value)}")
    return kind(**{name: value[name] for name in fields if name in value})


@dataclass(frozen=True, slots=True)
class FastV(Schedule):
    """One drop (FastV, Chen et al. 2024, arXiv 2403.06764).

    Args:
        layer: the first layer that sees fewer tokens, at least 1.
        keep: the share of the image tokens that it and all after it see, in (0, 1].
    """

    layer: int = 2
    keep: float = 0.5
    kind: str = field(default="FastV", init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "layer", _layer("layer", self.layer))
        object.__setattr__(self, "keep", _share("keep", self.keep))

    def shares(self, layers: int) -> tuple[float, ...]:
        return _stepwise(((self.layer, self.keep),), layers)


@dataclass(frozen=True, slots=True)
class Pyramid(Schedule):
    """Equal parts of the decoder, each with the same share of the tokens of the one before (PyramidDrop, Xing et al.
    2024, arXiv 2410.17247).

    Args:
        ratio: what each part keeps of the tokens that the part before it saw, in (0, 1].
        parts: how many parts, at least 2, as equal as they can be; or the layers with which the second part and those
            after it begin, rising. 4 parts of 32 layers are (8, 16, 24).
    """

    ratio: float = 0.5
    parts: int | tuple[int, ...] = 4
    kind: str = field(default="Pyramid", init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "ratio", _share("ratio", self.ratio))
        if _is_integer(self.parts):
            if self.parts < 2:
                raise ValueError(f"parts must be at least 2, got {self.parts}")
            object.__setattr__(self, "parts", int(self.parts))
            return
        if not isinstance(self.parts, Sequence) or isinstance(self.parts, str) or not self.parts:
            raise ValueError(f"parts must be an integer, or the layers with which parts begin, got {self.parts!r}")
        parts = tuple(_layer(f"parts[{index}]", layer) for index, layer in enumerate(self.parts))
        if any(after <= before for before, after in itertools.pairwise(parts)):
            raise ValueError(f"parts must begin with rising layers, got {parts}")
        object.__setattr__(self, "parts", parts)

    def shares(self, layers: int) -> tuple[float, ...]:
        begins = self.parts
        if isinstance(begins, int):
            if _count(layers) < begins:
                raise ValueError(f"{begins} parts need as many layers, the model has {layers}")
            begins = tuple(part * layers // begins for part in range(1, begins))
        return _stepwise([(layer, self.ratio**depth) for depth, layer in enumerate(begins, 1)], layers)


@dataclass(frozen=True, slots=True, repr=False)
class Stages(Schedule):
    """Shares as the user names them.

    Args:
        by_layer: a mapping from layers (at least 1, also as strings of digits), or its pairs, to the share of all image
            tokens that this layer and those after it see, in (0, 1] and never increasing. Held as pairs, shallow to
            deep.
    """

    by_layer: tuple[tuple[int, float], ...]
    kind: str = field(default="Stages", init=False)

    def __post_init__(self):
        pairs = list(self.by_layer.items()) if isinstance(self.by_layer, Mapping) else self.by_layer
        if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"by_layer must map layers to shares, such as {{2: 0.5, 8: 0.25}}, got {self.by_layer!r}")
        if not pairs:
            raise ValueError("by_layer is empty: name at least one layer, such as {2: 0.5}")
        stages = sorted((_layer("by_layer", layer), _share(f"by_layer[{layer}]", share)) for layer, share in pairs)
        for (before, wider), (after, share) in itertools.pairwise(stages):
            if before == after:
                raise ValueError(f"by_layer names layer {after} twice")
            if share > wider:
                raise ValueError(
                    f"shares must not increase with depth, got {wider} from layer {before} on and {share} from layer "
                    f"{after} on"
                )
        object.__setattr__(self, "by_layer", tuple(stages))

    def __repr__(self) -> str:
        return f"Stages({dict(self.by_layer)})"

    def shares(self, layers: int) -> tuple[float, ...]:
        return _stepwise(self.by_layer, layers)


@dataclass(frozen=True, slots=True)
class PSigmoid(Schedule):
    """A sigmoid of depth, in few steps (P-Sigmoid, arXiv 2412.00556).

    Of the L layers, layer l sees floor + (1 - floor) / (1 + exp(steepness * (l / L - middle))) of the image tokens. The
    paper's code is not public and its formula is not in its abstract: this one is a reconstruction.

    Since tokens that are dropped before every layer cost a copy before every layer, the layers from `first` on are cut
    into at most `levels` runs, so that the squared distance from the sigmoid is least; all layers of a run see the mean
    of their shares. The mean over all layers is therefore that of the sigmoid itself.

    Args:
        steepness: positive.
        middle: the depth, as a fraction of the layers, at which half of 1 - floor is gone. Any finite number: beyond
            [0, 1] it leaves the one or the other tail of the sigmoid.
        floor: the share that the deepest layers tend to, in [0, 1).
        levels: the most stages, at least 1.
        first: the first layer that may see fewer tokens, at least 1; the layers before it see all of them.
    """

    steepness: float
    middle: float
    floor: float = 0.0
    levels: int = 6
    first: int = FIRST
    kind: str = field(default="PSigmoid", init=False, repr=False)

    def __post_init__(self):
        for name in ("steepness", "middle", "floor"):
            object.__setattr__(self, name, _number(name, getattr(self, name), "a finite number"))
        if self.steepness <= 0:
            raise ValueError(f"steepness must be positive, got {self.steepness}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must be in [0, 1), got {self.floor}")
        object.__setattr__(self, "levels", _count(self.levels, "levels"))
        object.__setattr__(self, "first", _layer("first", self.first))

    def shares(self, layers: int) -> tuple[float, ...]:
        _check_depth(self.first, layers)
        return (1.0,) * self.first + _in_runs(self._curve(layers), self.levels)

    def _curve(self, layers: int) -> tuple[float, ...]:
        """The sigmoid at the layers from `first` on, before it is cut into runs."""
        logits = (self.steepness * (self.middle - layer / layers) for layer in range(self.first, layers))
        return tuple(max(LEAST, self.floor + (1 - self.floor) * _sigmoid(logit)) for logit in logits)

    @classmethod
    def within(
        cls,
        budget: float,
        steepness: float,
        floor: float,
        layers: int,
        levels: int = 6,
        first: int = FIRST,
        cost: Callable[[tuple[float, ...]], float] | None = None,
    ) -> "PSigmoid":
        """The sigmoid that costs `budget`: `middle` by bisection, since what it costs rises with it.

        Args:
            budget: the mean share over all layers, or what `cost` may come to, in (0, 1]. It is not exceeded.
            steepness, floor, levels, first: as in the class.
            layers: of the model.
            cost: what shares of all layers cost, as a fraction of what it costs to drop nothing; rising with every
                share. The mean of the shares where it is None.

        Raises:
            ValueError: no `middle` is within the budget, since the layers before `first` see all tokens and the others
                at least `floor` of them.
        """
        budget = _share("budget", budget)
        lowest = cls(steepness, 0.0, floor, levels, first)
        _check_depth(lowest.first, layers)

        def at(middle: float) -> float:
            given = dataclasses.replace(lowest, middle=middle)
            if cost is None:
                return (lowest.first + math.fsum(given._curve(layers))) / layers
            return cost(given.shares(layers))

        reach = 1 + 750 / lowest.steepness  # the exponential of -750 is zero: the sigmoid is flat beyond
        if at(-reach) > budget:
            raise ValueError(
                f"the budget must be at least {at(-reach):.4g}, which {layers} layers cost of which {lowest.first} see "
                f"all tokens and the others {lowest.floor} of them, got {budget}"
            )
        return dataclasses.replace(lowest, middle=crossing(at, budget, -reach, reach))


def crossing(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The greatest argument between `low` and `high` at which `function`, which never falls, is at most `target`: by
    bisection. `low` where there is none."""
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) <= target else (low, middle)
    return low


def kept(share: float, tokens: int) -> int:
    """How many of `tokens` tokens a share keeps: rounded up, so at least one of any. A product that is a whole number
    but for rounding is that number."""
    return min(tokens, math.ceil(share * tokens * (1 - 1e-12)))


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def _stepwise(stages: Sequence[tuple[int, float]], layers: int) -> tuple[float, ...]:
    """Shares of all layers from (layer, share), shallow to deep."""
    _check_depth(stages[-1][0], layers)
    shares = [1.0] * layers
    for layer, share in stages:
        shares[layer:] = [share] * (layers - layer)
    return tuple(shares)


def _in_runs(curve: Sequence[float], most: int) -> tuple[float, ...]:
    """The falling `curve` [n] in at most `most` runs of equal values, each the mean of its run, at the least squared
    distance: by dynamic programming over (runs, length), as optimal histograms are made."""
    sums, squares = [0.0], [0.0]
    for value in curve:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value * value)

    def error(start: int, end: int) -> int:  # in steps of 1e-12, so that of cuts as good as each other the fewest count
        return round(1e12 * (squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start)))

    count = len(curve)
    best = {0: (0, 0, ())}  # by length: the error, the number of runs, and where they end
    for _ in range(min(most, count)):
        best |= {
            end: min(
                (best[start][0] + error(start, end), best[start][1] + 1, (*best[start][2], end))
                for start in best
                if start < end
            )
            for end in range(1, count + 1)
        }
    ends = best[count][-1]
    runs = [curve[start:end] for start, end in zip((0, *ends), ends, strict=False)]
    return tuple(math.fsum(run) / len(run) for run in runs for _ in run)


def _check_depth(layer: int, layers: int) -> None:
    if layer >= _count(layers):
        raise ValueError(f"layer {layer} is none of the model's {layers} layers, which are 0 to {layers - 1}")


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _count(value: int, name: str = "layers") -> int:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def _layer(name: str, value: int | str) -> int:
    layer = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if not _is_integer(layer) or layer < FIRST:
        raise ValueError(
            f"{name} must be a layer from {FIRST} on (a token is scored by the layer before), got {value!r}"
        )
    return int(layer)


def _number(name: str, value: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def _share(name: str, value: float) -> float:
    share = _number(name, value, "a number in (0, 1]")
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    return share
