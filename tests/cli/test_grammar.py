"""How choices are spelled, and what a wrong spelling is told."""

import inspect

import pytest

from specdec import controllers, drafters, policies, registry
from specdec.grammar import Choice
from specdec.models.tabular import tabular
from specdec.models.toy import TOYS
from specdec.registry import parse_controller, parse_drafter, parse_policy


def test_options_are_read_by_their_types() -> None:
    assert parse_drafter("suffix") == Choice("suffix")
    assert parse_drafter(" ngram : max_ngram=4, window=0 ") == Choice("ngram", {"max_ngram": 4, "window": 0})
    assert parse_drafter("suffix:min_share=0.25") == Choice("suffix", {"min_share": 0.25})
    tree = parse_drafter("model:name=some/model,tree=3x2,replacement=true,mode=sample")
    assert tree.options == {"name": "some/model", "tree": (3, 2), "replacement": True, "mode": "sample"}
    assert parse_controller("expected:max_k=6,draft_cost=1e-3").options == {"max_k": 6, "draft_cost": 0.001}


def test_combinations_nest() -> None:
    choice = parse_drafter("first( ngram:max_ngram=4,min_ngram=2, union(model:name=a(b), suffix:nodes=8), suffix)")
    assert choice.name == "first"
    ngram, union, suffix = choice.parts
    assert ngram == Choice("ngram", {"max_ngram": 4, "min_ngram": 2})
    assert union.parts == (Choice("model", {"name": "a(b)"}), Choice("suffix", {"nodes": 8}))
    assert suffix == Choice("suffix")
    assert choice.names() == ("ngram", "model", "suffix", "suffix")


@pytest.mark.parametrize(
    "spelling", ["none", "ngram:max_ngram=4", "first(ngram:max_ngram=4,window=9, suffix)", "model:tree=3x2"]
)
def test_a_choice_is_written_as_it_is_read(spelling: str) -> None:
    assert str(parse_drafter(spelling)) == spelling


@pytest.mark.parametrize(
    ("spelling", "problem"),
    [
        ("", "unknown drafter ''"),
        ("sufix", "did you mean 'suffix'"),
        ("suffix:min_mach=2", r"did you mean 'min_match'\? \(its options: min_match, min_share, nodes\)"),
        ("none:k=1", r"has no option 'k' \(it has none\)"),
        ("suffix:nodes", "needs a value: nodes=an integer >= 0"),
        ("suffix:nodes=1,nodes=2", "given twice"),
        ("suffix:nodes=-1", "must be an integer >= 0, got '-1'"),
        ("suffix:min_share=2", "must be a number >= 0 and <= 1, got '2'"),
        ("suffix:min_share=nan", "got 'nan'"),
        ("model:mode=gready", "must be one of sample, greedy, coupled, got 'gready'"),
        ("model:tree=3x0", "must be children per level, as 3x2, got '3x0'"),
        ("model:tree=", "must be children per level"),
        ("model:replacement=1", "must be true or false"),
        ("model:name=", "must be a text"),
        ("first(suffix", "lacks its closing parenthesis"),
        ("first(suffix)", "combines at least two"),
        ("first", r"'first' combines drafters: first\(FIRST, SECOND\)"),
        ("frist(suffix, ngram)", "unknown drafter combination 'frist'; did you mean 'first'"),
        ("suffix(ngram, none)", "unknown drafter combination 'suffix'"),
        ("first(suffix, ngam)", "unknown drafter 'ngam'; did you mean 'ngram'"),
    ],
)
def test_a_wrong_spelling_is_told_the_right_one(spelling: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_drafter(spelling)


def test_other_kinds_are_named_in_errors() -> None:
    with pytest.raises(ValueError, match="unknown policy 'lossles'; did you mean 'lossless'"):
        parse_policy("lossles")
    with pytest.raises(ValueError, match="controller 'fixed' has no option 'max_k'"):
        parse_controller("fixed:max_k=4")


def test_every_library_option_can_be_given() -> None:
    factories = {
        "none": drafters.none,
        "ngram": drafters.ngram,
        "suffix": drafters.suffix,
        "model": drafters.draft_model,
        "early_exit": drafters.early_exit,
        **{name: getattr(policies, name) for name in policies.__all__ if name in registry.POLICIES},
        **{name: getattr(controllers, name) for name in controllers.__all__ if name in registry.CONTROLLERS},
        "tabular": tabular,
    }
    # What the command line spells differently, or works out itself.
    renamed = {"branching": "tree", "model": "name"}
    own = {"cost", "contexts", "max_length", "device"}
    entries = registry.DRAFTERS | registry.POLICIES | registry.CONTROLLERS | TOYS
    for name, entry in entries.items():
        options = {renamed.get(key, key) for key in inspect.signature(factories[name]).parameters} - own
        options -= {"target"} if name == "early_exit" else set()
        assert set(entry.settings) - {"agreement"} == options, name


def test_defaults_can_be_parsed() -> None:
    parse_drafter(registry.DEFAULT_DRAFTER)
    parse_controller(registry.DEFAULT_CONTROLLER)


def test_k_is_the_depth_of_the_controller() -> None:
    default = parse_controller("expected:max_k=8")
    assert registry.choose_controller(None, None, default) == default
    assert registry.choose_controller(None, 3, default) == Choice("fixed", {"k": 3})
    assert registry.choose_controller(Choice("fixed"), 3, default) == Choice("fixed", {"k": 3})
    assert registry.choose_controller(Choice("aimd", {"max_k": 9}), 3, default).options == {"max_k": 9, "k": 3}
    assert registry.choose_controller(Choice("expected"), 3, default) == Choice("expected", {"max_k": 3})
    with pytest.raises(ValueError, match="given twice"):
        registry.choose_controller(Choice("fixed", {"k": 4}), 3, default)
