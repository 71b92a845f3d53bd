"""What is captured gives what it gave before, nothing in a round asks the device, and failures run eagerly."""

import dataclasses
import gc

import pytest
import torch

from specdec import controllers, drafters, output_tokens, policies
from specdec.cache import KVCache, SlotStore, advance, init_cache
from specdec.graphs import (
    GraphLog,
    Rounds,
    UncapturableError,
    bucket,
    finish_rounds,
    graphed,
    graphed_parts,
    graphed_step,
    pad_nodes,
    with_cuda_graph,
)
from specdec.models.synthetic import llama
from specdec.models.tabular import tabular, tabular_draft
from specdec.records import fields_of, is_record
from specdec.sampling import Sampling
from specdec.state import init_state
from specdec.step import build_step, iterate
from specdec.transforms import Parts
from specdec.types import Model
from specdec_kernels.graphs import CaptureError, eager_recorder

TARGET = tabular(5, seed=1)
DRAFT = tabular_draft(TARGET, agreement=0.6)
SAMPLED = Sampling(temperature=1.0)
PROMPTS = [[1, 2], [3], [2, 2, 2]]


def start(parts, sampling=SAMPLED, new_tokens=24):
    step = build_step(*parts, sampling=sampling)
    state = init_state(
        PROMPTS, model=parts.model, drafter=parts.drafter, controller=parts.controller, max_new_tokens=new_tokens
    )
    return step, state


def run(parts, sampling=SAMPLED, wrap=lambda step: step):
    step, state = start(parts, sampling)
    step = wrap(step)
    *_, (state, _) = iterate(step, state)
    return output_tokens(state)


MADE = {
    "none": lambda: Parts(TARGET, drafters.none(), policies.lossless(), controllers.fixed(0)),
    "chain": lambda: Parts(TARGET, drafters.draft_model(DRAFT), policies.lossless(), controllers.fixed(3)),
    "tree": lambda: Parts(
        TARGET, drafters.draft_model(DRAFT, branching=(2, 2)), policies.lossless(), controllers.fixed(2)
    ),
    "adaptive": lambda: Parts(TARGET, drafters.draft_model(DRAFT), policies.block(), controllers.adaptive()),
    "suffix": lambda: Parts(TARGET, drafters.suffix(nodes=6), policies.lossless(), controllers.fixed(3)),
}


@pytest.mark.parametrize("name", MADE)
def test_graphed_parts_write_the_same_tokens(name):
    parts = MADE[name]()
    made = graphed_parts(parts, buckets=(1, 2, 4, 8), recorder=eager_recorder)
    assert run(made) == run(parts)
    assert made.model.about["graph"].replays > 0
    assert made.model.about["graph"].reason is None


def test_a_whole_round_writes_the_same_tokens():
    parts = MADE["none"]()
    log = GraphLog()
    assert run(parts, wrap=lambda step: graphed_step(step, eager_recorder, log)) == run(parts)
    assert log.captured == 1


def test_rounds_run_ahead_to_the_same_end():
    parts = MADE["none"]()
    wanted = run(parts)
    for lag in (1, 2, 5):
        step, state = start(parts)
        rounds = Rounds(step, state, eager_recorder)
        for _ in range(2):
            rounds.load(state)
            final = finish_rounds(rounds, lag=lag)
            assert output_tokens(final) == wanted
            assert final.metrics.emitted.tolist() == [24, 24, 24]
            assert final.round.tolist() == [24, 24, 24]
    # No more rounds than there are tokens to come.
    assert rounds.replays == 2 * 24
    with pytest.raises(ValueError, match="lag"):
        finish_rounds(rounds, lag=0)


def test_rounds_end_soon_after_the_last_row_has():
    parts = MADE["none"]()

    def begin():
        return build_step(*parts, sampling=SAMPLED, eos_ids=(0,)), start(parts)[1]

    step, state = begin()
    *_, (state, _) = iterate(step, state)
    needed = int(state.round.max())
    assert needed < 24
    for lag in (1, 3):
        rounds = Rounds(*begin(), eager_recorder)
        assert output_tokens(finish_rounds(rounds, lag=lag)) == output_tokens(state)
        assert needed <= rounds.replays < needed + lag


