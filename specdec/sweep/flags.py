"""The `SPECDEC_*` environment flags: which key of the configuration each one sets, and what it can do here.

A flag whose feature does not exist is not accepted in silence: `notices` says so, once a sweep.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.sweep.config import Config

_ON, _OFF = ("1", "true", "on", "yes"), ("0", "false", "off", "no", "")


def _switch(value: str) -> bool:
    if value.lower() not in (*_ON, *_OFF):
        raise ValueError("1 or 0")
    return value.lower() in _ON


def _mixed(value: str) -> str:
    return "auto" if value.lower() == "auto" else "on" if _switch(value) else "off"


def _one_of(*words: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value.lower() not in words:
            raise ValueError(" or ".join(words))
        return value.lower()

    return read


FLAGS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "SPECDEC_AMP": ("amp", _mixed),
    "SPECDEC_DTYPE": ("dtype", _one_of("auto", "float16", "bfloat16", "float32", "float64")),
    "SPECDEC_DETAILED_METRICS": ("detailed_metrics", _switch),
    "SPECDEC_ENABLE_KV_APPEND": ("enable_kv_append", _switch),
    "SPECDEC_FORCE_PY": ("force_py", _switch),
    "SPECDEC_DETERMINISTIC": ("deterministic", _switch),
    "SPECDEC_PROFILE": ("profile", _switch),
    "SPECDEC_CUDA_GRAPH": ("cuda_graph", _switch),
    "SPECDEC_PARALLEL_STREAMS": ("parallel_streams", _switch),
    "SPECDEC_SYNC_MODE": ("sync_mode", _one_of("event", "barrier")),
    "SPECDEC_DRY_RUN": ("dry_run", _switch),
}
# Variables of other parts of specdec, which are no flags of a sweep.
_OTHERS = {"SPECDEC_HOME"}


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The keys that flags in `environ` set; raises `ValueError` for a value that a flag cannot have."""
    values = {}
    for name, (key, read) in FLAGS.items():
        if name not in environ:
            continue
        try:
            values[key] = read(environ[name])
        except ValueError as expected:
            hint = "1 or 0" if str(expected) == "" else str(expected)
            raise ValueError(f"{name} cannot be {environ[name]!r}; use {hint}") from None
    return values


def stated(environ: Mapping[str, str]) -> dict[str, str]:
    """The flags of the environment, as they are written there."""
    return {name: environ[name] for name in FLAGS if name in environ}


def _runs_on_cuda(config: "Config") -> bool:
    if config.dry_run or (config.device not in ("auto", "cuda") and not config.device.startswith("cuda:")):
        return False
    import torch

    return torch.cuda.is_available()


def notices(config: "Config", environ: Mapping[str, str]) -> list[str]:
    """One sentence for each thing that was asked for and cannot be had, to be said once."""
    said = []
    if config.amp == "on":
        said.append("amp is not available: weights and arithmetic have one type; choose it with dtype")
    if not config.enable_kv_append:
        said.append("enable_kv_append cannot be switched off: every model decodes with its key-value cache")
    on_cuda = _runs_on_cuda(config)
    if config.cuda_graph and not on_cuda:
        said.append("cuda_graph has no effect: CUDA graphs run on NVIDIA GPUs, and rounds run eagerly here")
    asked = environ.keys() & {"SPECDEC_PARALLEL_STREAMS", "SPECDEC_SYNC_MODE"}
    if asked or not config.parallel_streams or config.sync_mode != "event":
        if not on_cuda:
            said.append("parallel_streams and sync_mode have no effect: a round runs in one queue here, in order")
        elif not config.cuda_graph:
            said.append("parallel_streams and sync_mode have no effect without cuda_graph")
    unknown = [name for name in environ if name.startswith("SPECDEC_") and name not in FLAGS and name not in _OTHERS]
    for name in unknown:
        near = get_close_matches(name, FLAGS, n=1)
        said.append(f"{name} is ignored: it is no flag of specdec{f'; did you mean {near[0]}?' if near else ''}")
    return said
