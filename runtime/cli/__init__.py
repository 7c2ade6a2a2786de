"""The command line: `hasten accelerate`, `generate`, `demo`, `bench` and `doctor`."""

from hasten.cli.app import app, main

__all__ = ["app", "main"]
