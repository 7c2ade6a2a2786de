"""Train the small Llama that ships with hasten, on the text that ships with Python, and measure it.

What it does, in order:

1. gathers the standard library of the running interpreter (no site-packages): its sources, the help
   topics of `pydoc`, and the docstrings once more as plain English. Whole files (and whole topics) are held
   out by a hash of their name, about 5 %; neither the tokenizer nor the model ever sees them;
2. trains a byte-level BPE tokenizer of 4096 tokens on the training files;
3. trains a `LlamaForCausalLM` in bf16 with fp32 master weights, AdamW, warm-up and cosine decay;
4. writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, with `heldout.txt` and a model
   card whose figures are measured at the end of the same run: perplexity as it is, and with half of the
   inputs of every linear projection zeroed, at random or by smallest magnitude.

Reproduce (the card of the shipped model names its Python version and its number of steps):

    python bench/runtime/train_language_model.py --minutes 27
    python bench/runtime/train_language_model.py --steps 2000      # the same schedule, counted in steps

With `--minutes` the schedule follows the clock, so that a busy machine still finishes on time; with
`--steps` it follows the step count. `--resume` continues from the checkpoint that a stopped run left beside
the output folder; `--measure-only` loads a finished folder and measures it again. The data are those of the
interpreter that runs this: a distribution that leaves out `test` gives another corpus.
On a machine that does other work too, set OMP_WAIT_POLICY=PASSIVE: it made a step 2.8 times faster there.

Shapes: B sequences of T tokens; each sequence is a bos token and T - 1 tokens of the stream.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import hashlib
import json
import math
import platform
import random
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hasten.bench.cards import wrapped

ROOT = Path(__file__).resolve().parents[2]
BOS, EOS = "<|bos|>", "<|eos|>"
HELD_OUT_SHARE = 0.05
HELD_OUT_BYTES = {"library": 150_000, "test": 40_000, "topic": 30_000}  # what heldout.txt takes of each kind
PASSES = {
    "library": 2.0,
    "test": 0.4,
    "topic": 3.0,
    "docstrings": 1.5,
}  # how often a pass over the stream shows each kind

CONFIG = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=576,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
)


# ---------------------------------------------------------------- text


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    kind: str  # "library", "test", "topic" or "docstrings"
    text: str

    @property
    def rank(self) -> float:
        """A number in [0, 1) that depends on the name only: decides what is held out and what is sampled."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:6], "big") / 2**48


def gather() -> list[Document]:
    """The standard library's sources and pydoc's help topics, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or relative.as_posix() == "pydoc_data/topics.py":
            continue
        if relative.parts[0].startswith(("_sysconfigdata", "config-")):  # describes a machine, not Python
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # sources in other encodings, kept by Python to test its decoder
        if len(text) < 200 or "decoding_table" in text or "\0" in text:  # stubs, and tables of characters
            continue
        if max(map(len, text.splitlines())) > 1000:  # data in the form of code
            continue
        is_test = any(part in ("test", "tests", "idle_test") for part in relative.parts)
        documents.append(Document(relative.as_posix(), "test" if is_test else "library", text))
    from pydoc_data.topics import topics

    documents += [Document(f"topic/{name}", "topic", text) for name, text in sorted(topics.items())]
    return documents


def docstrings_of(document: Document) -> Document | None:
    """The docstrings of one module as one document of plain text."""
    try:
        nodes = list(ast.walk(ast.parse(document.text)))
    except (SyntaxError, ValueError, RecursionError):
        return None
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in nodes if isinstance(node, holders)]
    text = "\n\n".join(entry for entry in found if entry and len(entry) > 80)
    return Document(document.name + "#docstrings", "docstrings", text) if text else None


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training documents with their docstrings, held-out documents)."""
    train = [document for document in documents if document.rank >= HELD_OUT_SHARE]
    held_out = [document for document in documents if document.rank < HELD_OUT_SHARE]
    english = [docstrings_of(document) for document in train if document.kind == "library"]
    return train + [document for document in english if document], held_out


def held_out_text(held_out: list[Document]) -> str:
    """An excerpt of every held-out document, the same number of characters from each of a kind."""
    parts = []
    for kind, budget in HELD_OUT_BYTES.items():
        chosen = [document for document in held_out if document.kind == kind]
        share = budget // len(chosen)
        while sum(min(len(d.text), share) for d in chosen) < budget and share < max(len(d.text) for d in chosen):
            share += 100
        parts += [document.text[:share].rsplit("\n", 1)[0] + "\n" for document in chosen]
    return "\n".join(parts)


