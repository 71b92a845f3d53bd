"""What a run was made with: `MANIFEST.json`, `environment.txt`, and the configuration and prompts beside them."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specdec.sweep import flags
from specdec.sweep.config import Config
from specdec.sweep.definitions import DEFINITIONS
from specdec.sweep.journal import CONTEXTS, ROWS, write_whole
from specdec.sweep.prompts import Prompt, hash_prompts, write_prompts

if TYPE_CHECKING:
    from specdec.sweep.bench import Bench

MANIFEST, ENVIRONMENT, CONFIG, PROMPTS = "MANIFEST.json", "environment.txt", "config.yaml", "prompts.jsonl"
# From the top of the repository.
_CODE = (":/specdec", ":/kernels", ":/cli", ":/pyproject.toml")
_PACKAGES = ("specdec-lab", "torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pydantic")


class Manifest(BaseModel):
    """Everything that a run depends on. Its JSON Schema ships as `schemas/manifest.schema.json`."""

    model_config = ConfigDict(extra="forbid", title="specdec sweep manifest")

    format: Literal[2] = 2
    name: str
    synthetic: bool = Field(description="made by a toy model: no claim about any real one")
    export_created_at: str
    config: dict[str, Any] = Field(description="the effective configuration, every key")
    cells: list[dict[str, Any]]
    models: dict[str, Any] = Field(description="base and draft model by name, as the lab wrote them")
    models_loaded: dict[str, dict[str, Any]] = Field(description="revision, file hashes, tokenizer, type, device")
    costs: dict[str, dict[int, float]] = Field(description="seconds of a forward of n tokens, where they were measured")
    prompts_sha256: str
    num_prompts: int
    flags: dict[str, str] = Field(description="SPECDEC_* as the environment had them")
    notices: list[str] = Field(description="what was asked for and is not available")
    device: str
    dtype: str
    max_tokens: list[int]
    iterations_per_k: int
    seed: list[int]
    git: dict[str, Any] | None
    packages: dict[str, str]
    system_info: dict[str, Any]
    metric_definitions: dict[str, str]
    artifacts: dict[str, str]
    source_dir: str
    resumed: list[dict[str, Any]] = Field(default=[], description="other code that went on with the run")


def build_manifest(
    config: Config, bench: "Bench", prompts: Sequence[Prompt], *, environ: Mapping[str, str], folder: Path
) -> Manifest:
    """The manifest of a run that begins now."""
    from specdec.sweep.bench import describe

    described = {name: describe(loaded) for name, loaded in bench.models.items()}
    targets = list(dict.fromkeys(prepared.loaded.name for prepared in bench.cells))
    drafts = sorted({loaded.name for loaded in bench.models.values()} - set(targets))
    return Manifest(
        name=config.name,
        synthetic=any(prepared.loaded.adapter == "tabular" for prepared in bench.cells),
        export_created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.effective(),
        cells=[prepared.cell._asdict() for prepared in bench.cells],
        models={"base": ", ".join(targets), "draft": ", ".join(drafts) or None},
        models_loaded=described,
        costs={name: dict(costs) for name, costs in bench.costs.items()},
        prompts_sha256=hash_prompts(prompts),
        num_prompts=len(prompts),
        flags=flags.stated(environ),
        notices=flags.notices(config, environ),
        device=", ".join(dict.fromkeys(str(model["device"]) for model in described.values())),
        dtype=", ".join(dict.fromkeys(str(model["dtype"]) for model in described.values())),
        max_tokens=list(config.max_new_tokens),
        iterations_per_k=config.iterations,
        seed=list(config.seed),
        git=git_state(),
        packages={name: version for name, version in packages().items() if name in _PACKAGES},
        system_info=system_info(config, bench),
        metric_definitions=dict(DEFINITIONS),
        artifacts={"summary_json": "summary.json", "summary_csv": "summary.csv", "rows": ROWS, "contexts": CONTEXTS},
        source_dir=folder.name,
    )


def write_setting(folder: Path, config: Config, prompts: Sequence[Prompt]) -> None:
    """The configuration, the prompts and the environment, beside the rows."""
    import yaml

    (folder / CONFIG).write_text(yaml.safe_dump(config.effective(), sort_keys=False), encoding="utf-8")
    write_prompts(prompts, folder / PROMPTS)
    (folder / ENVIRONMENT).write_text(environment_text(), encoding="utf-8")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step: a reader sees the old one or the new one."""
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder; raises `ValueError` when there is none that can be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} is no run folder: it has no {MANIFEST} ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{folder / MANIFEST} cannot be read ({place}: {first['msg']})") from error


def changed_code(stored: Manifest, now: Manifest) -> dict[str, Any] | None:
    """What to note when a run goes on with other code or packages; `None` when nothing changed."""
    before = stored.resumed[-1] if stored.resumed else {"git": stored.git, "packages": stored.packages}
    after = {"git": now.git, "packages": now.packages}
    same = all(before[name] == value for name, value in after.items())
    return None if same else {"at": now.export_created_at, **after}


def git_state(here: Path = Path(__file__).parent) -> dict[str, Any] | None:
    """Commit, and whether the code differs from it; `None` where specdec is not run from its repository. A run folder
    inside the repository makes nothing dirty."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", "__init__.py") and git("rev-parse", "--show-prefix") != "specdec/sweep/":
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", *_CODE))}
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def packages() -> dict[str, str]:
    """Every installed distribution."""
    found = {str(item.metadata["Name"]): item.version for item in distributions() if item.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def environment_text() -> str:
    """`environment.txt`: interpreter, platform, processor and every package."""
    import torch

    lines = [
        f"python {platform.python_version()} ({platform.python_implementation()})",
        f"platform {platform.platform()}",
        f"processor {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        f"cuda {torch.version.cuda or 'none'}",
        "",
        *(f"{name}=={version}" for name, version in packages().items()),
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def system_info(config: Config, bench: "Bench") -> dict[str, Any]:
    """The lab's `system_info`, under its names; what does not exist here is null."""
    import torch

    from specdec.types import implementations

    model = bench.cells[0].job.parts.model
    device = model.device
    cuda = device.type == "cuda"
    mega, giga = 2**20, 2**30
    used = implementations(model)
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python_version": platform.python_version(),
        "pytorch_version": torch.__version__,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else processor(),
        "cuda_available": torch.cuda.is_available(),
        "mps_available": torch.backends.mps.is_available(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernel_backends": used,
        "kv_append_enabled": True,
        "batch_size": max(config.batch_size),
        "parallel_streams": False,
        "cuda_graph": False,
        "cuda_total_memory_gb": torch.cuda.get_device_properties(device).total_memory / giga if cuda else None,
        "cuda_memory_allocated_mb": torch.cuda.memory_allocated(device) / mega if cuda else None,
        "cuda_memory_reserved_mb": torch.cuda.memory_reserved(device) / mega if cuda else None,
        "deterministic": config.deterministic,
        "kernel_info": used,
        "threads": torch.get_num_threads(),
    }


def schema_text(model: type[BaseModel]) -> str:
    """The JSON Schema of a row or manifest, as it is shipped."""
    return json.dumps(model.model_json_schema(), indent=2) + "\n"
