"""`hasten.generate`: its law, its errors, and that a step is one forward."""

import json
import math

import jsonschema
import pytest
import torch
import transformers
from toy_language import EOS, LETTERS, law_of_texts, toy

import hasten
from hasten.generation.generation import generate
from hasten.generation.results import DeadEndError
from hasten.guidance.text.constraints import JsonSchema, Predicate, PredicateError, Regex, Substring, UnsatisfiableError
from hasten.guidance.text.particles import ParticleFilter

LONGEST = 3


def wanted(text):
    return len(text) >= 2 and text.count("a") == 1


CONSTRAINTS = {
    "no-dead-ends": Predicate(wanted, on="complete") & Predicate(lambda text: text.count("a") <= 1),
    "dead-ends": Predicate(wanted, on="complete"),
    "mask": Regex("[b-e]{2}a|[b-e]a[b-e]?|a[b-e]{1,2}"),
}


@pytest.fixture(scope="module")
def embedded():
    folder = hasten.embedded_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.requires_grad_(False), transformers.AutoTokenizer.from_pretrained(folder)


def distance(results, exact):
    """Total variation of the texts, each counted by its weight within its result, from the exact law."""
    law = dict.fromkeys(exact, 0.0)
    alive = [result for result in results if result.ok]
    for result in alive:
        weights = torch.tensor([each.log_weight for each in result.particles], dtype=torch.float64).softmax(-1)
        for each, weight in zip(result.particles, weights.tolist(), strict=True):
            if weight:
                law[each.text] += weight / len(alive)
    return sum(abs(law[text] - exact[text]) for text in exact) / 2


def assert_mean_is(expected, estimates):
    estimates = torch.tensor(estimates, dtype=torch.float64)
    error = float(estimates.std() / math.sqrt(len(estimates)))
    assert abs(float(estimates.mean()) - expected) < 4 * error + 1e-12, (float(estimates.mean()), expected, error)
    assert error < 0.2 * expected


def assert_law(results, law, accepts, group):
    """The weights of the texts of each group sum to the group's probability in the mean, and so do all to Z."""
    assert_mean_is(sum(mass for text, mass in law.items() if accepts(text)), [result.mass_kept for result in results])
    for name in {group(text) for text in law if accepts(text)}:
        estimates = [
            sum(math.exp(each.log_weight) for each in result.particles if group(each.text) == name)
            / len(result.particles)
            for result in results
        ]
        assert_mean_is(sum(mass for text, mass in law.items() if accepts(text) and group(text) == name), estimates)


