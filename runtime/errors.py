"""The errors of hasten. Wrong values of arguments are `ValueError` and `TypeError`; these are about models and their
state."""

from dataclasses import dataclass


class HastenError(RuntimeError):
    """Something about the model or a saved folder stops hasten; the message names it and says what to do."""


class UnsupportedModelError(HastenError):
    """A model or one of its modules is of a kind that hasten cannot change correctly.

    Args:
        name: the module's name in the model, or `""` for the model itself.
        kind: the class of that module.
        reason: why it cannot be done.
        remedy: what the user can do instead.
    """

    def __init__(self, name: str, kind: str, reason: str, remedy: str):
        self.name, self.kind, self.reason, self.remedy = name, kind, reason, remedy
        super().__init__(f"{name or 'the model'} ({kind}): {reason}; {remedy}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why hasten leaves a module as it is: a record, from which the error is raised where the user asked for all or
    nothing.

    Args:
        name, kind, reason, remedy: as in `UnsupportedModelError`.
    """

    name: str
    kind: str
    reason: str
    remedy: str

    def error(self) -> UnsupportedModelError:
        return UnsupportedModelError(self.name, self.kind, self.reason, self.remedy)


class StateError(HastenError):
    """The model is not in the state that the call needs: accelerated twice, not accelerated, or changed since."""


class SavedPlanError(HastenError):
    """A saved folder is damaged, of a newer version, or belongs to another model."""
