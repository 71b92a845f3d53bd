"""Names of drafters, policies and controllers, and the library calls behind them.

The tables are plain data, so that help and error messages need no torch; the `build_*` functions import what they
build. A new drafter, policy or controller is an entry here and a line in its `build_*`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

from specdec.grammar import Choice, Entry, number, parse, switch, text, whole, widths, word

if TYPE_CHECKING:
    from specdec.models.loading import Loaded
    from specdec.sampling import Sampling
    from specdec.types import Controller, Drafter, Model, Policy

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_DRAFTER = "suffix:nodes=7"
DEFAULT_CHAIN = "suffix"
DEFAULT_CONTROLLER = "expected:max_k=8"
DEFAULT_MAX_NEW_TOKENS = 128

_MODE = word("sample", "greedy", "coupled")

DRAFTERS: dict[str, Entry] = {
    "none": Entry("plain decoding, one token a round"),
    "ngram": Entry(
        "what followed the last time the text ended like this",
        {"max_ngram": whole(1), "min_ngram": whole(1), "matches": whole(1), "window": whole(0)},
    ),
    "suffix": Entry(
        "most likely continuations by the longest repeated suffixes",
        {"min_match": whole(1), "min_share": number(0, 1), "nodes": whole(0)},
    ),
    "model": Entry(
        "a smaller model with the same vocabulary",
        {"name": text(), "mode": _MODE, "tree": widths(), "replacement": switch(), "agreement": number(0, 1)},
    ),
    "early_exit": Entry("the target's own first layers", {"layers": whole(1), "mode": _MODE, "tree": widths()}),
}
COMBINATIONS: dict[str, Entry] = {
    "first": Entry("first(A, B): the first that has a draft"),
    "union": Entry("union(A, B): all drafts in one tree"),
}
# Which implementation of the verification rule runs; see specdec_kernels.dispatch.
_KERNELS = {"kernels": word("auto", "cuda", "triton", "torch")}
POLICIES: dict[str, Entry] = {
    "greedy": Entry("keep a draft while it is the most likely token (temperature 0)", _KERNELS),
    "lossless": Entry("rejection sampling, for any tree", _KERNELS),
    "block": Entry("rejection sampling of a whole chain", _KERNELS),
    "match": Entry("keep a draft while it is the token that was sampled", _KERNELS),
    "coupled": Entry("target and draft share their noise; same output as plain decoding", _KERNELS),
}
CONTROLLERS: dict[str, Entry] = {
    "fixed": Entry("always the same depth", {"k": whole(1)}),
    "adaptive": Entry(
        "a step up or down when acceptance leaves a band",
        {
            "k": whole(1),
            "min_k": whole(1),
            "max_k": whole(1),
            "step": whole(1),
            "target": number(0, 1),
            "band": number(0, 1),
            "window": whole(1),
        },
    ),
    "aimd": Entry(
        "two more after a full success, else one less", {"k": whole(1), "min_k": whole(1), "max_k": whole(1)}
    ),
    "expected": Entry(
        "the depth of most expected tokens per second, from measured costs",
        {
            "max_k": whole(1),
            "draft_cost": number(0),
            "overhead": number(0),
            "prior": number(0, 1),
            "weight": number(0),
            "discount": number(0, 1),
        },
    ),
}
# Which option of a controller --k means.
_DEPTH_OPTION = {"fixed": "k", "adaptive": "k", "aimd": "k", "expected": "max_k"}


class Drafting(NamedTuple):
    """A drafter and the models that it runs, whose forwards a controller has to pay for."""

    drafter: "Drafter"
    models: tuple["Model", ...] = ()


def parse_drafter(text: str) -> Choice:
    return parse(text, "drafter", DRAFTERS, COMBINATIONS)


def parse_policy(text: str) -> Choice:
    return parse(text, "policy", POLICIES)


def parse_controller(text: str) -> Choice:
    return parse(text, "controller", CONTROLLERS)


def choose_policy(given: Choice | None, temperature: float) -> Choice:
    """The policy that was given, else the one that fits the temperature."""
    return given or Choice("greedy" if temperature == 0 else "lossless")


def choose_drafter(given: Choice | None, policy: Choice, k: int | None) -> Choice:
    """The drafter that was given, else the default: a chain where the policy wants one or a length was asked for."""
    return given or parse_drafter(DEFAULT_CHAIN if policy.name == "block" or k is not None else DEFAULT_DRAFTER)


def choose_controller(given: Choice | None, k: int | None, default: Choice) -> Choice:
    """The controller that was given, with --k as its depth; --k alone is a fixed depth."""
    if k is None:
        return given or default
    if given is None:
        return Choice("fixed", {"k": k})
    option = _DEPTH_OPTION[given.name]
    if option in given.options:
        raise ValueError(f"the depth is given twice, as k={k} and as {given}; leave one out")
    return Choice(given.name, {**given.options, option: k})


def build_drafter(
    choice: Choice,
    *,
    target: "Loaded",
    sampling: "Sampling",
    policy: str,
    draft_name: str | None = None,
    load_draft: Callable[[str], "Loaded"],
) -> Drafting:
    """The drafter of `choice`. `draft_name` is for `model` without a name; `load_draft` loads a draft model."""
    from specdec import drafters

    options = dict(choice.options)
    if choice.parts:
        parts = [
            build_drafter(
                part,
                target=target,
                sampling=sampling,
                policy=policy,
                draft_name=draft_name,
                load_draft=load_draft,
            )
            for part in choice.parts
        ]
        combine = {"first": drafters.first_hit, "union": drafters.union}[choice.name]
        # From the right, so that first(a, b, c) asks b and c only where a has nothing.
        rest = [part.drafter for part in reversed(parts)]
        joined = reduce(lambda last, before: combine(before, last), rest)
        return Drafting(joined, tuple(model for part in parts for model in part.models))
    if choice.name in ("model", "early_exit"):
        options.setdefault("mode", default_mode(sampling.temperature, policy))
        options["branching"] = options.pop("tree", ())
    if choice.name == "model":
        draft = _draft_model(target, options, draft_name, load_draft)
        return Drafting(drafters.draft_model(draft, **options), (draft,))
    if choice.name == "early_exit":
        layers = options.pop("layers", max(1, target.model.num_layers // 4))
        drafter = drafters.early_exit(target.model, layers, **options)
        early_exit = target.model.early_exit
        return Drafting(drafter, () if early_exit is None else (early_exit(layers),))
    build: Mapping[str, Callable[..., Drafter]] = {
        "none": drafters.none,
        "ngram": drafters.ngram,
        "suffix": drafters.suffix,
    }
    return Drafting(build[choice.name](**options))


def default_mode(temperature: float, policy: str) -> str:
    """How a draft model chooses tokens, unless told: as the verification makes most of."""
    return "greedy" if temperature == 0 else "coupled" if policy == "coupled" else "sample"


def build_policy(choice: Choice) -> "Policy":
    """The policy of `choice`."""
    from specdec import policies

    build: Mapping[str, Callable[..., Policy]] = {
        "greedy": policies.greedy,
        "lossless": policies.lossless,
        "block": policies.block,
        "match": policies.match,
        "coupled": policies.coupled,
    }
    return build[choice.name](**choice.options)


def build_controller(
    choice: Choice, *, target: "Model", drafts: Sequence["Model"], costs: Callable[["Model"], Mapping[int, float]]
) -> "Controller":
    """The controller of `choice`. `costs` measures what forwards of a model and the rounds around them take
    (`models.costs.measure_costs`); only `expected` asks."""
    from specdec import controllers

    options: dict[str, Any] = dict(choice.options)
    if choice.name == "expected":
        options.setdefault("draft_cost", sum((costs(draft)[1] for draft in drafts), 0.0))
        measured = costs(target)
        options.setdefault("overhead", measured.get(0, 0.0))
        return controllers.expected({n: seconds for n, seconds in measured.items() if n}, **options)
    build: Mapping[str, Callable[..., Controller]] = {
        "fixed": controllers.fixed,
        "adaptive": controllers.adaptive,
        "aimd": controllers.aimd,
    }
    return build[choice.name](**options)


def _draft_model(
    target: "Loaded", options: dict[str, Any], draft_name: str | None, load_draft: Callable[[str], "Loaded"]
) -> "Model":
    """The draft model that `options` ask for, taking what they say about it out of them."""
    name, agreement = options.pop("name", draft_name), options.pop("agreement", None)
    if target.model.adapter == "tabular":
        from specdec.models.tabular import tabular_draft

        if name is not None:
            raise ValueError(f"the toy target drafts with a toy of its own, not with {name!r}; use model:agreement=0.8")
        return tabular_draft(target.model, agreement=0.8 if agreement is None else agreement)
    if agreement is not None:
        raise ValueError("drafter option 'agreement' belongs to the toy target; use it with model tabular")
    if name is None:
        raise ValueError("drafter 'model' needs a draft model; name it with --draft-model or model:name=NAME")
    from specdec.models.vocabulary import align_vocabulary

    return align_vocabulary(load_draft(name), target)
