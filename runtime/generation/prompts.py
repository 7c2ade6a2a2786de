"""Prompts as users write them: texts or chat messages, one or a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hasten.model_facts import longest_input

Message = dict[str, Any]
Prompt = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]]


def tokenize_prompts(prompt: Prompt, tokenizer) -> tuple[list[list[int]], bool]:
    """The token ids of each prompt, and whether there is one that stands alone.

    Raises:
        ValueError: no text, no chat messages, and no list of these.
    """
    if isinstance(prompt, str) or (_is_list(prompt) and prompt and isinstance(prompt[0], dict)):
        return [_ids(prompt, tokenizer)], True
    if not _is_list(prompt):
        raise ValueError(f"prompt must be a text, chat messages or a list of these, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError("prompt is an empty list")
    return [_ids(each, tokenizer) for each in prompt], False


def check_lengths(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Refuses prompts that cannot be continued.

    Raises:
        ValueError: a prompt without tokens; prompt and continuation are longer than the model's context.
    """
    longest = longest_input(model)
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {place} is empty: it has no tokens")
        if len(prompt) + max_new_tokens > longest:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that is more than the "
                f"model's context of {longest}: max_new_tokens can be {max(longest - len(prompt), 0)} at most"
            )


def _ids(prompt, tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False)["input_ids"]
    if _is_list(prompt) and prompt and all(isinstance(message, dict) for message in prompt):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    raise ValueError(f"prompt must be a text or a list of chat messages, got {prompt!r:.60}")


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