def test_rounds_refuse_a_state_of_another_shape():
    step, state = start(MADE["none"]())
    rounds = Rounds(step, state, eager_recorder)
    _, other = start(MADE["none"](), new_tokens=30)
    with pytest.raises(ValueError, match="other shapes"):
        rounds.load(other)


def test_addresses_stay_and_inputs_are_copied():
    seen = []

    def work(cache: KVCache, x: torch.Tensor):
        seen.append((x.data_ptr(), cache.length.data_ptr(), cache.store.slots[0].data_ptr()))
        cache.store.slots[0][0, 0, 0] += x.sum()
        return advance(cache, 1, 1), x * 2

    replayed = graphed(work, eager_recorder)
    cache = init_cache(torch.zeros(1, 1, 4, 1, 1))
    first, doubled = replayed(cache, torch.tensor([1.0]))
    second, redoubled = replayed(first, torch.tensor([2.0]))
    assert (doubled.item(), redoubled.item()) == (2.0, 4.0), "results are copies"
    assert second.length.tolist() == [2]
    assert len(set(seen)) == 1
    assert replayed.log.captured == 1
    with pytest.raises(RuntimeError, match="consumed"):
        replayed(first, torch.tensor([1.0]))


def test_what_cannot_be_captured_runs_eagerly_and_says_why():
    def failing(work):
        raise CaptureError("operation not permitted when stream is capturing")

    parts = MADE["chain"]()
    made = graphed_parts(parts, recorder=failing)
    assert run(made) == run(parts)
    log = made.model.about["graph"]
    assert "not permitted" in str(log)
    assert log.captured == 0
    assert log.eager > 0


def test_host_memory_is_not_captured():
    log = GraphLog()
    parts = MADE["suffix"]()
    assert run(parts, wrap=lambda step: graphed_step(step, eager_recorder, log)) == run(parts)
    assert "SuffixMemo is host memory" in str(log.reason)
    step, state = start(parts)
    with pytest.raises(UncapturableError, match="host memory"):
        Rounds(step, state, eager_recorder)


def test_without_a_cuda_device_nothing_changes():
    made = with_cuda_graph(TARGET)
    assert made.forward is TARGET.forward
    assert "CUDA graphs run on NVIDIA GPUs, not on cpu" in str(made.about["graph"])


def test_buckets():
    assert [bucket(n, (1, 2, 4, 8)) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    with pytest.raises(ValueError, match="buckets"):
        with_cuda_graph(TARGET, ())


def test_padding_nodes_see_themselves_only():
    tokens, depth = torch.tensor([[7, 8, 9]]), torch.tensor([[0, 1, 1]])
    visible = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]).bool()
    padded, deep, seen = pad_nodes(tokens, depth, visible, 5)
    assert padded.tolist() == [[7, 8, 9, 7, 7]]
    assert deep.tolist() == [[0, 1, 1, 0, 0]]
    assert (seen[0, :3, :3] == visible[0]).all()
    assert seen[0, 3:].tolist() == [[False, False, False, True, False], [False, False, False, False, True]]
    assert not seen[0, :3, 3:].any()
    continued = torch.ones(1, 3, 5, dtype=torch.bool)
    assert pad_nodes(tokens, depth, continued, 4)[2][0, 3].tolist() == [False] * 5 + [True]


def test_caches_are_handed_out_again():
    model = with_cuda_graph(TARGET, (1, 2), recorder=eager_recorder)
    cache = model.init_cache(1, 10)
    address = cache.store.slots[0].data_ptr()
    assert cache.capacity >= 12
    other = model.init_cache(1, 10)
    assert other.store.slots[0].data_ptr() != address
    del cache
    gc.collect()
    again = model.init_cache(1, 20)
    assert again.store.slots[0].data_ptr() == address
    assert again.length.tolist() == [0]


