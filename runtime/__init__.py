"""hasten makes generative models that people already run faster, in place and reversibly, and says what that costs.

report = hasten.accelerate(model, hasten.Wina(sparsity=0.5), calibration=texts, tokenizer=tokenizer)
print(report)
hasten.revert(model)
"""

import importlib

_WHERE = {
    "acceleration.install": ("accelerate", "accelerated", "revert"),
    "acceleration.calibration": ("calibrate",),
    "acceleration.statistics": ("Statistics",),
    "embedded": ("embedded_model",),
    "errors": ("HastenError", "SavedPlanError", "StateError", "UnsupportedModelError"),
    "generation.generation": ("generate",),
    "guidance.diffusion.adaptive": ("AdaptiveGuidance",),
    "guidance.diffusion.apg": ("AdaptiveProjectedGuidance",),
    "guidance.diffusion.cfg_plus_plus": ("CFGPlusPlus",),
    "guidance.diffusion.classifier_free": ("ClassifierFreeGuidance", "Cutoff", "TwoScaleGuidance"),
    "guidance.text.constraints": (
        *("Choice", "Grammar", "JsonSchema", "OneOf", "Predicate", "Regex", "Substring"),
        *("InconsistentPredicateError", "PredicateError", "UnsatisfiableError"),
    ),
    "guidance.diffusion.intervals": ("SigmaInterval", "StepInterval", "StepSet", "Within"),
    "guidance.diffusion.linear_ag": ("LinearAG",),
    "pipelines.guided": ("guided", "guider", "run_key"),
    "generation.logits_processor": ("ConstraintLogitsProcessor",),
    "generation.results": ("DeadEndError", "Generated", "Text"),
    "generation.stream": ("Stream",),
    "acceleration.measure": ("Drift", "Timing"),
    "models.digit_diffusion": ("DigitClassifier", "DigitDiffusion"),
    "models.transnormer": ("TransNormer", "TransNormerConfig"),
    "acceleration.plan": ("Plan",),
    "acceleration.report": ("Report",),
    "pipelines.record": ("Run",),
    "acceleration.saving": ("load", "save"),
    "acceleration.techniques": (
        *("Cats", "DenseDecode", "DistinctTiles", "FastLinearAttention", "Teal", "VisionTokens", "Wina"),
    ),
    "acceleration.found_schedule": ("FoundSchedule",),
    "acceleration.techniques.vision_token_search": ("search_vision_tokens",),
    "sparsity.vision_tokens": ("FastV", "PSigmoid", "Pyramid", "Stages"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hasten.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
