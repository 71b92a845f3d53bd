"""Measured costs of a forward, and the file that keeps them."""

import json
from pathlib import Path

import pytest

from specdec.models.costs import SIZES, cached_comparison, cached_costs, cost_key, measure_costs
from specdec.models.tabular import tabular
from specdec.types import Model
from specdec_kernels.linear import Timing


@pytest.fixture
def model() -> Model:
    return tabular(8)


def test_every_size_is_measured(model: Model) -> None:
    costs = measure_costs(model, (1, 4), context=16, repeats=2)
    assert list(costs) == [1, 4, 0]
    assert min(costs.values()) > 0
    assert list(measure_costs(model, repeats=1)) == [*SIZES, 0]


def test_short_context_limits_what_is_measured() -> None:
    assert list(measure_costs(tabular(8, max_length=6), repeats=1)) == [1, 2, 3, 5, 0]
    with pytest.raises(ValueError, match="numbers from 1 to 5"):
        measure_costs(tabular(8, max_length=6), (6, 0))


def forwards(costs: dict[int, float]) -> dict[int, float]:
    return {n: seconds for n, seconds in costs.items() if n}


def pretend(times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards take the given seconds, in the order in which they are measured."""
    edges = iter([edge for seconds in times for edge in (0.0, seconds)])
    monkeypatch.setattr("specdec.models.costs.Clock.now", lambda clock: next(edges))


def test_median_is_taken_and_the_first_turn_does_not_count(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend([100.0, 100.0, 5.0, 50.0, 1.0, 10.0, 3.0, 30.0], monkeypatch)
    assert forwards(measure_costs(model, (1, 2), repeats=3, budget=1000.0)) == {1: 3, 2: 30}


def test_slow_model_is_measured_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend([100.0, 100.0, 5.0, 50.0], monkeypatch)
    assert forwards(measure_costs(model, (1, 2), repeats=3, budget=10.0)) == {1: 5, 2: 50}


def test_costs_of_a_busy_machine_are_not_kept(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
    pretend([1.0, 1.0, 9.0, 9.0], monkeypatch)
    assert forwards(cached_costs(model, (1,), repeats=3, budget=1000.0)) == {1: 9}
    assert not (tmp_path / "costs").exists()
    pretend([9.0, 1.0, 1.2, 1.1], monkeypatch)
    assert forwards(cached_costs(model, (1,), repeats=3, budget=1000.0)) == {1: 1.1}
    assert forwards(cached_costs(model, (1,))) == {1: 1.1}


def test_costs_are_measured_once(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
    first = cached_costs(model, repeats=1)
    assert cached_costs(model, repeats=1) == first
    (path,) = (tmp_path / "costs").iterdir()
    content = json.loads(path.read_text())
    assert content["key"].items() >= cost_key(model).items()
    content["seconds"]["1"] = 42.0
    path.write_text(json.dumps(content))
    assert cached_costs(model)[1] == 42
    assert cached_costs(model, refresh=True, repeats=1)[1] < 42


def test_other_settings_are_measured_again(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
    cached_costs(model, repeats=1)
    for other in (model._replace(name="x"), model._replace(about={"linear": "onednn"}), tabular(9)):
        cached_costs(other, repeats=1)
    cached_costs(model, (1, 2), repeats=1)
    assert len(list((tmp_path / "costs").iterdir())) == 5


@pytest.mark.parametrize("damage", ["", "{}", '{"key": 1, "seconds": {"1": 2}}', '{"seconds": []}', "\x00"])
def test_damaged_file_is_measured_again(
    damage: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
    cached_costs(model, repeats=1)
    (path,) = (tmp_path / "costs").iterdir()
    path.write_text(damage)
    assert list(cached_costs(model, repeats=1)) == [*SIZES, 0]
    assert json.loads(path.read_text())["key"]["format"] == 4


def test_store_that_cannot_be_written_is_no_obstacle(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "file"))
    assert list(cached_costs(model, repeats=1)) == [*SIZES, 0]


def test_comparison_of_linear_layers_is_kept_unless_the_machine_was_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path))
    measured = iter(
        {"cpu": Timing({1: turns}, True), "torch": Timing({1: [3.0, 3.1]}, False)} for turns in ([1.0, 9.0], [1.0, 1.2])
    )
    monkeypatch.setattr("specdec.models.costs.linears.compare", lambda *_: next(measured))
    arguments = {(8, 4): 2}, ("cpu", "torch"), "fp32"
    assert cached_comparison(*arguments)["cpu"].seconds == {1: 5.0}
    assert not (tmp_path / "costs").exists()
    found = cached_comparison(*arguments)
    assert found == cached_comparison(*arguments) == {
        "cpu": Timing({1: [1.0, 1.2]}, True), "torch": Timing({1: [3.0, 3.1]}, False)
    }  # fmt: skip
    with pytest.raises(StopIteration):
        cached_comparison({(8, 4): 3}, *arguments[1:])
