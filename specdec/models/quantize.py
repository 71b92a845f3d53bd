"""Quantize a model into a folder that loads as fast as it can be read.

    folder = quantize("smollm2-135m", "int4")
    load(str(folder)).model.about["weights"]

A GGUF file whose blocks match the format is repacked: no weight changes and none is ever in float32. Other weights
are rounded, in float32 and layer by layer.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.models.families import FAMILIES, supports
from specdec.models.packing import is_packed, pack_checkpoint, write_packed
from specdec.models.report import ModelError, Progress, silent
from specdec.models.source import Source, find_source
from specdec.models.store import install, packed_root, problem, read_marker, sha256
from specdec.models.tokenizer import find_tokenizer, read_tokenizer
from specdec.models.weights import Weights

FORMATS = ("fp16", "bf16", "int8", "int4")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def quantize(
    name: str,
    format: str,
    out: Path | None = None,
    *,
    calibrate: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the model `name` (anything `load` takes) in `format`, one of `FORMATS`, and return the folder.

    `out`: a folder that does not exist yet; by default one in the store, `packed/NAME-FORMAT`. A folder that holds
    the same model in the same format already is left alone. `calibrate`: weigh the errors of int4 by how large each
    channel's inputs are over a text (`specdec.models.calibration`); other formats have no choice to make.

    Raises `ModelError`, in one line, for a model that the CPU kernels cannot run, one that is packed already, and a
    folder that holds something else.
    """
    progress = progress or silent
    if format not in FORMATS:
        raise ModelError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if calibrate and format != "int4":
        raise ModelError(f"calibration decides nothing in {format}; leave it out")
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        from specdec.models.gguf_weights import matching_format, open_gguf

        file = open_gguf(path, progress)
        if matching_format(file) == format and refusal(file.config) is None and not calibrate:
            origin = {"file": str(path.resolve()), "sha256": sha256(path), "weights": format, "repacked": True}
            return _install(out or packed_root() / f"{path.stem}-{format}", origin, repacker(path, format), progress)
    source = find_source(name, progress, trust_remote_code=trust_remote_code)
    if is_packed(source.folder):
        raise ModelError(f"{name} is packed already; quantize the model it was made from")
    origin = {"model": name, "sha256": _digest(source), "weights": format, "calibrated": calibrate}
    named = source.kind in ("built-in", "hub")
    label = name.partition("@")[0].replace("/", "--") if named else path.resolve().name.removesuffix(".gguf")
    suffix = f"{format}-calibrated" if calibrate else format

    def build(work: Path, report: Progress) -> Mapping[str, Any]:
        from specdec.models.loading import read_config

        config = read_config(source, trust_remote_code)
        reason = refusal(config)
        if reason is not None:
            raise ModelError(f"{name} cannot be packed into a folder: {reason}")
        importance = _importance(source) if calibrate else lambda part: None
        model = pack_checkpoint(config, Weights(source.folder), format, importance=importance, progress=report)
        write_packed(work, config, model, format)
        _copy_tokenizer(source, work, trust_remote_code)
        return {"bytes": model.bytes}

    return _install(out or packed_root() / f"{label}-{suffix}", origin, build, progress)


Build = Callable[[Path, Progress], Mapping[str, Any]]


def repacker(path: Path, format: str) -> Build:
    """What fills a folder with the blocks of the GGUF file at `path`; `format` is its `matching_format`."""

    def build(work: Path, report: Progress) -> Mapping[str, Any]:
        from specdec.models.gguf_weights import Blocks, open_gguf, write_tokenizer

        file = open_gguf(path, report)
        model = pack_checkpoint(file.config, Blocks(file), format, progress=report)
        write_packed(work, file.config, model, format)
        write_tokenizer(file, work)
        return {"bytes": model.bytes, **file.about}

    return build


def _install(folder: Path, origin: Mapping[str, Any], build: Build, progress: Progress) -> Path:
    folder = folder.expanduser().absolute()
    marker = read_marker(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        same = marker is not None and all(marker["source"].get(key) == value for key, value in origin.items())
        reason = problem(folder)
        if same and reason is None:
            return folder
        if same:
            raise ModelError(f"{folder} holds this model, {reason}; remove it and quantize again")
        raise ModelError(f"{folder} holds something else; remove it, or name another folder with --out")
    return install(folder, lambda work: {**origin, **build(work, progress)}, progress)


def refusal(config: Any) -> str | None:
    """Why the CPU kernels cannot run a model of this configuration, or `None`."""
    from specdec_kernels.cpu.stack import refuse_spec

    reason = supports(config)
    if reason is not None:
        return reason
    problem = refuse_spec(FAMILIES[config.model_type].describe(config))
    return None if problem is None else f"the CPU stack {problem}; --quantize when decoding needs no folder"


def _digest(source: Source) -> str:
    """What pins the weights: the recorded hash of a stored model, else one over the hashes of the files."""
    marker = read_marker(source.folder)
    if marker is not None and "sha256" in marker["source"]:
        return str(marker["source"]["sha256"])
    total = hashlib.sha256()
    for path in (source.folder / "config.json", *Weights(source.folder).files):
        total.update(path.name.encode() + b"\0" + sha256(path).encode() + b"\0")
    return total.hexdigest()


def _copy_tokenizer(source: Source, work: Path, trust_remote_code: bool) -> None:
    if not source.converted:
        tokenizer = find_tokenizer(source.folder, trust_remote_code=trust_remote_code)
        tokenizer.save_pretrained(work)
        generation = source.folder / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, work / generation.name)
        sample = "  Grüße, 日本 🙂\n\tx = [1, 23]  # it's\n"
        if read_tokenizer(work)(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
            raise ModelError("the tokenizer is not a plain fast tokenizer; use --quantize when decoding instead")
        return
    for name in _TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, work / name)


def _importance(source: Source) -> Callable[[str], Tensor | None]:
    from specdec.models.calibration import measure_importance

    return measure_importance(source.folder).get
