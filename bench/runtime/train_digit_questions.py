"""Train the small LLaVA that ships with hasten, on questions about pictures of several handwritten digits, and measure
it.

What it does, in order:

1. takes scikit-learn's 1,797 handwritten digits, a fifth of each value held out (`hasten.models.digit_questions`), and
   composes every picture of training anew from the others;
2. writes a word-level tokenizer and a processor for the questions;
3. trains a `LlavaForConditionalGeneration`, all of it at once, by next-token cross-entropy on the answers alone. One
   picture serves several questions: each is a slot of the sequence that attends to the picture and to itself, at the
   positions that it would have alone. Beside the answers, the vision tower's patches tell through a linear layer the
   digit whose centre they hold, its class token which values are in the picture, and the head is also applied after
   half of the decoder layers, so that these read the picture; the attention of three of the first layers, from the last
   token of a question, is taught to fall on the digits that it is about. The finished model is an ordinary LLaVA;
4. writes a folder that `LlavaForConditionalGeneration` and `AutoProcessor` load, training.json, and a model card whose
   figures are measured at the end of the same run: accuracy by kind of question with the picture and with a black one.

Reproduce (the schedule follows the clock, so a machine of another speed takes another number of steps; with --steps it
follows the step count):

    python bench/runtime/train_digit_questions.py --minutes 30

Two processes of one thread each share the work: on a machine that does other work too, they wait for each other once a
step and not at every operator.
`--measure-only` loads a finished folder and measures it again. Training and measuring need scikit-learn.

Shapes: B pictures of P patches; S slots of W tokens; sequences of T = 1 + P + S W, the first token being bos.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaModel, apply_rotary_pos_emb

from hasten.bench.cards import wrapped
from hasten.bench.runtime.train_digit_diffusion import jitter
from hasten.models.digit_questions import digit_questions
from hasten.models.digit_questions.questions import KINDS, PLACES, ask
from hasten.models.digit_questions.scenes import (
    DIGIT,
    HELD_OUT_SHARE,
    MOST,
    SIDE,
    SPLIT_SEED,
    Scenes,
    draw_scenes,
    handwritten,
)

ROOT = Path(__file__).resolve().parents[2]
RECORD = "training.json"
PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
MEAN, DEVIATION = 0.1, 0.25  # of pixels in [0, 1], about those of the pictures
SLOTS = ("place",) * 3 + ("where",) * 2 + ("count",) + ("count_of",) * 3 + ("sum",)  # questions for each picture
WEIGHTS = {"sum": 3.0}  # of a kind's loss, 1 for the others
LOSSES = {"answer": 1.0, "early": 0.3, "look": 0.3, "centre": 0.3, "presence": 0.1}  # weights of the parts of the loss
LOOKING = (1, 2, 3)  # the decoder layers whose attention is taught where to look
VARIANTS = 15  # jittered copies of each digit of the training
MEASURED, MEASURE_SEED = 1000, 12345  # questions of each kind, and the seed that they are drawn by

VISION = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=6,
    num_channels=3,
    projection_dim=128,
)
TEXT = dict(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


# ---------------------------------------------------------------- tokens and pixels


def vocabulary() -> list[str]:
    """Every word of the questions and answers."""
    words = ["what", "which", "where", "how", "many", "is", "are", "there", "the", "of", "digit", "digits", "sum", "?"]
    words += sorted({word for place in PLACES for word in place.split()})
    return [PAD, BOS, EOS, UNKNOWN, IMAGE, *words, *map(str, range(9 * MOST + 1))]


def make_processor() -> LlavaProcessor:
    """A word-level tokenizer that puts bos first and pads on the left, and pictures of 72 x 72 as they are."""
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.index(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=TEXT["max_position_embeddings"],
    )
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=True,
        size=size,
        crop_size=size,
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def make_model(words: list[str]) -> LlavaForConditionalGeneration:
    ids = {"pad_token_id": words.index(PAD), "bos_token_id": words.index(BOS), "eos_token_id": words.index(EOS)}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(vocab_size=len(words), **TEXT, **ids),
        image_token_index=words.index(IMAGE),
        image_seq_length=(SIDE // VISION["patch_size"]) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, **ids)
    vision = model.model.vision_tower.embeddings
    nn.init.normal_(vision.patch_embedding.weight, std=vision.patch_embedding.weight[0].numel() ** -0.5)
    with torch.no_grad():
        vision.position_embedding.weight[1:] = grid_positions(SIDE // VISION["patch_size"], VISION["hidden_size"])
    return model


def grid_positions(side: int, channels: int) -> torch.Tensor:
    """Sines and cosines of row and column, [side * side, channels]: where the learned positions of the patches begin."""
    place = torch.arange(side * side)
    frequencies = torch.logspace(math.log10(2 * math.pi / side / 2), math.log10(2), channels // 4)
    angles = torch.stack([place // side, place % side], dim=-1)[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1) * 0.5


def pixels(images: np.ndarray) -> torch.Tensor:
    """The pixel values that the processor makes of grey pictures: uint8 [B, 72, 72] -> [B, 3, 72, 72]."""
    values = (torch.from_numpy(images).float() / 255 - MEAN) / DEVIATION
    return values[:, None].expand(-1, 3, -1, -1)


# ---------------------------------------------------------------- training


def training_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits of the training, and VARIANTS copies of each that are slightly turned, scaled and shifted."""
    images, values = handwritten(held_out=False)
    copies = np.tile(images, (VARIANTS, 1, 1))
    moved = jitter(torch.from_numpy(copies)[:, None].float() / 8 - 1)[:, 0].clamp(-1, 1)
    moved = ((moved + 1) * 8).round().to(torch.uint8).numpy()
    return np.concatenate([images, moved]), np.tile(values, VARIANTS + 1)


