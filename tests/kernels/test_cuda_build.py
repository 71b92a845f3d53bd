"""Compiling the CUDA sources: once, atomically, for the architecture asked for, and absent without harm."""

import ctypes
import os
import stat
import subprocess
import sys

import pytest
import torch

from specdec_kernels.cuda import build, library

FAKE = """#!/bin/sh
for word in "$@"; do last="$word"; done
if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi
sleep 0.1
echo "$@" >> {log}
echo compiled > "$last"
"""


def find_compiler():
    try:
        return build.find_compiler()
    except build.BuildError:
        return None


needs_nvcc = pytest.mark.skipif(find_compiler() is None, reason="there is no nvcc here")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "home"))
    return tmp_path


def fake_compiler(folder, body):
    path = folder / "fake-nvcc"
    path.write_text(body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_there_is_one_line(home, monkeypatch):
    monkeypatch.setenv("NVCC", str(home / "nowhere"))
    with pytest.raises(build.BuildError, match="which is not here") as caught:
        build.library_path("kv_keep", "sm_90")
    assert "\n" not in str(caught.value)
    opened, reason = library._open.__wrapped__("kv_keep", "sm_90")
    assert opened is None
    assert reason == str(caught.value)


def test_a_compile_error_becomes_one_line_and_leaves_nothing(home, monkeypatch):
    body = '#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit 0; fi\necho "x.cu(3): error: no such thing"\nexit 1\n'
    monkeypatch.setenv("NVCC", fake_compiler(home, body))
    with pytest.raises(build.BuildError, match="no such thing") as caught:
        build.library_path("kv_keep", "sm_90")
    assert "\n" not in str(caught.value)
    assert not list((home / "home").rglob("*.so"))
    assert not list((home / "home").rglob(".build-*"))


def test_a_library_that_does_not_load_is_a_reason(home, monkeypatch):
    monkeypatch.setenv("NVCC", fake_compiler(home, FAKE.format(log=home / "log")))
    opened, reason = library._open.__wrapped__("kv_keep", "sm_90")
    assert opened is None
    assert "cannot be loaded" in reason


def test_each_architecture_and_version_of_the_sources_is_compiled_once(home, monkeypatch):
    log = home / "log"
    monkeypatch.setenv("NVCC", fake_compiler(home, FAKE.format(log=log)))
    first = build.library_path("kv_keep", "sm_90")
    assert build.library_path("kv_keep", "sm_90") == first
    assert "arch=compute_90,code=sm_90" in log.read_text()
    assert len(log.read_text().splitlines()) == 1
    assert build.library_path("kv_keep", "sm_80") != first
    sources = home / "sources"
    sources.mkdir()
    for path in [*build.SOURCE.glob("*.cu"), *build.SOURCE.glob("*.cuh")]:
        (sources / path.name).write_bytes(path.read_bytes() + b"\n" * (path.suffix == ".cuh"))
    monkeypatch.setattr(build, "SOURCE", sources)
    assert build.library_path("kv_keep", "sm_90") != first


def test_two_processes_compile_it_once(home):
    log = home / "log"
    environ = {**os.environ, "NVCC": fake_compiler(home, FAKE.format(log=log))}
    code = "from specdec_kernels.cuda.build import library_path; print(library_path('kv_keep', 'sm_90'))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert len({process.communicate()[0] for process in started}) == 1
    assert len(log.read_text().splitlines()) == 1


def test_a_torch_without_a_gpu_is_a_reason():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert library.available("kv_keep", torch.device("cuda")) in (
        "needs a torch built for CUDA",
        "needs a GPU, and torch sees none",
    )


@needs_nvcc
def test_every_source_compiles_for_ampere_and_hopper_and_the_cache_kernel_does_not_spill():
    reports = build.compile_all(("sm_80", "sm_90"))
    assert {(report.source, report.architecture) for report in reports} == {
        (source, architecture) for source in build.sources() for architecture in ("sm_80", "sm_90")
    }
    for report in reports:
        assert 0 < report.registers <= 255
        if report.source == "kv_keep":
            assert report.spill_stores == report.spill_loads == 0, report


@needs_nvcc
@pytest.mark.parametrize("source", build.sources())
def test_every_library_loads_and_names_its_errors(home, source):
    handle = ctypes.CDLL(str(build.library_path(source, "sm_90")))
    assert getattr(handle, f"specdec_{source}")
    handle.specdec_error.restype = ctypes.c_char_p
    assert handle.specdec_error(1) == b"invalid argument"
    assert handle.specdec_error(0) == b"no error"


@needs_nvcc
def test_nothing_is_launched_for_nothing_and_a_refused_launch_is_reported(home):
    entry = ctypes.CDLL(str(build.library_path("kv_keep", "sm_90"))).specdec_kv_keep
    pointers = [ctypes.c_void_p()] * 4
    entry.argtypes = (*(ctypes.c_void_p,) * 4, *(ctypes.c_int64,) * 7, ctypes.c_void_p)
    assert entry(*pointers, 0, 1, 1, 16, 16, 16, 16, None) == 0
    # 2^40 blocks are more than any GPU starts, and no GPU is asked.
    assert entry(*pointers, 1 << 20, 1 << 20, 1, 16, 16, 16, 16, None) != 0


@needs_nvcc
def test_a_library_that_the_driver_refuses_is_a_reason(home):
    opened, reason = library._open.__wrapped__("kv_keep", "sm_90")
    assert (opened is None) == (reason is not None)
    if not torch.cuda.is_available():
        assert reason.startswith("was compiled but cannot run (")