def on_meta(value):
    """A state on the device that has shapes and no values: whoever asks it for one gets an error."""
    if isinstance(value, KVCache):
        slots = tuple(buffer.to("meta") for buffer in value.store.slots)
        return KVCache(SlotStore(slots, static=True), value.length.to("meta"), 0, value.capacity)
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if is_record(value):
        return type(value)(**{name: on_meta(item) for name, item in fields_of(value).items()})
    return value


def shapes_only(model: Model) -> Model:
    """A model that writes nothing and says nothing, anywhere."""

    def forward(cache, tokens, depth=None, visible=None, *, logits=True, features=False):
        scores = torch.empty(*tokens.shape, model.vocab_size, device=cache.length.device)
        return scores, None, advance(cache, tokens.shape[1], cache.capacity)

    return model._replace(forward=forward, device=torch.device("meta"))


@pytest.mark.parametrize("policy", ["greedy", "lossless", "block", "match", "coupled"])
@pytest.mark.parametrize("kind", ["none", "chain", "greedy chain", "tree"])
def test_a_round_asks_the_device_nothing(kind, policy, monkeypatch):
    made = {
        "none": lambda draft: drafters.none(),
        "chain": drafters.draft_model,
        "greedy chain": lambda draft: drafters.draft_model(draft, mode="greedy"),
        "tree": lambda draft: drafters.draft_model(draft, branching=(2, 2)),
    }[kind]
    rule = getattr(policies, policy)()
    if rule.chain_only and kind == "tree":
        pytest.skip("verifies chains only")
    sampling = Sampling() if policy == "greedy" else Sampling(temperature=0.8, top_k=3, top_p=0.9, min_p=0.01)
    controller = controllers.fixed(0 if kind == "none" else 2)
    parts = Parts(TARGET, made(DRAFT), rule, controller)
    _, state = start(parts, sampling)
    drafter = made(shapes_only(DRAFT))
    assert drafter.capturable
    step = build_step(shapes_only(TARGET), drafter, rule, controller, sampling=sampling, eos_ids=(4,))
    shapes = on_meta(state)
    # Copies of host memory cannot be captured either, and shapes cannot show them.
    monkeypatch.setattr(torch, "tensor", None)
    after, info = step(shapes)
    assert after.tokens.shape == state.tokens.shape
    assert info.proposal.tokens.shape[1] == drafter.max_nodes(controller.max_depth)


def test_the_decoder_runs_over_a_static_cache():
    model = llama("nano", "cpu", torch.float32)
    parts = Parts(model, drafters.none(), policies.greedy(), controllers.fixed(0))
    step, state = start(parts, Sampling(), new_tokens=6)
    rounds = Rounds(step, state, eager_recorder)
    graph = output_tokens(finish_rounds(rounds))
    step, state = start(parts, Sampling(), new_tokens=6)
    *_, (state, _) = iterate(step, state)
    assert output_tokens(state) == graph


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_replay_what_eager_rounds_do(dtype):
    target, draft = (llama("nano", "cuda", dtype, seed=seed) for seed in (0, 1))
    for drafter, k in ((drafters.none(), 0), (drafters.draft_model(draft, mode="greedy"), 3)):
        parts = Parts(target, drafter, policies.greedy(), controllers.fixed(k))
        made = graphed_parts(parts)
        wanted = run(parts, Sampling())
        assert run(made, Sampling()) == wanted
        assert made.model.about["graph"].reason is None
        assert "draft_graph" not in made.model.about or made.model.about["draft_graph"].reason is None


@cuda
def test_a_whole_round_is_one_cuda_graph():
    from specdec_kernels.graphs import cuda_recorder

    device = torch.device("cuda")
    target, draft = (llama("nano", "cuda", torch.bfloat16, seed=seed) for seed in (0, 1))
    for drafter, k in ((drafters.none(), 0), (drafters.draft_model(draft, mode="greedy"), 3)):
        parts = Parts(target, drafter, policies.greedy(), controllers.fixed(k))
        wanted = run(parts, Sampling())
        step, state = start(parts, Sampling())
        rounds = Rounds(step, state, cuda_recorder(device))
        assert output_tokens(finish_rounds(rounds)) == wanted
        rounds.load(dataclasses.replace(state))
        assert output_tokens(finish_rounds(rounds)) == wanted