class Questions(NamedTuple):
    """tokens, targets [B, S W] and the targets' weights; ends [B, S], where each question's last token is in the
    sequence, 0 where there is none; patches: bool [B, S, P], those with the centres of the digits that it is about.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    ends: torch.Tensor
    patches: torch.Tensor


class Slots:
    """Questions and answers of pictures in one layout: the mask and the positions of the sequences, and their tokens.

    mask: [1, 1, T, T], 0 where a token attends, else -inf. positions: [1, T].
    """

    def __init__(self, words: list[str], patches: int):
        self.index = {word: i for i, word in enumerate(words)}
        longest = ("what is the sum of the digits ? 0", f"where is the 0 ? {PLACES[0]}")
        self.width = max(len(text.split()) for text in longest)
        self.prefix = 1 + patches
        slots, width = len(SLOTS), self.width
        slot = torch.cat(
            [torch.zeros(self.prefix, dtype=torch.int64), 1 + torch.arange(slots).repeat_interleave(width)]
        )
        order = torch.arange(len(slot))
        seen = (slot[None] == 0) | (slot[None] == slot[:, None])
        attends = seen & (order[None] <= order[:, None])
        self.mask = torch.zeros(attends.shape).masked_fill(~attends, -torch.inf)[None, None]
        self.positions = torch.cat([order[: self.prefix], (self.prefix + torch.arange(width)).repeat(slots)])[None]
        self.pad, self.bos, self.eos = (self.index[word] for word in (PAD, BOS, EOS))

    def fill(self, scenes: Scenes, rng: np.random.Generator) -> Questions:
        """Questions about scenes."""
        shape = (len(scenes.values), len(SLOTS), self.width)
        tokens, targets, weights = np.full(shape, self.pad), np.full(shape, -100), np.zeros(shape, np.float32)
        ends, patches = np.zeros(shape[:2], np.int64), np.zeros((*shape[:2], self.prefix - 1), bool)
        where = centre_patches(scenes)
        for b, scene in enumerate(scenes.values):
            for s, kind in enumerate(SLOTS):
                if (asked := ask(kind, scene, rng)) is None:
                    continue
                question, answer = ([self.index[word] for word in text.split()] for text in asked)
                begin, end = len(question) - 1, len(question) + len(answer)
                tokens[b, s, :end] = question + answer
                targets[b, s, begin:end] = [*answer, self.eos]
                weights[b, s, begin:end] = WEIGHTS.get(kind, 1.0)
                ends[b, s] = self.prefix + s * self.width + begin
                patches[b, s, where[b, asked_about(asked[0], scene)]] = True
        rows = (torch.from_numpy(part.reshape(len(scenes.values), -1)) for part in (tokens, targets, weights))
        return Questions(*rows, torch.from_numpy(ends), torch.from_numpy(patches))


def asked_about(question: str, values: np.ndarray) -> np.ndarray:
    """The occupied places that a question about a scene of values [9] is about."""
    words = question.split()
    if question.startswith("which"):
        return np.array([PLACES.index(" ".join(words[3:-1]))])
    named = [int(word) for word in words if word.isdigit()]
    return np.flatnonzero(values == named[0] if named else values >= 0)


class Teachers(nn.Module):
    """What the vision tower is asked beside the questions: the digit whose centre lies in a patch, or none (class 10),
    and which values there are in the picture.
    """

    def __init__(self):
        super().__init__()
        self.centre = nn.Linear(VISION["hidden_size"], 11)
        self.presence = nn.Linear(VISION["hidden_size"], 10)


def centre_patches(scenes: Scenes) -> np.ndarray:
    """The patch in which the centre of each place's digit lies, were there one: int64 [B, 9]."""
    row, column = np.moveaxis((scenes.corners + DIGIT // 2) // VISION["patch_size"], -1, 0)
    return row * (SIDE // VISION["patch_size"]) + column


def centres(scenes: Scenes) -> np.ndarray:
    """The value of the digit whose centre lies in each patch, 10 where there is none: int64 [B, P]."""
    found = np.full((len(scenes.values), (SIDE // VISION["patch_size"]) ** 2), 10)
    b, place = np.nonzero(scenes.values >= 0)
    found[b, centre_patches(scenes)[b, place]] = scenes.values[b, place]
    return found


def looking(text: LlamaModel, layer: int, hidden: torch.Tensor, slots: Slots, asked: Questions) -> torch.Tensor:
    """How little of what the ends of the questions attend to in bos and the picture, in the mean of a layer's heads, is
    on the digits that they are about: the mean -log of that share, of hidden [B, T, C] before the layer.
    """
    block = text.layers[layer]
    hidden = block.input_layernorm(hidden)
    heads = (*hidden.shape[:1], -1, block.self_attn.head_dim)
    cos, sin = text.rotary_emb(hidden, slots.positions)
    rows = torch.arange(len(hidden))[:, None]

    def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, heads[1:]).transpose(1, 2)  # [B, heads, tokens, D]
        return apply_rotary_pos_emb(x, x, cos, sin)[0]

    q = rotated(block.self_attn.q_proj(hidden[rows, asked.ends]), cos[0, asked.ends], sin[0, asked.ends])
    k = rotated(block.self_attn.k_proj(hidden[:, : slots.prefix]), cos[:, : slots.prefix], sin[:, : slots.prefix])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    shares = (q @ k.transpose(-1, -2) * block.self_attn.scaling).float().softmax(-1)[..., 1:].mean(1)  # [B, S, P]
    given = asked.patches.any(-1)
    return -((shares * asked.patches).sum(-1)[given] + 1e-6).log().mean()


def losses(model: LlavaForConditionalGeneration, teachers: Teachers, slots: Slots, batch) -> dict[str, torch.Tensor]:
    """The parts of the loss: that of the answers after all layers, the same after half of them, and what the vision
    tower's patches and class token tell.
    """
    images, centre, there, questions = batch
    tower, text = model.model.vision_tower, model.model.language_model
    seen = tower(pixel_values=images)
    patches = seen.last_hidden_state[:, 1:]
    image = model.model.multi_modal_projector(patches)
    words = text.embed_tokens(F.pad(questions.tokens, (1, 0), value=slots.bos)).to(image.dtype)
    out = text(
        inputs_embeds=torch.cat([words[:, :1], image, words[:, 1:]], dim=1),
        attention_mask=slots.mask.to(image.dtype),
        position_ids=slots.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    asked = questions.targets.flatten() >= 0
    weight, target = questions.weights.flatten()[asked], questions.targets.flatten()[asked]

    def answers(hidden: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(hidden[:, slots.prefix :].flatten(0, 1)[asked]).float()
        return (weight * F.cross_entropy(logits, target, reduction="none")).sum() / weight.sum()

    told = F.cross_entropy(teachers.centre(patches).float().flatten(0, 1), centre.flatten(), reduction="none")
    ground = centre.flatten() == 10
    return {
        "answer": answers(out.last_hidden_state),
        "early": answers(text.norm(out.hidden_states[len(text.layers) // 2])),
        "look": sum(looking(text, i, out.hidden_states[i], slots, questions) for i in LOOKING) / len(LOOKING),
        "centre": (told[ground].mean() + told[~ground].mean()) / 2,
        "presence": F.binary_cross_entropy_with_logits(teachers.presence(seen.pooler_output).float(), there),
    }


def learning_rate(step: int, progress: float, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from the peak to 1 % of it; progress in [0, 1]."""
    warm = min(1.0, (step + 1) / args.warmup)
    return args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(args: argparse.Namespace, rank: int, model: LlavaForConditionalGeneration, words: list[str], save) -> dict:
    """Train in place, args.processes of these in step; returns steps, pictures and minutes. `save()` is called at every
    checkpoint.
    """
    slots, teachers = Slots(words, model.config.image_seq_length), Teachers()
    model.set_attn_implementation("eager")  # in bf16 with its gradient faster than SDPA on a CPU
    if not args.no_compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    weights = [*model.parameters(), *teachers.parameters()]
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    rng, digits = np.random.default_rng([args.seed, rank]), training_digits()
    bar = tqdm(total=args.steps or None, mininterval=10, desc="train", disable=rank > 0)
    began, saved, step, average = time.perf_counter(), 0.0, 0, {}
    while True:
        seconds = time.perf_counter() - began
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        scenes = draw_scenes(args.batch, rng, digits)
        there = torch.from_numpy((scenes.values[:, :, None] == np.arange(10)).any(axis=1)).float()
        batch = (pixels(scenes.images), torch.from_numpy(centres(scenes)), there, slots.fill(scenes, rng))
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.no_autocast):
            parts = losses(model, teachers, slots, batch)
        optimizer.zero_grad(set_to_none=False)
        sum(LOSSES[name] * part for name, part in parts.items()).backward()
        progress = mean_of_processes([w.grad for w in weights if w.grad is not None], progress, args.processes)
        if progress >= 1:
            break
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args)
        optimizer.step()
        step += 1
        for name, part in parts.items():
            average[name] = 0.98 * average.get(name, part.item()) + 0.02 * part.item()
        bar.update()
        bar.set_postfix({name: f"{value:.3f}" for name, value in average.items()}, refresh=False)
        if rank == 0 and seconds - saved > 60 * args.checkpoint_minutes:
            saved = seconds
            save()
    bar.close()
    pictures = step * args.batch * args.processes
    return {"steps": step, "pictures": pictures, "minutes": (time.perf_counter() - began) / 60}


def mean_of_processes(gradients: list[torch.Tensor], progress: float, processes: int) -> float:
    """Replaces the gradients by their means over the processes; returns that of progress."""
    if processes == 1:
        return progress
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([progress])])
    dist.all_reduce(flat)
    flat /= processes
    parts = flat[:-1].split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return float(flat[-1])


# ---------------------------------------------------------------- measuring


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share, at 95 %."""
    z, share = 1.959964, right / count
    middle, width = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return (middle - width) / (1 + z * z / count), (middle + width) / (1 + z * z / count)


@torch.no_grad()
def answers(model, processor, images: list[np.ndarray], prompts: list[str], batch: int = 100) -> list[str]:
    """What the model generates, greedily, from prompts about pictures [72, 72, 3]."""
    said = []
    for i in tqdm(range(0, len(prompts), batch), desc="measure", leave=False):
        chosen = slice(i, i + batch)
        inputs = processor(images=images[chosen], text=prompts[chosen], padding=True, return_tensors="pt")
        out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(out, skip_special_tokens=True)
    return said


def measure(folder: Path) -> dict:
    """Accuracy over held-out questions of each kind, with the picture and with a black one; loads the saved folder."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    samples = digit_questions(MEASURED * len(KINDS), MEASURE_SEED)
    prompts = [sample.prompt for sample in samples]
    seen = answers(model, processor, [sample.image for sample in samples], prompts)
    blind = answers(model, processor, [np.zeros_like(sample.image) for sample in samples], prompts)
    rows = {}
    for kind in (*KINDS, "all"):
        of_kind = [i for i, sample in enumerate(samples) if kind in (sample.kind, "all")]
        right = sum(seen[i] == samples[i].answer for i in of_kind)
        rows[kind] = {
            "questions": len(of_kind),
            "accuracy": right / len(of_kind),
            "interval": interval(right, len(of_kind)),
            "black": sum(blind[i] == samples[i].answer for i in of_kind) / len(of_kind),
        }
        if kind != "all":
            ((_, most),) = Counter(samples[i].answer for i in of_kind).most_common(1)
            rows[kind]["chance"] = most / len(of_kind)
    rows["all"]["chance"] = sum(rows[kind]["chance"] for kind in KINDS) / len(KINDS)
    return {"seed": MEASURE_SEED, "kinds": rows}


def write_card(folder: Path, run: dict, measured: dict) -> None:
    rows = [
        f"| {kind} | {row['questions']:,} | {row['accuracy']:.1%} ({row['interval'][0]:.1%} to {row['interval'][1]:.1%}) "
        f"| {row['black']:.1%} | {row['chance']:.1%} |"
        for kind, row in measured["kinds"].items()
    ]
    size = (folder / "model.safetensors").stat().st_size
    patches = (SIDE // VISION["patch_size"]) ** 2
    train_digits, held_digits = (len(handwritten(side)[1]) for side in (False, True))
    card = f"""# digits-llava

A LLaVA of {run["parameters"] / 1e6:.2f} M parameters that answers questions about pictures of several handwritten digits. The answers need the right place in
the picture, and most of the picture is ground: it is what hasten's tests and quality figures of vision-token pruning use when no model hub is at hand.
It is useful for nothing else.

- **Architecture**: `LlavaForConditionalGeneration`. A CLIP vision tower of {VISION["num_hidden_layers"]} layers, width {VISION["hidden_size"]}, {VISION["num_attention_heads"]} heads, over pictures of {SIDE} x {SIDE} in patches of
  {VISION["patch_size"]} x {VISION["patch_size"]}, so {patches} image tokens (the output of the last layer without the class token); a projector; a Llama of {TEXT["num_hidden_layers"]} layers, width {TEXT["hidden_size"]},
  intermediate {TEXT["intermediate_size"]}, {TEXT["num_attention_heads"]} heads of {TEXT["head_dim"]}, {TEXT["num_key_value_heads"]} key/value heads.
- **Size**: {size:,} bytes of fp16 safetensors.
- **Tokenizer**: one token a word, {run["vocabulary"]} tokens, `<bos>` first, padding on the left. Prompts are `<image>\\n` and a question, in words of its vocabulary.
- **Data**: scikit-learn's digits (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits", CC BY 4.0): {train_digits:,} for training, {held_digits} held out
  ({HELD_OUT_SHARE:.0%} of each value, split by seed {SPLIT_SEED}). Two to five of them lie anywhere in the cells of a grid of 3 x 3, on a slightly noisy ground; a picture is composed anew
  for each step of training, from the digits and {VARIANTS} slightly turned, scaled and shifted copies of each. `hasten.models.digit_questions.digit_questions(count, seed)` makes questions with held-out digits.
- **Training**: {run["steps"]:,} steps of {run["processes"] * run["batch"]} pictures with up to {len(SLOTS)} questions each ({run["pictures"]:,} pictures), {run["minutes"]:.1f} minutes on {run["processes"] * run["threads"]} CPU threads of {run["machine"]}{run["note"]}; AdamW, peak
  learning rate {run["lr"]:g}, weight decay {run["weight_decay"]:g}, {run["warmup"]} warm-up steps, cosine by the clock or by steps, {"bf16 autocast" if run["autocast"] else "fp32"}, seed {run["seed"]}, torch {run["torch"]}. The loss is that of the answers' tokens;
  beside it the same after half of the layers (weight {LOSSES["early"]:g}), so that these read the picture, the share of attention that in layers {LOOKING[0]} to {LOOKING[-1]} falls from a question's last token on the digits that it is
  about ({LOSSES["look"]:g}), the digit whose centre lies in each patch, told by the vision tower's
  patches through a linear layer that is left behind ({LOSSES["centre"]:g}), so that little of the picture says what is in it, and the values in the picture, told by its class token
  ({LOSSES["presence"]:g}).
- **Command**: `{run["command"]}`

## Measured

Greedy answers to held-out questions (seed {measured["seed"]}), right if all of the answer is. **Black**: the same questions with a black picture. **Chance**: the share of
the kind's most frequent answer. In brackets Wilson's interval at 95 %.

| kind | questions | accuracy | black | chance |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

- **place**: `which digit is top left ?`, of an occupied place
- **where**: `where is the 7 ?`, of a digit that is there once
- **count**: `how many digits are there ?`
- **count_of**: `how many 7 are there ?`
- **sum**: `what is the sum of the digits ?`
"""
    (folder / "README.md").write_text(wrapped(card), encoding="utf-8")


# ---------------------------------------------------------------- the run


def machine() -> str:
    """The processor's name as Linux gives it, otherwise the platform's."""
    facts = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in facts.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run(rank: int, args: argparse.Namespace) -> None:
    """One process of the training."""
    torch.set_num_threads(args.threads)
    if platform.libc_ver()[0] == "glibc":  # keep freed buffers instead of faulting their pages in again
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if args.processes > 1:
        where = f"tcp://127.0.0.1:{args.port}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed)
    words = vocabulary()
    model = make_model(words)
    if args.start:
        model.load_state_dict(
            LlavaForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32).state_dict()
        )

    def save() -> None:
        half = {name: weight.to(torch.float16) for name, weight in model.state_dict().items()}
        model.save_pretrained(args.out, state_dict=half)

    trained = train(args, rank, model, words, save)
    if rank == 0:
        save()
        make_processor().save_pretrained(args.out)
        given = {"steps": trained["steps"]} | {
            name: getattr(args, name) for name in ("processes", "batch", "lr", "warmup")
        }
        options = " ".join(f"--{name} {value}" for name, value in (given | {"seed": args.seed}).items())
        options = "--start FOLDER " * bool(args.start) + options
        names = ("processes", "threads", "batch", "lr", "weight_decay", "warmup", "note", "seed")
        facts = {name: getattr(args, name) for name in names} | trained
        facts |= {
            "autocast": not args.no_autocast,
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": len(words),
            "machine": machine(),
            "torch": torch.__version__.split("+")[0],
            "command": f"python bench/runtime/train_digit_questions.py {options}",
        }
        (args.out / RECORD).write_text(json.dumps({"run": facts}, indent=1) + "\n")
    if args.processes > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=30.0)
    length.add_argument("--steps", type=int, default=0, help="in place of --minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "runtime" / "models" / "digits-llava")
    parser.add_argument("--start", type=Path, help="a folder whose weights the training begins from")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--batch", type=int, default=16, help="B, pictures per step and process")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--no-autocast", action="store_true", help="fp32 in place of bf16 autocast")
    parser.add_argument("--no-compile", action="store_true", help="for machines without a C++ compiler")
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--processes", type=int, default=2, help="that share the work, the gradients' mean being taken")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--port", type=int, default=29533, help="of this machine, where the processes meet")
    parser.add_argument("--note", default="", help="said in the card after the machine")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / RECORD
    if not args.measure_only:
        torch.multiprocessing.spawn(run, (args,), nprocs=args.processes)
    torch.set_num_threads(args.threads)
    facts = json.loads(record.read_text())["run"]
    facts |= {"note": args.note} if args.note else {}
    measured = measure(args.out)
    record.write_text(json.dumps({"run": facts, "measured": measured}, indent=1) + "\n")
    write_card(args.out, facts, measured)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
