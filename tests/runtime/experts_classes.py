"""Every class of fused experts in the installed transformers, and tiny instances of them."""

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import transformers
from torch import nn

EXPERTS, HIDDEN, INTERMEDIATE = 5, 24, 16
# What the constructors read from a config, by name.
CONFIG = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), INTERMEDIATE),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu"),
    "ffn_act_fn": {"name": "silu"},
    "moe_latent_size": None,
    "zero_expert_num": 2,
    "n_shared_experts": 2,
    "swiglu_limit": 0.5,
    "swiglu_alpha": 1.702,
    "mlp_gate_softcap": 1.5,
    "mlp_up_softcap": 1.5,
    "post_norm_eps": 1e-6,
    "moe_num_shared_experts": 2,
    "mlp_bias": False,
    "d_model": HIDDEN,
    "d_ff": INTERMEDIATE,
    "dropout_rate": 0.0,
    "dense_act_fn": "relu",
    "_experts_implementation": "eager",
}  # fmt: skip


def classes() -> dict[str, type[nn.Module]]:
    """The classes of experts by name: every module class called ...Experts... with fused parameters in transformers' modeling files."""
    found = {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if not re.search(r"^class \w*Experts\w*\(", file.read_text(), re.MULTILINE):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, value in vars(module).items():
            if (
                inspect.isclass(value)
                and issubclass(value, nn.Module)
                and "Experts" in name
                and value.__module__ == module.__name__
            ):
                found[name] = value
    return found


def build(kind: type[nn.Module]) -> nn.Module:
    """A tiny instance with random weights, in float32."""
    module = kind(SimpleNamespace(**CONFIG)).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)
