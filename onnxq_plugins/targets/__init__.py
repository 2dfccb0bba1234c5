"""What a runtime can execute and how it wants it stored."""

from onnxq_plugins.targets.target import BUILTIN, Rule, Target

__all__ = ["BUILTIN", "Rule", "Target"]
