"""`hasten bench`: picks benchmark cases by name, runs them, and shows their ratios."""

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
import typer

from hasten.bench import kernels, runner
from hasten.cli import tables
from hasten.model_facts import progress

# What runs if nothing is named: the cases that stand for the rest, some two minutes on two cores.
DEFAULT = (
    "linear * batch 1 bfloat16",
    "column_sparse_linear * 50% bfloat16",
    "row_sparse_linear * 50% bfloat16",
    "linear_attention* 4096 *bfloat16",
    "delta_rule * bfloat16",
    "decode",
)


# What a user would run otherwise; it stands under "to torch".
BASELINES = ("torch", "flash-linear-attention", "scaled_dot_product_attention", "transformers")


def run(patterns: list[str], json_file: Path | None, only_list: bool, threads: int | None) -> None:
    """Runs the cases that `patterns` name, prints a table and writes the records. "sweep" is a case of its own.

    Raises:
        ValueError: a pattern that matches no case; the nearest name is suggested.
        OSError: the file cannot be written; found out before anything is measured.
    """
    if patterns and patterns[0] == "sweep":
        sweep(patterns[1:], json_file, only_list)
        return
    cases = all_cases("cuda" if torch.cuda.is_available() else "cpu")
    chosen = select(cases, patterns if patterns or only_list else DEFAULT)
    if only_list:
        typer.echo("\n".join([*chosen, *([] if patterns else ["sweep"])]))
        return
    if json_file:
        tables.check_writable(json_file)
    if threads:
        torch.set_num_threads(threads)
    records = [record for name in progress(chosen, "benchmarks", unit="case") for record in cases[name]()]
    tables.show(f"Batch 1 unless it says otherwise, {torch.get_num_threads()} threads", *table(records), labels=4)
    typer.echo(
        "of limit: the share of what the memory's bandwidth (and for attention torch's matrix products) would allow, "
        "measured in the same run"
    )
    if json_file:
        tables.write_json(json_file, records)


def sweep(patterns: list[str], json_file: Path | None, only_list: bool) -> None:
    """Tries every technique on tiny models of the types of transformers that `patterns` name, "kind/type"; all if none.

    Prints how many types came to which outcome, and writes the records. Exit status 1 where one was silently wrong, or
    raised what is no refusal.

    Raises:
        ValueError: a pattern that matches no type.
        OSError: the file cannot be written.
    """
    from hasten.bench.runtime import sweep, tiny_zoo  # brings transformers

    types = {f"{kind}/{name}": (kind, name) for kind in ("causal", "image-text") for name in tiny_zoo.types(kind)}
    chosen = select(types, patterns)
    if only_list:
        typer.echo("\n".join(chosen))
        return
    if json_file:
        tables.check_writable(json_file)
    records = list(progress(sweep.sweep([types[name] for name in chosen]), "sweep", unit="type", total=len(chosen)))
    tables.show("Types of transformers, tiny and with random weights", *sweep.summary(records), labels=3)
    for technique in sweep.TECHNIQUES:
        typer.echo("\n".join(["", technique, *sweep.types_by_outcome(records, technique)]))
    if json_file:
        tables.write_json(json_file, sweep.versions() | {"records": records})
    if any(o["outcome"] in ("error", "silent") for record in records for o in record["outcomes"].values()):
        raise typer.Exit(1)


def all_cases(device: str) -> dict[str, Callable[[], list[dict]]]:
    """Every case by its name "op case dtype", as a call that measures it and returns its records."""
    cases = {}
    for case in kernels.cases(device):
        cases[f"{case.op} {case.case} {str(case.dtype).removeprefix('torch.')}"] = partial(runner.run, [case])
    cases["decode 1.1B bfloat16"] = partial(_end_to_end, "decode", device, steps=32)
    cases["prefill 1.1B bfloat16"] = partial(_end_to_end, "prefill", device, steps=1, prefill=True)
    return cases


def _end_to_end(op: str, device: str, **settings) -> list[dict]:
    from hasten.bench.runtime.decode import compare  # brings transformers, which kernels do without

    return [record for record in compare(device=device, **settings) if record["op"] == op]


def select(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names of which a pattern is the operator, or else a part, with wildcards; all if there is no pattern.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    names, chosen = list(names), []
    for pattern in patterns:
        matching = [name for name in names if name.split()[0] == pattern]
        matching = matching or [name for name in names if fnmatchcase(name, f"*{pattern}*")]
        if not matching:
            known = [*names, *dict.fromkeys(name.split()[0] for name in names), "sweep"]
            (nearest,) = difflib.get_close_matches(pattern, known, n=1, cutoff=0)
            raise ValueError(f"no case matches {pattern!r}; the nearest is {nearest!r}, and --list shows all")
        chosen += matching
    return [name for name in names if name in chosen] if chosen else names


def table(records: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and one row per case, whose baselines stand side by side."""
    columns = ("op", "case", "dtype", "backend", "ms", "to torch", "to hasten dense", "of limit")
    grouped: dict[tuple, dict[str, dict]] = {}
    for record in records:
        key = tuple(record[name] for name in ("op", "case", "dtype", "backend"))
        grouped.setdefault(key, {})[record["baseline"]] = record
    rows = []
    for key, by_baseline in grouped.items():
        record = next(iter(by_baseline.values()))
        outer = next((by_baseline[name] for name in BASELINES if name in by_baseline), None)
        limit = record["share_of_limit"]
        ratios = _ratio(outer), _ratio(by_baseline.get("hasten dense") or by_baseline.get("hasten in torch"))
        rows.append((*key, f"{record['seconds'] * 1e3:.3f}", *ratios, f"{limit:.0%}" if limit else "-"))
    return columns, rows


def _ratio(record: dict | None) -> str:
    return tables.ratio(record["ratio"]) if record else "-"
