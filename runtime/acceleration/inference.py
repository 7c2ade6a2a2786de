"""How the text decoder of any transformers model is run: on token ids, or on what a processor returns.

A run neither depends on what the model remembers of earlier inputs nor changes it. What goes wrong inside the model
comes out as an `UnsupportedModelError` that names what the model was given.
"""

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hasten.acceleration.caches import CACHES, caches, is_filled
from hasten.acceleration.image_tokens import IMAGES, image_token_ids
from hasten.acceleration.undisturbed import undisturbed
from hasten.errors import HastenError, UnsupportedModelError
from hasten.model_facts import device_of, longest_input, vocabulary

Inputs = torch.Tensor | Mapping[str, Any]

# Inputs that have a value for each token, besides those of the ids' own shape: masks over images.
ROWS = ("cross_attention_mask", "image_attention_mask")
# Inputs that a step needs again, by model type.
EVERY_STEP = {"idefics": ("pixel_values",), "kosmos-2": ("pixel_values", "image_embeds")}
# Model types that make positions of their own, of other lengths than their input.
OWN_POSITIONS = ("reformer", "xlnet")
# Beginnings of the names of tokens that stand for something else than text, in configurations.
PLACEHOLDERS = (*IMAGES, "audio_token")
BEFORE_IMAGE = 4  # tokens of text before an image that a prompt to measure on has
# Inputs that are not 0 at such tokens.
KINDS_OF_TOKENS = {"mm_token_type_ids", "image_embeds_position_mask"}
# What a processor returns besides, and no forward takes.
NOT_FORWARDED = ("labels", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping")
# Arguments of a run on text alone.
TEXT = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHES}
# Parts of the names of modules that attend to something else than the text.
CROSS_ATTENTION = ("cross", "encoder_attn", "encoder_decoder")
EXAMPLE_TOKENS = 4


