"""The command line: what it prints, and one clear line with exit status 1 for bad input."""

import copy
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from command_line import refused, run

import hasten
from hasten.acceleration import measure
from hasten.acceleration.inference import Inference
from hasten.acceleration.preflight import examine
from hasten.acceleration.report import TechniqueReport
from hasten.bench.kernels import cases as kernel_cases
from hasten.cli import bench, demo, doctor, loading, picture, tables
from hasten.cli import generate as generation
from hasten.kernels import cpu, tuning

GENERATE = ("generate", "stdlib-llama", "def read(path):", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def embedded():
    return loading.load("stdlib-llama", [], "auto")


def test_version():
    assert run("--version").stdout == f"hasten {hasten.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "accelerate", "generate", "bench", "doctor"])
def test_help_names_every_command(command):
    assert command in run("--help").output
    assert "Usage" in run(command, "--help").output


def test_generate_streams_to_stdout_and_tells_the_speed_on_stderr(embedded):
    model, tokenizer = embedded
    result = run(*GENERATE)
    text = generation.continue_prompt(model, tokenizer, "def read(path):", 8).text
    assert result.stdout.strip() == ("def read(path):" + text).strip()
    assert result.stderr.startswith("hasten: 8 tokens, ") and "tokens/s in decode" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--dense",),
        ("--wina", "0.5"),
        ("--teal", "0.4", "--dense"),
        ("--cats", "0.5"),
    ],
    ids=" ".join,
)
def test_generate_with_techniques(options, tmp_path):
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("import os\n\n\ndef names(folder):\n    return sorted(os.listdir(folder))\n" * 4)
    calibrated = () if options == ("--dense",) else ("--calibration", calibration)
    record = json.loads(run(*GENERATE, *options, *calibrated, "--json").stdout)
    assert record["tokens"] == 8 and record["text"] and record["tokens_per_second"] > 0
    assert len(record["plan"]) == sum(option in ("--dense", "--wina", "--teal", "--cats") for option in options)


def test_generate_says_what_it_calibrates_on(monkeypatch):
    monkeypatch.setattr(loading, "CALIBRATION_CHARACTERS", 2_000)
    assert "calibrating on Python sources" in run(*GENERATE, "--wina", "0").stderr


def test_generate_samples():
    assert run(*GENERATE, "--temperature", "0.8").stdout.startswith("def read(path):")


def test_generate_in_another_dtype():
    record = json.loads(run(*GENERATE, "--dtype", "float32", "--json").stdout)
    assert record["plan"] == [] and record["tokens"] == 8


