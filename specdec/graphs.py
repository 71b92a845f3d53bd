"""Forwards, drafting loops and whole rounds as CUDA graphs: the same results with a launch instead of hundreds.

A graph replays addresses, and a decode state is made of values. `graphed` joins the two: the tensors of the arguments
are copied into buffers of the graph, the results are copied out, and memory behind cache handles is what the
addresses stand for. A function is recorded again for every shape, plain value and cache it has not seen.

What cannot be captured runs as it is; the `GraphLog` tells why. The functions recorded must be pure up to the scratch
slots of their caches, and ask the device nothing (no `.item()`), which is what `specdec.step` keeps to.
"""

import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec import cache as kv
from specdec.cache import KVCache, SlotStore
from specdec.records import Memo, fields_of, is_record
from specdec.sampling import Sampling
from specdec.step import any_running
from specdec.transforms import Parts
from specdec.types import RUNNING, DecodeState, Drafter, Model, Plan, Proposal, Step, StepInfo
from specdec_kernels.graphs import CaptureError, Recorder, cuda_recorder, refuse_graphs
from specdec_kernels.streams import Readback

# A draft of k tokens makes k + 1 nodes, so short drafts have a graph each; longer ones are padded by less than half.
BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 25, 33, 49, 65)

# Graphs kept of one function. A graph of a 32-layer forward holds a few megabytes of nodes.
_KEPT = 48

# Caches of graphed models have a multiple of so many slots, so that few prompts need graphs of their own.
_GRAIN = 256


class UncapturableError(ValueError):
    """A value that no graph can hold, such as host memory of a drafter."""


@dataclasses.dataclass
class GraphLog:
    """What became of a capture: how many graphs, how often one was replayed, and why something ran eagerly."""

    captured: int = 0
    replays: int = 0
    eager: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        said = f"{self.captured} graphs, {self.replays} replays"
        return said if self.reason is None else f"{said}, {self.eager} eager calls: {self.reason}"


class _Recorded(NamedTuple):
    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: list[Tensor]
    layout: Hashable
    # By output tensor, the input that it is; by cache of the results, its place among those of the arguments.
    passed: list[int | None]
    stores: list[int]
    consumed: list[bool]


class Graphed:
    """`function` of nested records, replayed from graphs; see `graphed`."""

    def __init__(self, function: Callable[..., Any], recorder: Recorder[Any], log: GraphLog) -> None:
        self.function, self.recorder, self.log = function, recorder, log
        self.known: OrderedDict[Hashable, _Recorded] = OrderedDict()

    def __call__(self, *arguments: Any) -> Any:
        if self.log.reason is not None:
            self.log.eager += 1
            return self.function(*arguments)
        tensors: list[Tensor] = []
        caches: list[KVCache] = []
        try:
            layout = _take_apart(arguments, tensors, caches)
            for cache in caches:
                kv.check_fresh(cache)
            found = self.known.get(layout) or self._record(layout, tensors, caches)
        except (CaptureError, UncapturableError) as error:
            self.log.reason = str(error)
            return self(*arguments)
        self.known.move_to_end(layout)
        torch._foreach_copy_(found.inputs, tensors)
        found.replay()
        self.log.replays += 1
        for cache, consumed in zip(caches, found.consumed, strict=True):
            cache.store.generation += consumed
        results = (
            tensor.clone() if passed is None else tensors[passed]
            for tensor, passed in zip(found.outputs, found.passed, strict=True)
        )
        return _put_together(found.layout, iter(list(results)), iter([caches[index].store for index in found.stores]))

    def _record(self, layout: Hashable, tensors: Sequence[Tensor], caches: Sequence[KVCache]) -> _Recorded:
        inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        stores = [SlotStore(cache.store.slots, static=True) for cache in caches]
        made: dict[str, Any] = {}

        def work() -> list[Tensor]:
            before = [store.generation for store in stores]
            result = self.function(*_put_together(layout, iter(inputs), iter(stores)))
            outputs: list[Tensor] = []
            handles: list[KVCache] = []
            made["layout"] = _take_apart(result, outputs, handles)
            made["stores"] = [_place(handle.store, stores) for handle in handles]
            made["consumed"] = [store.generation > old for store, old in zip(stores, before, strict=True)]
            return outputs

        replay, outputs = self.recorder(work)
        places = {id(tensor): place for place, tensor in enumerate(inputs)}
        passed = [places.get(id(tensor)) for tensor in outputs]
        recorded = _Recorded(replay, inputs, outputs, made["layout"], passed, made["stores"], made["consumed"])
        self.known[layout] = recorded
        self.log.captured += 1
        if len(self.known) > _KEPT:
            self.known.popitem(last=False)
        return recorded


