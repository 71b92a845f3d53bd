"""From axes to cells."""

from collections.abc import Callable

import pytest

from specdec.sweep.config import Config
from specdec.sweep.grid import expand
from specdec.sweep.prompts import Prompt
from specdec.sweep.runner import schedule


def test_product_has_its_plain_baseline_first(make_config: Callable[..., Config]) -> None:
    cells = expand(make_config(drafter=["ngram", "suffix"], k="0-2"))
    assert [cell.id for cell in cells] == ["plain", "ngram k=1", "ngram k=2", "suffix k=1", "suffix k=2"]
    assert {cell.baseline for cell in cells} == {"plain"}
    assert cells[0].k == 0


def test_every_setting_that_changes_plain_decoding_has_a_baseline(make_config: Callable[..., Config]) -> None:
    cells = expand(make_config(temperature=[0, 1], batch_size=[1, 2], seed=[0, 1], k=3))
    plain = [cell for cell in cells if cell.plain]
    assert len(plain) == 8
    assert len({cell.id for cell in cells}) == len(cells) == 16
    by_id = {cell.id: cell for cell in cells}
    for cell in cells:
        base = by_id[cell.baseline]
        assert base.plain
        assert (base.temperature, base.batch_size, base.seed) == (cell.temperature, cell.batch_size, cell.seed)
        assert base.policy == ("greedy" if cell.temperature == 0 else "lossless")


def test_named_configurations_override_axes(make_config: Callable[..., Config]) -> None:
    config = make_config(cells=[{"name": "fast", "drafter": "ngram", "k": 5}, {"name": "grow", "controller": "aimd"}])
    cells = expand(config)
    assert [cell.id for cell in cells] == ["plain", "fast", "grow"]
    assert cells[1].controller == "fixed:k=5"
    assert cells[2].controller == "aimd:k=2"


def test_depth_is_the_controllers_own_where_none_is_given(make_config: Callable[..., Config]) -> None:
    cells = expand(make_config(k=[None], controller=["auto", "adaptive", "fixed:k=7"]))
    assert [cell.controller for cell in cells[1:]] == ["fixed:k=4", "adaptive", "fixed:k=7"]
    assert [cell.k for cell in cells] == [0, 4, None, 7]


def test_coupled_cells_are_compared_with_coupled_plain_decoding(make_config: Callable[..., Config]) -> None:
    cells = expand(make_config(temperature=1, policy=["lossless", "coupled"]))
    by_id = {cell.id: cell for cell in cells}
    assert {cell.policy: by_id[cell.baseline].policy for cell in cells if not cell.plain} == {
        "lossless": "lossless",
        "coupled": "coupled",
    }
    assert len(by_id) == len(cells)


def test_unknown_names_are_refused(make_config: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match="unknown drafter 'sufix'; did you mean 'suffix'"):
        expand(make_config(drafter="sufix"))


def test_cells_take_turns(make_config: Callable[..., Config]) -> None:
    cells = expand(make_config(k="0-2"))
    prompts = [Prompt(str(index), "c", ("a", "b")[: 1 + index % 2]) for index in range(4)]
    order = [(work.cell, work.samples[0].place, work.samples[0].turn) for work in schedule(cells, prompts, 1)]
    for begin in range(0, len(order), 3):
        assert sorted(cell for cell, _, _ in order[begin : begin + 3]) == [0, 1, 2]
        assert len({place for _, *place in map(list, order[begin : begin + 3]) for place in [tuple(place)]}) == 1
    assert [cell for cell, _, _ in order[:9:3]] == [0, 1, 2]


def test_batches_hold_every_sample_once(make_config: Callable[..., Config]) -> None:
    cells = expand(make_config(batch_size=[1, 2, 3]))
    prompts = [Prompt(str(index), "c", ("a", "b")[: 1 + index % 2]) for index in range(7)]
    seen: dict[tuple[int, int, str, int], int] = {}
    for work in schedule(cells, prompts, 2):
        assert len(work.samples) <= cells[work.cell].batch_size
        for sample in work.samples:
            key = (work.cell, sample.iteration, sample.prompt.id, sample.turn)
            seen[key] = seen.get(key, 0) + 1
    assert set(seen.values()) == {1}
    assert len(seen) == len(cells) * 2 * sum(len(prompt.turns) for prompt in prompts)
