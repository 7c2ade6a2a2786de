"""Every class of experts in the installed transformers, and tiny instances of them."""

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import transformers
from torch import nn

EXPERTS, HIDDEN, INTERMEDIATE = 5, 24, 16
# What the constructors read from a config, by name. EXPERTS is odd and the sizes differ, so that no two can be
# confused.
CONFIG = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "d_ff"), INTERMEDIATE),
    "expert_ffn_hidden_size": INTERMEDIATE,
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act", "dense_act_fn"), "silu"),
    "activation_function": "silu",
    "ffn_act_fn": {"name": "silu"},
    "moe_latent_size": None,
    "moe_num_shared_experts": 2,
    "n_shared_experts": 2,
    "zero_expert_num": 2,
    "mlp_bias": False,
    **dict.fromkeys(("dropout_rate", "activation_dropout", "moe_token_dropout"), 0.0),
    "swiglu_limit": 0.5,
    "swiglu_alpha": 1.702,
    "mlp_gate_softcap": 1.5,
    "mlp_up_softcap": 1.5,
    "post_norm_eps": 1e-6,
    "_experts_implementation": "eager",
}
ARGUMENTS = {"config": SimpleNamespace(**CONFIG), "ffn_dim": INTERMEDIATE}
ARGUMENTS |= {"num_experts": EXPERTS, "input_size": HIDDEN, "output_size": INTERMEDIATE}


@cache
def names() -> dict[str, str]:
    """The module of each class by its name: those called ...Experts... in transformers' modeling files. Imports
    none."""
    found = {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^class (\w*Experts\w*)\(nn\.Module\w*\)", file.read_text(), re.MULTILINE):
            found[name] = f"transformers.models.{file.parent.name}.{file.stem}"
    return found


def build(name: str) -> nn.Module:
    """A tiny instance with random weights, in float32."""
    kind = getattr(importlib.import_module(names()[name]), name)
    parameters = list(inspect.signature(kind).parameters.values())
    arguments = [ARGUMENTS[parameter.name] for parameter in parameters if parameter.default is parameter.empty]
    module = kind(*arguments).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)
