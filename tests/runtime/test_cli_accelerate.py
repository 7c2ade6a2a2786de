"""`hasten accelerate`: a plan from options, its report, and the folder that it saves; and the options of techniques."""

import json
import os
import shutil

import pytest
import torch
import transformers
from command_line import refused, run

import hasten
from hasten.acceleration.install import installed_on
from hasten.cli import loading, techniques

CODE = "import os\n\n\ndef names(folder):\n    return sorted(os.listdir(folder))\n" * 12
QUICK = ("--no-speed", "--dtype", "float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny random models with the embedded model's tokenizer, and texts."""
    root = tmp_path_factory.mktemp("accelerate")
    tokenizer = transformers.AutoTokenizer.from_pretrained(hasten.embedded_model())
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2}
    configs = {
        "llama": transformers.LlamaConfig(**sizes, intermediate_size=96, num_attention_heads=4),
        "mamba2": transformers.Mamba2Config(**sizes, num_heads=8, head_dim=16, state_size=16, n_groups=2),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "calibration.txt").write_text(CODE)
    (root / "heldout.txt").write_text(CODE[:600].replace("names", "files"))
    return root


def test_the_report_is_printed_and_the_folder_is_generated_from_accelerated(folders, tmp_path):
    texts = ("--calibration", folders / "calibration.txt", "--heldout", folders / "heldout.txt")
    out = tmp_path / "new" / "folder"
    result = run("accelerate", folders / "llama", "--wina", 0.5, *texts, "--out", out, *QUICK)
    assert "Wina(sparsity=0.5" in result.stdout and "counted on held-out text" in result.stdout
    assert "nats per token" in result.stdout and result.stderr == (
        f"hasten: saved in {out}: hasten generate and hasten.load take it accelerated, transformers as it was\n"
    )
    model, _ = loading.load(str(out), [], "auto")
    assert installed_on(model).plan == (hasten.Wina(0.5),)
    record = json.loads(run("generate", out, "def f(", "--max-new-tokens", 4, "--json").stdout)
    assert record["plan"] == [repr(hasten.Wina(0.5))] and record["tokens"] == 4
    assert "holds a plan of hasten.save" in refused("accelerate", out, "--dense")


def test_what_is_printed_is_what_python_reports(folders):
    arguments = ("--teal", 0.4, "--calibration", folders / "calibration.txt", *QUICK, "--json")
    record = json.loads(run("accelerate", folders / "llama", *arguments).stdout)
    model, tokenizer = loading.load(str(folders / "llama"), [], "float32")
    report = hasten.accelerate(model, hasten.Teal(0.4), calibration=CODE, tokenizer=tokenizer, measure_speed=False)
    assert record == json.loads(report.to_json())
    assert 0.5 < record["techniques"][0]["active_share"] < 0.7


def test_several_options_make_one_plan(folders):
    arguments = ("--dense", "--wina", 0.5, "--fast-linear-attention", "--calibration", folders / "calibration.txt")
    record = json.loads(run("accelerate", folders / "mamba2", *arguments, "--no-drift", *QUICK, "--json").stdout)
    used = [entry["technique"] for entry in record["techniques"]]
    assert used == ["FastLinearAttention", "Wina", "DenseDecode"]
    assert all(entry["drift"] is None and entry["timings"] == [] for entry in record["techniques"])


def test_greedy_allocation(folders):
    arguments = ("--wina", 0.3, "--allocation", "greedy", "--calibration", folders / "calibration.txt")
    record = json.loads(run("accelerate", folders / "llama", *arguments, *QUICK, "--json").stdout)
    (wina, _) = record["techniques"]
    assert wina["configuration"] == {"sparsity": 0.3, "allocation": "greedy"}
    assert len({setting["sparsity"] for setting in wina["settings"].values()}) > 1


def test_speed_is_measured_unless_one_says_no(folders):
    arguments = ("accelerate", folders / "llama", "--dense", "--dtype", "float32")
    assert "decode, after 128 tokens: " in run(*arguments).stdout
    assert "ms (" not in run(*arguments, "--no-speed").stdout


