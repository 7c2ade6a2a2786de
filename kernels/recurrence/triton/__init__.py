"""Linear attention and the delta rule on GPUs: states by a light serial scan over chunks of tokens, all else in
parallel over the chunks.

| file | kernels |
| --- | --- |
| states.py | the weights of keys in a state, and the scan: the state before each chunk, and the final ones |
| pairs.py | what decays per component do within a chunk: weights of pairs of tokens, decayed q and k |
| corrections.py | the delta rule within a chunk: its triangular system solved (WY form) |
| outputs.py | the outputs, from the states and from the pairs of tokens of a chunk |
| step.py | a few tokens that continue a state: decode |
| arithmetic.py | what they share |
| launches.py | which tiles and how many programs, and the launches |
"""

from .launches import MAX_K, launch, step

__all__ = ["MAX_K", "launch", "step"]
