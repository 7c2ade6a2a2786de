"""The selective scan of Mamba, over a sequence and as a step."""

from .op import selective_scan, selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
