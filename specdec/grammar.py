"""How drafters, policies, controllers and toy models are spelled on the command line.

    choice   = name [ ":" key "=" value { "," key "=" value } ]
    drafter  = choice | ( "first" | "union" ) "(" drafter "," drafter { "," drafter } ")"

`ngram:max_ngram=4`, `expected:max_k=8`, `first(ngram:max_ngram=4, suffix)`. Inside parentheses a comma followed by
`key=` goes on with the options before it; any other begins the next drafter. Keys are those of the library's factories.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from specdec.models.report import did_you_mean

_OPTION = re.compile(r"\s*\w+\s*=")


class Setting(NamedTuple):
    """The type of an option: `read` turns text into a value or raises `ValueError`; `expects` says what it wants."""

    read: Callable[[str], Any]
    expects: str


class Entry(NamedTuple):
    """A name that can be chosen: what it is, in one line, and its options."""

    about: str
    settings: Mapping[str, Setting] = {}


class Choice(NamedTuple):
    """What was chosen: a name with the options that were given, or a combination of `parts`."""

    name: str
    options: Mapping[str, Any] = {}
    parts: tuple["Choice", ...] = ()

    def names(self) -> tuple[str, ...]:
        """The names of all parts that are not combinations."""
        return tuple(name for part in self.parts for name in part.names()) if self.parts else (self.name,)

    def __str__(self) -> str:
        if self.parts:
            return f"{self.name}({', '.join(map(str, self.parts))})"
        options = ",".join(f"{key}={_spell(value)}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def parse(
    text: str, kind: str, entries: Mapping[str, Entry], combinations: Mapping[str, Entry] | None = None
) -> Choice:
    """The choice that `text` spells. `kind` names it in errors: `ValueError`, with what would have been right."""
    text, combinations = text.strip(), combinations or {}
    head, opening, inside = text.partition("(")
    if opening and ":" not in head:
        name = head.strip()
        _check_name(name, f"{kind} combination", combinations)
        if not inside.endswith(")"):
            raise ValueError(f"{kind} {text!r} lacks its closing parenthesis")
        parts = tuple(parse(part, kind, entries, combinations) for part in _split(inside[:-1]))
        if len(parts) < 2:
            raise ValueError(f"{name}(...) combines at least two {kind}s, separated by commas")
        return Choice(name, {}, parts)
    name, _, settings = text.partition(":")
    _check_name(name.strip(), kind, entries, combinations)
    return Choice(name.strip(), _options(settings, f"{kind} {name.strip()!r}", entries[name.strip()].settings))


def whole(minimum: int) -> Setting:
    """An integer of at least `minimum`."""
    return _checked(int, lambda value: value >= minimum, f"an integer >= {minimum}")


def number(minimum: float | int, maximum: float | int = float("inf")) -> Setting:
    """A number from `minimum` to `maximum`."""
    limit = f" and <= {maximum:g}" if maximum < float("inf") else ""
    return _checked(float, lambda value: minimum <= value <= maximum, f"a number >= {minimum:g}{limit}")


def word(*choices: str) -> Setting:
    """One of the given words."""
    return _checked(str, lambda value: value in choices, f"one of {', '.join(choices)}")


def text() -> Setting:
    """Any text without a comma."""
    return _checked(str, bool, "a text")


def switch() -> Setting:
    """true or false."""
    return Setting(lambda value: {"true": True, "false": False}[value.lower()], "true or false")


def widths() -> Setting:
    """Children per level of a tree, as 3x2."""
    return _checked(_read_widths, lambda value: min(value) >= 1, "children per level, as 3x2")


def _checked(read: Callable[[str], Any], fine: Callable[[Any], bool], expects: str) -> Setting:
    def checked(value: str) -> Any:
        result = read(value)
        if not fine(result):
            raise ValueError(expects)
        return result

    return Setting(checked, expects)


def _read_widths(value: str) -> tuple[int, ...]:
    return tuple(int(width) for width in value.split("x"))


def _check_name(name: str, kind: str, *known: Mapping[str, Entry]) -> None:
    if name in known[0]:
        return
    names = [key for entries in known for key in entries]
    if name in names:
        raise ValueError(f"{name!r} combines {kind}s: {name}(FIRST, SECOND)")
    raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, names)} (known: {', '.join(names) or 'none'})")


def _options(text: str, owner: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in settings:
            known = f"its options: {', '.join(settings)}" if settings else "it has none"
            raise ValueError(f"{owner} has no option {key!r}{did_you_mean(key, settings)} ({known})")
        if not equals:
            raise ValueError(f"option {key!r} of {owner} needs a value: {key}={settings[key].expects}")
        if key in options:
            raise ValueError(f"option {key!r} of {owner} is given twice")
        try:
            options[key] = settings[key].read(value)
        except (ValueError, KeyError):
            raise ValueError(f"option {key!r} of {owner} must be {settings[key].expects}, got {value!r}") from None
    return options


def _split(text: str) -> list[str]:
    """The drafters of a combination, cut at commas outside inner parentheses."""
    parts, depth, begin = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0 and not _OPTION.match(text, index + 1):
            parts.append(text[begin:index])
            begin = index + 1
    return [*parts, text[begin:]]


def _spell(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
