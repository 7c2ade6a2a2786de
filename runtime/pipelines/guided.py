"""A guide decides what a diffusers pipeline samples with, and which passes are computed at all.

`with hasten.guided(pipe, guide) as run` is for the pipelines that combine predictions themselves,
`hasten.guider(guide, scheduler)` for those that ask a guider component.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from warnings import warn

from packaging.version import Version

from hasten.errors import HastenError, StateError
from hasten.guidance.diffusion.guide import Guide
from hasten.guidance.diffusion.linear_ag import RunKey
from hasten.pipelines import schedulers
from hasten.pipelines.families import DIFFUSERS, family_of
from hasten.pipelines.loop import Loop
from hasten.pipelines.record import Run


@contextmanager
def guided(pipe: Any, guide: Guide, *, rescale: bool = True) -> Iterator[Run]:
    """Runs every call of `pipe` in the block under `guide`; afterwards, also after an exception, the pipeline is what
    it was.

    At each step the guide says which predictions it needs; the others are not computed (nor their share of a
    ControlNet). What it makes of them takes the place of what the pipeline itself combined, exactly, on its way into
    the scheduler's step. So the pipeline's own guidance scale no longer matters, but it must be such that the pipeline
    makes an unconditional pass: `guidance_scale` above 1 (Z-Image: above 0), for Flux, Qwen-Image and HunyuanVideo
    `true_cfg_scale` above 1 and a negative prompt. Every call of the pipeline starts with an empty memory.

    Args:
        pipe: a diffusers pipeline, one of `hasten.pipelines.families.FAMILIES`.
        guide: see `hasten.guidance.diffusion.guide`.
        rescale: do to the guide's prediction what the pipeline itself does to a guided one: `guidance_rescale`,
            Z-Image's `cfg_normalization`, Qwen-Image's norm for each token, which it has no argument to turn off.
            False: the guide's prediction is final.

    Yields:
        The run's record, filled while the pipeline runs.

    Raises:
        TypeError: guide is no Guide.
        UnsupportedModelError: the pipeline's loop or its scheduler is not known, or it has no unconditional pass at
            all.
        StateError: the pipeline, or a part that it shares with another one, is guided already, or its denoiser has a
            cache of diffusers enabled.
        ValueError: in the block: the guide needs a pass that this call of the pipeline does not make, it is for other
            samplers (CFG++ and its eta), or predictions are not finite.
    """
    _check_guide(guide)
    _check_diffusers()
    family = family_of(pipe)
    schedulers.check(pipe.scheduler)
    for name in family.denoisers:
        if getattr(getattr(pipe, name, None), "is_cache_enabled", False):
            raise StateError(
                f"{name} keeps what one step computes for the next (enable_cache); a pass that is skipped leaves "
                f"that stale: call {name}.disable_cache()"
            )
    if hasattr(pipe.scheduler.step, "hasten_loop"):
        raise StateError(f"{type(pipe).__name__} is guided already; leave the other `with hasten.guided(...)` first")
    run = Run(str(guide), type(pipe).__name__)
    with ExitStack() as undo:
        loop = Loop(pipe, family, guide, run, rescale)
        undo.callback(loop.uninstall)
        loop.install()
        yield run


def run_key(pipe: Any, *, steps: int, scale: float, shape: tuple[int, ...]) -> RunKey:
    """The key of LinearAG's coefficients for runs of `pipe`. Fitted and loaded under it, they are refused by any other
    pipeline that differs in what counts.

    model holds the denoisers' classes and a digest of their weights (name, shape and dtype of each, and its first
    values); scheduler its class and a digest of its configuration.

    Args:
        steps: the number of denoising steps.
        scale: the guidance scale, off at 1.
        shape: of one sample as the scheduler steps it, without the batch: for SDXL at 1024 x 1024 (4, 128, 128).

    Raises:
        UnsupportedModelError: the pipeline's loop or its scheduler is not known.
        ValueError: steps, scale or shape that make no sense.
    """
    family = family_of(pipe)
    schedulers.check(pipe.scheduler)
    denoisers = [part for part in (getattr(pipe, name, None) for name in family.denoisers) if part is not None]
    weights = hashlib.sha256()
    for denoiser in denoisers:
        for name, weight in denoiser.state_dict().items():
            weights.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            if not weight.is_meta:
                weights.update(weight.flatten()[:16].double().cpu().numpy().tobytes())
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    configuration = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    return RunKey(
        model=f"{' and '.join(type(denoiser).__name__ for denoiser in denoisers)} {weights.hexdigest()[:16]}",
        scheduler=f"{type(pipe.scheduler).__name__} {configuration.hexdigest()[:16]}",
        steps=steps,
        scale=scale,
        shape=shape,
        parameterization=schedulers.parameterization(pipe.scheduler),
    )


def guider(guide: Guide, scheduler: Any) -> Any:
    """The guide as a guider component: `pipe.update_components(guider=hasten.guider(guide, pipe.scheduler))`.

    For modular pipelines of SDXL, SD3, Wan, Qwen-Image and Z-Image. A pipeline with a second guider (Wan 2.2's
    `guider_2`) takes the same object twice: then what the guide remembers survives the change of denoisers.
    Qwen-Image's loop gives the guide's prediction the norms of the conditional one.

    Args:
        guide: see `hasten.guidance.diffusion.guide`.
        scheduler: of the pipeline that will ask the guider.

    Returns:
        A guider with the record of its runs as `run`, as `hasten.guided` yields it.

    Raises:
        TypeError: guide is no Guide.
        UnsupportedModelError: the scheduler is not known; while the pipeline runs: its denoiser is not.
        ValueError: while the pipeline runs, as in `guided`.
    """
    _check_guide(guide)
    _check_diffusers()
    schedulers.check(scheduler)
    from hasten.pipelines.component import Guider  # the first import of diffusers, which may be missing

    return Guider(guide, scheduler)


def _check_guide(guide: Any) -> None:
    if not isinstance(guide, Guide):
        raise TypeError(f"guide must be a hasten.guidance.diffusion.guide.Guide, got {guide!r}")


def _check_diffusers() -> None:
    """Warns where the installed diffusers is none that the loops were read and tested in.

    Raises:
        HastenError: diffusers, the extra `[diffusers]`, is not installed.
    """
    try:
        installed = Version(version("diffusers"))
    except PackageNotFoundError:
        raise HastenError("diffusers is not installed; pip install 'hasten[diffusers]'") from None
    first, last = DIFFUSERS
    if not Version(first) <= installed < Version(last):
        warn(
            f"guidance is tested with diffusers >={first},<{last}, installed is {installed}: its loops may differ",
            stacklevel=3,
        )