def test_generate_from_a_folder_that_was_saved(embedded, tmp_path):
    model, tokenizer = embedded
    settings = {"calibration": "def f(x):\n" * 9, "tokenizer": tokenizer, "measure_speed": False}
    with hasten.accelerated(model, hasten.Wina(0.9), **settings):
        hasten.save(model, tmp_path, tokenizer)
        text = generation.continue_prompt(model, tokenizer, "def read(path):", 8).text
    arguments = ("generate", tmp_path, "def read(path):", "--max-new-tokens", "8")
    assert json.loads(run(*arguments, "--json").stdout)["text"] == text
    assert "holds a plan of hasten.save" in run(*arguments, "--wina", "0.5", status=1).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--wina", "1.5"), "sparsity must be in [0, 1), got 1.5"),
        (("--teal", "-0.1"), "sparsity must be in [0, 1), got -0.1"),
        (("--cats", "nan"), "sparsity must be in [0, 1), got nan"),
        (("--allocation", "greedy"), "--wina or --teal"),
        (("--allocation", "greedy", "--cats", "0.5"), "--wina or --teal"),
        (("--temperature", "-1"), "temperature must be 0 or more, got -1.0"),
        (("--temperature", "nan"), "temperature must be 0 or more, got nan"),
        (("--wina", "0.5", "--calibration", "nowhere.txt"), "there is no file nowhere.txt"),
        (("--max-new-tokens", "600"), "more than the model's context of 512: max_new_tokens can be 506 at most"),
        (("--calibration", "nowhere.txt"), "--calibration is for --wina, --teal or --cats"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_generate_refuses(options, message):
    assert message in refused(*GENERATE, *options)


TEMPLATE = "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}<reply>"


@pytest.fixture
def with_template(embedded, monkeypatch):
    """A function that gives the embedded model's tokenizer a chat template."""
    model, tokenizer = embedded

    def give(template):
        chatting = copy.deepcopy(tokenizer)
        chatting.chat_template = template
        monkeypatch.setattr(loading, "load", lambda name, plan, dtype: (model, chatting))

    return give


def test_chat_goes_through_the_template_and_only_the_reply_is_shown(embedded, with_template):
    with_template(TEMPLATE)
    reply = generation.continue_prompt(*embedded, "<user>def read(path):</><reply>", 8).text
    assert run(*GENERATE, "--chat").stdout == reply + "\n"
    record = json.loads(run(*GENERATE, "--chat", "--json").stdout)
    assert record["text"] == reply and record["prompt"] == [{"role": "user", "content": "def read(path):"}]


def test_chat_under_a_constraint(embedded, with_template):
    with_template(TEMPLATE)
    pattern = ("--regex", "[0-9]{2}", "--seed", "1", "--temperature", "1", "--json")
    chatted = json.loads(run(*GENERATE, *pattern, "--chat").stdout)
    plain = json.loads(run("generate", "stdlib-llama", "<user>def read(path):</><reply>", *pattern).stdout)
    assert chatted["text"] == plain["text"] and chatted["log_z"] == plain["log_z"]


@pytest.mark.parametrize("options", [(), ("--regex", "[0-9]")], ids=["free", "constrained"])
def test_chat_without_a_template_or_with_one_that_refuses(options, with_template):
    assert refused(*GENERATE, "--chat", *options) == (
        "hasten: the tokenizer of stdlib-llama has no chat template: leave out --chat"
    )
    with_template("{{ raise_exception('no user may speak first') }}")
    assert "refuses the message: no user may speak first" in refused(*GENERATE, "--chat", *options)


@pytest.mark.parametrize("content", ["", "\xff"], ids=["empty", "no text"])
def test_generate_refuses_to_calibrate_on_nothing(content, tmp_path):
    file = tmp_path / "calibration.txt"
    file.write_bytes(content.encode("latin-1"))
    refused(*GENERATE, "--wina", "0.5", "--calibration", file)


def test_generate_refuses_two_techniques_for_one_projection(tmp_path):
    (tmp_path / "calibration.txt").write_text("def read(path):\n" * 8)
    both = ("--wina", "0.5", "--teal", "0.5", "--calibration", tmp_path / "calibration.txt")
    assert "would both change" in refused(*GENERATE, *both)


def test_generate_refuses_models_that_are_not_there(tmp_path):
    assert refused("generate", "./nowhere", "x") == "hasten: there is no folder ./nowhere"
    refused("generate", tmp_path, "x")


@pytest.mark.parametrize(
    "options", [("--max-new-tokens", "0"), ("--dtype", "int8"), ("--wina", "half"), ("--wino", "1")]
)
def test_misspelt_options_are_usage_errors(options):
    assert "Usage" in run(*GENERATE, *options, status=2).output


def test_doctor():
    result = run("doctor")
    assert f"hasten                   {hasten.__version__}" in result.stdout
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json").stdout)}
    assert checks["torch"]["state"] == checks["backend reference"]["state"] == "ok"
    if cpu.reason() is None:
        assert checks["instruction set"]["value"] == cpu.isa()
        assert checks["backend cpu"]["value"] == "works on cpu"


def test_doctor_tells_where_measurements_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    file = tuning.cache_file()
    checks = {check.name: check for check in doctor.examine()}
    assert checks["measurements"].value == f"{file} (nothing measured yet)"
    tuning.remembered("a kernel", lambda: 1)
    checks = {check.name: check for check in doctor.examine()}
    assert checks["measurements"].value == f"{file} (exists)"
    monkeypatch.setenv("HASTEN_CACHE", "")
    checks = {check.name: check for check in doctor.examine()}
    assert checks["measurements"].state == "note" and "not kept" in checks["measurements"].value


def test_doctor_fails_where_a_backend_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "linear", lambda x, weight: x @ weight.T + 1)
    assert "BROKEN" in run("doctor", status=1).stdout


def test_doctor_fails_where_a_backend_raises(monkeypatch):
    def broken(x, weight):
        raise RuntimeError("CPU kernel returned 3")

    monkeypatch.setattr(doctor, "linear", broken)
    assert "RuntimeError: CPU kernel returned 3" in run("doctor", status=1).stdout


def test_doctor_tells_why_there_are_no_compiled_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "reason", lambda: "not built: no compiler")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
    assert "not built: no compiler" in run("doctor").stdout
    (tmp_path / "_cpu.so").touch()
    run("doctor", status=1)


def test_doctor_marks_versions_outside_the_range(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "99.0")
    checks = {check.name: check for check in doctor.examine()}
    assert checks["torch"].state == "note" and "outside" in checks["torch"].value


def test_doctor_tells_of_two_openmp_runtimes(monkeypatch):
    monkeypatch.setattr(cpu, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    checks = {check.name: check for check in doctor.examine()}
    assert checks["OpenMP"].state == "note" and "/b/libiomp5.so" in checks["OpenMP"].value


def test_demo_in_its_reduced_form(tmp_path):
    result = run("demo", "--quick", "--plot", tmp_path / "demo.png", "--json", tmp_path / "demo.json")
    assert "measured on the embedded model" in result.stdout and "WINA 50%" in result.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "demo.json").read_text())
    read = {(point["technique"], point["sparsity"]): point["weights_read"] for point in written["drift"]}
    active = {(point["technique"], point["sparsity"]): point["active_share"] for point in written["drift"]}
    assert read["dense", 0.0] == active["dense", 0.0] == 1
    assert (
        read["WINA", 0.65] == pytest.approx(active["WINA", 0.65], rel=1e-12)
        and read["CATS", 0.65] > active["CATS", 0.65]
    )
    assert all(abs(active[name, sparsity] - (1 - sparsity)) < 0.08 for name, sparsity in active)
    kl = {(point["technique"], point["sparsity"]): point["drift"]["kl"] for point in written["drift"]}
    assert kl["dense", 0.0] < kl["WINA", 0.25] < kl["WINA", 0.65]


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_demo_refuses_files_that_it_cannot_write_before_it_measures(option, tmp_path):
    assert "there is no folder" in refused("demo", option, tmp_path / "nowhere" / "file")
    assert "is a folder" in refused("demo", option, tmp_path)