def verbatim_share(text: str, documents: list[Document], length: int = 120) -> float:
    """The share of the stretches of `length` characters of text that occur verbatim in the documents."""
    corpus = "\0".join(document.text for document in documents)
    stretches = [text[i : i + length] for i in range(0, len(text) - length, length)]
    return sum(stretch in corpus for stretch in stretches) / len(stretches)


# ---------------------------------------------------------------- tokens


def train_tokenizer(texts: list[str], context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: all 256 bytes are in the alphabet, so there is no unknown token and any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[np.ndarray]:
    """Each document as bos, its tokens, eos."""
    encodings = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    return [np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32) for encoding in encodings]


def one_pass(documents: list[Document], tokens: list[np.ndarray], T: int, bos: int, seed: int) -> torch.Tensor:
    """[N, T]: every document as often as PASSES says, shuffled, in windows that begin with bos, shuffled again."""
    rng = random.Random(seed)
    chosen = []
    for document, ids in zip(documents, tokens, strict=True):
        passes = PASSES[document.kind]
        chosen += [ids] * (int(passes) + (rng.random() < passes % 1))
    rng.shuffle(chosen)
    stream = np.concatenate(chosen)
    N = len(stream) // (T - 1)
    windows = np.full((N, T), bos, dtype=np.int64)
    windows[:, 1:] = stream[: N * (T - 1)].reshape(N, T - 1)
    rows = np.random.default_rng(seed).permutation(N)
    return torch.from_numpy(windows[rows])


# ---------------------------------------------------------------- training


def losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats, [B, T - 1] fp32, of ids [B, T] given what precedes each."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits = F.linear(hidden, model.lm_head.weight).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def learning_rate(step: int, progress: float, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from the peak to 2 % of it; progress in [0, 1]."""
    warm = min(1.0, (step + 1) / args.warmup)
    return args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(args, model, documents, tokens, bos: int, probe: torch.Tensor, save) -> dict:
    """Train in place; returns steps, tokens and seconds. `save(model)` is called at every checkpoint."""
    weights = list(model.parameters())
    masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    step, seconds = 0, 0.0
    if args.resume:
        state = torch.load(args.checkpoint)
        step, seconds = state["step"], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
        for weight, master, saved in zip(weights, masters, state["masters"], strict=True):
            master.data.copy_(saved)
            weight.data.copy_(saved)

    windows = one_pass(documents, tokens, args.context, bos, args.seed)
    per_pass = len(windows) // args.batch
    current = 0
    print(f"one pass: {per_pass} steps, {windows.numel() / 1e6:.1f} M tokens", flush=True)
    bar = tqdm(total=args.steps, initial=step, mininterval=10, desc="train")
    began, last_saved, average = time.perf_counter() - seconds, seconds, None
    while True:
        seconds = time.perf_counter() - began
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if progress >= 1:
            break
        if step // per_pass != current:
            current = step // per_pass
            windows = one_pass(documents, tokens, args.context, bos, args.seed + current)
        row = step % per_pass * args.batch
        loss = losses(model, windows[row : row + args.batch]).mean()
        loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.update()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
        if seconds - last_saved > 60 * args.checkpoint_minutes:
            last_saved = seconds
            state = {"step": step, "seconds": seconds, "masters": masters, "optimizer": optimizer.state_dict()}
            torch.save(state, args.checkpoint)
            save(model)
            with torch.no_grad():
                tqdm.write(
                    f"step {step}  {seconds / 60:.1f} min  train {average:.3f}"
                    f"  held out {losses(model, probe).mean():.3f}"
                )
                sys.stdout.flush()
    bar.close()
    save(model)
    return {"steps": step, "tokens": step * args.batch * args.context, "minutes": seconds / 60, "train_loss": average}


# ---------------------------------------------------------------- measuring


