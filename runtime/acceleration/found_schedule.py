"""A schedule that was searched on a model, with what is known of it."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from hasten.sparsity.vision_tokens import Schedule, Stages, kept


@dataclass(frozen=True, slots=True)
class FoundSchedule(Schedule):
    """What `hasten.search_vision_tokens` returns; a `Schedule` for `VisionTokens`, saved with the plan.

    Args:
        by_layer: pairs of a layer and the share of the image tokens that it and those after it see.
        layers: of the decoder that it was searched on.
        method: "g_search" or "p_sigmoid".
        metric, full: the mean metric of the samples under it, and with all image tokens.
        cost: the operations of a prefill that image tokens cause under it, as a share of all that they cause.
        image_tokens: of a sample, the mean.
        evaluations: how many schedules were tried, on all samples each; `sweep`, how many it would take to try each
            level at each layer that was searched.
    """

    by_layer: tuple[tuple[int, float], ...]
    layers: int
    method: str
    metric: float
    full: float
    cost: float
    image_tokens: float
    evaluations: int
    sweep: int
    kind: str = field(default="FoundSchedule", init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "by_layer", Stages(self.by_layer).by_layer)
        self.shares(self.layers)

    def shares(self, layers: int) -> tuple[float, ...]:
        if layers != self.layers:
            raise ValueError(
                f"this schedule was searched for a decoder of {self.layers} layers, the model has {layers}"
            )
        return Stages(self.by_layer).shares(layers)

    def plot(self, path: str | Path) -> None:
        """Draws how many image tokens each layer sees, as a picture at `path` (its ending says of which format).

        Raises:
            ImportError: matplotlib, the extra `[plot]`, is not installed.
        """
        if find_spec("matplotlib") is None:
            raise ImportError('a plot needs matplotlib: pip install "hasten[plot]"')
        from matplotlib.figure import Figure  # an extra

        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        tokens = round(self.image_tokens)
        axes.bar(range(self.layers), [tokens] * self.layers, color="#d9dde2", width=0.9, label="all")
        counts = [kept(share, tokens) for share in self.shares(self.layers)]
        axes.bar(range(self.layers), counts, color="#0072b2", width=0.9, label=f"kept ({self.cost:.0%} of operations)")
        for layer, count in enumerate(counts):
            axes.annotate(str(count), (layer, count), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        axes.set(xlabel="decoder layer", ylabel="image tokens", xticks=range(0, self.layers, max(1, self.layers // 12)))
        axes.set_title(f"metric {self.metric:.3f}, with all tokens {self.full:.3f}", fontsize=10)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
