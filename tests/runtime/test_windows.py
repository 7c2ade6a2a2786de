"""What calibration data may be: every form of the same text gives the same windows, without padding."""

import pytest
import torch
from tiny_models import token_ids
from transformers import BatchEncoding

from hasten.acceleration.windows import SHORTEST, WINDOW, split_heldout, windows

VOCABULARY = 300
ROWS = [row[:length] for row, length in zip(token_ids(3, 40), (40, 25, 9), strict=True)]


def padded(side: str) -> dict[str, torch.Tensor]:
    """ROWS in one batch, as a tokenizer pads them."""
    ids, mask = torch.zeros(2, 3, 40, dtype=torch.int64)
    for i, row in enumerate(ROWS):
        place = slice(0, len(row)) if side == "right" else slice(40 - len(row), 40)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


FORMS = {
    "tensors": ROWS,
    "tensors of one row": [row[None] for row in ROWS],
    "token lists": [row.tolist() for row in ROWS],
    "nested": [[ROWS[0].tolist()], [ROWS[1], ROWS[2].tolist()]],
    "int32": [row.int() for row in ROWS],
    "padded right": padded("right"),
    "padded left": BatchEncoding(padded("left")),
    "encodings": [BatchEncoding({"input_ids": row.tolist(), "attention_mask": [1] * len(row)}) for row in ROWS],
    "lists of an encoding": BatchEncoding({"input_ids": [row.tolist() for row in ROWS]}),
    "arrays": BatchEncoding({name: value.numpy() for name, value in padded("left").items()}),
    "labels": padded("right") | {"labels": padded("right")["input_ids"].masked_fill(padded("right")["attention_mask"] == 0, -100)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_windows(form):
    found = windows(FORMS[form], None, VOCABULARY)
    assert [piece.tolist() for piece in found] == [row.tolist() for row in ROWS]
    assert {piece.dtype for piece in found} == {torch.int64}


def test_nothing_of_a_long_sequence_is_lost():
    ids = token_ids(1, 2 * WINDOW + SHORTEST)[0]
    assert torch.equal(torch.cat(windows(ids, None, VOCABULARY)), ids)
    assert [len(piece) for piece in windows(ids, None, VOCABULARY, longest=400)] == [400, 400, 232]


@pytest.mark.parametrize("longest", [1, 4, 24])
def test_models_of_few_positions_get_short_windows(longest):
    found = windows(token_ids(1, 48), None, VOCABULARY, longest=longest)
    assert {len(piece) for piece in found} == {longest} and torch.cat(found).numel() == 48


def test_a_picture_stays_with_its_text():
    ids = token_ids(1, 12)
    pixels = torch.randn(1, 3, 8, 8)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    (found,) = windows(BatchEncoding(given), None, VOCABULARY)
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    (speech,) = windows({"input_features": pixels, "labels": ids}, None, VOCABULARY)
    assert speech.keys() == {"input_features", "labels"}


def test_padded_rows_with_pictures_are_told_apart():
    given = padded("left") | {
        "pixel_values": torch.randn(3, 3, 8, 8),
        "token_type_ids": padded("left")["attention_mask"],
    }
    found = windows(given, None, VOCABULARY)
    for i, (window, row) in enumerate(zip(found, ROWS, strict=True)):
        assert torch.equal(window["input_ids"], row[None])
        assert window["attention_mask"].all() and window["token_type_ids"].shape == window["input_ids"].shape
        assert torch.equal(window["pixel_values"], given["pixel_values"][i : i + 1])


def test_rows_that_need_no_padding_are_told_apart_too():
    ids, pixels, sizes = token_ids(4, 12), torch.randn(4, 3, 8, 8), [[8, 8]] * 4
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}
    found = windows(given | {"interpolate_pos_encoding": True}, None, VOCABULARY)
    alone = [{name: value[i : i + 1] for name, value in given.items()} for i in range(4)]
    assert len(found) == 4
    for window, one in zip(found, windows(alone, None, VOCABULARY), strict=True):
        assert window.pop("interpolate_pos_encoding") is True and window.keys() == one.keys()
        assert all(torch.equal(torch.as_tensor(window[name]), torch.as_tensor(one[name])) for name in one)


def test_packed_patches_are_told_apart_by_their_grid():
    """Pictures of different sizes, whose patches lie one after the other as Qwen2-VL takes them."""
    patches, grid = torch.randn(16 + 8 + 4, 12), torch.tensor([[1, 4, 4], [1, 2, 4], [1, 2, 2]])
    given = padded("left") | {"pixel_values": patches, "image_grid_thw": grid}
    found = windows(given, None, VOCABULARY)
    for window, row, own, size in zip(found, ROWS, patches.split([16, 8, 4]), grid, strict=True):
        assert torch.equal(window["input_ids"], row[None]) and torch.equal(window["pixel_values"], own)
        assert torch.equal(window["image_grid_thw"], size[None])
    with pytest.raises(ValueError, match=r"3 rows whose pixel_values \[27, 12\] cannot be told apart"):
        windows(given | {"pixel_values": patches[1:]}, None, VOCABULARY)


def test_labels_lose_their_own_padding_row_by_row():
    features, labels = torch.randn(3, 8, 20), torch.full((3, 40), -100)
    for i, row in enumerate(ROWS):
        labels[i, : len(row)] = row
    found = windows({"input_features": features, "labels": labels, "decoder_input_ids": labels.clamp(min=0)}, None, 300)
    for i, (window, row) in enumerate(zip(found, ROWS, strict=True)):
        assert torch.equal(window["labels"], row[None]) and torch.equal(window["decoder_input_ids"], row[None])
        assert torch.equal(window["input_features"], features[i : i + 1])


def test_a_tenth_is_held_out_and_a_single_picture_is_kept():
    text, held = split_heldout(windows(token_ids(20, 16), None, VOCABULARY))
    assert (len(text), len(held)) == (18, 2)
    (window,) = windows(token_ids(1, 40), None, VOCABULARY)
    text, held = split_heldout([window])
    assert [piece.tolist() for piece in (*text, *held)] == [window[:30].tolist(), window[30:].tolist()]
    short = [window[:20]]
    assert split_heldout(short) == (short, []), "a quarter of it would be too short"
    picture = [{"input_ids": token_ids(1, 12), "pixel_values": torch.randn(1, 3, 8, 8)}]
    assert split_heldout(picture) == (picture, [])


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([[]], ValueError, "calibration is empty"),
        ({"attention_mask": torch.ones(1, 9)}, ValueError, r"without input_ids: \['attention_mask'\]"),
        ([[3.5, 4.0]], TypeError, "float"),
        (b"bytes of a text", TypeError, "int"),
        ({1, 2}, TypeError, "set"),
        (padded("left") | {"attention_mask": torch.ones(3, 7, dtype=torch.int64)}, ValueError, "other lengths"),
        (padded("left") | {"pixel_values": torch.randn(16, 12)}, ValueError, "pixel_values .*cannot be told apart by rows"),
        ({"input_ids": token_ids(3, 9), "pixel_values": torch.randn(4, 3, 8, 8)}, ValueError, r"pixel_values \[4, 3, 8, 8\]"),
        ({"input_ids": token_ids(3, 9), "position_ids": torch.zeros(3, 3, 9), "bbox": ROWS}, ValueError, "position_ids"),
        ({"input_ids": token_ids(1, 30), "pixel_values": torch.randn(1, 3, 8, 8)}, ValueError, "30 tokens.*20"),
    ],
    ids=["nothing", "no ids", "floats", "bytes", "set", "mask", "patches", "pictures", "positions", "long"],
)  # fmt: skip
def test_errors_name_the_value(data, error, words):
    with pytest.raises(error, match=words):
        windows(data, None, VOCABULARY, longest=20)