def drop_inputs(model: LlamaForCausalLM, share: float, how: str, seed: int = 0) -> list:
    """Zero a share of the inputs of every linear projection in the layers, per token; returns the hooks."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module, inputs):
        (x,) = inputs  # [B, T, K]
        score = torch.rand(x.shape, generator=generator) if how == "random" else x.abs().float()
        drop = score.topk(int(share * x.shape[-1]), dim=-1, largest=False).indices
        return (x.scatter(-1, drop, 0),)

    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    return [linear.register_forward_pre_hook(hook) for linear in linears]


@torch.no_grad()
def measure(folder: Path) -> dict:
    """Perplexity per token and bits per byte on heldout.txt, dense and with dropped inputs; loads the saved folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if tokenizer.decode(ids) != text:
        raise AssertionError("the tokenizer does not round-trip heldout.txt")
    T = model.config.max_position_embeddings
    N = len(ids) // (T - 1)
    windows = torch.full((N, T), tokenizer.bos_token_id)
    windows[:, 1:] = torch.tensor(ids[: N * (T - 1)]).view(N, T - 1)
    scored_bytes = len(tokenizer.decode(ids[: N * (T - 1)]).encode())

    results = {
        "heldout_bytes": len(text.encode()),
        "heldout_tokens": N * (T - 1),
        "bytes_per_token": scored_bytes / (N * (T - 1)),
    }
    cases = [("dense", 0, "")] + [
        (f"{how}_{share:.0%}", share, how) for share in (0.25, 0.5, 0.7) for how in ("random", "smallest")
    ]
    for name, share, how in tqdm(cases, desc="measure"):
        hooks = drop_inputs(model, share, how) if how else []
        total = sum(losses(model, chunk).double().sum().item() for chunk in windows.split(8))
        for hook in hooks:
            hook.remove()
        results[name] = {
            "perplexity": math.exp(total / (N * (T - 1))),
            "bits_per_byte": total / math.log(2) / scored_bytes,
        }
    return results


def samples(folder: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in ("def read_lines(path):\n", "class TestParser(unittest.TestCase):\n", "The function returns"):
        torch.manual_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        out = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=40)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def write_card(folder: Path, facts: dict, results: dict) -> None:
    size = (folder / "model.safetensors").stat().st_size
    rows = [
        f"| {name.replace('_', ' ')} | {value['perplexity']:.2f} | {value['bits_per_byte']:.3f} |"
        for name, value in results.items()
        if isinstance(value, dict)
    ]
    kinds = "\n".join(f"| {kind} | {a} | {b / 1e6:.2f} | {c} |" for kind, a, b, c in facts["kinds"])
    sampled = "\n\n".join("```\n" + text.rstrip() + "\n```" for text in samples(folder))
    card = f"""# stdlib-llama

A Llama of {facts["parameters"] / 1e6:.2f} M parameters that imitates Python and the English of Python's documentation. It is small enough to ship and
good enough that pruning it shows: it is what hasten's tests and quality figures use when no model hub is at hand. It is not useful for anything else.

- **Architecture**: `LlamaForCausalLM`, hidden {CONFIG["hidden_size"]}, {CONFIG["num_hidden_layers"]} layers, intermediate {CONFIG["intermediate_size"]}, \
{CONFIG["num_attention_heads"]} heads of {CONFIG["head_dim"]}, {CONFIG["num_key_value_heads"]} key/value heads, context {facts["context"]}, tied embedding.
- **Size**: {size:,} bytes of bf16 safetensors.
- **Tokenizer**: byte-level BPE, {CONFIG["vocab_size"]} tokens with `{BOS}` (put first) and `{EOS}` (also used to pad); trained on the training files only; round-trips any text.
- **Data**: the standard library of Python {facts["python"]} (its sources and the help topics of `pydoc`), copyright Python Software Foundation, under
  the PSF License Version 2; `heldout.txt` is an excerpt of it. Docstrings appear a second time as plain text.
- **Held out**: files and topics whose name hashes below {HELD_OUT_SHARE} (see `split` in the script); never seen by the tokenizer or the model. `heldout.txt` is the beginning of each.
  Files of one library resemble each other all the same: {results["verbatim"]:.1%} of its stretches of 120 characters occur somewhere in the training text.
- **Training**: {facts["steps"]} steps of {facts["batch"]} x {facts["context"]} tokens = {facts["tokens"] / 1e6:.2f} M tokens, {facts["minutes"]:.1f} minutes on {facts["threads"]} CPU threads{facts.get("note", "")}; AdamW,
  peak learning rate {facts["lr"]}, weight decay {facts["weight_decay"]}, {facts["warmup"]} warm-up steps, cosine by the clock or by steps, bf16 with fp32 master weights, seed {facts["seed"]}, torch {facts["torch"]}.
- **Command**: `{facts["command"]}`

| kind | training documents | MB of text | held-out documents |
| --- | --- | --- | --- |
{kinds}

## Measured

On `heldout.txt` ({results["heldout_bytes"]:,} bytes; {results["heldout_tokens"]:,} tokens scored in windows of {facts["context"]}, each beginning with bos; {results["bytes_per_token"]:.2f} bytes per token).
"random 50%" zeroes half of the inputs of every linear projection in the layers, drawn anew for each token; "smallest 50%" zeroes the half with the smallest |x|.

| inputs zeroed | perplexity per token | bits per byte |
| --- | --- | --- |
{chr(10).join(rows)}

## What it writes

Temperature 0.7, top-k 40, seed 0, 80 new tokens.

{sampled}
"""
    (folder / "README.md").write_text(wrapped(card), encoding="utf-8")