@pytest.mark.parametrize("method", ["awrs", "mask", "reject"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_law_is_the_models_law_given_the_constraint(name, method):
    """Against the listed probabilities of every text: unbiased, text by first letter and by last letter."""
    model, tokenizer = toy()
    law = law_of_texts(model, "abc", LONGEST)
    settings = {"constraint": CONSTRAINTS[name], "method": method, "max_new_tokens": LONGEST, "on_dead": "return"}
    results = generate(model, tokenizer, ["abc"] * 120, particles=10, seed=0, ess_threshold=0.95, **settings)
    assert all(wanted(each.text) for result in results for each in result.particles if each.log_weight > -math.inf)
    assert_law(results, law, wanted, lambda text: text.find("a"))
    assert all(result.resamplings == 0 for result in results) == (method == "reject")


def test_the_law_is_the_same_where_a_mask_spares_the_next_walk(monkeypatch):
    """A mask after one refusal, and at once after one that found less than 0.9 of the law valid: still unbiased."""
    model, tokenizer = toy()
    law = law_of_texts(model, "abc", LONGEST)
    checks = {}
    monkeypatch.setattr("hasten.guidance.text.particles.MASK_AFTER", 1)
    for little in (-math.inf, math.log(0.9)):
        monkeypatch.setattr("hasten.guidance.text.particles.LITTLE_MASS", little)
        settings = {"constraint": CONSTRAINTS["mask"], "max_new_tokens": LONGEST, "on_dead": "return", "seed": 0}
        results = generate(model, tokenizer, ["abc"] * 120, particles=10, ess_threshold=0.95, **settings)
        assert_law(results, law, wanted, lambda text: text.find("a"))
        checks[little] = sum(result.checks_per_token for result in results)
    assert checks[math.log(0.9)] < checks[-math.inf]


def test_one_particle_has_the_law_of_masks_and_many_the_posteriors():
    model, tokenizer = toy()
    law = {text: mass for text, mass in law_of_texts(model, "cab", 3).items() if len(text) == 3 and text[2] == "d"}
    exact = {text: mass / sum(law.values()) for text, mass in law.items()}
    settings = {"constraint": Regex("[a-e]{2}d"), "max_new_tokens": 3, "seed": 7}
    distances = [
        distance(generate(model, tokenizer, ["cab"] * (960 // count), particles=count, **settings), exact)
        for count in (1, 4, 32)
    ]
    assert distances == sorted(distances, reverse=True) and distances[0] > 2 * distances[-1], distances


def test_temperature_and_critic_are_part_of_the_law():
    model, tokenizer = toy()
    law = law_of_texts(model, "abc", 2, temperature=0.5)
    critic = {text: math.log(1 + len(set(text))) for text in law}
    law = {text: mass * math.exp(critic[text]) for text, mass in law.items()}
    settings = {"temperature": 0.5, "critic": critic.__getitem__, "max_new_tokens": 2, "ess_threshold": 0.9}
    constraint = Predicate(lambda text: "a" in text, on="complete")
    results = generate(
        model, tokenizer, ["abc"] * 150, constraint=constraint, particles=8, seed=0, on_dead="return", **settings
    )
    assert_law(results, law, lambda text: "a" in text, lambda text: text.find("a"))
    assert any(result.resamplings for result in results)


@pytest.mark.parametrize("constraint", [None, CONSTRAINTS["mask"]], ids=["free", "regex"])
def test_a_batch_of_prompts_gives_what_each_gives_alone(constraint):
    model, tokenizer = toy()
    prompts = ["abcde", "b", "dcb", "ab"]
    settings = {"constraint": constraint, "particles": 5, "max_new_tokens": 6}
    together = generate(model, tokenizer, prompts, seed=3, **settings)
    for place, prompt in enumerate(prompts):
        alone = generate(model, tokenizer, prompt, seed=3 + place, **settings)
        assert [each.tokens for each in alone.particles] == [each.tokens for each in together[place].particles]
        assert alone.log_z == pytest.approx(together[place].log_z, abs=1e-9)
        assert (alone.text, alone.resamplings) == (together[place].text, together[place].resamplings)
    assert len({result.text for result in together}) > 1


def test_top_k_and_top_p_cut_what_can_be_drawn():
    model, tokenizer = toy()
    settings = {"particles": 200, "max_new_tokens": 1, "seed": 0}
    constraint = Regex("[a-e]")
    for cut in ({"top_k": 6}, {"top_p": 0.999999}, {}):
        result = generate(model, tokenizer, "abc", constraint=constraint, **cut, **settings)
        assert {each.text for each in result.particles} == set(LETTERS)
    p = model(torch.tensor([[0, 1, 2]])).logits[0, -1, : EOS + 2].softmax(-1).sort(descending=True)
    for cut in ({"top_k": 2}, {"top_p": float(p.values[0]) + 1e-6}):
        result = generate(model, tokenizer, "abc", **cut, **settings)
        assert {each.tokens[0] for each in result.particles} == set(p.indices[:2].tolist())


def test_the_seed_decides():
    model, tokenizer = toy()

    def texts(seed):
        return [each.text for each in generate(model, tokenizer, "ab", seed=seed, particles=6).particles]

    torch.manual_seed(1)
    drawn = texts(None)
    torch.manual_seed(1)
    assert texts(5) == texts(5) != texts(6) and texts(None) == drawn


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_that_of_transformers(embedded, penalty):
    model, tokenizer = embedded
    prompts = ["def read(self):\n    ", "import os\n"]
    settings = {"max_new_tokens": 24, "repetition_penalty": penalty}
    for prompt, result in zip(prompts, generate(model, tokenizer, prompts, temperature=0, **settings), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        expected = model.generate(**inputs, do_sample=False, **settings)[0, inputs["input_ids"].shape[1] :]
        assert list(result.tokens) == expected.tolist()
        assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert result.log_z == 0


def test_greedy_under_a_constraint_takes_the_likeliest_allowed_token(embedded):
    model, tokenizer = embedded
    settings = {"constraint": Regex("[0-9]{4}"), "temperature": 0, "max_new_tokens": 8}
    awrs = generate(model, tokenizer, "year = ", **settings)
    mask = generate(model, tokenizer, "year = ", method="mask", **settings)
    cut = generate(model, tokenizer, "year = ", top_k=1, top_p=0.1, **settings)
    assert (
        awrs.tokens == mask.tokens == cut.tokens
        and awrs.text.isdigit()
        and math.isnan(awrs.log_z)
        and math.isnan(awrs.log_weight)
    )


class Counter:
    """Counts forwards and their rows."""

    def __init__(self, model):
        self.rows = []
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.rows.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._hook.remove()


def test_a_step_is_one_forward_of_the_texts_that_still_grow():
    """The prompt is read once, however many particles share it; texts that have ended cost nothing."""
    model, tokenizer = toy()
    with Counter(model) as counter:
        results = generate(model, tokenizer, ["abc", "de"], particles=3, max_new_tokens=8, seed=0)
    lengths = [len(each.tokens) for result in results for each in result.particles]
    growing = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert min(lengths) < max(lengths) and counter.rows == [(2, 3), *((count, 1) for count in growing)]


def test_resampling_reads_nothing_again():
    model, tokenizer = toy()
    with Counter(model) as counter:
        result = generate(
            model, tokenizer, "abc", constraint=CONSTRAINTS["mask"], particles=12, seed=0, ess_threshold=1
        )
    assert result.resamplings and counter.rows[0] == (1, 3) and all(shape[1] == 1 for shape in counter.rows[1:])


def test_every_law_is_that_of_the_particles_own_text(monkeypatch):
    """It is what a fresh prefill of prompt and text gives, after forks and with particles that have ended."""
    model, tokenizer = toy()
    grow, compared = ParticleFilter._grow, []

    def compare(texts, growing, logits):
        for row, i in enumerate(growing):
            particle = texts.particles[i]
            ids = tokenizer(["abcde", "ba"][particle.prompt])["input_ids"] + particle.tokens
            expected = model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-9, rtol=0)
            compared.append(len(particle.tokens))
        grow(texts, growing, logits)

    monkeypatch.setattr(ParticleFilter, "_grow", compare)
    constraint = Regex("[a-e]b?[cd][a-e]*d[abe]{1,4}")
    settings = {"constraint": constraint, "particles": 6, "ess_threshold": 1, "max_new_tokens": 12, "seed": 0}
    results = generate(model, tokenizer, ["abcde", "ba"], **settings)
    assert all(result.resamplings > 2 for result in results) and max(compared) > 5


def test_checks_are_counted():
    model, tokenizer = toy()
    calls = []
    constraint = Predicate(lambda text: calls.append(text) or True)
    result = generate(model, tokenizer, "abc", constraint=constraint, seed=2, max_new_tokens=6, extra_checks=1)
    assert result.checks_per_token == 3
    assert generate(model, tokenizer, "abc", seed=2).checks_per_token == 0
    masked = generate(model, tokenizer, "abc", constraint=constraint, seed=2, max_new_tokens=6, method="mask")
    assert masked.checks_per_token == EOS + 2  # every token of the vocabulary


def test_several_eos_ids_end_a_text_and_padding_is_never_drawn():
    model, tokenizer = toy()
    result = generate(model, tokenizer, "abc", particles=300, seed=0, max_new_tokens=8)
    tokens = {token for each in result.particles for token in each.tokens}
    assert tokens == set(range(EOS + 2))
    for each in result.particles:
        assert (each.tokens[-1] >= EOS) == (each.status == "complete")
        assert each.text == "".join(LETTERS[token] for token in each.tokens if token < EOS)


def test_json_is_valid_and_parsed(embedded):
    model, tokenizer = embedded
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "size": {"type": "integer", "minimum": 3, "maximum": 9},
        },
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    settings = {"constraint": JsonSchema(schema), "particles": 3, "max_new_tokens": 80, "seed": 0}
    for result in generate(model, tokenizer, ["x = ", "settings = "], **settings):
        jsonschema.validate(result.value, schema)
        assert result.value == json.loads(result.text) and result.ok and 0 < result.mass_kept < 1


def test_a_substring_comes_with_its_places():
    model, tokenizer = toy()
    constraint = Substring(["abcab", "cabd"])
    result = generate(model, tokenizer, "ab", constraint=constraint, seed=0, max_new_tokens=4)
    assert result.value == constraint.places(result.text) != []


def test_stop_strings_cut_the_text():
    model, tokenizer = toy()
    results = generate(model, tokenizer, ["abc"] * 40, stop=["bd", "e"], seed=0, max_new_tokens=12)
    for result in results:
        whole = "".join(LETTERS[token] for token in result.tokens if token < EOS)
        places = [place for place in (whole.find("bd"), whole.find("e")) if place >= 0]
        assert result.text == whole[: min(places, default=None)]
        assert (result.status == "stopped") == bool(places)
    assert {result.status for result in results} == {"stopped", "complete"}


def test_a_stop_string_asks_the_constraint_about_the_text_before_it():
    model, tokenizer = toy()
    law = {}
    for text, mass in law_of_texts(model, "abc", LONGEST).items():
        before = text.partition("d")[0]
        law[before] = law.get(before, 0) + mass
    settings = {"stop": "d", "max_new_tokens": LONGEST, "on_dead": "return", "particles": 8, "seed": 0}
    constraint = Predicate(lambda text: text[:1] == "e" and "d" not in text, on="complete")
    with pytest.raises(DeadEndError, match="a stop string, but the text does not satisfy the constraint"):
        generate(model, tokenizer, "abc", constraint=constraint, stop=["a", "b", "c", "d"], seed=11)
    results = generate(model, tokenizer, ["abc"] * 200, constraint=constraint, **settings)
    assert_law(results, law, lambda text: text[:1] == "e", len)
    assert {result.status for result in results if result.ok} == {"stopped", "complete", "length"}


@pytest.mark.parametrize("method", ["awrs", "mask"])
def test_the_constraint_begins_after_the_marker(method):
    model, tokenizer = toy()
    constraint = Regex("b[cd]")
    results = generate(
        model, tokenizer, ["abc"] * 20, constraint=constraint, start_after="ac", max_new_tokens=28, method=method,
        seed=0, particles=4, on_dead="return",
    )  # fmt: skip
    assert {result.ok for result in results} == {True, False}
    for result in results:
        if result.ok:
            assert result.text in ("bc", "bd") and result.preamble.find("ac") == len(result.preamble) - 2
        else:
            waited = result.preamble.find("ac") < 0
            assert result.status == "incomplete" and ("anything up to 'ac'" in result.reason) == waited


def test_a_stream_gives_the_text_in_pieces_that_nothing_takes_back(embedded):
    model, tokenizer = embedded
    for settings in (
        {"stop": "("},
        {"constraint": Predicate(lambda text: "e" not in text)},
        {"stop": ["\n    if", ":"]},
    ):
        stream = generate(model, tokenizer, "def read(self):\n    ", seed=4, max_new_tokens=40, stream=True, **settings)
        pieces = list(stream)
        whole = generate(model, tokenizer, "def read(self):\n    ", seed=4, max_new_tokens=40, **settings)
        assert "".join(pieces) == whole.text == stream.result.text and all(pieces) and len(pieces) > 1


def test_a_dead_end_says_where_and_what_was_allowed():
    model, tokenizer = toy()
    constraint = Regex("a{30}")
    with pytest.raises(
        DeadEndError, match=r"at token 4, after 'aaaa': max_new_tokens=4 is reached .* allows 'a'"
    ) as error:
        generate(model, tokenizer, "abc", constraint=constraint, max_new_tokens=4)
    (result,) = error.value.results
    assert not result.ok and result.status == "incomplete" and result.log_z == -math.inf and result.mass_kept == 0
    assert (result.text, result.value) == ("aaaa", None)
    returned = generate(
        model, tokenizer, ["abc", "de"], constraint=constraint, max_new_tokens=4, particles=2, on_dead="return"
    )
    assert [each.status for result in returned for each in result.particles] == ["incomplete"] * 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"constraint": Predicate(lambda text: text in ("", "a"), on="prefix"), "top_k": 1}, "no probability to what"),
        ({"constraint": Predicate(lambda text: not text), "max_checks": 1}, "none of max_checks=1 drawn tokens"),
        ({"constraint": Regex("aaaa"), "method": "reject"}, "the model went on with .*, which the constraint refuses"),
        ({"critic": lambda text: 0.0 if not text else -math.inf}, "the critic gives the text no weight"),
    ],
    ids=["no-support", "budget", "refused", "critic"],
)
def test_every_kind_of_dead_end_is_named(settings, reason):
    model, tokenizer = toy()
    with pytest.raises(DeadEndError, match=f"dead end at token [0-9]+, after .*{reason}"):
        generate(model, tokenizer, "cde", seed=1, **settings)
    result = generate(model, tokenizer, "cde", seed=1, on_dead="return", **settings)
    assert result.status == "dead" and result.reason and not result.ok and result.value is None


