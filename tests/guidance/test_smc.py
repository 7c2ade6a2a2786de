"""SMC on a language model small enough to list all its texts."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from hasten.guidance.smc import SCHEMES, Population, ancestors, effective_sample_size, log_mean_weight
from hasten.guidance.text.rejection import draw

LETTERS, LENGTH, EOS = 3, 4, 3


@dataclass
class Toy:
    """Texts over 3 letters of at most 4 tokens. A text is a number: its letters in base 4, each plus 1.

    p[text, token] is the law of the next token, the last the end; valid[text, token] the check. A text that reaches
    full length counts if it is wanted.
    """

    p: torch.Tensor
    valid: torch.Tensor
    wanted: set
    probability: dict

    @property
    def z(self):
        return sum(self.probability[text] for text in self.wanted)


def number(text):
    return sum((letter + 1) * 4**place for place, letter in enumerate(text))


def toy(looks_ahead):
    """With `looks_ahead` the check refuses exactly the prefixes of no wanted text, else it knows complete texts
    alone."""
    generator = torch.Generator().manual_seed(11)
    texts = [text for length in range(LENGTH + 1) for text in itertools.product(range(LETTERS), repeat=length)]
    p = -torch.rand(4 ** (LENGTH + 1), LETTERS + 1, dtype=torch.float64, generator=generator).log()
    p = (p**2) / (p**2).sum(-1, keepdim=True)
    wanted = {text for text in texts if len(text) >= 2 and sum(text) % 4 == 3 and text[0] != text[-1]}
    alive = {text[:length] for text in wanted for length in range(len(text) + 1)} if looks_ahead else set(texts)
    valid = torch.zeros(4 ** (LENGTH + 1), LETTERS + 1, dtype=torch.bool)
    probability = {}
    for text in texts:
        mass = math.prod(float(p[number(text[:i]), letter]) for i, letter in enumerate(text))
        probability[text] = mass * (float(p[number(text), EOS]) if len(text) < LENGTH else 1.0)
        valid[number(text), EOS] = text in wanted
        for letter in range(LETTERS):
            longer = (*text, letter)
            valid[number(text), letter] = longer in (wanted if len(longer) == LENGTH else alive)
    return Toy(p, valid, wanted, probability)


def awrs(p, valid, generator):
    """The closed form for all rows at once: (token, log weight), of the order of Gumbel keys."""
    order = (p.log() - (-torch.rand(p.shape, dtype=torch.float64, generator=generator).log()).log()).argsort(
        -1, descending=True
    )
    p, v = p.gather(-1, order), valid.gather(-1, order)
    first = v.int().argmax(-1, keepdim=True)
    after = torch.cat([p.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(p[..., :1])], -1).gather(-1, first + 1)
    next_valid = torch.cat([v, torch.zeros_like(v[..., :1])], -1).gather(-1, first + 1)
    weight = torch.where(v.any(-1, keepdim=True), p.gather(-1, first) + after * next_valid, 0.0)
    return order.gather(-1, first)[..., 0], weight[..., 0].log()


def by_draw(p, valid, generator):
    """The same by hasten's own draw."""
    rows, accepts = p.flatten(0, -2), valid.flatten(0, -2).tolist()
    drawn = draw(rows.log(), lambda row, token: accepts[row][token], generator=generator)
    return drawn.token.clamp(min=0).view(p.shape[:-1]), drawn.log_weight.view(p.shape[:-1])


def run(lm, runs, particles, threshold=0.5, scheme="systematic", step=awrs, critic=None, seed=0):
    """All runs at once: the population, the texts [runs, particles] as numbers."""
    generator = torch.Generator().manual_seed(seed)
    population = Population(runs, particles)
    texts = torch.zeros(runs, particles, dtype=torch.int64)
    finished = torch.zeros(runs, particles, dtype=torch.bool)
    for place in range(LENGTH):
        token, log_weight = step(lm.p[texts], lm.valid[texts], generator)
        population.reweight(torch.where(finished, 0.0, log_weight))
        texts = torch.where(finished | (token == EOS), texts, texts + (token + 1) * 4**place)
        finished |= token == EOS
        if critic is not None:
            population.twist(critic[texts])
        going_on = (~finished & population.log_weights.isfinite()).any(-1)
        parents = population.resample(threshold, scheme, generator, going_on & (place < LENGTH - 1))
        texts, finished = texts.gather(1, parents), finished.gather(1, parents)
    return population, texts


def distance(lm, population, texts):
    """Total variation between the posterior and the law of a text drawn by weight."""
    kept = population.log_weights.isfinite().any(-1)
    weights = population.log_weights[kept].softmax(-1)
    law = torch.zeros(4 ** (LENGTH + 1), dtype=torch.float64).index_add(0, texts[kept].flatten(), weights.flatten())
    law /= law.sum()
    posterior = torch.zeros_like(law)
    for text in lm.wanted:
        posterior[number(text)] = lm.probability[text] / lm.z
    return float((law - posterior).abs().sum() / 2)


def assert_mean_is(z, population):
    estimates = population.log_z().exp()
    error = float(estimates.std() / math.sqrt(len(estimates)))
    assert abs(float(estimates.mean()) - z) < 4 * error and error < 0.03 * z


