"""The configuration: where values come from, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from specdec.sweep.config import Config, differences, load_config, parse_config
from specdec.sweep.flags import FLAGS, notices


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("dtype: float16\nseed: [1, 2]\niterations: 7\n")
    config = load_config(file, environ={"SPECDEC_DTYPE": "bfloat16"}, overrides={"iterations": 9})
    assert config.dtype == ("bfloat16",)
    assert config.iterations == 9
    assert config.seed == (1, 2)
    assert config.warmup == 1
    assert load_config(file, environ={"SPECDEC_DTYPE": "bfloat16"}, overrides={"dtype": ["float32"]}).dtype == (
        "float32",
    )


def test_command_line_beats_named_configurations_too(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("cells:\n  - {name: a, k: 3, dtype: float16}\n")
    config = load_config(file, overrides={"dtype": ["float32"]})
    assert config.cells[0].dtype is None
    assert config.cells[0].k == (3,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("drafters: ngram", "unknown key 'drafters'; did you mean 'drafter'"),
        ("wurst: 1", "unknown key 'wurst' (known: name, model,"),
        ("cells: [{drafer: ngram}]", "unknown key 'cells.0.drafer'; did you mean 'drafter'?"),
        ("k: -1", "k cannot be -1"),
        ("iterations: none", "iterations cannot be 'none'"),
        ("cells: [{k: x}]", "cells.0.k cannot be 'x'"),
        ("- 1", "a sweep is a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_the_file_are_named(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(file)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_depths_can_be_spelled_as_ranges() -> None:
    assert parse_config({"k": "0-3"}).k == (0, 1, 2, 3)
    assert parse_config({"k": "1,2, 8"}).k == (1, 2, 8)
    assert parse_config({"k": ["1-2", "5"]}).k == (1, 2, 5)
    assert parse_config({"k": 4}).k == (4,)
    with pytest.raises(ValueError, match="the range 4-1 is empty; write the smaller depth first"):
        parse_config({"k": "2,4-1"})


def test_prompts_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("hello\n")
    (tmp_path / "sweep.yaml").write_text("prompts: mine.txt\n")
    assert load_config(tmp_path / "sweep.yaml").prompts == str(tmp_path / "mine.txt")


def test_effective_configuration_is_complete_and_reads_back() -> None:
    config = parse_config({"k": "1-3", "temperature": 0.7, "cells": [{"name": "a", "drafter": "ngram"}]})
    assert config.effective().keys() == Config.model_fields.keys()
    assert parse_config(config.effective()) == config


def test_differences_show_both_values() -> None:
    assert differences({"k": [1], "seed": [0]}, {"k": [2], "seed": [0]}) == ["k: [1] there, [2] here"]


def test_every_flag_sets_its_key() -> None:
    other = {"dtype": "float16", "amp": "on", "sync_mode": "barrier"}
    for flag, (key, _) in FLAGS.items():
        default = getattr(Config(), key)
        value = other.get(key, "0" if default is True else "1")
        changed = getattr(load_config(environ={flag: value}), key)
        assert changed != default, flag


def test_a_flag_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="SPECDEC_PROFILE cannot be 'maybe'; use 1 or 0"):
        load_config(environ={"SPECDEC_PROFILE": "maybe"})
    with pytest.raises(ValueError, match="SPECDEC_SYNC_MODE cannot be 'x'; use event or barrier"):
        load_config(environ={"SPECDEC_SYNC_MODE": "x"})


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"SPECDEC_AMP": "1"}, "amp is not available"),
        ({"SPECDEC_CUDA_GRAPH": "1"}, "cuda_graph has no effect"),
        ({"SPECDEC_ENABLE_KV_APPEND": "0"}, "enable_kv_append cannot be switched off"),
        ({"SPECDEC_PARALLEL_STREAMS": "1"}, "parallel_streams and sync_mode have no effect"),
        ({"SPECDEC_SYNC_MODE": "barrier"}, "parallel_streams and sync_mode have no effect"),
        ({"SPECDEC_DRYRUN": "1"}, "SPECDEC_DRYRUN is ignored: it is no flag of specdec; did you mean SPECDEC_DRY_RUN?"),
    ],
)
def test_what_is_not_available_is_said_once(environ: dict[str, str], said: str) -> None:
    found = notices(load_config(environ=environ), environ)
    assert len(found) == 1
    assert found[0].startswith(said)


def test_defaults_ask_for_nothing_that_is_missing(make_config: Callable[..., Config]) -> None:
    assert notices(make_config(), {"SPECDEC_HOME": "x", "PATH": "y"}) == []