@dataclass(slots=True)
class Reading:
    """What a decoder has read so far, and what its next step takes.

    `ids` are the tokens [B, T]; `mask` [B, T] is 0 at padding, None without any; `cache` is empty for models without;
    `along` are the other arguments of each step; `text_only` is False where the prompt held more than text.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    text_only: bool
    cache: dict[str, object] = field(default_factory=dict)
    along: dict[str, object] = field(default_factory=dict)


class Inference:
    """Runs the text decoder of a model as `generate` would: with positions, masks and caches as the model takes them.

    A decoder-only model reads token ids. An encoder-decoder that is given ids alone reads them with its encoder and
    with its decoder, as a denoising pass does; of what a processor returns, the decoder gets `decoder_input_ids`, else
    `labels`, moved on by one as in training where the configuration names the token that begins, else the ids that the
    encoder gets. A multimodal model whose forward needs more than token ids is run on its inner language model where it
    has one. A model without a cache reads the whole text in every step.

    Args:
        model: a model of transformers, in eval mode.
        example: inputs like those that it will be run on, one row of them; by default a few token ids.

    Attributes:
        model: the model.
        target: what is run of it: the model itself, or its inner language model.
        example: the example.

    Raises:
        UnsupportedModelError: the model cannot be run on such inputs; the message names what it was given.
    """

    def __init__(self, model: nn.Module, example: Inputs | None = None):
        self.model = self.target = model
        if example is None:
            example = torch.arange(min(EXAMPLE_TOKENS, longest_input(model)))
        try:
            self._probe(example)
        except UnsupportedModelError as refusal:
            whole = isinstance(example, Mapping) or model.config.is_encoder_decoder
            inner = None if whole else inner_language_model(model)
            if inner is None:
                raise
            self.target = inner
            try:
                self._probe(example)
            except UnsupportedModelError:
                raise refusal from None

    def _probe(self, example: Inputs) -> None:
        """Runs the example, to find out how the target takes and returns its cache."""
        parameters = inspect.signature(self.target.forward).parameters
        self.parameters = parameters.keys()
        self.encodes = "decoder_input_ids" in parameters and self.target.config.is_encoder_decoder
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.takes_flag = anything or "use_cache" in parameters
        room = max(1, min(EXAMPLE_TOKENS, longest_input(self.model) - 1))  # a step follows
        self.example = example
        example = self.cut(example, max(room, self.shortest_prefix(example)))
        for makes_cache in (False, True) if self.takes_flag else ():
            self.has_cache, self.makes_cache = True, makes_cache
            # An AttributeError is a configuration's from which transformers cannot make a cache.
            with contextlib.suppress(UnsupportedModelError, AttributeError), undisturbed(self.model):
                _, reading = self.prefill(example)
                if any(map(is_filled, reading.cache.values())):
                    self.step(reading, reading.ids[:, -1:])
                    return
        self.has_cache = self.makes_cache = False
        self.forward(example)

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> torch.Tensor:
        """One pass over `inputs` without a cache: logits [B, T, V], or of the last position alone where the model can.

        Raises:
            UnsupportedModelError: the model raised an error.
        """
        arguments, _ = self._arguments(inputs)
        if self.takes_flag:
            arguments["use_cache"] = False
        if "logits_to_keep" in self.parameters:
            arguments["logits_to_keep"] = 1
        with undisturbed(self.model):
            return self._run(arguments).logits

    @torch.no_grad()
    def prefill(self, inputs: Inputs, last: bool = False) -> tuple[torch.Tensor, Reading]:
        """Reads a prompt: token ids [T] or [B, T], or what a processor returns. Use it and `step` in `undisturbed`.

        Args:
            last: of the logits, those of the last position are enough, as for `generate`.

        Returns:
            logits [B, T, V], or [B, 1, V] with `last` and of models that give no others; and the reading that `step`
            continues.

        Raises:
            UnsupportedModelError: the model raised an error.
        """
        arguments, reading = self._arguments(inputs)
        if self.encodes:
            arguments = self._encoded(arguments)
        if last and "logits_to_keep" in self.parameters:
            arguments["logits_to_keep"] = 1
        if self.takes_flag:
            arguments["use_cache"] = self.has_cache
        if self.makes_cache:
            arguments["past_key_values"] = self._new_cache()
        output = self._run(arguments)
        if self.has_cache:
            reading.cache = caches(output) or caches(arguments)
        if reading.cache:
            reading.along = self._for_each_step(arguments, output)
        return output.logits, reading

    @torch.no_grad()
    def step(self, reading: Reading, ids: torch.Tensor) -> torch.Tensor:
        """Reads further tokens `ids` [B, t], usually t = 1, and adds them to `reading`; returns their logits [B, t, V].

        Raises:
            UnsupportedModelError: the model raised an error.
        """
        ids = ids.to(reading.ids.device)
        reading.ids = torch.cat([reading.ids, ids], 1)
        if reading.mask is not None:
            reading.mask = torch.cat([reading.mask, reading.mask.new_ones(ids.shape)], 1)
        new = ids.shape[1] if reading.cache else reading.ids.shape[1]
        for name, value in () if reading.cache or self.encodes else reading.along.items():
            if _is_of_tokens(name, value, reading.ids[:, : -ids.shape[1]]):
                reading.along[name] = torch.cat([value, value[:, -1:].expand(-1, ids.shape[1], *value.shape[2:])], 1)
        arguments = reading.along | reading.cache | self._text(reading, new)
        if self.takes_flag:
            arguments["use_cache"] = bool(reading.cache)
        output = self._run(arguments)
        reading.cache |= caches(output) if reading.cache else {}
        return output.logits[:, -ids.shape[1] :]

    @torch.no_grad()
    def decode(self, inputs: Inputs, prefix: int) -> torch.Tensor:
        """Logits [B, T - prefix + 1, V] in float32, on the CPU, that follow positions prefix - 1 .. T - 1 of `inputs`:
        a prefill of the first `prefix` tokens, then single steps. A prefix that cuts an image is made longer.

        Raises:
            UnsupportedModelError: the model raised an error.
        """
        ids = self.token_ids(inputs)
        prefix = max(prefix, self.shortest_prefix(inputs))
        with undisturbed(self.model):
            logits, reading = self.prefill(self.cut(inputs, prefix), last=True)
            rows = [logits[:, -1]]
            for position in range(prefix, ids.shape[1]):
                rows.append(self.step(reading, ids[:, position : position + 1])[:, -1])
        return torch.stack(rows, 1).float().cpu()

    def token_ids(self, inputs: Inputs) -> torch.Tensor:
        """The tokens [B, T] that the decoder reads."""
        return self._arguments(inputs)[1].ids

    def shortest_prefix(self, inputs: Inputs) -> int:
        """The number of tokens up to the last one that stands for something else than text; at least 1."""
        ids = self.token_ids(inputs)
        if self.encodes or self._arguments(inputs)[1].text_only:
            return 1
        stands = torch.zeros_like(ids, dtype=torch.bool)
        for name, value in vars(self.target.config).items():
            if name.startswith(PLACEHOLDERS) and isinstance(value, int):
                stands |= ids == value
        for name in KINDS_OF_TOKENS & inputs.keys():
            stands |= inputs[name].to(ids.device) != 0
        return max(1, int(stands.any(0).nonzero().max()) + 1) if stands.any() else 1

    def cut(self, inputs: Inputs, tokens: int) -> Inputs:
        """`inputs` without what the decoder reads after the first `tokens` tokens."""
        if not isinstance(inputs, Mapping) and not self.encodes:
            return inputs[..., :tokens]
        inputs = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
        ids = self.token_ids(inputs)
        if self.encodes:
            return inputs | {"decoder_input_ids": ids[:, :tokens]}
        return {name: value[:, :tokens] if _is_of_tokens(name, value, ids) else value for name, value in inputs.items()}

    def random_ids(self, tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        """Token ids [batch, tokens] from a seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary(self.target), (batch, tokens), generator=generator)

    def prompt_length(self, tokens: int) -> int:
        """How many tokens `prompt` has where so many are asked for: a picture is not cut, and where no text follows the
        last one, there is nothing to go on with."""
        if not isinstance(self.example, Mapping):
            return tokens
        length, first = self.token_ids(self.example).shape[1], self.shortest_prefix(self.example)
        return max(tokens if first < length else min(tokens, length), first)

    def image_length(self, tokens: int, image: int) -> int:
        """How many of the tokens of `prompt` stand for an image where so many are asked for: those that the example
        has, or as many as leave some of the `tokens` for text; none of a model that knows no token for images."""
        if isinstance(self.example, Mapping):
            return self.image_length_of(self.cut(self.example, self.prompt_length(tokens)))
        return max(0, min(image, tokens - 2 * BEFORE_IMAGE)) if self._image_ids() else 0

    def image_length_of(self, inputs: Inputs) -> int:
        """How many tokens of the decoder stand for an image, the most of any row."""
        ids = self.token_ids(inputs)
        return int(torch.isin(ids, torch.tensor(self._image_ids(), dtype=ids.dtype, device=ids.device)).sum(1).max())

    def _image_ids(self) -> list[int]:
        return [token for token in image_token_ids(self.target.config) if token < vocabulary(self.target)]

    def prompt(self, tokens: int, batch: int = 1, image: int = 0) -> Inputs:
        """A prompt of `prompt_length(tokens)` tokens to measure on, in `batch` rows: random ids, `image` of which stand
        for an image; or the example where the model was given more than ids, its text after the last picture repeated
        as often as it takes."""
        if not isinstance(self.example, Mapping):
            ids = self.random_ids(tokens, batch)
            for token in image_token_ids(self.target.config):
                ids[ids == token] = 0
            if image := self.image_length(tokens, image):
                ids[:, BEFORE_IMAGE : BEFORE_IMAGE + image] = image_token_ids(self.target.config)[0]
            return ids
        tokens, first = self.prompt_length(tokens), self.shortest_prefix(self.example)
        inputs = self.cut(self.example, tokens)
        ids = self.token_ids(inputs)
        places, length = torch.arange(tokens, device=ids.device), ids.shape[1]
        if tokens > length:
            places[length:] = first + (places[length:] - length) % (length - first)
            for name, value in inputs.items():
                if name == "decoder_input_ids" if self.encodes else _is_of_tokens(name, value, ids):
                    inputs[name] = value[:, places.to(value.device)]
        return {name: _repeated(value, batch) for name, value in inputs.items()}

    def _moved_on(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads to say `labels` [B, T], as the model's own forward makes it of them."""
        config, prepare = self.target.config, getattr(self.target, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None:
            with contextlib.suppress(UnsupportedModelError):  # it needs tokens that not every configuration names
                return self._call(prepare, {"labels": labels})
        start, padding = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "pad"))
        if start is None:
            return labels.clamp(min=0)
        moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
        return moved.masked_fill(moved < 0, start if padding is None else padding)  # labels are -100 at padding

    def _arguments(self, inputs: Inputs) -> tuple[dict[str, Any], Reading]:
        """The arguments of a pass over `inputs`, and the reading that starts with it."""
        device = device_of(self.model)
        inputs = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
        inputs = {name: _on(value, device) for name, value in inputs.items()}
        given = {name: value for name, value in inputs.items() if name not in NOT_FORWARDED}
        names = ("decoder_input_ids", "labels", "input_ids") if self.encodes else ("input_ids",)
        ids = next((inputs[name] for name in names if name in inputs), None)
        if ids is None:
            raise self._refusal(given, f"no {' nor '.join(names)} among what it was given")
        ids = torch.atleast_2d(ids)
        if self.encodes and "decoder_input_ids" not in inputs and "labels" in inputs:
            ids = self._moved_on(ids)
        mask = given.pop("decoder_attention_mask" if self.encodes else "attention_mask", None)
        mask = None if mask is None or mask.bool().all() else mask
        reading = Reading(ids, mask, text_only=not given.keys() - {"input_ids", "attention_mask", "decoder_input_ids"})
        if self.encodes:
            main = self.target.main_input_name
            if "input_ids" in given and main == "input_ids":
                given["input_ids"] = torch.atleast_2d(given["input_ids"])
            else:
                given.pop("input_ids", None)
                if not given.keys() & {main, "encoder_outputs"}:
                    raise self._refusal(inputs, f"its encoder reads {main}")
        reading.along = {name: value for name, value in given.items() if name != names[0]}
        return given | self._text(reading, ids.shape[1]), reading

    def _text(self, reading: Reading, tokens: int) -> dict[str, Any]:
        """The arguments for the last `tokens` of a reading: ids, and masks and positions where they are needed."""
        if self.encodes:
            mask = {"decoder_attention_mask": reading.mask} if reading.mask is not None else {}
            return {"decoder_input_ids": reading.ids[:, -tokens:]} | mask
        arguments = {"input_ids": reading.ids[:, -tokens:]}
        if reading.mask is not None:
            arguments["attention_mask"] = reading.mask
        if (
            "position_ids" in self.parameters
            and reading.text_only
            and self.target.config.model_type not in OWN_POSITIONS
        ):
            if reading.mask is not None:
                positions = (reading.mask.long().cumsum(-1) - 1).clamp(min=0)
            else:
                positions = torch.arange(reading.ids.shape[1], device=reading.ids.device).repeat(len(reading.ids), 1)
            arguments["position_ids"] = positions[:, -tokens:].contiguous()
        return arguments

    def _for_each_step(self, arguments: dict[str, Any], output) -> dict[str, Any]:
        """What a step takes besides its tokens and the cache."""
        again = (
            ("encoder_outputs", "attention_mask") if self.encodes else EVERY_STEP.get(self.target.config.model_type, ())
        )
        along = {name: arguments[name][:, -1:] for name in ROWS if name in arguments}
        along |= {name: arguments[name] for name in again if name in arguments}
        if self.encodes and (encoded := getattr(output, "encoder_last_hidden_state", None)) is not None:
            along.setdefault("encoder_outputs", BaseModelOutput(last_hidden_state=encoded))
        return along

    def _encoded(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """`arguments` with the output of the encoder for its inputs, where the encoder alone takes all of them."""
        encoder = self.target.get_encoder()
        inputs = {name: value for name, value in arguments.items() if not name.startswith(("decoder_", "encoder_"))}
        if not inputs or not inputs.keys() <= inspect.signature(encoder.forward).parameters.keys():
            return arguments
        output = self._call(encoder, inputs)
        kept = {name: value for name, value in arguments.items() if name not in inputs or name == "attention_mask"}
        return kept | {"encoder_outputs": output}

    def _new_cache(self) -> object:
        """A cache as `generate` makes it, for models that fill one and make none."""
        config = self.target.config.get_text_config(decoder=True)
        cache = DynamicCache(config=config)
        return EncoderDecoderCache(cache, DynamicCache(config=config)) if self.encodes else cache

    def _run(self, arguments: dict[str, Any]):
        """The target's output, with logits."""
        output = self._call(self.target, arguments)
        logits = getattr(output, "logits", None)
        found = "no logits" if not isinstance(logits, torch.Tensor) else f"logits {list(logits.shape)}"
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or self._classifies(logits):
            reason, remedy = f"it has no language-model head: its output has {found}", "pass the ...ForCausalLM model"
            raise UnsupportedModelError("", type(self.target).__qualname__, reason, remedy)
        ids = arguments["decoder_input_ids" if self.encodes else "input_ids"]
        if not arguments.keys() - TEXT and logits.shape[1] not in (1, ids.shape[1]):
            raise self._refusal(arguments, f"its logits {list(logits.shape)} are not one row for each token")
        return output

    def _classifies(self, logits: torch.Tensor) -> bool:
        """Whether logits [B, T, labels] are of a head that classifies tokens."""
        labels = getattr(self.target.config, "num_labels", None)
        return logits.shape[-1] == labels and self.target.get_output_embeddings() is None

    def _call(self, module: nn.Module, arguments: dict[str, Any]):
        """The output of the target or of its encoder."""
        try:
            return module(**arguments)
        except (HastenError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise self._refusal(arguments, f"{type(error).__name__}: {lines[0]}") from error

    def _refusal(self, arguments: dict[str, Any], reason: str) -> UnsupportedModelError:
        given = ", ".join(
            f"{name} {list(value.shape)}" for name, value in arguments.items() if isinstance(value, torch.Tensor)
        )
        return UnsupportedModelError(
            "",
            type(self.target).__qualname__,
            f"it cannot be run on {given or 'what it was given'}: {reason}",
            "give calibration= as dictionaries with all that its forward needs, as its processor returns them",
        )


def inner_language_model(model: nn.Module) -> nn.Module | None:
    """The language model with a head of its own that a multimodal model is built around, or None.

    A decoder with cross-attention is none: on token ids alone, part of it would not run.
    """
    for _, module in sorted(model.named_modules(), key=lambda item: item[0].count(".")):
        if module is model or not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
            continue
        crosses = any(part in name for name, _ in module.named_modules() for part in CROSS_ATTENTION)
        if module.main_input_name == "input_ids" and (module.config.is_encoder_decoder or not crosses):
            return module
    return None


def _on(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _repeated(value: object, batch: int) -> object:
    """An input of one row for `batch` rows, packed or not: its first dimension again and again."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value] * batch) if value.dim() else value
    return value * batch if isinstance(value, list | tuple) else value


def _is_of_tokens(name: str, value: object, ids: torch.Tensor) -> bool:
    """Whether an input has a value for each token of `ids` [B, T]."""
    if name.startswith("qformer"):  # the tokens of another model, which reads the prompt alone
        return False
    return name in ROWS or (isinstance(value, torch.Tensor) and value.shape == ids.shape)