def graphed(function: Callable[..., Any], recorder: Recorder[Any], log: GraphLog | None = None) -> Graphed:
    """`function`, replayed from graphs; its arguments and results are records, tuples, tensors and plain values.

    Caches among the arguments are consumed if `function` consumes them. Results are copies and stay what they are.
    """
    return Graphed(function, recorder, log or GraphLog())


def with_cuda_graph(model: Model, buckets: Sequence[int] = BUCKETS, *, recorder: Recorder[Any] | None = None) -> Model:
    """`model`, its forwards of up to `max(buckets)` nodes replayed from graphs, padded to the next bucket.

    Padding nodes write scratch slots, of which the model's caches have enough. Caches are handed out again once the
    last handle on them is gone, so their graphs are used again, too. `Model.about["graph"]` is the `GraphLog`; a model
    that cannot be captured runs eagerly and the log tells why; one that has its graphs is returned as it is.
    `recorder`: for tests.
    """
    sizes = sorted(set(buckets))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"buckets must hold numbers of nodes from 1 on, got {tuple(buckets)}")
    if "graph" in model.about:
        return model
    log = GraphLog(reason=None if recorder else refuse_graphs(model.device))
    about = {**model.about, "graph": log}
    if log.reason is not None:
        return model._replace(about=about)
    recorder = recorder or cuda_recorder(model.device)
    return _graphed_model(model._replace(about=about), sizes, recorder, log)


def _graphed_model(model: Model, sizes: Sequence[int], recorder: Recorder[Any], log: GraphLog) -> Model:
    def run(cache: KVCache, tokens: Tensor, depth: Tensor | None, visible: Tensor | None, features: bool) -> Any:
        logits, hidden, _ = model.forward(cache, tokens, depth, visible, features=features)
        return logits, hidden

    replayed = graphed(run, recorder, log)
    memory = _Memory(model.init_cache, sizes[-1])

    def forward(
        cache: KVCache,
        tokens: Tensor,
        depth: Tensor | None = None,
        visible: Tensor | None = None,
        *,
        logits: bool = True,
        features: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, KVCache]:
        n = tokens.shape[1]
        # Inside a graph of more than the forward there is nothing left to save.
        if not logits or n > sizes[-1] or cache.store.static or log.reason is not None:
            return model.forward(cache, tokens, depth, visible, logits=logits, features=features)
        kv.check_fresh(cache)
        size = bucket(n, sizes)
        scores, hidden = replayed(cache, *pad_nodes(tokens, depth, visible, size), features)
        extent = min(cache.extent + n, cache.capacity)
        # An eager call has consumed the handle itself.
        handle = KVCache(cache.store, cache.length, cache.store.generation, cache.extent)
        return scores[:, :n], None if hidden is None else hidden[:, :n], kv.advance(handle, n, extent)

    early_exit = model.early_exit
    return model._replace(
        init_cache=memory.init_cache,
        forward=forward,
        early_exit=None
        if early_exit is None
        else lambda layers: _graphed_model(early_exit(layers), sizes, recorder, log),
    )


def bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds n."""
    return next(size for size in sizes if size >= n)


def pad_nodes(
    tokens: Tensor, depth: Tensor | None, visible: Tensor | None, size: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A forward's nodes with padding behind them, up to `size`: copies of the root that see themselves only."""
    missing = size - tokens.shape[1]
    if missing == 0:
        return tokens, depth, visible
    tokens = torch.cat([tokens, tokens[:, :1].expand(-1, missing)], 1)
    if depth is not None:
        depth = torch.nn.functional.pad(depth, (0, missing))
    if visible is not None:
        visible = torch.nn.functional.pad(visible, (0, missing, 0, missing))
        visible.diagonal(visible.shape[2] - size, 1, 2)[:, -missing:] = True
    return tokens, depth, visible


