"""Any causal language model of transformers behind the bundle `Model`: ragged rows, trees, rollback without a copy.

A transformers cache grows at its end, in step for all rows, and positions and visibility follow from its length.
Here the model is handed a cache that writes each row's new nodes to that row's own slots and returns all slots in
use, explicit position ids, and a 4-D mask that says which slots a node sees. Nothing else of the model changes; that
the result is the model's own is checked once, when it is built.

Cache layout: as in `specdec.models.decoder`, with keys and values as the model hands them to its cache.
"""

import inspect
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from specdec import cache as kv
from specdec.cache import KVCache
from specdec.models.report import ModelError, one_line
from specdec.models.window import Window, additive_mask, open_window
from specdec.types import Model

# Attention that adds a mask to its scores; flash and flex attention do not.
_ATTENTION = ("sdpa", "eager")

_FULL, _SLIDING = "full_attention", "sliding_attention"

# What the self-check forgives, relative to the largest logit. Rounding alone gave 1e-6 in float32 on tiny models; a
# wrong position or a leaking branch changes attention weights, hence logits, by percents.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def build_huggingface(module: PreTrainedModel, *, name: str) -> Model:
    """The bundle of a loaded `AutoModelForCausalLM`: in evaluation mode, on one device, `sdpa` or `eager` attention.

    Sliding windows are kept by the mask; their old keys stay in memory. `features` are the last hidden states after
    the final norm. Four forwards of a few tokens check that a tree scored through the slot cache equals plain
    forwards of its branches.

    Raises `ModelError` (a `ValueError`) for models that cannot be run this way: without a key-value cache, recurrent
    or hybrid ones, keys and values of different shapes or of different shapes by layer, models that do not take
    positions or a mask per node, and any that fails the check.
    """
    problem = _refuse(module)
    if problem is not None:
        raise ModelError(f"{name} cannot run through a slot cache: {problem}")
    try:
        model = _build_model(module, name, _probe(module))
        _check_tree(module, model)
    except ModelError as error:
        raise ModelError(f"{name} cannot run through a slot cache: {error}") from None
    # Whatever a foreign model raises in its first forwards means the same to the caller.
    except Exception as error:
        problem = f"a trial forward failed ({one_line(error)})"
        raise ModelError(f"{name} cannot run through a slot cache: {problem}") from error
    return model


def _refuse(module: PreTrainedModel) -> str | None:
    """Why a model cannot be served, as far as its configuration and signature tell."""
    config = module.config.get_text_config()
    parameters = inspect.signature(module.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING}
    if module.training:
        return "it is in training mode; call eval() first"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if "past_key_values" not in parameters:
        return "it has no key-value cache"
    if "position_ids" not in parameters or "attention_mask" not in parameters:
        return "it does not take a position and a mask per token"
    if kinds:
        return f"its layers include {', '.join(sorted(kinds))}"
    if config._attn_implementation not in _ATTENTION:
        return f"its attention is {config._attn_implementation!r}; load it with attn_implementation='sdpa'"
    if not getattr(config, "max_position_embeddings", None):
        return "its configuration states no max_position_embeddings"
    if len({parameter.device for parameter in module.parameters()}) > 1:
        return "its weights are spread over several devices"
    return None


class _Layout(NamedTuple):
    """What a model keeps per token: `layers` times keys and values `[heads, size]`; and the width of its logits."""

    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    vocab_size: int


