"""The small trained models that come with hasten."""

from pathlib import Path

_MODELS = Path(__file__).parent / "models"


def embedded_model(name: str = "stdlib-llama") -> Path:
    """The folder of an embedded model, with its card in README.md.

    "stdlib-llama" is an ordinary Hugging Face folder with held-out text in heldout.txt, and "digits-llava" one of an
    image-text model, whose questions `hasten.models.digit_questions` makes; "digit-diffusion" is for
    DigitDiffusion.load and DigitClassifier.load.

    Raises:
        ValueError: there is no embedded model of that name.
    """
    folder = _MODELS / name
    if not name or not (folder / "config.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in _MODELS.glob("*/config.json")))
        raise ValueError(f"no embedded model {name!r}, there are: {known}")
    return folder
