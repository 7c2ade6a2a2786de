"""Guidance on the embedded digit model: what each guide costs and what it does to samples, against classifier-free
guidance from the same noise.

Every guide draws the same 1,000 digits (seeds 0 to 999) in ten rounds of 100, all guides once per round, so that wall
times are compared within a round; so are times of the processor, which other work on the machine disturbs less.
Thresholds of adaptive guidance are set beforehand, on other seeds, to a stated number of evaluations; nothing is set on
the seeds that are reported. Intervals are 95 %: Wilson's for accuracy, bootstrap over seeds (or over rounds, for time)
for the rest.

    python bench/runtime/guidance.py --json bench/results/guidance-digits-cpu.json
    python bench/runtime/guidance.py --only "CFG 3" "AG 3*" "cutoff 3*" "CFG 5" "AG 5*" "cutoff 5*" \\
        --json bench/results/guidance-digits-time-cpu.json

Needs scikit-learn, for the real digits that the Fréchet distance compares with.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import hasten
from hasten.guidance.diffusion.adaptive import AdaptiveGuidance
from hasten.guidance.diffusion.apg import AdaptiveProjectedGuidance
from hasten.guidance.diffusion.cfg_plus_plus import CFGPlusPlus
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance, Cutoff
from hasten.guidance.diffusion.guide import Guide
from hasten.guidance.diffusion.intervals import SigmaInterval
from hasten.models.digit_diffusion.classifier import contrast, saturation
from hasten.models.digit_diffusion.drawing import draw

STEPS, FEW_STEPS = 50, 10
ROUND = 100
CALIBRATION_SEEDS = range(1_000_000, 1_000_200)
GUIDED_STEPS = 23.5  # on average, of STEPS: 26.5 % fewer evaluations than full CFG
MIN_GUIDED_STEPS = 5
ADAPTIVE_SCALES = (3.0, 5.0)
CUTOFFS = (24, 25)
# Bounds on the norm of APG's update that are in use (SDXL 15 on 4 x 128 x 128 latents; EDM2 2.5 on 4 x 64 x 64), for 64
# elements.
NORMS = {
    "SDXL": 15 * (64 / 65536) ** 0.5,
    "EDM2": 2.5 * (64 / 16384) ** 0.5,
    "none": None,
}
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Case:
    """One guide. `reference`: the name of the case that its samples and its time are compared with."""

    name: str
    guide: Guide
    reference: str
    steps: int = STEPS


def cases(model) -> list[Case]:
    """Everything that is drawn; sets the thresholds of adaptive guidance on CALIBRATION_SEEDS."""
    found = [Case("conditional only", ClassifierFreeGuidance(1.0), "CFG 3")]
    found += [Case(f"CFG {scale:g}", ClassifierFreeGuidance(scale), f"CFG {scale:g}") for scale in (3.0, 5.0, 10.0)]
    for scale in ADAPTIVE_SCALES:
        full = f"CFG {scale:g}"
        for space in ("epsilon", "x0", "model"):
            threshold = calibrate(model, scale, space, "cosine")
            guide = AdaptiveGuidance(scale, threshold, space, MIN_GUIDED_STEPS, batch="rows")
            found.append(Case(f"AG {scale:g}, cosine of {space}", guide, full))
        tolerance = calibrate(model, scale, "x0", "update")
        guide = AdaptiveGuidance(scale, 1.0, "x0", MIN_GUIDED_STEPS, batch="rows", tolerance=tolerance)
        found.append(Case(f"AG {scale:g}, size of update in x0", guide, full))
        found += [Case(f"cutoff {scale:g} after {steps}", Cutoff(scale, steps), full) for steps in CUTOFFS]
        interval = SigmaInterval(0.28, 5.42)
        found.append(Case(f"interval {scale:g}", ClassifierFreeGuidance(scale, interval=interval), full))
    for name, norm in NORMS.items():
        found.append(Case(f"APG 10, norm of {name}", AdaptiveProjectedGuidance(10.0, 0.0, -0.5, norm), "CFG 10"))
    found += [Case(f"CFG++ {strength:g}", CFGPlusPlus(strength), "CFG 3") for strength in STRENGTHS]
    few = f"CFG 3, {FEW_STEPS} steps"
    for scale in (3.0, 5.0, 10.0):
        found.append(Case(f"CFG {scale:g}, {FEW_STEPS} steps", ClassifierFreeGuidance(scale), few, FEW_STEPS))
    found += [Case(f"CFG++ {s:g}, {FEW_STEPS} steps", CFGPlusPlus(s), few, FEW_STEPS) for s in STRENGTHS]
    return found


def calibrate(model, scale: float, space: str, criterion: str) -> float:
    """The threshold at which adaptive guidance stops after GUIDED_STEPS on average, from traces of full guidance: up to
    the stop they are its own.

    criterion: "cosine", or "update" for (scale - 1) * ||difference|| / ||conditional||.
    """
    seeds = list(CALIBRATION_SEEDS)
    guide = AdaptiveGuidance(scale, math.inf, space)
    trace = draw(model, torch.arange(len(seeds)) % 10, guide, seeds, STEPS).trace
    if criterion == "cosine":
        agreement = [trace[i]["cosine"] for i in range(STEPS)]
    else:
        agreement = [-(scale - 1) * trace[i]["update_norm"] / trace[i]["conditional_norm"] for i in range(STEPS)]
    agreement = torch.stack(agreement)  # [STEPS, B]; a digit stops where it reaches the threshold
    best = agreement[MIN_GUIDED_STEPS - 1 :].cummax(0).values  # [STEPS - MIN_GUIDED_STEPS + 1, B]

    def guided_steps(threshold: float) -> float:
        return MIN_GUIDED_STEPS + float((best[:-1] < threshold).sum(0).float().mean())

    low, high = float(best.min()), float(best.max())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if guided_steps(middle) < GUIDED_STEPS else (low, middle)
    return high if criterion == "cosine" else -high


def select(every: list[Case], patterns: list[str]) -> list[Case]:
    """The cases whose name matches one of the patterns; a ValueError where one is to be compared with a case that is
    left out.
    """
    chosen = [case for case in every if any(fnmatch(case.name, pattern) for pattern in patterns)]
    missing = {case.reference for case in chosen} - {case.name for case in chosen}
    if missing or not chosen:
        raise ValueError(f"{patterns} must also match {sorted(missing) or [case.name for case in every]}")
    return chosen


def study(every: list[Case], model, classifier, real: torch.Tensor, count: int) -> tuple[list[dict], dict[str, dict]]:
    """One record per case, and per case what its comparisons need, digit by digit and round by round."""
    labels = torch.arange(count) % 10
    drawings, processor = ({case.name: [] for case in every} for _ in range(2))
    draw(model, labels[:10], ClassifierFreeGuidance(3.0), range(10), 2)  # warms up
    bar = tqdm(total=len(every) * math.ceil(count / ROUND), desc="guidance", unit="run")
    for start in range(0, count, ROUND):
        seeds = range(start, min(start + ROUND, count))
        for case in every:
            begin = time.process_time()
            drawings[case.name].append(draw(model, labels[list(seeds)], case.guide, seeds, case.steps))
            processor[case.name].append(time.process_time() - begin)
            bar.update()
    bar.close()

    raw, records = {}, []
    for case in every:
        parts = drawings[case.name]
        samples = torch.cat([part.samples for part in parts])
        full = torch.cat([part.samples for part in drawings[case.reference]])
        raw[case.name] = {
            "correct": classifier.correct(samples, labels).double(),
            "saturation": saturation(samples).double(),
            "contrast": contrast(samples).double(),
            "distance": (samples - full).square().mean((1, 2, 3)).sqrt().double(),
            "seconds": torch.tensor([part.seconds for part in parts], dtype=torch.float64),
            "processor": torch.tensor(processor[case.name], dtype=torch.float64),
            "rows": sum(part.rows for part in parts),
        }
    for case in every:
        values, parts = raw[case.name], drawings[case.name]
        samples = torch.cat([part.samples for part in parts])
        record = {
            "case": case.name,
            "guide": repr(case.guide),
            "reference": case.reference,
            "steps": case.steps,
            "evaluations": values["rows"] / count,
            "calls": sum(part.calls for part in parts) / len(parts),
            "seconds": float(values["seconds"].sum()),
            "time_ratio": bootstrap(values["seconds"] / raw[case.reference]["seconds"], median),
            "processor_time_ratio": bootstrap(values["processor"] / raw[case.reference]["processor"], median),
            "accuracy": wilson(values["correct"]),
            "saturation": bootstrap(values["saturation"]),
            "contrast": bootstrap(values["contrast"]),
            "distance": bootstrap(values["distance"]),
            "frechet": frechet(classifier.features(samples), classifier.features(real)),
        }
        records.append(record)
    return records, raw


# ---------------------------------------------------------------- the claims


def claims(records: list[dict], raw: dict[str, dict]) -> list[dict]:
    """What was to be shown, with its figures, and whether it held."""
    of = {record["case"]: record for record in records}
    found = []
    for name in (name for name in of if name.startswith("AG ")):
        full, scale = of[name]["reference"], name.split()[1].rstrip(",")
        # The fixed cutoff with no fewer evaluations: where they cannot be equal, it is given more.
        cutoffs = [f"cutoff {scale} after {steps}" for steps in CUTOFFS]
        equal = next((cutoff for cutoff in cutoffs if raw[cutoff]["rows"] >= raw[name]["rows"]), None)
        cut = 1 - raw[name]["rows"] / raw[full]["rows"]
        time_ratio = of[name]["time_ratio"]
        accuracy = difference(raw, name, full, "correct")
        figures = {
            "cut_of_evaluations": cut,
            "time_ratio": time_ratio,
            "processor_time_ratio": of[name]["processor_time_ratio"],
            "accuracy_difference": accuracy,
            "cutoff": equal,
        }
        holds = cut >= 0.25 and time_ratio["estimate"] <= 0.8 and abs(accuracy["estimate"]) <= 0.01
        if equal:
            figures["distance_minus_cutoff"] = difference(raw, name, equal, "distance")
            holds = holds and figures["distance_minus_cutoff"]["high"] < 0
        claim = (
            "cuts >= 25 % of evaluations and >= 20 % of time, accuracy within 1 point of CFG, "
            "nearer to CFG than the cutoff"
        )
        found.append({"case": name, "claim": claim, "holds": bool(holds and equal), **figures})
    for name in (name for name in of if name.startswith("APG ")):
        accuracy = difference(raw, name, "CFG 3", "correct")
        ratios = {
            measure: of[name][measure]["estimate"] / of["CFG 3"][measure]["estimate"]
            for measure in ("saturation", "contrast")
        }
        for measure, ratio in ratios.items():
            claim = f"{measure} at scale 10 within 10 % of CFG at 3, or below, at equal or better accuracy"
            holds = ratio <= 1.1 and accuracy["estimate"] >= 0
            figures = {"ratio_to_cfg_3": ratio, "accuracy_difference": accuracy}
            figures["ratio_of_cfg_10"] = of["CFG 10"][measure]["estimate"] / of["CFG 3"][measure]["estimate"]
            found.append({"case": name, "claim": claim, "holds": bool(holds), **figures})
    return found


def difference(raw: dict[str, dict], name: str, other: str, measure: str) -> dict:
    """The mean paired difference over seeds, name minus other."""
    return bootstrap(raw[name][measure] - raw[other][measure])


# ---------------------------------------------------------------- statistics


def bootstrap(values: torch.Tensor, statistic=torch.mean, resamples: int = 2000) -> dict:
    """A statistic of values [n] with its percentile interval."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    drawn = statistic(values[picks], dim=1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return {"estimate": float(statistic(values, dim=0)), "low": low, "high": high}


