"""Suffix arrays against sorted suffixes: random and periodic texts, every length from nothing on, every instruction
set."""

import pytest
import torch

from hasten.kernels import backend, cpu
from hasten.kernels.suffix_array import cpu as room
from hasten.kernels.suffix_array import suffix_array

FIBONACCI = ["b", "a"]
while len(FIBONACCI[-1]) < 500:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])

TEXTS = {
    **{f"{length} bytes": bytes((i * i + i // 3) % 251 for i in range(length)) for length in (0, 1, 2, 3, 63, 64, 65)},
    "one byte repeated": b"a" * 130,
    "zeros and the largest": b"\x00\xff\x00\x00\xff\xff" * 20,
    "falling": bytes(range(255, -1, -1)),
    "rising": bytes(range(256)) * 2,
    "Fibonacci": FIBONACCI[-1].encode(),
    "banana": b"banana",
    "periodic with a break": b"abc" * 50 + b"x" + b"abc" * 50,
}


def tensor(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def by_sorting(text: bytes) -> list[int]:
    return sorted(range(len(text)), key=lambda i: text[i:])


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_of_written_texts(text, isa):
    assert suffix_array(tensor(text)).tolist() == by_sorting(text)


@pytest.mark.parametrize("letters", [1, 2, 3, 256])
def test_of_random_texts(letters, isa):
    for length in range(0, 120, 7):
        text = torch.randint(letters, (length,)).to(torch.uint8)
        assert suffix_array(text).tolist() == by_sorting(bytes(text.tolist()))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_definition(text):
    with backend.use("reference"):
        assert suffix_array(tensor(text)).tolist() == by_sorting(text)


def test_of_a_longer_text_against_the_definition():
    text = torch.randint(4, (30_000,)).to(torch.uint8)
    text[10_000:20_000] = text[:10_000]  # long repetitions: several rounds of doubling, several levels of induction
    ours = suffix_array(text)
    with backend.use("reference"):
        assert torch.equal(ours, suffix_array(text))
    assert ours.dtype == torch.int32


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (b"banana", TypeError, "text: expected a tensor, got b'banana'"),
        (torch.zeros(4), TypeError, "text: expected torch.uint8, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.uint8), ValueError, r"text: expected shape \[N\], .* got shape \[2, 2\]"),
        (torch.zeros(8, dtype=torch.uint8)[::2], ValueError, r"text: .* contiguous, .* strides \(2,\) on cpu"),
        (torch.zeros(4, dtype=torch.uint8, device="meta"), ValueError, "text: .* on the CPU, .* on meta"),
    ],
    ids=["bytes", "float", "2-d", "strided", "device"],
)
def test_wrong_texts(text, error, message):
    with pytest.raises(error, match=message):
        suffix_array(text)


def test_without_memory(monkeypatch):
    if cpu.reason():
        pytest.skip(cpu.reason())
    monkeypatch.setattr(cpu.Function, "_find", lambda function, isa: lambda arguments: 2)
    monkeypatch.setattr(room, "_suffix_array", cpu.Function("suffix_array", room.SuffixArrayArguments))
    with pytest.raises(MemoryError, match="no memory for suffix_array"):
        suffix_array(tensor(b"ab"))
