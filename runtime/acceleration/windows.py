"""Inputs for calibration and for measuring drift: from texts, token ids, or what a tokenizer or processor returns."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

Texts = str | torch.Tensor | Mapping[str, Any] | Sequence[Any]
Window = torch.Tensor | dict[str, Any]

WINDOW = 512
SHORTEST = 8

# What a tokenizer returns besides token ids; a dictionary with more holds something else than text.
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "offset_mapping")


def windows(data: Texts, tokenizer, vocabulary: int, name: str = "calibration", longest: int = WINDOW) -> list[Window]:
    """Cuts texts, one after the other, or sequences of token ids into windows of at most WINDOW tokens.

    Padding that an attention mask marks is cut off. Tails shorter than SHORTEST are left out. A dictionary that holds
    more than text, such as `pixel_values` or `input_features`, gives one window a row, each with what is its own.

    Args:
        data: texts (with a tokenizer); token ids: a tensor [T] or [B, T] or lists of them; a dictionary as a tokenizer
            or processor returns it; or a sequence of these.
        vocabulary: the number of rows of the model's embedding.
        name: what to call `data` in errors.
        longest: the longest input of the model, if that is less than WINDOW.

    Returns:
        int64 tensors [T] on the CPU, and dictionaries.

    Raises:
        TypeError, ValueError: no data, texts without a tokenizer, ids that are no integers or outside the vocabulary,
            rows whose other inputs cannot be told apart; the message names the value.
    """
    items = list(_items(data, name))
    if not items:
        raise ValueError(f"{name} is empty: give a few thousand tokens of typical text")
    sequences = [window for item in items for window in _sequences(item, tokenizer, name)]
    if all(isinstance(item, str) for item in items):
        sequences = [torch.cat(sequences)]  # however short each text is, nothing of it is lost
    shortest = min(SHORTEST, longest)
    pieces: list[Window] = []
    for sequence in sequences:
        if isinstance(sequence, dict):
            _check_length(sequence, longest, name)
            pieces.append(sequence)
        else:
            _check_ids(sequence, vocabulary, name)
            cut = sequence.split(min(WINDOW, longest))
            pieces += [piece for piece in cut if piece.numel() >= shortest]
    if not pieces:
        most = max((sequence.numel() for sequence in sequences), default=0)
        raise ValueError(f"{name} is empty: the longest sequence has {most} tokens, at least {shortest} are needed")
    return pieces


def split_heldout(pieces: list[Window]) -> tuple[list[Window], list[Window]]:
    """Sets about a tenth of the windows aside for measuring drift;
    a single window of text is cut after three quarters."""
    if len(pieces) > 1:
        kept = len(pieces) - max(1, len(pieces) // 10)
        return pieces[:kept], pieces[kept:]
    if isinstance(pieces[0], dict):
        return pieces, []
    cut = pieces[0].numel() * 3 // 4
    heldout = pieces[0][cut:]
    return ([pieces[0][:cut]], [heldout]) if heldout.numel() >= SHORTEST else (pieces, [])


def _items(data: Texts, name: str) -> Iterable[str | torch.Tensor | Mapping[str, Any]]:
    """Texts, tensors of token ids and dictionaries, one by one."""
    if isinstance(data, str | torch.Tensor | Mapping):
        yield data
    elif not isinstance(data, Sequence):
        raise TypeError(f"{name} must be texts, token ids or what a processor returns, got {type(data).__name__}")
    for item in data if isinstance(data, Sequence) and not isinstance(data, str) else ():
        if isinstance(item, list | tuple) and item and all(type(number) is int for number in item):
            yield torch.tensor(item)
        elif isinstance(item, str | torch.Tensor | Mapping | list | tuple):
            yield from _items(item, name)
        else:
            raise TypeError(f"{name} must hold texts, lists of token ids or dictionaries, got {type(item).__name__}")


def _sequences(item: str | torch.Tensor | Mapping[str, Any], tokenizer, name: str) -> list[Window]:
    """The token sequences of an item, or the dictionaries that it stays."""
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(f"{name} holds texts: pass tokenizer= as well, or token ids")
        return [torch.tensor(tokenizer(item, verbose=False)["input_ids"], dtype=torch.int64)]
    if isinstance(item, torch.Tensor):
        return list(_rows(item, name))
    return _of_dictionary(item, name)


def _rows(ids: torch.Tensor, name: str) -> torch.Tensor:
    """Token ids as int64 [B, T] on the CPU."""
    if ids.dim() not in (1, 2) or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold integer tensors [T] or [B, T], got {ids.dtype} {list(ids.shape)}")
    return torch.atleast_2d(ids).long().cpu()


def _of_dictionary(item: Mapping[str, Any], name: str) -> list[Window]:
    """The rows of a dictionary without padding: tensors where it holds text alone, else dictionaries."""
    given = {key: value for key, value in item.items() if value is not None}
    if isinstance(ids := given.get("input_ids"), torch.Tensor) and ids.dim() == 1:  # one text without a batch
        given |= {k: v[None] for k, v in given.items() if isinstance(v, torch.Tensor) and v.shape == ids.shape}
    more = [key for key in given if key not in OF_TEXT and not _repeats_ids(key, given)]
    if "input_ids" not in given:
        if not more:
            raise ValueError(f"{name} holds a dictionary without input_ids: {sorted(map(str, item))}")
        first = next(given[key] for key in ("decoder_input_ids", "labels", *more) if key in given)
        rows = 1 if getattr(first, "ndim", 2) < 2 or not hasattr(first, "__len__") else len(first)
        return [_without_padded_labels({key: _own(key, given, i, rows, name) for key in given}) for i in range(rows)]
    rows = _token_lists(given["input_ids"], name)
    masks = _token_lists(given["attention_mask"], name) if "attention_mask" in given else map(torch.ones_like, rows)
    keep = [mask.bool() for mask in masks]
    if [len(row) for row in rows] != [len(mask) for mask in keep]:
        raise ValueError(f"{name} holds an attention_mask of other lengths than its input_ids")
    if not more:
        return [row[mask] for row, mask in zip(rows, keep, strict=True)]
    return [_row(given, rows, i, mask, name) for i, mask in enumerate(keep)]


def _row(given: dict[str, Any], rows: list[torch.Tensor], i: int, keep: torch.Tensor, name: str) -> dict[str, Any]:
    """Row i of a dictionary, without its padding."""
    row = {key: _own(key, given, i, len(rows), name) for key in given}
    for key, own in row.items():
        if isinstance(own, torch.Tensor) and own.shape[:2] == (1, len(keep)) and key not in _OF_ENCODERS:
            row[key] = own[:, keep]
    return _without_padded_labels(row) | {"input_ids": rows[i][keep][None]}


def _own(key: str, given: dict[str, Any], i: int, rows: int, name: str) -> Any:
    """What row i of so many has of an input: its own place in the first dimension; of the patches of all pictures,
    which some processors pack one after the other, as many as its picture has by `*_grid_thw` [pictures, 3]."""
    value = given[key]
    if rows == 1 or isinstance(value, str) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0:
        return value
    if (grid := given.get(_GRIDS.get(key))) is not None and len(grid) == rows:
        patches = torch.as_tensor(grid).prod(-1).tolist()
        if sum(patches) == len(value):
            return value[sum(patches[:i]) : sum(patches[: i + 1])]
    elif not isinstance(value, Mapping) and len(value) == rows and not (key == "position_ids" and value.ndim == 3):
        return value[i : i + 1]
    shape = list(value.shape) if hasattr(value, "shape") else f"of length {len(value)}"
    raise ValueError(
        f"{name} holds a dictionary of {rows} rows whose {key} {shape} cannot be told apart by rows: "
        "its first dimension must be the rows; else give one dictionary a text"
    )


def _without_padded_labels(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the padding of what its decoder reads or says, which a mask of its own or -100 marks."""
    marks = row.get("decoder_attention_mask", row.get("labels"))
    if not isinstance(marks, torch.Tensor) or marks.dim() != 2:
        return row
    keep = marks[0] > 0 if "decoder_attention_mask" in row else marks[0] >= 0
    return row | {
        key: row[key][:, keep]
        for key in ("decoder_input_ids", "decoder_attention_mask", "labels")
        if keep.any() and isinstance(row.get(key), torch.Tensor) and row[key].shape == marks.shape
    }