class _Memory:
    """Caches by rows and rounded capacity, handed out again once nobody holds them."""

    def __init__(self, make: Callable[[int, int], KVCache], room: int) -> None:
        self.make, self.room = make, room
        self.made: dict[tuple[int, int], list[tuple[tuple[Tensor, ...], weakref.ref[SlotStore]]]] = {}

    def init_cache(self, rows: int, capacity: int) -> KVCache:
        key = rows, -(-(capacity + self.room) // _GRAIN) * _GRAIN
        there = self.made.setdefault(key, [])
        for place, (slots, owner) in enumerate(there):
            if owner() is None:
                store = SlotStore(slots)
                there[place] = slots, weakref.ref(store)
                length = torch.zeros(rows, dtype=torch.int64, device=slots[0].device)
                # What an earlier text left must not be NaN; see the model's own `init_cache`.
                for buffer in slots:
                    buffer.zero_()
                return KVCache(store, length, 0, 0)
        # Memory of other sizes that nobody holds: a new size would be beside it.
        self.made = {size: held for size, found in self.made.items() if (held := [h for h in found if h[1]()])}
        cache = self.make(*key)
        self.made.setdefault(key, []).append((cache.store.slots, weakref.ref(cache.store)))
        return cache


def graphed_drafter(drafter: Drafter, recorder: Recorder[Any], log: GraphLog | None = None) -> Drafter:
    """`drafter`, its whole drafting loop replayed as one graph a depth; it must be `capturable`."""
    if not drafter.capturable:
        raise ValueError(f"drafter {drafter.name!r} works on the host, so it cannot be captured; use it as it is")

    def draft(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, Any, int]:
        return drafter.propose(state, plan, sampling)

    replayed = graphed(draft, recorder, log)

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, Any, int]:
        found: tuple[Proposal, Any, int] = replayed(state, plan, sampling)
        return found

    return drafter._replace(propose=propose)


def graphed_step(step: Step[Any, Any], recorder: Recorder[Any], log: GraphLog | None = None) -> Step[Any, Any]:
    """A whole round as one graph; the step's drafter must be `capturable`, its controller `fixed`."""
    replayed = graphed(step, recorder, log)

    def run(state: DecodeState[Any, Any]) -> tuple[DecodeState[Any, Any], StepInfo]:
        found: tuple[DecodeState[Any, Any], StepInfo] = replayed(state)
        return found

    return run


class Rounds:
    """A round captured over buffers that hold the state: `replay` decodes a round and copies nothing in or out.

    `state` is consumed. Raises `CaptureError` or `UncapturableError` when it cannot be captured.
    """

    def __init__(self, step: Step[Any, Any], state: DecodeState[Any, Any], recorder: Recorder[Any]) -> None:
        tensors: list[Tensor] = []
        caches: list[KVCache] = []
        self.layout = _take_apart(state, tensors, caches)
        for cache in caches:
            kv.check_fresh(cache)
        self.buffers = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        self.owners = [cache.store for cache in caches]
        stores = [SlotStore(cache.store.slots, static=True) for cache in caches]
        owned = {buffer.untyped_storage().data_ptr() for buffer in self.buffers}
        start = list(tensors)
        self.state = self._state(self.buffers, stores)

        def work() -> list[Tensor]:
            after, _ = step(self._state(self.buffers, stores))
            results: list[Tensor] = []
            handles: list[KVCache] = []
            if _take_apart(after, results, handles) != self.layout:
                raise UncapturableError("the state changes its shape from round to round")
            if [_place(handle.store, stores) for handle in handles] != list(range(len(stores))):
                raise UncapturableError("the state's caches change places")
            # One result may be the buffer of another, which the copies would overwrite.
            safe = [
                result.clone() if result is not buffer and result.untyped_storage().data_ptr() in owned else result
                for buffer, result in zip(self.buffers, results, strict=True)
            ]
            for kind in {buffer.dtype for buffer in self.buffers}:
                # Of one type, so that one launch copies all of them.
                pairs = [pair for pair in zip(self.buffers, safe, strict=True) if pair[0].dtype == kind]
                torch._foreach_copy_([buffer for buffer, _ in pairs], [result for _, result in pairs])
            return []

        self._replay, _ = recorder(work)
        for store in self.owners:
            store.generation += 1
        # The warm-up has decoded rounds already.
        torch._foreach_copy_(self.buffers, start)
        self.replays = 0

    def replay(self) -> None:
        """Decode one round; rows that are done stay as they are."""
        self._replay()
        self.replays += 1

    def most_rounds(self) -> int:
        """Rounds after which every row is done for certain: each gives a token to every row that runs."""
        left = torch.where(self.state.done, 0, self.state.limit - self.state.length)
        return int(left.max())

    def load(self, state: DecodeState[Any, Any]) -> None:
        """Go on from `state`, which must be over the same caches, with every slot that it counts still in place: the
        state that the rounds were made from, say, with another seed."""
        tensors: list[Tensor] = []
        caches: list[KVCache] = []
        if _take_apart(state, tensors, caches) != self.layout:
            raise ValueError("the state has other shapes or another cache than the one that was captured")
        torch._foreach_copy_(self.buffers, tensors)

    def read(self) -> DecodeState[Any, Any]:
        """A copy of the state as it is now. Its cache is the one decoded over, so replaying consumes it."""
        for store in self.owners:
            store.generation += 1
        return self._state([buffer.clone() for buffer in self.buffers], self.owners)

    def _state(self, tensors: Sequence[Tensor], stores: Sequence[SlotStore]) -> DecodeState[Any, Any]:
        state: DecodeState[Any, Any] = _put_together(self.layout, iter(tensors), iter(stores))
        return state


