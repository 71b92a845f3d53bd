"""Compiling the CUDA sources: by either compiler, once, atomically, for what was asked for; absent without harm."""

import os
import stat
import subprocess
import sys

import pytest
import torch

from specdec_kernels.cuda import build, library, nvrtc

FAKE = """#!/bin/sh
for word in "$@"; do last="$word"; done
if [ "$1" = --version ]; then echo fake, release 1.0, V1.0.2; exit 0; fi
sleep 0.1
echo "$@" >> {log}
echo compiled > "$last"
"""
PLACES = ("NVCC", "NVRTC", "CUDA_HOME", "CUDA_PATH", build.COMPILER)


def missing(name):
    """Why a compiler is not here, or `None`; asked before a test changes the environment."""
    try:
        build.find_compiler(name)
    except build.BuildError as error:
        return str(error)
    return None


COMPILERS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name in ("nvcc", "nvrtc")
    for reason in [missing(name)]
]


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def no_nvrtc(monkeypatch):
    monkeypatch.setattr(nvrtc, "_libraries", lambda: iter(()))


def fake_compiler(folder, body):
    path = folder / "fake-nvcc"
    path.write_text(body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_there_is_one_line(home, no_nvrtc, monkeypatch):
    monkeypatch.setenv("NVCC", str(home / "nowhere"))
    with pytest.raises(build.BuildError, match=r"which is not here.*; or needs NVRTC, which is not here") as caught:
        build.cubin_path("kv_keep", "sm_90")
    assert "\n" not in str(caught.value)


def test_a_library_opens_to_a_reason_where_nothing_compiles(home, no_nvrtc, monkeypatch):
    monkeypatch.setenv("NVCC", str(home / "nowhere"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    opened, reason = library._open.__wrapped__("kv_keep", 0)
    assert opened is None
    assert reason.startswith("needs ")


def test_the_environment_forces_a_compiler(home, no_nvrtc, monkeypatch):
    monkeypatch.setenv("NVCC", fake_compiler(home, FAKE.format(log=home / "log")))
    assert build.find_compiler().name == "nvcc"
    assert build.find_compiler().version == "1.0"
    monkeypatch.setenv(build.COMPILER, "nvrtc")
    with pytest.raises(build.BuildError, match="needs NVRTC"):
        build.find_compiler()
    assert build.find_compiler("nvcc").name == "nvcc"
    monkeypatch.setenv(build.COMPILER, "clang")
    with pytest.raises(build.BuildError, match="knows no compiler 'clang'"):
        build.find_compiler()


def test_an_nvrtc_that_does_not_load_is_a_reason(home, monkeypatch):
    monkeypatch.setenv("NVRTC", str(home / "libnvrtc.so"))
    with pytest.raises(build.BuildError, match="cannot load NVRTC") as caught:
        build.find_compiler("nvrtc")
    assert "\n" not in str(caught.value)


def test_a_compile_error_becomes_one_line_and_leaves_nothing(home, monkeypatch):
    body = '#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit 0; fi\necho "x.cu(3): error: no such thing"\nexit 1\n'
    monkeypatch.setenv("NVCC", fake_compiler(home, body))
    with pytest.raises(build.BuildError, match="no such thing") as caught:
        build.cubin_path("kv_keep", "sm_90")
    assert "\n" not in str(caught.value)
    assert not list((home / "home").rglob("*.cubin"))
    assert not list((home / "home").rglob(".build-*"))


def test_each_architecture_and_version_of_the_sources_is_compiled_once(home, monkeypatch):
    log = home / "log"
    monkeypatch.setenv("NVCC", fake_compiler(home, FAKE.format(log=log)))
    first = build.cubin_path("kv_keep", "sm_90")
    assert build.cubin_path("kv_keep", "sm_90") == first
    assert "arch=compute_90,code=sm_90" in log.read_text()
    assert len(log.read_text().splitlines()) == 1
    assert build.cubin_path("kv_keep", "sm_80") != first
    sources = home / "sources"
    sources.mkdir()
    for path in [*build.SOURCE.glob("*.cu"), *build.SOURCE.glob("*.cuh")]:
        (sources / path.name).write_bytes(path.read_bytes() + b"\n" * (path.suffix == ".cuh"))
    monkeypatch.setattr(build, "SOURCE", sources)
    assert build.cubin_path("kv_keep", "sm_90") != first


def test_two_processes_compile_it_once(home):
    log = home / "log"
    environ = {**os.environ, "NVCC": fake_compiler(home, FAKE.format(log=log))}
    code = "from specdec_kernels.cuda.build import cubin_path; print(cubin_path('kv_keep', 'sm_90'))"
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


@pytest.mark.parametrize("name", COMPILERS)
def test_every_source_compiles_for_ampere_and_hopper_and_what_must_not_spill_does_not(name):
    compiler = build.find_compiler(name)
    reports = build.compile_all(("sm_80", "sm_90a"), compiler)
    if not reports:
        pytest.skip(f"all compile, and {compiler.name} {compiler.version} reports nothing of them")
    # These are for GPUs with clusters and bulk copies.
    assert {(report.source, report.architecture) for report in reports} == {
        (source, architecture) for source in build.sources() for architecture in ("sm_80", "sm_90a")
    } - {("attend", "sm_80"), ("layers", "sm_80")}
    for report in reports:
        assert 0 < report.registers <= 255
        if report.source in ("kv_keep", "attend", "layers"):
            assert report.spill_stores == report.spill_loads == 0, report


def test_the_architecture_of_a_device():
    assert [build.architecture_of(*capability) for capability in ((8, 0), (8, 9), (9, 0), (12, 0))] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_120a",
    ]


@pytest.mark.parametrize("name", COMPILERS)
def test_an_error_of_the_real_compiler_is_one_line(name, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("#include <cuda_fp16.h>\nthis is no C++\n")
    with pytest.raises(build.BuildError, match=r"does not compile with .*wrong\.cu\(2\): error") as caught:
        build.find_compiler(name).compile(source, "sm_90", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