@pytest.mark.parametrize("looks_ahead", [True, False], ids=["no-dead-ends", "dead-ends"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0], ids=["importance", "smc", "always"])
def test_the_normaliser_is_unbiased(looks_ahead, threshold):
    lm = toy(looks_ahead)
    population, _ = run(lm, 20_000, 5, threshold)
    assert_mean_is(lm.z, population)
    dead = population.log_weights == -torch.inf
    assert dead.any() != looks_ahead


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_leaves_the_normaliser_unbiased(scheme):
    lm = toy(False)
    population, texts = run(lm, 20_000, 4, 0.9, scheme, seed=1)
    assert_mean_is(lm.z, population)
    wanted = torch.tensor([number(text) for text in lm.wanted])
    assert torch.isin(texts[population.log_weights.isfinite()], wanted).all()


def test_draw_gives_the_same_estimate():
    lm = toy(True)
    population, texts = run(lm, 1500, 4, step=by_draw)
    assert_mean_is(lm.z, population)
    assert distance(lm, population, texts) == pytest.approx(distance(lm, *run(lm, 1500, 4)), abs=0.03)


@pytest.mark.parametrize("looks_ahead", [True, False], ids=["no-dead-ends", "dead-ends"])
@pytest.mark.parametrize("threshold", [0.0, 0.5], ids=["importance", "smc"])
def test_the_posterior_is_reached_as_particles_grow(looks_ahead, threshold):
    """One particle is what a token mask gives: the law of local masking, far from the posterior."""
    lm = toy(looks_ahead)
    distances = [distance(lm, *run(lm, 40_000 // count, count, threshold)) for count in (1, 4, 16, 64)]
    assert distances == sorted(distances, reverse=True), distances
    assert distances[0] > 0.2 and distances[-1] < 0.04, distances


def test_a_critic_weighs_complete_texts_only():
    lm = toy(False)
    critic = torch.randn(4 ** (LENGTH + 1), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    scored = sum(lm.probability[text] * math.exp(critic[number(text)]) for text in lm.wanted)
    for threshold in (0.0, 0.7):
        population, _ = run(lm, 20_000, 5, threshold, critic=critic)
        assert_mean_is(scored, population)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_particles_are_continued_by_their_share(scheme):
    log_weights = torch.tensor([0.4, 0.0, 0.05, 0.35, 0.2], dtype=torch.float64).log()
    runs = 20_000
    parents = ancestors(log_weights.expand(runs, -1), scheme, torch.Generator().manual_seed(0))
    copies = torch.nn.functional.one_hot(parents, 5).sum(1).double()
    error = copies.std(0) / math.sqrt(runs)
    assert ((copies.mean(0) - 5 * log_weights.exp()).abs() <= 4 * error + 1e-12).all()
    certain = {"systematic": 1, "residual": 1, "stratified": 1, "multinomial": 0}[scheme]
    assert copies[:, 0].min() >= certain and (copies[:, 1] == 0).all()


def test_systematic_and_residual_keep_equal_weights_as_they_are():
    log_weights = torch.zeros(50, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for scheme in ("systematic", "stratified", "residual"):
        assert torch.equal(ancestors(log_weights, scheme, generator), torch.arange(8).expand(50, -1))


def test_ess_and_mean_weight():
    log_weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf], [-torch.inf] * 4])
    assert effective_sample_size(log_weights).tolist() == [4, 1, 0]
    assert log_mean_weight(log_weights).exp().tolist() == [1, 0.25, 0]
    assert torch.equal(effective_sample_size(log_weights - 5000), effective_sample_size(log_weights))


def test_nothing_is_resampled_where_all_are_dead_and_the_dead_are_replaced():
    population = Population(3, 4)
    population.reweight(
        torch.tensor([[-torch.inf] * 4, [0.0, -torch.inf, -torch.inf, -torch.inf], [0.0, -0.1, 0.0, 0.0]])
    )
    parents = population.resample(0.5, "systematic", torch.Generator().manual_seed(0))
    assert parents.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert population.log_z().exp().tolist() == pytest.approx([0, 0.25, (3 + math.exp(-0.1)) / 4])
    assert population.log_weights[1].tolist() == pytest.approx([math.log(0.25)] * 4)
    population.reweight(torch.full((3, 4), torch.inf))
    assert (population.log_weights[0] == -torch.inf).all()


def test_populations_with_their_own_generators_do_not_depend_on_each_other():
    log_weights = torch.randn(3, 6, dtype=torch.float64)
    together = ancestors(log_weights, "multinomial", [torch.Generator().manual_seed(row) for row in range(3)])
    for row in range(3):
        alone = ancestors(log_weights[row : row + 1], "multinomial", [torch.Generator().manual_seed(row)])
        assert torch.equal(alone[0], together[row])


def test_an_unknown_scheme():
    with pytest.raises(ValueError, match=r"resampling must be one of systematic, .*, got 'best'"):
        ancestors(torch.zeros(1, 2, dtype=torch.float64), "best", torch.Generator())
