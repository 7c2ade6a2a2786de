"""Output: tables, drawn on a terminal and plain elsewhere, notes, and files, checked before the work starts."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> None:
    """Prints a table on stdout. The first `labels` columns are words and stand left, the others figures."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < labels else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
    else:
        typer.echo(plain(title, columns, rows, labels))


def plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """The same table as lines of text."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [title]
    for row in (columns, *rows):
        places = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if i < labels else cell.rjust(width) for i, (cell, width) in places]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def ratio(value: float) -> str:
    """A ratio of speeds in words: "2.10x faster"; within 2 % it is the same."""
    verdict = "faster" if value >= 1.02 else "slower" if value <= 0.98 else "the same"
    return f"{value:.2f}x {verdict}"


def say(message: str) -> None:
    """Prints a note on stderr."""
    typer.echo(f"hasten: {message}", err=True)


def check_folder(path: Path) -> None:
    """Raises OSError unless a folder stands or can be made at `path`, and can be written to."""
    present = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.exists())
    if not present.is_dir():
        raise NotADirectoryError(f"cannot write to {path}: {present} is no folder")
    if not os.access(present, os.W_OK):
        raise PermissionError(f"cannot write to {path}")


def check_writable(path: Path) -> None:
    """Raises OSError unless a file can be written at `path`, so that minutes of measuring are not lost."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, a file name is needed")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}")


def write_json(path: Path, data) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
