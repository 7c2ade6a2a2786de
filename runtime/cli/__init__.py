"""The command line: `hasten demo`, `generate`, `bench` and `doctor`."""

from hasten.cli.app import app, main

__all__ = ["app", "main"]