def test_demo_without_matplotlib(monkeypatch):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    assert picture.destination("auto") is None
    with pytest.raises(ValueError, match=r"pip install 'hasten\[plot\]'"):
        picture.destination("demo.png")


def test_weights_read_counts_real_parameters(embedded):
    found = examine(Inference(embedded[0]))
    sizes = {projection.name: projection.weight.numel() for projection in found.projections}
    total = sum(sizes.values())
    query = "model.layers.0.self_attn.q_proj"
    wina = TechniqueReport(hasten.Wina({query: 0.5}), [query], active_share=0.25)
    assert demo.weights_read(found, wina) == 1 - 0.75 * sizes[query] / total
    skipped = sizes["model.layers.0.mlp.up_proj"] + sizes["model.layers.0.mlp.down_proj"]
    cats = TechniqueReport(hasten.Cats({"model.layers.0.mlp": 0.5}), ["model.layers.0.mlp"], active_share=0.25)
    assert demo.weights_read(found, cats) == 1 - 0.75 * skipped / total
    assert demo.weights_read(found, TechniqueReport(hasten.DenseDecode(), [query])) == 1


def test_the_speed_table_says_slower_where_it_is_slower(capsys):
    record = {
        "op": "decode",
        "case": "1.1B wina 50%",
        "baseline": "transformers",
        "seconds": 0.08,
        "baseline_seconds": 0.04,
    }
    demo._show_speed([record | {"ratio": 0.5}, record | {"ratio": 2.0}])
    slower, faster = capsys.readouterr().out.splitlines()[-2:]
    assert "0.50x slower" in slower and "2.00x faster" in faster and "12.5" in faster


def test_the_picture_marks_the_measured_speed(tmp_path):
    drift = measure.Drift(0.01, 0.9, 10.0, 11.0, 100)
    points = [demo.Point("WINA", 0.5, 0.5, 0.5, drift)]
    record = {"case": "1.1B wina 50%", "baseline": "transformers", "ratio": 2.0}
    picture.draw(tmp_path / "with.png", points, [record])
    picture.draw(tmp_path / "without.png", points, [])
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_plain_tables_are_aligned():
    table = tables.plain("title", ("name", "ms"), [("a", "10.0"), ("long", "2.5")])
    assert table == "title\nname    ms\na     10.0\nlong   2.5"


def test_bench_lists_cases_by_operator_part_or_pattern():
    everything = run("bench", "--list").stdout.splitlines()
    assert "decode 1.1B bfloat16" in everything and "linear 4096->4096 batch 1 float32" in everything
    linear = run("bench", "linear", "--list").stdout.splitlines()
    assert linear == [name for name in everything if name.startswith("linear ")]
    assert run("bench", "linear *batch [12] float32", "prefill", "--list").stdout.count("\n") == 7
    assert bench.select(everything, bench.DEFAULT)


def test_bench_suggests_the_nearest_case(tmp_path):
    assert "the nearest is 'column_sparse_linear'" in refused("bench", "colum_sparse_linear")
    assert "there is no folder" in refused("bench", "linear", "--json", tmp_path / "nowhere" / "bench.json")


def test_bench_runs_cases_as_a_table_and_json(monkeypatch, tmp_path):
    keys = {
        "op",
        "case",
        "dtype",
        "device",
        "backend",
        "machine",
        "baseline",
        "seconds",
        "baseline_seconds",
        "ratio",
        "share_of_limit",
    }
    small = [replace(case, case="small", make=_small) for case in kernel_cases("cpu")[:1]]
    monkeypatch.setattr(bench.kernels, "cases", lambda device: small)
    result = run("bench", "linear", "--threads", torch.get_num_threads(), "--json", tmp_path / "bench.json")
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("linear")]
    assert row.split()[1] == "small" and "x " in row
    records = json.loads((tmp_path / "bench.json").read_text())
    assert [record["baseline"] for record in records] == ["torch", "hasten dense"]
    assert all(set(record) == keys for record in records)


def _small():
    call = partial(torch.zeros, 4)
    return {"hasten": [call], "torch": [call], "hasten dense": [call]}


def test_tables_are_drawn_on_a_terminal_and_keep_every_character(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tables.show("title", ("what", "found"), [("hint", "pip install 'hasten[plot]'")])
    assert "│ pip install 'hasten[plot]' │" in capsys.readouterr().out