# ---------------------------------------------------------------- the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=27, help="wall time of the training loop, unless --steps is given"
    )
    parser.add_argument("--steps", type=int, help="number of steps; the schedule then follows the steps")
    parser.add_argument("--out", type=Path, default=ROOT / "runtime" / "models" / "stdlib-llama")
    parser.add_argument("--checkpoint", type=Path, help="default: beside --out")
    parser.add_argument("--checkpoint-minutes", type=float, default=4)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--batch", type=int, default=4, help="B, sequences per step")
    parser.add_argument("--context", type=int, default=512, help="T, tokens per sequence")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--note", default="", help="said in the card after the wall time, such as: ', shared with other work'"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or args.out.with_name(args.out.name + ".checkpoint.pt")
    torch.set_num_threads(args.threads)
    if platform.libc_ver()[0] == "glibc":  # keep freed buffers instead of faulting their pages in again: 16 % faster
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "training.json"

    documents, held_out = split(gather())
    if args.measure_only:
        facts = json.loads(record.read_text())["run"]
        facts |= {"note": args.note} if args.note else {}
    else:
        if args.resume:
            tokenizer = AutoTokenizer.from_pretrained(args.out)
        else:
            tokenizer = train_tokenizer([document.text for document in documents], args.context)
            tokenizer.save_pretrained(args.out)
        (args.out / "heldout.txt").write_text(held_out_text(held_out), encoding="utf-8")
        tokens = encode(tokenizer, documents)
        kinds = []
        for kind in PASSES:
            here = [i for i, document in enumerate(documents) if document.kind == kind]
            size = sum(len(documents[i].text.encode()) for i in here)
            kinds.append((kind, len(here), size, sum(document.kind == kind for document in held_out)))
            print(
                f"{kind:12} {len(here):5} documents  {size / 1e6:6.2f} MB"
                f"  {sum(len(tokens[i]) for i in here) / 1e6:5.2f} M tokens"
            )

        torch.manual_seed(args.seed)
        special = dict(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(
            LlamaConfig(**CONFIG, **special, max_position_embeddings=args.context, attn_implementation="sdpa")
        ).to(torch.bfloat16)
        model.generation_config = GenerationConfig(**special)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters", flush=True)
        probe = torch.from_numpy(
            np.concatenate(encode(tokenizer, held_out))[: 24 * args.context].astype(np.int64)
        ).view(24, args.context)

        run = train(
            args, model, documents, tokens, tokenizer.bos_token_id, probe, lambda m: m.save_pretrained(args.out)
        )
        names = ("note", "batch", "context", "lr", "weight_decay", "warmup", "threads", "seed")
        facts = {name: getattr(args, name) for name in names} | run
        length = f"--steps {args.steps}" if args.steps else f"--minutes {args.minutes:g}"
        facts |= {
            "kinds": kinds,
            "parameters": parameters,
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
        }
        facts |= {
            "command": f"python bench/runtime/train_language_model.py {length} --batch {args.batch} --lr {args.lr:g}"
        }
        record.write_text(json.dumps({"run": facts}, indent=1) + "\n")

    results = measure(args.out)
    results["verbatim"] = verbatim_share((args.out / "heldout.txt").read_text(encoding="utf-8"), documents)
    record.write_text(json.dumps({"run": facts, "measured": results}, indent=1) + "\n")
    write_card(args.out, facts, results)
    args.checkpoint.unlink(missing_ok=True)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
