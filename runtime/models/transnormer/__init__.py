"""TransNormerLLM (Qin et al. 2024, arXiv 2405.17381) as a transformers model.

Importing this package registers the model type `transnormer` with AutoConfig, AutoModel and AutoModelForCausalLM, so
that a released checkpoint loads without its remote code. `import hasten` alone does not: touch `hasten.TransNormer`
first.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import TransNormerCache
from .configuration import TransNormerConfig
from .modeling import TransNormerForCausalLM, TransNormerModel

TransNormer = TransNormerForCausalLM

AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig, exist_ok=True)
AutoModel.register(TransNormerConfig, TransNormerModel, exist_ok=True)
AutoModelForCausalLM.register(TransNormerConfig, TransNormerForCausalLM, exist_ok=True)

__all__ = ["TransNormer", "TransNormerCache", "TransNormerConfig", "TransNormerForCausalLM", "TransNormerModel"]
