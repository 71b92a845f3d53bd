"""`specdec doctor`: what this machine has, and what specdec would use of it."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from specdec_cli.options import model_options, refusals

_PACKAGES = ("specdec-lab", "torch", "transformers", "tokenizers", "safetensors", "gguf", "triton", "numpy")
# What decides how fast a matrix is multiplied.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")


@click.command()
@click.option("--profile", metavar="MODEL", help="Measure what a forward of n tokens of this model costs.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(profile: str | None, as_json: bool, **options: Any) -> None:
    """Report versions, devices, implementations and models."""
    from specdec_cli.render import Monitor, print_findings

    with Monitor(quiet_text=True) as monitor, refusals():
        monitor.phase("looking around")
        findings = _findings(options)
        if profile is not None:
            findings["profile"] = _profile(profile, options, monitor)
    if as_json:
        click.echo(json.dumps(findings))
    else:
        print_findings(findings)


def _findings(options: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from specdec.models.loading import choose_device, choose_dtype
    from specdec.models.store import list_models, store_root
    from specdec_kernels.dispatch import OPERATIONS

    device = choose_device(options["device"])
    dtype = choose_dtype(None if options["dtype"] == "auto" else options["dtype"], device) or torch.bfloat16
    stored = list_models()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": {
            "name": _cpu_lines().get("model name", platform.processor()),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "flags": [flag for flag in _CPU_FLAGS if flag in _flags()],
            "threads": torch.get_num_threads(),
        },
        "devices": ["cpu", *_accelerators()],
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "cuda_compiler": _cuda_compiler(),
        "implementations": {op: _implementation(op, device, dtype) for op in OPERATIONS},
        "store": str(store_root()),
        "models": {model.name: model.present for model in stored},
    }


def _cuda_compiler() -> dict[str, str]:
    """What would compile CUDA C++, or the `problem` that nothing would."""
    from specdec_kernels.cuda.build import BuildError, find_compiler

    try:
        found = find_compiler()
    except BuildError as error:
        return {"problem": str(error)}
    return {"name": found.name, "version": found.version, "path": found.path}


def _implementation(op: str, device: Any, dtype: Any) -> dict[str, Any]:
    """What would run for `op`, and of every other implementation why not."""
    from specdec_kernels.dispatch import OPERATIONS, choose

    choice = choose(op, device, dtype)
    names = [candidate.name for candidate in OPERATIONS[op]]
    later = names[names.index(choice.implementation) + 1 :]
    others = dict(choice.rejected) | dict.fromkeys(later, f"comes after {choice.implementation}")
    return {"use": choice.implementation, "because": choice.reason, "not": others}


def _profile(name: str, options: Mapping[str, Any], monitor: Any) -> dict[str, Any]:
    from specdec.models.costs import measure_costs
    from specdec.target import load_target

    loaded = load_target(name, options, monitor)
    monitor.phase(f"measuring {loaded.name}")
    costs, about = measure_costs(loaded.model), loaded.model.about
    forwards = {n: seconds for n, seconds in costs.items() if n}
    profile: dict[str, Any] = {
        "model": loaded.name,
        "adapter": loaded.adapter,
        "seconds": forwards,
        "round_s": costs[0],
    }
    if "linear_timings" in about:
        timings = {name: timing.seconds for name, timing in about["linear_timings"].items()}
        choice = {"use": about["linear"], "because": about["linear_reason"], "not": about["linear_rejected"]}
        profile["linear"] = choice | {"seconds": timings}
    return profile


def _accelerators() -> list[str]:
    import torch

    cuda = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    return cuda + (["mps"] if torch.backends.mps.is_available() else [])


def _cpu_lines() -> dict[str, str]:
    """The first processor's entries where Linux lists them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.is_file() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _flags() -> set[str]:
    lines = _cpu_lines()
    return set(lines.get("flags", lines.get("Features", "")).split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
