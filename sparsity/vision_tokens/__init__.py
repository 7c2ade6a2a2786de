"""Vision-token pruning: which image tokens of a prompt the layers of a decoder see, and what that costs."""

from hasten.sparsity.vision_tokens.baseline import random_scores
from hasten.sparsity.vision_tokens.cost import Cost, LayerShape, prefill_cost
from hasten.sparsity.vision_tokens.duplicates import identical_rows
from hasten.sparsity.vision_tokens.greedy import Searched, g_search, grid
from hasten.sparsity.vision_tokens.merging import Merging, bipartite_merging
from hasten.sparsity.vision_tokens.p_sigmoid import Fitted, p_sigmoid_search
from hasten.sparsity.vision_tokens.raters import text_raters
from hasten.sparsity.vision_tokens.schedules import FastV, PSigmoid, Pyramid, Schedule, Stages, kept, schedule

__all__ = [
    "Cost",
    "FastV",
    "Fitted",
    "LayerShape",
    "Merging",
    "PSigmoid",
    "Pyramid",
    "Schedule",
    "Searched",
    "Stages",
    "bipartite_merging",
    "g_search",
    "grid",
    "identical_rows",
    "kept",
    "p_sigmoid_search",
    "prefill_cost",
    "random_scores",
    "schedule",
    "text_raters",
]