class _Probe(Cache):
    """Keeps nothing, and notes what each layer hands to its cache."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen[layer_idx] = key_states, value_states
        return key_states, value_states


class _SlotCache(Cache):
    """The cache a model sees during one forward: writes a window of a `KVCache` and returns the slots in use."""

    def __init__(self, cache: KVCache, window: Window) -> None:
        super().__init__(layers=[])
        self._groups, self._window, self._capacity = cache.store.slots[0], window, cache.capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        groups = self._groups[2 * layer_idx], self._groups[2 * layer_idx + 1]
        for group, states in zip(groups, (key_states, value_states), strict=True):
            kv.write(group, self._window.slots, states.transpose(1, 2))
        keys, values = (group[:, : self._window.extent].transpose(1, 2) for group in groups)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._window.extent - self._window.slots.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._window.extent, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._capacity


def _probe(module: PreTrainedModel) -> _Layout:
    """The layout of a model, seen in a forward of two tokens; raises `ModelError` when slots cannot hold it."""
    probe = _Probe()
    with torch.no_grad():
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=module.device)
        logits = module(input_ids=tokens, past_key_values=probe, use_cache=True).logits
    if not probe.seen:
        raise ModelError("it never uses its key-value cache")
    if sorted(probe.seen) != list(range(len(probe.seen))):
        raise ModelError(f"only its layers {sorted(probe.seen)} use the key-value cache")
    states = [tensor for pair in probe.seen.values() for tensor in pair]
    shapes = sorted({(tensor.shape[1], tensor.shape[3]) for tensor in states})
    if len(shapes) > 1:
        raise ModelError(f"its keys and values differ in shape ([heads, size]: {', '.join(map(str, shapes))})")
    return _Layout(len(probe.seen), *shapes[0], states[0].dtype, logits.shape[-1])


def _build_model(module: PreTrainedModel, name: str, layout: _Layout) -> Model:
    config = module.config.get_text_config()
    slim = "logits_to_keep" in inspect.signature(module.forward).parameters

    def init_cache(rows: int, capacity: int) -> KVCache:
        # Zeros, not `empty`: a slot that a row does not see has attention weight 0, and 0 times NaN is NaN.
        shape = (2 * layout.layers, rows, capacity, layout.heads, layout.size)
        return kv.init_cache(torch.zeros(shape, dtype=layout.dtype, device=module.device))

    def forward(
        cache: KVCache,
        tokens: Int[Tensor, "b n"],
        depth: Int[Tensor, "b n"] | None = None,
        visible: Bool[Tensor, "b n w"] | None = None,
        *,
        logits: bool = True,
        features: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, KVCache]:
        window = open_window(cache, tokens.shape[1], depth, config.max_position_embeddings)
        # A prefill needs no logits, and a model that can leave most of them out computes one row.
        options = {"logits_to_keep": 1} if slim and not logits else {}
        # Not inference mode: some models replace their own buffers in a forward, and would keep inference tensors.
        with torch.no_grad():
            output = module(
                input_ids=tokens,
                attention_mask=_masks(config, cache, window, visible, layout.dtype),
                position_ids=window.positions,
                past_key_values=_SlotCache(cache, window),
                use_cache=True,
                output_hidden_states=features,
                **options,
            )
        scores = hidden = None
        if logits:
            scores = output.logits if output.logits.dtype == torch.float64 else output.logits.float()
        if features:
            hidden = output.hidden_states[-1]
        return scores, hidden, kv.advance(cache, tokens.shape[1], window.extent)

    return Model(
        name=name,
        adapter="huggingface",
        vocab_size=layout.vocab_size,
        max_length=config.max_position_embeddings,
        device=module.device,
        dtype=module.dtype,
        init_cache=init_cache,
        forward=forward,
        num_layers=layout.layers,
        about={"architecture": module.config.model_type, "class": type(module).__name__},
    )


def _masks(
    config: Any, cache: KVCache, window: Window, visible: Bool[Tensor, "b n w"] | None, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The mask of the model, or one by kind of layer where it has full and sliding ones: such models take them so."""
    reach = _reach(config)
    kinds = set(getattr(config, "layer_types", None) or (_FULL if reach is None else _SLIDING,))
    by_kind = {
        kind: additive_mask(cache, window, visible, dtype, reach=reach if kind == _SLIDING else None) for kind in kinds
    }
    return by_kind if len(by_kind) > 1 else by_kind.popitem()[1]


def _reach(config: Any) -> int | None:
    """The sliding window that layers of the model keep to, or `None` when they see everything."""
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) if kinds is None else _SLIDING in kinds
    return (getattr(config, "sliding_window", None) or None) if used else None


def _check_tree(module: PreTrainedModel, model: Model) -> None:
    """Raise `ModelError` unless two branches, scored at once over ragged rows, get the logits of plain forwards."""
    # Any tokens will do as long as they differ; a small vocabulary only repeats some.
    text = torch.tensor([[2, 3, 5, 7], [11, 13, 17, 0]], device=model.device) % model.vocab_size
    nodes = torch.tensor([[19, 23, 29], [31, 37, 41]], device=model.device) % model.vocab_size
    lengths = (4, 3)
    depth = torch.tensor([[0, 1, 1]] * 2, device=model.device)
    visible = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]] * 2, dtype=torch.bool, device=model.device)
    _, _, cache = model.forward(model.init_cache(2, 8), text, logits=False)
    cache = kv.truncate(cache, torch.tensor(lengths, device=model.device))
    scored, _, _ = model.forward(cache, nodes, depth, visible)
    assert scored is not None
    error, largest = [], []
    for row, length in enumerate(lengths):
        for branch in ([0, 1], [0, 2]):
            path = torch.cat([text[row, :length], nodes[row, branch]])
            with torch.no_grad():
                plain = module(input_ids=path[None], use_cache=False).logits[0, -2:].double()
            error.append((scored[row, branch].double() - plain).abs().max())
            largest.append(plain.abs().max())
    worst, scale = float(torch.stack(error).max()), float(torch.stack(largest).max())
    # Written so that NaN fails.
    if not worst <= _TOLERANCE.get(model.dtype, 5e-2) * scale:
        raise ModelError(
            f"logits of a tree differ from plain forwards by {worst:.2g} (of {scale:.2g}), so it does not follow "
            "explicit positions or a mask per token"
        )
