"""The delta rule with decay, in chunks and in steps."""

from .op import delta_rule, delta_rule_step

__all__ = ["delta_rule", "delta_rule_step"]
