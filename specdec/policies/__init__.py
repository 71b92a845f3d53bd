"""Verification rules: which drafted tokens are kept, and which one token follows them."""

from specdec.policies.block import block
from specdec.policies.lossless import lossless
from specdec.policies.matching import coupled, greedy, match

__all__ = ["block", "coupled", "greedy", "lossless", "match"]
