"""Controllers: how many tokens to draft in the next round."""

from specdec.controllers.adaptive import adaptive, aimd
from specdec.controllers.expected import expected
from specdec.controllers.fixed import fixed

__all__ = ["adaptive", "aimd", "expected", "fixed"]
