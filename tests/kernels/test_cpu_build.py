"""Compiling the CPU kernels: once, atomically, and absent without harm."""

import os
import stat
import subprocess
import sys

import pytest

from specdec_kernels.cpu import build, library

HERE = library.available()

FAKE = """#!/bin/sh
for word in "$@"; do last="$word"; done
if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi
echo run >> {log}
echo compiled > "$last"
"""


def fake_compiler(folder, body):
    path = folder / "fake-c++"
    path.write_text(body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "home"))
    return tmp_path


def test_without_a_compiler_there_is_a_reason(home, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(build.BuildError, match="needs a C\\+\\+ compiler"):
        build.library_path()


def test_a_compile_error_becomes_one_line_and_leaves_nothing(home, monkeypatch):
    body = '#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit 0; fi\necho "x.cpp: error: no such thing"\nexit 1\n'
    monkeypatch.setenv("CXX", str(fake_compiler(home, body)))
    with pytest.raises(build.BuildError, match="no such thing") as caught:
        build.library_path()
    assert "\n" not in str(caught.value)
    assert not list((home / "home").rglob("*.so"))
    assert not list((home / "home").rglob(".build-*"))


def test_a_folder_that_cannot_be_written_is_a_reason(home, monkeypatch):
    (home / "home").write_text("a file")
    monkeypatch.setenv("CXX", str(fake_compiler(home, FAKE.format(log=home / "log"))))
    with pytest.raises(build.BuildError, match="cannot be compiled into"):
        build.library_path()


def test_the_library_is_compiled_once_and_again_when_a_source_changes(home, monkeypatch):
    log = home / "log"
    monkeypatch.setenv("CXX", str(fake_compiler(home, FAKE.format(log=log))))
    first = build.library_path()
    runs = len(log.read_text().splitlines())
    assert build.library_path() == first
    assert len(log.read_text().splitlines()) == runs
    sources = home / "sources"
    sources.mkdir()
    for path in build.SOURCE.iterdir():
        (sources / path.name).write_bytes(path.read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCE", sources)
    assert build.library_path() != first


def test_two_processes_compile_it_once(home):
    log = home / "log"
    compiler = fake_compiler(home, FAKE.format(log=log).replace("echo run", "sleep 0.1\necho run"))
    code = "from specdec_kernels.cpu.build import library_path; print(library_path())"
    environ = {**os.environ, "CXX": str(compiler)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    paths = {process.communicate()[0] for process in started}
    assert len(paths) == 1
    sources = len(list(build.SOURCE.glob("*.cpp")))
    assert len(log.read_text().splitlines()) == sources + 1


def test_a_library_that_does_not_load_is_a_reason(home, monkeypatch):
    monkeypatch.setenv("CXX", str(fake_compiler(home, FAKE.format(log=home / "log"))))
    opened, reason = library._open.__wrapped__()
    assert opened is None
    assert "cannot be loaded" in reason


@pytest.mark.skipif(HERE is not None, reason=f"the CPU kernels: {HERE}")
def test_every_build_has_the_portable_instruction_set():
    assert library.load().instruction_sets[-1] == "portable"
