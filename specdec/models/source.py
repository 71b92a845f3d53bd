"""From the name a user types to a folder with a model: built-in, local folder, GGUF file or hub id."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from specdec.models import store
from specdec.models.builtin import BUILT_IN
from specdec.models.report import ModelError, Progress, did_you_mean, one_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

PICKLE_REMEDY = (
    "pickled weights can run code while they load and are not read; save the model as safetensors "
    "(model.save_pretrained(folder)) in an environment where you trust the file"
)

# The weights of a model that is packed for the CPU kernels (`specdec.models.packing`).
PACKED = "packed.safetensors"

_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_INSTEAD = f"name a local model folder, a .gguf file, or a built-in model ({', '.join(BUILT_IN)})"


class Source(NamedTuple):
    """Where a model is. `kind`: `built-in`, `folder`, `gguf` or `hub`. `revision`: what pins its content, if known.

    `converted`: written by specdec, so its configuration spells out every default.
    """

    kind: str
    folder: Path
    revision: str | None
    converted: bool


def find_source(
    name: str, progress: Progress, *, trust_remote_code: bool = False, quantize: str | None = None
) -> Source:
    """The folder behind `name`, fetched or converted if need be.

    A path that exists wins, then the built-in names, what `list_models` calls `gguf/...` or `packed/...`, and the hub
    (`owner/name`, optionally `@revision`). A GGUF file whose blocks match the format `quantize` is repacked instead of
    dequantized. Raises `ModelError` for a name that is none of these, pickled weights, and a hub that
    cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Source("folder", path, None, (path / PACKED).is_file())
    if path.is_file():
        return _from_file(path, progress, quantize)
    if name in BUILT_IN:
        folder = store.pull(name, progress)
        return Source("built-in", folder, f"sha256:{BUILT_IN[name].sha256}", True)
    if name.startswith(("gguf/", "packed/")):
        return _converted(store.model_path(name))
    hub_id, _, revision = name.partition("@")
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in (".gguf", ".safetensors", *PICKLES):
        raise ModelError(f"there is no file or folder {path}; {_INSTEAD}")
    if "/" not in name and (suggestion := did_you_mean(name, BUILT_IN)):
        raise ModelError(f"there is no model {name!r}{suggestion}")
    if not _HUB_ID.fullmatch(hub_id):
        raise ModelError(f"{name!r} is neither an existing path nor a hub id; {_INSTEAD}")
    folder = _from_hub(hub_id, revision or None, progress, code=trust_remote_code)
    # The cache of the hub names a snapshot's folder after its commit.
    return Source("hub", folder, folder.name, False)


def _from_file(path: Path, progress: Progress, quantize: str | None) -> Source:
    if path.suffix in PICKLES:
        raise ModelError(f"{path} is not loaded: {PICKLE_REMEDY}")
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is a file; name the folder it is in, or a .gguf file")
    packed = None if quantize is None else store.pull_packed(path, quantize, progress)
    return _converted(packed or store.pull_gguf(path, progress))


def _converted(folder: Path) -> Source:
    marker = store.read_marker(folder)
    return Source("gguf", folder, f"sha256:{marker['source']['sha256']}" if marker else None, True)


def _from_hub(name: str, revision: str | None, progress: Progress, *, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    progress(f"fetching {name}", 0, 0)
    try:
        with _quiet_hub():
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=[*_HUB_FILES, *(["*.py"] if code else [])],
                    ignore_patterns=["*/*", "consolidated*"],
                )
            )
    except GatedRepoError as error:
        raise ModelError(f"the hub model {name!r} asks for consent; accept its terms there and log in") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"the hub has no model {name!r} that you may read; check the spelling, or {_INSTEAD}"
        ) from error
    # Without a network, the hub's client raises its own errors, its transport's, or OSError, all told apart by nobody.
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the model {name!r} is not on this machine and the hub cannot be reached ({one_line(error, 120)}); "
            + _INSTEAD
        ) from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No progress bars of the hub's client: what is shown is the caller's choice."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # Its environment variable fixes the setting, and changing it then only warns.
    if are_progress_bars_disabled() or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
