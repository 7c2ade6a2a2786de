"""Temporary: running a model on token ids."""

import inspect

import torch

from hasten.model_facts import cache_of, device_of


def prefill(model, ids):
    return model(input_ids=ids.to(device_of(model)), use_cache=True)


def step(model, ids, run):
    return model(input_ids=ids.to(device_of(model)), use_cache=True, **cache_of(run))


@torch.no_grad()
def forward(model, ids):
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(input_ids=ids[None].to(device_of(model)), use_cache=False, **last_only)
