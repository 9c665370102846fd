"""What optimisers and unusual converters write, brought into plain forms that compute the same."""

from corp_onnx.graph.canonical.rules import RULES, canonicalise

__all__ = ["RULES", "canonicalise"]
