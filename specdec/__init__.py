"""Speculative decoding as a pipeline of pure functions.

A round is `step(state) -> (state, info)`; `build_step` composes it from a model, a drafter, a policy and a controller,
`init_state` makes the first state, `iterate` repeats the step and `decode` does it all. See `specdec.types` for the
records and the shape letters.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.sampling import Sampling as Sampling
    from specdec.state import fork_state as fork_state
    from specdec.state import init_state as init_state
    from specdec.state import load_state as load_state
    from specdec.state import output_tokens as output_tokens
    from specdec.state import save_state as save_state
    from specdec.step import build_step as build_step
    from specdec.step import decode as decode
    from specdec.step import iterate as iterate

__version__ = "0.1.0"

# Torch takes a second to import, so nothing is imported before it is asked for.
_HOMES = {
    "Sampling": "sampling",
    "build_step": "step",
    "decode": "step",
    "fork_state": "state",
    "init_state": "state",
    "iterate": "step",
    "load_state": "state",
    "output_tokens": "state",
    "save_state": "state",
}
__all__ = [*sorted(_HOMES), "__version__"]  # noqa: PLE0604 (names of _HOMES are strings)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"specdec.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'specdec' has no attribute {name!r}")