def test_a_model_that_cannot_be_changed_is_one_line(folders):
    line = refused("accelerate", folders / "llama", "--fast-linear-attention", *QUICK)
    assert line.startswith("hasten: ") and "no linear-attention layer" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "choose what to do: --fast-linear-attention, --wina, --teal, --cats or --dense"),
        (("--dense", "--allocation", "greedy"), "--allocation is for --wina or --teal: give one of them"),
        (("--dense", "--calibration", "x.txt"), "--calibration is for --wina, --teal or --cats: give one of them"),
        (("--wina", "2"), "--wina: sparsity must be in [0, 1), got 2.0"),
        (("--wina", "0.5", "--no-drift", "--heldout", "x.txt"), "--heldout is what drift is measured on"),
        (("--wina", "0.5", "--calibration", "nowhere.txt"), "there is no file nowhere.txt"),
        (("--wina", "0.5", "--calibration", "."), ". is a folder, a file is needed"),
        (("--wina", "0.5", "--calibration", os.devnull), "/dev/null is empty: give a few thousand tokens"),
        (("--dense", "--heldout", "nowhere.txt"), "there is no file nowhere.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_one_line_and_found_out_before_a_model_is_loaded(options, message, monkeypatch):
    monkeypatch.setattr(loading, "load", None)
    assert message in refused("accelerate", "stdlib-llama", *options)


def test_a_folder_that_cannot_be_made_is_refused_first(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load", None)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "is no folder" in refused("accelerate", "stdlib-llama", "--dense", "--out", out)


def test_a_folder_of_another_model_is_left_alone_and_one_of_ours_is_written_anew(folders, tmp_path):
    before = {path.name: path.read_bytes() for path in (folders / "mamba2").iterdir()}
    arguments = ("accelerate", folders / "llama", "--dense", *QUICK, "--out")
    assert "holds a model that hasten.save did not write" in refused(*arguments, folders / "mamba2")
    assert before == {path.name: path.read_bytes() for path in (folders / "mamba2").iterdir()}
    run(*arguments, tmp_path)
    run("accelerate", folders / "mamba2", "--fast-linear-attention", *QUICK, "--out", tmp_path)
    model, _ = loading.load(str(tmp_path), [], "auto")
    assert installed_on(model).plan == (hasten.FastLinearAttention(),)


def copied(folder, to, **changes):
    """A copy of a model's folder with another configuration."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_model_that_cannot_be_loaded_is_one_line_that_names_it(folders, tmp_path):
    dense = ("--dense", *QUICK)
    assert (
        refused("accelerate", "", *dense) == "hasten: MODEL is empty: give a Hugging Face id, a folder, or stdlib-llama"
    )
    assert "draws digits and writes no text" in refused("accelerate", "digit-diffusion", *dense)
    assert f"there is no folder {tmp_path}/nowhere" in refused("accelerate", tmp_path / "nowhere", *dense)
    assert f"there is no model in the folder {tmp_path}" in refused("accelerate", tmp_path, *dense)
    wider = copied(folders / "llama", tmp_path / "wider", intermediate_size=112)
    assert "is saved as [64, 96], its config.json asks for [64, 112]" in refused("accelerate", wider, *dense)
    deeper = copied(folders / "llama", tmp_path / "deeper", num_hidden_layers=3)
    assert f"{deeper} lacks the weight model.layers.2." in refused("accelerate", deeper, *dense)
    other = copied(folders / "llama", tmp_path / "other", model_type="t5")
    assert f"{other} is no causal language model, its type is t5" in refused("accelerate", other, *dense)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        damaged = copied(folders / "llama", tmp_path / f"damaged {name}")
        (damaged / name).write_bytes((damaged / name).read_bytes()[:100])
        assert f"{damaged} cannot be loaded: " in refused("accelerate", damaged, *dense)


@pytest.mark.parametrize("row", techniques.TABLE, ids=lambda row: row.option)
def test_every_command_that_takes_a_plan_takes_every_technique(row):
    for command in ("accelerate", "generate"):
        assert row.option[:14] in run(command, "--help").output
    value = 0.25 if row.takes else True
    (technique,) = techniques.plan_of({row: value}, "greedy" if "allocation" in row.takes else "uniform")
    assert type(technique) is getattr(hasten, row.technique)
    assert getattr(technique, "sparsity", 0.25) == 0.25
    assert getattr(technique, "allocation", "greedy") == "greedy"