def finish_rounds(rounds: Rounds, *, lag: int = 2) -> DecodeState[Any, Any]:
    """Decode until every row is done.

    The host looks at round r when round r + `lag` - 1 has been launched, so the device never waits for it. The rounds
    launched too many, for which a row must have ended before its limit, change nothing: a row that is done commits
    nothing, and counts nothing.
    """
    if lag < 1:
        raise ValueError(f"lag must be at least 1, got {lag}")
    looks: list[Readback] = []
    spare: list[Readback] = []
    for _ in range(rounds.most_rounds()):
        rounds.replay()
        look = spare.pop() if spare else Readback(rounds.state.finish)
        look.request(rounds.state.finish)
        looks.append(look)
        if len(looks) < lag:
            continue
        first = looks.pop(0)
        if RUNNING not in first.wait():
            break
        spare.append(first)
    state = rounds.read()
    any_running(state)
    return state


def graphed_parts(parts: Parts, *, recorder: Recorder[Any] | None = None, buckets: Sequence[int] = BUCKETS) -> Parts:
    """The parts with the target's forwards as graphs, and the drafting loop of a draft model as one.

    Each has a memory pool of its own, so they may run at the same time (`specdec.overlap`). `Model.about["graph"]` and
    `["draft_graph"]` are their logs.
    """
    model, drafter = with_cuda_graph(parts.model, buckets, recorder=recorder), parts.drafter
    if model.about["graph"].reason is None and drafter.capturable and drafter.vocab_size is not None:
        log = GraphLog()
        drafter = graphed_drafter(drafter, recorder or cuda_recorder(model.device), log)
        model = model._replace(about={**model.about, "draft_graph": log})
    return parts._replace(model=model, drafter=drafter)


def _place(store: SlotStore, stores: Sequence[SlotStore]) -> int:
    for place, known in enumerate(stores):
        if known is store:
            return place
    raise UncapturableError("a cache was made or copied inside the round")


def _take_apart(value: Any, tensors: list[Tensor], caches: list[KVCache]) -> Hashable:
    """The shape of a nested value without its tensors and caches, which are appended to the lists."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return (Tensor, value.shape, value.dtype)
    if isinstance(value, KVCache):
        tensors.append(value.length)
        caches.append(value)
        slots = tuple((buffer.data_ptr(), buffer.shape, buffer.stride(), buffer.dtype) for buffer in value.store.slots)
        return (KVCache, slots, value.length.shape)
    if isinstance(value, Memo):
        raise UncapturableError(f"{type(value).__name__} is host memory")
    if is_record(value):
        return (type(value), *(_take_apart(item, tensors, caches) for item in fields_of(value).values()))
    if isinstance(value, tuple):
        return (type(value), *(_take_apart(item, tensors, caches) for item in value))
    if value is None or isinstance(value, bool | int | float | str):
        return (type(value), value)
    raise UncapturableError(f"a {type(value).__name__} is no tensor, record or plain value")


def _put_together(layout: Any, tensors: Iterator[Tensor], stores: Iterator[SlotStore]) -> Any:
    """The inverse of `_take_apart`, over other tensors and on other cache stores."""
    kind = layout[0]
    if kind is Tensor:
        return next(tensors)
    if kind is KVCache:
        store = next(stores)
        return KVCache(store, next(tensors), store.generation, int(store.slots[0].shape[2]))
    if dataclasses.is_dataclass(kind):
        made: Any = kind
        return made(*(_put_together(item, tensors, stores) for item in layout[1:]))
    if issubclass(kind, tuple):
        items = [_put_together(item, tensors, stores) for item in layout[1:]]
        return kind(*items) if hasattr(kind, "_fields") else tuple(items)
    return layout[1]