def test_chat_messages():
    model, tokenizer = toy()
    with pytest.raises(ValueError, match="chat_template"):
        generate(model, tokenizer, [{"role": "user", "content": "abc"}])
    tokenizer = toy.__wrapped__()[1]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}d{% endif %}"
    )
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    alone, (first, second) = (
        generate(model, tokenizer, prompt, seed=0, max_new_tokens=6) for prompt in (chat, [chat, chat[:1]])
    )
    assert alone.tokens == first.tokens == generate(model, tokenizer, "abcd", seed=0, max_new_tokens=6).tokens
    assert second.tokens == generate(model, tokenizer, "abd", seed=1, max_new_tokens=6).tokens


def test_a_predicate_that_raises_is_reported_with_its_text():
    model, tokenizer = toy()
    with pytest.raises(PredicateError, match=r"raised ZeroDivisionError for the text '[a-e]'") as error:
        generate(model, tokenizer, "abc", constraint=Predicate(lambda text: not text or 1 / 0 > 0))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_unsatisfiable_constraint_is_found_before_the_first_forward():
    model, tokenizer = toy()
    with Counter(model) as counter, pytest.raises(UnsatisfiableError):
        generate(model, tokenizer, "abc", constraint=Predicate(lambda text: False))
    assert not counter.rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"particles": 0}, "particles must be 1 or more, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": 0, "particles": 2}, "temperature 0 takes one text, particles=2"),
        ({"temperature": -1}, "temperature must be 0 or more, got -1"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_k": 0}, "top_k must be 1 or more"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"method": "magic"}, "method must be one of awrs, mask, reject, got 'magic'"),
        ({"resampling": "best"}, "resampling must be one of systematic"),
        ({"on_dead": "ignore"}, "on_dead must be one of error, return, got 'ignore'"),
        ({"ess_threshold": 2}, "ess_threshold must be between 0 and 1, got 2"),
        ({"max_checks": 0}, "max_checks must be 1 or more"),
        ({"extra_checks": -1}, "extra_checks must be 0 or more"),
        ({"max_checks": 3, "method": "mask"}, "settings of method 'awrs', not of 'mask'"),
        ({"extra_checks": 1, "method": "reject"}, "settings of method 'awrs', not of 'reject'"),
        ({"particles": 2.0}, "particles must be an integer, got 2.0"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be an integer, got '5'"),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer, got None"),
        ({"top_k": 2.5}, "top_k must be an integer, or None, got 2.5"),
        ({"seed": "x"}, "seed must be an integer, or None, got 'x'"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": "0.5"}, "top_p must be a number, or None, got '0.5'"),
        ({"critic": 5}, "critic must be a function from a text to a log score, got 5"),
        ({"critic": lambda text: "good"}, "critic must return a log score below infinity, got 'good' for the text"),
        ({"critic": lambda text: None}, "critic must return a log score below infinity, got None for the text"),
        ({"stop": 5}, "stop must be strings that are not empty, got 5"),
        ({"stop": [""]}, "stop must be strings that are not empty"),
        ({"constraint": "[0-9]+"}, r"constraint must be a Constraint such as hasten.Regex\(...\), got '\[0-9\]\+'"),
        ({"start_after": "x"}, "start_after='x' says where a constraint begins"),
        ({"start_after": 5, "constraint": Predicate(str.isalpha)}, "start_after=5 says where a constraint begins"),
        ({"stream": True, "particles": 2}, "stream needs one prompt and one particle, got 1 and 2"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", ""]}, "prompt 1 is empty: it has no tokens"),
        ({"prompt": 5}, "prompt must be a text, chat messages or a list of these, got int"),
        ({"prompt": [5]}, "prompt must be a text or a list of chat messages, got 5"),
        (
            {"max_new_tokens": 254},
            "3 tokens; with max_new_tokens=254 .* context of 256: max_new_tokens can be 253 at most",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    model, tokenizer = toy()
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, **({"prompt": "abc"} | change))


def test_a_tokenizer_of_another_model(embedded):
    with pytest.raises(ValueError, match=r"the tokenizer does not belong to the model: it has ids 0..4095"):
        generate(toy()[0], embedded[1], "abc")
    with pytest.raises(ValueError, match=r"does not belong to the model: it has ids 0..6, the model predicts 0..4095"):
        generate(embedded[0], toy()[1], "abc")
