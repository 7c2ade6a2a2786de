"""The linear-attention layers of transformers models, and what hasten puts in the place of their torch fallbacks.

A layer keeps transformers' own forward, re-made for this instance with the slow functions that it calls replaced:
everything in which the families differ (projections, gates, norms, caches) stays theirs. MiniMax, whose loops stand in
the forward itself, gets a forward of ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from hasten.acceleration.techniques.adapted_forwards import remade
from hasten.acceleration.techniques.convolution_adapters import CONVOLUTION
from hasten.acceleration.techniques.delta_rule_adapters import chunk_delta_rule, step_delta_rule
from hasten.acceleration.techniques.mamba2_adapters import chunk_mamba2, step_mamba2
from hasten.acceleration.techniques.minimax_adapters import minimax_forward
from hasten.acceleration.techniques.rwkv_adapters import RWKV, rwkv_forward
from hasten.acceleration.techniques.selective_scan_adapters import MAMBA, mamba_forward
from hasten.acceleration.techniques.xlstm_adapters import mlstm_forward

_GATED = CONVOLUTION | {
    "torch_chunk_gated_delta_rule": chunk_delta_rule,
    "torch_recurrent_gated_delta_rule": step_delta_rule,
}
_KIMI = CONVOLUTION | {
    "chunk_kimi_delta_attention": chunk_delta_rule,
    "recurrent_kimi_delta_attention": step_delta_rule,
}
_MAMBA2 = CONVOLUTION | {"mamba2_chunk_scan": chunk_mamba2, "mamba2_selective_state_update": step_mamba2}


@dataclass(frozen=True, slots=True)
class Layer:
    """A class of layers: the models that have it, what makes its fast forward, and the functions of its module that
    this replaces, by name, each with its adapter."""

    models: str
    make: Callable[[nn.Module], Callable]
    replaced: Mapping[str, Callable] = field(default_factory=dict)

    @property
    def recurrent(self) -> bool:
        """Whether it keeps a state that cannot go back in its text, unlike the last inputs of a convolution."""
        return self.replaced != CONVOLUTION


def _layers(replacements: dict[str, Callable], make: Callable | None = None, **models: str) -> dict[str, Layer]:
    """Layers by their classes, made by `make` or simply `remade` with the replacements."""
    make = make or remade(**replacements)
    return {name: Layer(model, make, replacements) for name, model in models.items()}


# By the name of the class.
LAYERS: dict[str, Layer] = (
    {
        "MiniMaxLightningAttention": Layer("MiniMax", minimax_forward),
        "xLSTMBackend": Layer("xLSTM", mlstm_forward),
    }
    | _layers(
        _GATED,
        Qwen3NextGatedDeltaNet="Qwen3-Next",
        Qwen3_5GatedDeltaNet="Qwen3.5",
        Qwen3_5MoeGatedDeltaNet="Qwen3.5-MoE",
        OlmoHybridGatedDeltaNet="OLMo-hybrid",
        Qwen4ExpTextGatedDeltaNet="Qwen4-exp",
    )
    | _layers(
        _KIMI,
        KimiLinearDeltaAttention="Kimi-Linear",
        BailingHybridDeltaAttention="Bailing-hybrid",
        Glm5NextTextLinearAttention="GLM-5-next",
    )
    | _layers(CONVOLUTION, Lfm2ShortConv="LFM2", Lfm2MoeShortConv="LFM2-MoE", Lfm3ShortConv="LFM3")
    | _layers(
        _MAMBA2,
        Mamba2Mixer="Mamba-2",
        BambaMixer="Bamba",
        FalconH1Mixer="Falcon-H1",
        GraniteMoeHybridMambaLayer="Granite-MoE-hybrid",
        NemotronHMamba2Mixer="Nemotron-H",
        Zamba2MambaMixer="Zamba2",
    )
    | _layers(
        MAMBA,
        mamba_forward,
        MambaMixer="Mamba",
        FalconMambaMixer="Falcon-Mamba",
        JambaMambaMixer="Jamba",
        ZambaMambaMixer="Zamba",
    )
    | _layers(RWKV, rwkv_forward, RwkvSelfAttention="RWKV")
)