# Inputs with a second dimension of their own, of features, which may by chance be as long as the text.
_OF_ENCODERS = ("pixel_values", "input_features", "input_values", "qformer_input_ids", "decoder_input_ids", "labels")
# Patches that are packed one picture after the other, and the input that says how many each has.
_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


def _repeats_ids(key: str, given: dict[str, Any]) -> bool:
    """Whether these are a language model's labels: its input ids again, or -100."""
    ids, labels = given.get("input_ids"), given.get("labels")
    if key != "labels" or not isinstance(ids, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return False
    return ids.shape == labels.shape and bool(((ids == labels) | (labels == -100)).all())


def _token_lists(values: Any, name: str) -> list[torch.Tensor]:
    """Rows of token ids or of a mask, as a tokenizer returns them: a tensor, an array, or lists of lists."""
    if isinstance(values, Sequence) and values and not isinstance(values[0], int):
        return [row for value in values for row in _token_lists(value, name)]
    return list(_rows(torch.as_tensor(values), name))


def _check_ids(ids: torch.Tensor, vocabulary: int, name: str) -> None:
    if ids.numel() and (ids.min() < 0 or ids.max() >= vocabulary):
        wrong = int(ids.max() if ids.min() >= 0 else ids.min())
        raise ValueError(f"{name} holds token id {wrong}, the vocabulary is 0..{vocabulary - 1}")


def _check_length(item: dict[str, Any], longest: int, name: str) -> None:
    tokens = item["input_ids"].shape[-1] if isinstance(item.get("input_ids"), torch.Tensor) else 0
    if tokens > longest:
        raise ValueError(f"{name} holds a dictionary of {tokens} tokens; the model was made for {longest}")
