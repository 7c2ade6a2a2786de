"""Train the digit-diffusion transformer that ships with hasten, and the classifier that scores it, and measure both.

What it does, in order:

1. takes scikit-learn's 1,797 handwritten digits of 8 x 8 pixels and holds out a fifth of each class,
   drawn by the seed, from both networks;
2. trains the classifier on digits that are slightly turned, shifted and scaled;
3. trains the diffusion transformer: v-prediction, AdamW with cosine decay, the average of the weights is what is kept,
   and the label is dropped from one digit in ten so that the model has an unconditional class;
4. writes a folder that `DigitDiffusion.load` and `DigitClassifier.load` read, training.json, and a model card whose
   figures are measured at the end of the same run.

Reproduce (the same seed, steps and torch version give the same model; one thread):

    python bench/runtime/train_digit_diffusion.py

`--measure-only` loads a finished folder and measures it again. Training needs scikit-learn; the model does not.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from hasten.bench.cards import wrapped
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance
from hasten.models.digit_diffusion import DigitClassifier, DigitDiffusion
from hasten.models.digit_diffusion.classifier import contrast, saturation
from hasten.models.digit_diffusion.drawing import draw

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT_SHARE = 0.2
SCALES = (1.0, 3.0, 5.0, 10.0)
SAMPLES, STEPS = 1000, 50


def digits(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images [N, 1, 8, 8] in [-1, 1] and labels [N], and the held-out ones;
    a fifth of each class is held out."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=HELD_OUT_SHARE, stratify=labels, random_state=seed)
    train, held_out = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for part in parts[:2])
    return train, torch.tensor(parts[2]), held_out, torch.tensor(parts[3])


def batches(count: int, size: int, steps: int):
    """Indices [size] of `steps` batches, each digit as often as every other."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(count)])
        yield left[:size]
        left = left[size:]


# ---------------------------------------------------------------- the classifier


def jitter(x: torch.Tensor) -> torch.Tensor:
    """Each digit [B, 1, 8, 8] turned by up to 12 degrees, scaled by up to 10 % and shifted by up to a pixel."""
    angle, scale = ((torch.rand(2, len(x)) * 2 - 1).T * torch.tensor([math.pi / 15, 0.1])).T
    cos, sin = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    shift = (torch.rand(len(x), 2) * 2 - 1) / 4
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # paper beyond the border


