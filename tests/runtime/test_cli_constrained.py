"""`hasten generate` under a constraint: the text satisfies it, or the exit status is 1."""

import json
import re

import command_line
import jsonschema
import pytest

from hasten.cli import demo_constrained


def run(*arguments, status=0):
    return command_line.run("generate", "stdlib-llama", "x = ", *arguments, status=status)


@pytest.mark.parametrize("particles", [1, 3])
def test_a_pattern(particles):
    result = run("--regex", "[0-9]{2,4}", "--particles", particles, "--seed", 1)
    assert re.fullmatch("[0-9]{2,4}\n", result.stdout)
    assert re.match(r"hasten: complete, \d tokens, [\d.]+ checks per token", result.stderr)
    assert ("particles effective" in result.stderr) == (particles > 1)


def test_a_choice_that_matches_a_pattern_and_json_output():
    result = run("--choice", "red,green,blue", "--regex", "[a-g].*", "--json", "--temperature", 1)
    record = json.loads(result.stdout)
    assert record["text"] in ("green", "blue") and record["log_z"] < 0 and record["status"] == "complete"


def test_a_schema_and_a_grammar_from_files(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}')
    record = json.loads(run("--json-schema", schema, "--json").stdout)
    assert record["value"] == json.loads(record["text"]) and set(record["value"]) <= {1, 2} and record["log_z"] is None
    grammar = tmp_path / "sum.lark"
    grammar.write_text('start: "1" ("+" "1")~1..2')
    assert run("--grammar", grammar).stdout in ("1+1\n", "1+1+1\n")


def test_the_seed_decides_without_a_constraint_too():
    settings = ("--temperature", 1, "--max-new-tokens", 12, "--seed")
    first, again, other = (run(*settings, seed).stdout for seed in (3, 3, 4))
    assert first == again != other


def test_a_file_that_is_no_text(tmp_path):
    file = tmp_path / "schema.json"
    file.write_bytes(b"\xff")
    for option in ("--json-schema", "--grammar"):
        assert f"{file} is no UTF-8" in run(option, file, status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--regex", "[0-9]{40}", "--max-new-tokens", 3), "dead end at token 3, after '[0-9]+': max_new_tokens=3 is"),
        (("--regex", "("), "regex '\\('"),
        (("--choice", ""), "--choice is empty"),
        (("--grammar", "/no/such/file"), "there is no file /no/such/file"),
        (("--particles", 2, "--temperature", 0), "temperature 0 takes one text"),
    ],
    ids=["dead-end", "pattern", "choice", "file", "temperature"],
)
def test_what_cannot_be_done_is_one_line_and_status_1(arguments, message):
    (line,) = run(*arguments, status=1).stderr.splitlines()
    assert line.startswith("hasten: ") and re.search(message, line)


def test_the_demo_shows_weights_and_what_it_shows_is_true(tmp_path):
    file = tmp_path / "demo.json"
    shown = command_line.run("demo", "constrained", "--json", file).stdout
    extracted, watched = json.loads(file.read_text())["examples"]
    assert demo_constrained.balanced(watched["text"]) and demo_constrained.balanced(watched["masked"])
    jsonschema.validate(json.loads(extracted["text"]), demo_constrained.SCHEMA)
    assert all(0 < each["mass_kept"] <= 1.5 and len(each["log_weights"]) == 8 for each in (extracted, watched))
    assert "mass kept" in shown and "checks per token" in shown and "log weights" in shown
    line = command_line.refused("demo", "constrained", "--quick")
    assert line == "hasten: --plot and --quick are for the demos of sparsity, guidance and vision"