def median(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The median, between the two in the middle where their number is even."""
    return values.quantile(0.5, dim=dim)


def wilson(correct: torch.Tensor, z: float = 1.96) -> dict:
    """A share with Wilson's interval, which is not empty at 0 and 1."""
    n, p = len(correct), float(correct.mean())
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"estimate": p, "low": centre - half, "high": centre + half}


def frechet(features: torch.Tensor, other: torch.Tensor) -> float:
    """The Fréchet distance between two clouds [n, C], as Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6),
    on the digit classifier.
    """
    (mean, covariance), (mean_other, covariance_other) = (
        (cloud.double().mean(0), torch.cov(cloud.double().T)) for cloud in (features, other)
    )
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_other @ root).clamp_min(0).sqrt().sum()
    return float((mean - mean_other).square().sum() + covariance.trace() + covariance_other.trace() - 2 * cross)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="digits per guide")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases by name, such as 'AG 3*'")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = hasten.embedded_model("digit-diffusion")
    model, classifier = hasten.DigitDiffusion.load(folder), hasten.DigitClassifier.load(folder)
    seed = json.loads((folder / "training.json").read_text(encoding="utf-8"))["run"]["seed"]
    images, labels = load_digits(return_X_y=True)
    train, real = train_test_split(images, test_size=0.2, stratify=labels, random_state=seed)  # as in training
    train, real = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for part in (train, real))
    records, raw = study(select(cases(model), args.only), model, classifier, real, args.samples)
    floor = frechet(classifier.features(train), classifier.features(real))

    print(f"{args.samples} digits per case; Fréchet distance of the training digits to the held-out ones: {floor:.2f}")
    for record in records:
        line = (
            "{case:34} {evaluations:6.1f} evaluations  {time_ratio[estimate]:.2f} x time "
            "({processor_time_ratio[estimate]:.2f} x processor time)  accuracy {accuracy[estimate]:.1%} "
            "[{accuracy[low]:.1%}, {accuracy[high]:.1%}]  saturation {saturation[estimate]:.2%}  "
            "contrast {contrast[estimate]:.3f}  from {reference} {distance[estimate]:.4f}  Fréchet {frechet:.2f}"
        )
        print(line.format(**record))
    shown = claims(records, raw)
    for claim in shown:
        print(f"{'holds' if claim['holds'] else 'FAILS':6}{claim['case']}: {claim['claim']}")
        print("      ", {key: value for key, value in claim.items() if key not in ("case", "claim", "holds")})
    if args.json:
        facts = {
            "samples": args.samples,
            "threads": args.threads,
            "torch": torch.__version__,
            "frechet_of_training_digits": floor,
        }
        args.json.write_text(
            json.dumps({**facts, "records": records, "claims": shown}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