def train_classifier(images: torch.Tensor, labels: torch.Tensor, steps: int) -> DigitClassifier:
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for index in tqdm(batches(len(images), 128, steps), total=steps, desc="classifier"):
        loss = F.cross_entropy(model(jitter(images[index])), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- the diffusion model


def v_loss(model: DigitDiffusion, images: torch.Tensor, labels: torch.Tensor, times: torch.Tensor, noise: torch.Tensor):
    """The mean squared error of v at one time [B] and noise [B, 1, 8, 8] per image."""
    angle = (math.pi / 2 * times)[:, None, None, None]
    x = angle.cos() * images + angle.sin() * noise
    return F.mse_loss(model(x, times, labels), angle.cos() * noise - angle.sin() * images)


def train_diffusion(
    args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor
) -> tuple[DigitDiffusion, dict]:
    model = DigitDiffusion()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.99))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, running = time.perf_counter(), None
    bar = tqdm(batches(len(images), args.batch, args.steps), total=args.steps, desc="diffusion")
    for step, index in enumerate(bar):
        dropped = torch.rand(args.batch) < args.drop
        target = torch.where(dropped, model.unconditional, labels[index])
        times = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch  # evenly spread over (0, 1)
        loss = v_loss(model, images[index], target, times, torch.randn_like(images[index]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(args.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
    return average.eval(), {"train_loss": running, "minutes": (time.perf_counter() - start) / 60}


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def heldout_loss(model: DigitDiffusion, images: torch.Tensor, labels: torch.Tensor, draws: int = 10) -> float:
    """The loss with labels over `draws` fixed draws of times and noise per image."""
    generator = torch.Generator().manual_seed(0)
    times = (torch.arange(draws * len(images)) + 0.5) / (draws * len(images))
    times = times[torch.randperm(len(times), generator=generator)].chunk(draws)
    return sum(
        float(v_loss(model, images, labels, part, torch.randn(images.shape, generator=generator))) for part in times
    ) / len(times)


@torch.no_grad()
def measure(folder: Path, seed: int) -> dict:
    """Losses, the classifier's accuracy, and samples at every scale of SCALES; loads the saved folder."""
    model, classifier = DigitDiffusion.load(folder), DigitClassifier.load(folder)
    images, labels, held_out, held_out_labels = digits(seed)
    asked, seeds = torch.arange(SAMPLES) % 10, list(range(SAMPLES))
    scales = []
    for scale in tqdm(SCALES, desc="measure"):
        samples = draw(model, asked, ClassifierFreeGuidance(scale), seeds, STEPS).samples
        scales.append(
            {
                "scale": scale,
                "accuracy": float(classifier.correct(samples, asked).float().mean()),
                "saturation": float(saturation(samples).mean()),
                "contrast": float(contrast(samples).mean()),
                "nearest": nearest(samples, images),
            }
        )
    return {
        "heldout_images": len(held_out),
        "classifier_accuracy": float(classifier.correct(held_out, held_out_labels).float().mean()),
        "classifier_train_accuracy": float(classifier.correct(images, labels).float().mean()),
        "train_loss": heldout_loss(model, images, labels),
        "heldout_loss": heldout_loss(model, held_out, held_out_labels),
        "heldout_saturation": float(saturation(held_out).mean()),
        "heldout_contrast": float(contrast(held_out).mean()),
        "heldout_nearest": nearest(held_out, images),
        "samples": SAMPLES,
        "steps": STEPS,
        "scales": scales,
    }


def nearest(samples: torch.Tensor, images: torch.Tensor) -> float:
    """The mean distance of samples, clamped to [-1, 1], to their nearest training image,
    as a root mean square over pixels."""
    distances = torch.cdist(samples.clamp(-1, 1).flatten(1), images.flatten(1)).amin(1)
    return float(distances.mean()) / math.sqrt(images[0].numel())


def write_card(folder: Path, run: dict, measured: dict) -> None:
    config = DigitDiffusion.load(folder).config
    weights, scorer = ((folder / name).stat().st_size for name in ("model.safetensors", "classifier.safetensors"))
    rows = [
        f"| {row['scale']:g} | {row['accuracy']:.1%} | {row['saturation']:.1%} | {row['contrast']:.3f} | {row['nearest']:.3f} |"
        for row in measured["scales"]
    ]
    card = f"""# digit-diffusion

A class-conditional diffusion transformer of {run["parameters"] / 1e6:.2f} M parameters that draws handwritten digits of 8 x 8 pixels, and a classifier that
tells which digit a picture shows. They are what hasten's tests and quality figures of guidance use when no model hub is at hand; useful for nothing else.

- **Architecture**: `hasten.DigitDiffusion`, patches of {config.patch} x {config.patch}, {config.layers} layers of {config.channels} channels and {config.heads} heads, adaLN-Zero; predicts v on the
  cosine schedule; label {config.classes} is the unconditional class. `hasten.DigitClassifier`, a convolutional network of {run["classifier_parameters"] / 1e3:.0f} k parameters.
- **Size**: {weights:,} and {scorer:,} bytes of fp32 safetensors.
- **Data**: scikit-learn's digits (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits", CC BY 4.0), 1,797 pictures scaled to [-1, 1];
  a fifth of each class ({measured["heldout_images"]} pictures) is held out from both networks by seed {run["seed"]}.
- **Training**: {run["steps"]} steps of {run["batch"]} digits, {run["minutes"]:.1f} minutes on {run["threads"]} CPU thread{run["note"]}; AdamW, peak learning rate {run["lr"]:g}, weight decay {run["weight_decay"]:g},
  cosine decay, label dropped from {run["drop"]:.0%}, weights averaged with decay {run["average"]:g}, seed {run["seed"]}, torch {run["torch"]}. The classifier: {run["classifier_steps"]} steps on turned, shifted
  and scaled digits.
- **Command**: `{run["command"]}`

## Measured

The classifier is right on {measured["classifier_accuracy"]:.1%} of the held-out digits ({measured["classifier_train_accuracy"]:.1%} of the training digits). Mean squared error of v: {measured["train_loss"]:.4f} on
training digits, {measured["heldout_loss"]:.4f} on held-out ones.

{measured["samples"]:,} samples per scale, seeds 0 to {measured["samples"] - 1}, {measured["steps"]} steps of DDIM, classifier-free guidance. **Accuracy**: the classifier sees the digit that was asked for.
**Saturation**: the share of pixels that a picture would clip, |x0| > 1 + 1/16. **Contrast**: the mean |x0|. **Nearest**: root mean square distance to the nearest
training digit. Held-out digits have saturation {measured["heldout_saturation"]:.1%}, contrast {measured["heldout_contrast"]:.3f}, nearest {measured["heldout_nearest"]:.3f}.

| guidance scale | accuracy | saturation | contrast | nearest |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
    (folder / "README.md").write_text(wrapped(card), encoding="utf-8")


# ---------------------------------------------------------------- the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=ROOT / "runtime" / "models" / "digit-diffusion")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--batch", type=int, default=128, help="B, digits per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--drop", type=float, default=0.1, help="share of digits whose label is dropped")
    parser.add_argument("--average", type=float, default=0.999, help="decay of the average of the weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="said in the card after the wall time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "training.json"
    if args.measure_only:
        run = json.loads(record.read_text())["run"]
        run |= {"note": args.note} if args.note else {}
    else:
        torch.manual_seed(args.seed)
        images, labels, _, _ = digits(args.seed)
        classifier = train_classifier(images, labels, args.classifier_steps)
        classifier.save(args.out)
        model, trained = train_diffusion(args, images, labels)
        model.save(args.out)
        names = ("steps", "classifier_steps", "batch", "lr", "weight_decay", "warmup", "drop", "average", "threads")
        run = {name: getattr(args, name) for name in (*names, "note", "seed")} | trained
        run |= {
            "parameters": sum(p.numel() for p in model.parameters()),
            "classifier_parameters": sum(p.numel() for p in classifier.parameters()),
            "torch": torch.__version__.split("+")[0],
            "command": f"python bench/runtime/train_digit_diffusion.py --steps {args.steps} --seed {args.seed}",
        }
        record.write_text(json.dumps({"run": run}, indent=1) + "\n")
    measured = measure(args.out, run["seed"])
    record.write_text(json.dumps({"run": run, "measured": measured}, indent=1) + "\n")
    write_card(args.out, run, measured)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
