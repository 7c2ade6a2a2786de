"""What is measured once is remembered: per machine, threads and build; whatever is wrong with the file, it is measured
again."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hasten.kernels import cpu, tuning


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never():
    pytest.fail("measured again")


def test_is_measured_once_and_read_by_another_process(folder):
    value = {"ratios": [1.5, None, "a"], "nested": {"é": True}}
    assert tuning.remembered("key", lambda: value) == value
    assert tuning.remembered("key", never) == value
    code = "from hasten.kernels.tuning import remembered; print(remembered('key', lambda: 0)['ratios'][0])"
    command, environment = [sys.executable, "-c", code], os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "1.5\n"
    own, every = tuning.cache_file().name, tuning.cache_file(every_isa=True).name  # by which the other process chose
    assert {path.name for path in folder.iterdir()} <= {own, every}  # and nothing half written


def test_keys_are_apart(folder):
    assert [tuning.remembered(key, lambda key=key: key * 2) for key in "abab"] == ["aa", "bb", "aa", "bb"]


def test_the_first_value_is_as_the_later_ones(folder):
    assert tuning.remembered("tuple", lambda: (1, 2)) == [1, 2] == tuning.remembered("tuple", never)


def test_what_another_process_wrote_meanwhile_is_kept(folder):
    def measure():
        tuning.remembered("other", lambda: 1)
        return 2

    assert tuning.remembered("key", measure) == 2
    assert tuning.remembered("other", never) == 1


def test_an_error_of_the_measurement_is_the_callers(folder):
    with pytest.raises(ZeroDivisionError):
        tuning.remembered("key", lambda: 1 / 0)
    assert tuning.remembered("key", lambda: 3) == 3


def corrupted(text: str) -> dict[str, bytes]:
    content = json.loads(text)
    other = {"measured": {"key": 7}, "checksum": content["checksum"]}
    return {
        "empty": b"",
        "cut": text[: len(text) // 2].encode(),
        "not JSON": b"measured: 1",
        "not UTF-8": b"\xff\xfe\x00",
        "a list": b"[1, 2]",
        "a number": b"3",
        "no checksum": b'{"measured": {"key": 7}}',
        "another value": json.dumps(other).encode(),
        "measured is a list": b'{"measured": ["key"], "checksum": ""}',
        "deep": b"[" * 100_000,
    }


@pytest.mark.parametrize("kind", corrupted('{"checksum": ""}'))
def test_a_broken_file_is_ignored_and_rewritten(folder, kind):
    tuning.remembered("key", lambda: 1)
    path = tuning.cache_file()
    path.write_bytes(corrupted(path.read_text())[kind])
    assert tuning.remembered("key", lambda: 2) == 2
    assert tuning.remembered("key", never) == 2


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("HASTEN_CACHE", str(folder))
        assert tuning.remembered("key", lambda: 1) == 1
        assert tuning.remembered("key", lambda: 2) == 2


def test_an_empty_variable_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_file() is None
    assert [tuning.remembered("key", lambda value=value: value) for value in (1, 2)] == [1, 2]
    assert not list(tmp_path.iterdir())


def test_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.delenv("HASTEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file().parent == tmp_path / "xdg" / "hasten"
    for unset in ("", None):
        monkeypatch.setenv("XDG_CACHE_HOME", "") if unset == "" else monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert tuning.cache_file().parent == tmp_path / "home" / ".cache" / "hasten"


def test_every_number_of_threads_has_a_file(folder, threads):
    torch.set_num_threads(1)
    one = tuning.cache_file()
    torch.set_num_threads(2)
    assert tuning.cache_file() != one


@pytest.mark.skipif(cpu.reason() is not None, reason="no compiled kernels")
def test_every_instruction_set_has_a_file(folder, monkeypatch):
    before = tuning.cache_file()
    monkeypatch.setattr(cpu, "isa", lambda: "another")
    assert tuning.cache_file() != before


@pytest.mark.parametrize("change", ["processor", "library", "torch"])
def test_every_processor_and_build_has_a_file(change, tmp_path, monkeypatch):
    before = tuning._build_and_processor()
    (tmp_path / "_cpu.so").write_bytes(b"another build")
    if change == "processor":
        monkeypatch.setattr(cpu, "processor", lambda: "another")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "0")
    else:
        monkeypatch.setattr(cpu, "reason", lambda: None)
        monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
    assert tuning._build_and_processor.__wrapped__() != before
