"""Vision-token pruning: which image tokens of a prompt the layers of a decoder see."""

from hasten.sparsity.vision_tokens.schedules import FastV, PSigmoid, Pyramid, Schedule, Stages, kept, schedule

__all__ = ["FastV", "PSigmoid", "Pyramid", "Schedule", "Stages", "kept", "schedule"]
