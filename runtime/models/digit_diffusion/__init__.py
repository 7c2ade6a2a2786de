"""A small class-conditional diffusion transformer of handwritten digits, and the classifier of what it draws."""

from hasten.models.digit_diffusion.classifier import DigitClassifier
from hasten.models.digit_diffusion.modeling import DigitDiffusion, DigitDiffusionConfig

__all__ = ["DigitClassifier", "DigitDiffusion", "DigitDiffusionConfig"]
