"""A Gaussian mixture whose denoiser is known in closed form, in every parameterization, on every schedule, in float64;
and what counts its calls.
"""

import math

import torch

from hasten.guidance.diffusion.schedules import Schedule, flow, variance_exploding, variance_preserving

STABLE_DIFFUSION_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = (1 - STABLE_DIFFUSION_BETAS).cumprod(0)
SCHEDULES = {
    "vp": lambda count: variance_preserving(ALPHAS_CUMPROD, count),
    "ve": lambda count: variance_exploding(20.0, 0.02, count),
    # Without the level of pure noise, where an epsilon prediction says nothing about x0.
    "flow": lambda count: Schedule(flow(count + 1).alphas[1:], flow(count + 1).sigmas[1:]),
}
# Every prediction type that a schedule has.
KINDS = [
    *(("vp", kind) for kind in ("epsilon", "sample", "v")),
    *(("ve", kind) for kind in ("epsilon", "sample")),
    *(("flow", kind) for kind in ("epsilon", "sample", "flow")),
]


class Mixture:
    """x0 ~ sum_k weights[k] N(means[k], covariances[k]); a class is a subset of the components.

    weights [K], means [K, d], covariances [K, d, d], classes: name to components.
    """

    def __init__(self, weights, means, covariances, classes):
        self.weights, self.means, self.classes = weights, means, classes
        self.variances, self.axes = torch.linalg.eigh(covariances)

    def posterior(self, x, alpha, sigma, name):
        """E[x0 | x_t] and E[noise | x_t], each [B, d]: sums of the components' posteriors, weighted by their
        responsibilities for x [B, d].
        """
        which = self.classes[name]
        variances, axes, means = self.variances[which], self.axes[which], self.means[which]
        total = alpha**2 * variances + sigma**2  # [K, d]
        centred = torch.einsum("kdi,bkd->bki", axes, x[:, None] - alpha * means)  # along each component's axes
        logits = self.weights[which].log() - 0.5 * total.log().sum(-1) - 0.5 * (centred**2 / total).sum(-1)
        share = logits.softmax(-1)
        clean = means + torch.einsum("kdi,bki->bkd", axes, alpha * variances / total * centred)
        noise = torch.einsum("kdi,bki->bkd", axes, sigma / total * centred)
        return torch.einsum("bk,bkd->bd", share, clean), torch.einsum("bk,bkd->bd", share, noise)

    def predict(self, x, alpha, sigma, name, kind):
        """The prediction of type `kind`, by its definition."""
        x0, noise = self.posterior(x, alpha, sigma, name)
        return {"epsilon": noise, "sample": x0, "v": alpha * noise - sigma * x0, "flow": noise - x0}[kind]

    def denoiser(self, kind):
        """For `hasten.guidance.diffusion.sampling.sample`."""
        return lambda x, step, name, rows: self.predict(x, step.alpha, step.sigma, name, kind)

    def both(self, x, alpha, sigma):
        """For the samplers of CFG++: the conditional and the unconditional x0."""
        return tuple(self.posterior(x, alpha, sigma, name)[0] for name in ("conditional", "unconditional"))


class Counting:
    """A denoiser that counts what it is given."""

    def __init__(self, predict):
        self.predict, self.rows, self.calls = predict, 0, 0

    def __call__(self, x, *rest):
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        return self.predict(x, *rest)


def mixture(d=6, components=5, seed=3):
    """Components apart by a few deviations; the condition is the first two, the image condition the first three."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(components, d, d, dtype=torch.float64, generator=generator) / math.sqrt(d)
    covariances = 0.3 * roots @ roots.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    means = 1.5 * torch.randn(components, d, dtype=torch.float64, generator=generator)
    weights = torch.rand(components, dtype=torch.float64, generator=generator) + 0.2
    everything = list(range(components))
    classes = {"conditional": [0, 1], "image": [0, 1, 2], "unconditional": everything}
    return Mixture(weights / weights.sum(), means, covariances, classes)


def start(schedule, batch=4, d=6, seed=5):
    """x at the schedule's first level, as good as pure noise: [batch, d]."""
    generator = torch.Generator().manual_seed(seed)
    return schedule.sigmas[0] * torch.randn(batch, d, dtype=torch.float64, generator=generator)


def step_at(schedule, index, kind, model=None, batch=4, memory=None):
    """A step in the middle of a run, with all three predictions of the mixture."""
    model = mixture() if model is None else model
    step = schedule.step(index, start(schedule, batch), kind, {} if memory is None else memory)
    names = ("conditional", "unconditional", "image")
    return step.with_predictions(*(model.predict(step.sample, step.alpha, step.sigma, name, kind) for name in names))
