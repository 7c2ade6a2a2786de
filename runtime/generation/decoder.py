"""A model of transformers that continues many texts at once: one forward a step, one cache, whose rows fork."""

import inspect

import torch
from torch import nn

from hasten.errors import UnsupportedModelError
from hasten.model_facts import cache_of, device_of, vocabulary


class CachedDecoder:
    """A `hasten.guidance.text.particles.Decoder`: the cache of a batch of texts, and the forwards that extend it.

    Prompts are padded on the left; padding is masked, and positions count without it, so a row's logits are those of
    its prompt alone.
    """

    def __init__(self, model: nn.Module):
        if model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                "", type(model).__name__, "encoder-decoder models read no prompt that they continue", "use a causal LM"
            )
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_last_only = "logits_to_keep" in accepted
        self._cache: dict[str, object] = {}
        self._mask: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Logits [P, V] that follow P prompts, which begin the cache.

        Raises:
            ValueError: a prompt with ids that the model does not embed.
        """
        embedded = vocabulary(self._model)
        for prompt in prompts:
            if max(prompt) >= embedded:
                raise ValueError(
                    f"the tokenizer does not belong to the model: the prompt holds id {max(prompt)}, the model embeds "
                    f"0..{embedded - 1}"
                )
        device = device_of(self._model)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        positions = torch.arange(width, device=device) - (width - self._lengths[:, None])
        if (positions < 0).any():
            self._mask = (positions >= 0).long()
        logits = self._forward(ids, positions.clamp(min=0))
        if "cache_params" in self._cache:  # a purely recurrent model keeps nothing of the padding that could be masked
            self._mask = None
        return logits

    @torch.inference_mode()
    def step(self, tokens: list[int], rows: list[int]) -> torch.Tensor:
        """Reads one more token per text.

        Args:
            tokens: the R tokens.
            rows: the rows of the batch so far that the R texts continue; a row may be continued several times, or not
                at all.

        Returns:
            [R, V]. The rows of the next step are 0..R - 1.
        """
        device = self._lengths.device
        if rows != list(range(len(self._lengths))):
            chosen = torch.tensor(rows, device=device)
            for cache in self._cache.values():
                cache.reorder_cache(chosen)
            self._lengths = self._lengths[chosen]
            self._mask = None if self._mask is None else self._mask[chosen]
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], -1)
        positions = self._lengths[:, None]
        self._lengths = self._lengths + 1
        return self._forward(torch.tensor(tokens, device=device)[:, None], positions)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        arguments = {"input_ids": ids, "attention_mask": self._mask, "use_cache": True, **self._cache}
        if self._takes_positions and self._mask is not None:
            arguments["position_ids"] = positions
        if self._takes_last_only:
            arguments["logits_to_keep"] = 1
        output = self._model(**arguments)
        if not (hasattr(output, "past_key_values") or hasattr(output, "cache_params")):
            name = type(self._model).__name__
            raise UnsupportedModelError(
                "", name, "its output has no cache that texts can share", "use another causal LM"
            )
        self._cache = cache_of(output)
        return output.logits[:, -1]
