"""Reading a device's small answers on the host without making the device wait, and stopping a run whose predictions are
no numbers.
"""

from __future__ import annotations

from collections import deque

import torch


def default_lag(device: torch.device) -> int:
    """How many steps late a device's answer is read: 0 on CPU, where it costs nothing at once, 1 elsewhere."""
    return 0 if device.type == "cpu" else 1


class Lagged:
    """Answers of the device, read `lag` steps late: by then it has computed them, and works on the step that was queued
    since.

    What is read depends on the steps' numbers alone, never on how fast the device is, so runs repeat.
    """

    def __init__(self, lag: int):
        self.lag = lag
        self._queue = deque()
        self._latest = None

    def put(self, index: int, answer: torch.Tensor) -> None:
        """The answer of step `index`: starts its copy to the host."""
        copy = answer.to("cpu", non_blocking=True)
        event = None
        if answer.device.type != "cpu":
            event = torch.Event(device=answer.device)
            event.record()
        self._queue.append((index, copy, event))

    def read(self, index: int) -> tuple[int, torch.Tensor] | None:
        """At the beginning of step `index`: the latest answer that may be known by then, with its step, or None. Asking
        twice changes nothing.
        """
        while self._queue and self._queue[0][0] < index - self.lag:
            step, answer, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            self._latest = (step, answer)
        return self._latest


class FiniteCheck:
    """Stops a run with the number of the step at which a prediction was NaN or infinite; on an accelerator up to one
    step later.
    """

    def __init__(self, count: int, device: torch.device):
        self.count = count
        self._answers = Lagged(default_lag(device))

    def __call__(self, index: int, *predictions: torch.Tensor | None) -> None:
        """Checks the predictions of step `index`; None: that pass was not computed."""
        finite = [torch.isfinite(prediction).all() for prediction in predictions if prediction is not None]
        self._answers.put(index, torch.stack(finite).all())
        self._raise(index + 1)

    def finish(self) -> None:
        """After the last step: what is still unread."""
        self._raise(self.count + self._answers.lag)

    def _raise(self, index):
        known = self._answers.read(index)
        if known is not None and not known[1]:
            raise ValueError(
                f"NaN or infinite prediction at step {known[0]} of {self.count} (counted from 0): the run was stopped"
            )
