"""Pictures of several handwritten digits, and questions whose answers need the right place in the picture."""

from hasten.models.digit_questions.questions import PlacedDigit, Sample, digit_questions

__all__ = ["PlacedDigit", "Sample", "digit_questions"]
