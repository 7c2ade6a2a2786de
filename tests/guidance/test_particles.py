"""The particles of constrained generation over a table of logits: no transformers, and the law of every text is
known."""

import itertools
import math

import pytest
import torch

from hasten.guidance.text.constraints import Predicate, Regex, UnsatisfiableError
from hasten.guidance.text.particles import ParticleFilter
from hasten.guidance.text.sampling import Sampling
from hasten.guidance.text.vocabulary import Vocabulary

LETTERS, EOS, PADDED = "abc", 3, 6
VOCABULARY = Vocabulary([b"a", b"b", b"c", b""], eos=(EOS,))
LONGEST = 4


class Table:
    """A decoder whose next token depends on the last two: logits [V, V, W] in float64, W above V as in a padded
    model."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.logits = torch.randn(len(VOCABULARY), len(VOCABULARY), PADDED, dtype=torch.float64, generator=generator)
        self.logits[..., len(VOCABULARY) :] = 50.0  # whoever draws from the padding draws nothing else
        self.texts: list[list[int]] = []
        self.steps: list[int] = []

    def prefill(self, prompts):
        assert not self.texts
        return self._read([list(prompt) for prompt in prompts])

    def step(self, tokens, rows):
        return self._read([[*self.texts[row], token] for token, row in zip(tokens, rows, strict=True)])

    def _read(self, texts):
        self.texts = texts
        self.steps.append(len(texts))
        return torch.stack([self.logits[text[-2], text[-1]] for text in texts])

    def law(self, prompt):
        """The probability of every text of at most LONGEST letters behind the prompt."""
        p = self.logits[..., : len(VOCABULARY)].softmax(-1)
        law = {}
        for length in range(LONGEST + 1):
            for text in itertools.product(range(len(LETTERS)), repeat=length):
                ids = [*prompt, *text]
                mass = math.prod(float(p[ids[i - 2], ids[i - 1], ids[i]]) for i in range(len(prompt), len(ids)))
                mass *= float(p[ids[-2], ids[-1], EOS]) if length < LONGEST else 1.0
                law["".join(LETTERS[token] for token in text)] = mass
        assert sum(law.values()) == pytest.approx(1)
        return law


def run(prompts, *, seed=0, **settings):
    """A particle filter that has come to its end, and the table that it read."""
    names = ("constraint", "start_after", "stops")
    others = {name: settings.pop(name) for name in names if name in settings}
    table = Table()
    sampling = Sampling(**({"max_new_tokens": LONGEST} | settings))
    texts = ParticleFilter(table, VOCABULARY, prompts, sampling, seeds=range(seed, seed + len(prompts)), **others)
    for _ in texts:
        pass
    return texts, table


def wanted(text):
    return len(text) >= 2 and text.count("a") == 1


CONSTRAINTS = {
    "dead ends": Predicate(wanted, on="complete"),
    "prefix": Predicate(wanted, on="complete") & Predicate(lambda text: text.count("a") <= 1),
    "mask": Regex("[bc]*a[bc]+|[bc]+a"),
}


def assert_mean_is(expected, estimates):
    error = float(estimates.std() / math.sqrt(len(estimates)))
    assert abs(float(estimates.mean()) - expected) < 4 * error and error < 0.2 * expected


@pytest.mark.parametrize("method", ["awrs", "mask", "reject"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_weights_are_unbiased(name, method):
    """exp(log Z) in the mean is the mass of the valid texts, and so is the weight of those with the "a" at each
    place."""
    texts, table = run(
        [[0, 1]] * 500, constraint=CONSTRAINTS[name], method=method, particles=8, ess_threshold=0.9, seed=1
    )
    law = table.law([0, 1])
    weights = texts.population.log_weights.exp()
    assert all(
        particle.status in ("complete", "length") and wanted(particle.text.decode())
        for particle, weight in zip(texts.particles, weights.flatten().tolist(), strict=True)
        if weight
    )
    assert_mean_is(sum(mass for text, mass in law.items() if wanted(text)), texts.population.log_z().exp())
    places = torch.tensor([particle.text.find(b"a") for particle in texts.particles]).view(weights.shape)
    for place in range(LONGEST):
        exact = sum(mass for text, mass in law.items() if wanted(text) and text.find("a") == place)
        assert_mean_is(exact, (weights * (places == place)).mean(-1))
    assert (sum(texts.resamplings) == 0) == (method == "reject")


def test_without_a_constraint_texts_have_the_tables_own_law():
    texts, table = run([[1, 2]] * 10, particles=400)
    counts = {}
    for particle in texts.particles:
        text = particle.text.decode()
        counts[text] = counts.get(text, 0) + 1
    law = {text: mass * len(texts.particles) for text, mass in table.law([1, 2]).items()}
    often = {text: expected for text, expected in law.items() if expected > 5}
    freedom = len(often) - 1
    assert freedom > 20
    distance = sum((counts.get(text, 0) - expected) ** 2 / expected for text, expected in often.items())
    assert distance < freedom + 4 * math.sqrt(2 * freedom)
    assert (texts.population.log_weights == 0).all()


def test_a_step_reads_the_texts_that_still_grow_and_nothing_twice():
    texts, table = run([[0, 1], [2, 2]], particles=6, seed=4)
    lengths = [len(particle.tokens) for particle in texts.particles]
    assert table.steps == [2, *(sum(length > step for length in lengths) for step in range(1, max(lengths)))]
    assert min(lengths) < max(lengths)
    assert all(token < len(VOCABULARY) for particle in texts.particles for token in particle.tokens)


def test_every_row_is_the_text_of_the_particle_that_draws_from_it():
    """After forks too, and beside particles that have ended."""
    table = Table()
    sampling = Sampling(particles=6, max_new_tokens=8, ess_threshold=1)
    texts = ParticleFilter(table, VOCABULARY, [[0, 1], [2, 2]], sampling, seeds=[0, 1], constraint=Regex("[bc]*a[bc]+"))
    resampled = []
    for _ in texts:
        growing = [particle for particle in texts.particles if particle.status is None]
        rows = [texts._rows[i] for i, particle in enumerate(texts.particles) if particle.status is None]
        read = [[*[[0, 1], [2, 2]][particle.prompt], *particle.tokens[:-1]] for particle in growing]
        assert [table.texts[row] for row in rows] == read
        resampled.append(sum(texts.resamplings))
    assert len(set(resampled)) > 3


@pytest.mark.parametrize("name", [None, "mask"])
def test_a_prompt_gives_what_it_gives_alone(name):
    settings = {"constraint": CONSTRAINTS.get(name), "particles": 4, "ess_threshold": 0.9}
    prompts = [[0, 1], [2, 2, 1], [1, 0]]
    together, _ = run(prompts, **settings)
    for place, prompt in enumerate(prompts):
        alone, _ = run([prompt], seed=place, **settings)
        assert [each.tokens for each in alone.particles] == [each.tokens for each in together.of_prompt(place)]
        assert torch.equal(alone.population.log_weights[0], together.population.log_weights[place])
        assert alone.choose(0) == together.choose(place)


def test_the_chosen_particle_is_drawn_by_weight():
    texts, _ = run([[0, 1]] * 2000, constraint=CONSTRAINTS["mask"], particles=2, ess_threshold=0)
    alive = texts.population.log_weights.isfinite().any(-1)
    shares = texts.population.log_weights[alive].softmax(-1)[:, 1]
    chosen = torch.tensor([texts.choose(prompt) for prompt in range(2000)], dtype=torch.float64)[alive]
    error = math.sqrt(float((shares * (1 - shares)).sum()))
    assert abs(float((chosen - shares).sum())) < 4 * error


def test_every_end_has_its_status():
    texts, _ = run([[0, 1]] * 50, stops=("cb", "ba"), seed=2)
    for particle in texts.particles:
        whole = "".join(LETTERS[token] for token in particle.tokens if token != EOS)
        places = [place for place in (whole.find("cb"), whole.find("ba")) if place >= 0]
        assert particle.text.decode() == whole[: min(places, default=None)]
        assert particle.status == ("stopped" if places else "complete" if particle.tokens[-1] == EOS else "length")
    assert {particle.status for particle in texts.particles} == {"stopped", "complete", "length"}
    texts, _ = run([[0, 1]] * 20, constraint=Regex("b{9}"), start_after="c")
    for particle in texts.particles:
        assert particle.status == "incomplete" and b"b" * len(particle.text) == particle.text
        assert b"c" not in particle.preamble[:-1] and (particle.preamble[-1:] == b"c" or not particle.text)
    assert any(particle.text for particle in texts.particles)
    texts, _ = run([[0, 1]], constraint=Predicate(lambda text: not text), max_checks=1, seed=1)
    assert texts.particles[0].status == "dead"
    assert (
        texts.particles[0].reason == "at token 0, after '': none of max_checks=1 drawn tokens satisfies the constraint"
    )


def test_greedy_takes_the_likeliest_valid_token():
    texts, table = run([[0, 1]], constraint=Regex("[bc]{4}"), temperature=0)
    ids = [0, 1]
    for _ in range(LONGEST):
        ids.append(1 + int(table.logits[ids[-2], ids[-1], 1:3].argmax()))
    assert texts.particles[0].tokens == ids[2:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"constraint": "a+"}, r"constraint must be a Constraint such as hasten.Regex\(...\), got 'a\+'"),
        ({"start_after": "a"}, "start_after='a' says where a constraint begins"),
        ({"start_after": "", "constraint": Regex("a")}, "start_after='' says where a constraint begins"),
        ({"stops": ("",)}, "stop must be strings that are not empty, got ''"),
        ({"seeds": [1, 2]}, "seeds must be one for each prompt, got 2 for 1 prompts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ParticleFilter(Table(), VOCABULARY, [[0, 1]], Sampling(), **({"seeds": [0]} | change))


def test_an_unsatisfiable_constraint_is_found_before_the_first_prefill():
    table = Table()
    with pytest.raises(UnsatisfiableError):
        ParticleFilter(table, VOCABULARY, [[0, 1]], Sampling(), seeds=[0], constraint=Predicate(lambda text: False))
    assert not table.steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"particles": 0}, "particles must be 1 or more, got 0"),
        ({"particles": 2.0}, "particles must be an integer, got 2.0"),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer, got None"),
        ({"top_k": 0}, "top_k must be 1 or more, or None, got 0"),
        ({"top_k": 2.5}, "top_k must be an integer, or None, got 2.5"),
        ({"top_p": "0.5"}, "top_p must be a number, or None, got '0.5'"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, or None, got 1.5"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
        ({"max_checks": 0}, "max_checks must be 1 or more, or None, got 0"),
        ({"extra_checks": -1}, "extra_checks must be 0 or more, got -1"),
        ({"ess_threshold": 2}, "ess_threshold must be between 0 and 1, got 2"),
        ({"method": "magic"}, "method must be one of awrs, mask, reject, got 'magic'"),
        ({"resampling": "best"}, "resampling must be one of systematic, stratified, multinomial, residual, got 'best'"),
        ({"critic": 5}, "critic must be a function from a text to a log score, got 5"),
        ({"temperature": 0, "particles": 2}, "temperature 0 takes one text, particles=2 would all be the same"),
        ({"method": "mask", "max_checks": 3}, "settings of method 'awrs', not of 'mask'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**change)


def test_settings_go_by_name():
    with pytest.raises(TypeError, match="positional"):
        Sampling(4)
    assert Sampling(temperature=0).greedy and not Sampling().greedy
