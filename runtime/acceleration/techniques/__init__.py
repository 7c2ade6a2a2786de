"""The techniques: one file each, on the contract of `base`."""

from hasten.acceleration.techniques.base import Regime, Settings, Technique
from hasten.acceleration.techniques.cats import Cats
from hasten.acceleration.techniques.dense_decode import DenseDecode
from hasten.acceleration.techniques.distinct_tiles import DistinctTiles
from hasten.acceleration.techniques.fast_linear_attention import FastLinearAttention
from hasten.acceleration.techniques.teal import Teal
from hasten.acceleration.techniques.vision_tokens import VisionTokens
from hasten.acceleration.techniques.wina import Wina

__all__ = [
    "Cats",
    "DenseDecode",
    "DistinctTiles",
    "FastLinearAttention",
    "Regime",
    "Settings",
    "Teal",
    "Technique",
    "VisionTokens",
    "Wina",
]
