"""What a calibration pass gathers."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Statistics:
    """What one calibration pass gathered; serves any number of accelerations of the same model, with any settings.

    Attributes:
        gathered: by the class names of techniques, whatever each gathered.
        tokens: how many tokens were seen.
        model: a checksum over samples of the model's weights.
    """

    gathered: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    model: int | None = None

    def of(self, technique: object) -> Any:
        """What was gathered for techniques of this class.

        Raises:
            ValueError: nothing.
        """
        kind = type(technique).__name__
        if kind not in self.gathered:
            raise ValueError(f"the statistics hold nothing for {kind}: calibrate this model for it")
        return self.gathered[kind]
