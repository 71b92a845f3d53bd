"""The fused stack against the torch decoder, and its rows against each other, bit by bit."""

import os
import threading
import time
from typing import NamedTuple

import pytest
import torch

from specdec.models.checkpoint import Reader, Spec
from specdec.models.decoder import build_decoder
from specdec.models.families import FAMILIES
from specdec.types import Model
from specdec_kernels.cpu import library
from specdec_kernels.cpu.packed import FORMATS
from specdec_kernels.cpu.stack import Stack, build_stack, refuse_spec, stack_forward

pytestmark = pytest.mark.skipif(library.available() is not None, reason=f"the CPU kernels: {library.available()}")
SETS = library.load().instruction_sets if library.available() is None else ()

CAPACITY = 40
SIZES = {"vocab_size": 101, "num_hidden_layers": 3, "max_position_embeddings": 64}
KINDS = {
    # A head of one panel, grouped queries, tied.
    "llama": ("llama", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "tie_word_embeddings": True}),
    # Biases everywhere, sizes that fill no panel, a head that fills no vector.
    "llama-odd": ("llama", {"hidden_size": 60, "intermediate_size": 46, "num_attention_heads": 6, "head_dim": 10,
                            "num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True,
                            "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1,
                        "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "head_dim": 12, "tie_word_embeddings": False}),
    "mistral": ("mistral", {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 2, "head_dim": 72,
                            "num_key_value_heads": 2, "sliding_window": None, "tie_word_embeddings": False}),
}  # fmt: skip


class Pair(NamedTuple):
    spec: Spec
    decoder: Model
    stack: Stack


def config_of(kind):
    from transformers import AutoConfig

    name, options = KINDS[kind]
    return AutoConfig.for_model(name, **SIZES, **options)


def random_weights(config):
    from transformers import AutoModelForCausalLM

    generator, module = torch.Generator().manual_seed(0), AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, tensor in sorted(module.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        near = 0.0 if name.endswith("bias") else 1.0
        tensors[name] = noise / tensor.shape[-1] ** 0.5 if tensor.dim() == 2 else near + 0.2 * noise
    return tensors


def build_pair(kind, format="fp32", **options):
    config = config_of(kind)
    tensors, cpu = random_weights(config), torch.device("cpu")
    decoder = build_decoder(config, tensors, name=kind, dtype=torch.float32, device=cpu, linear="torch")
    family, reader = FAMILIES[config.model_type], Reader(tensors, torch.float32, cpu)
    spec = family.describe(config)
    ends = family.ends(config, spec, reader)
    layers = (family.layer(config, spec, reader, index) for index in range(spec.num_layers))
    return Pair(
        spec, decoder, build_stack(spec, layers, ends.final_norm.weight, ends.embedding, ends.head, format, **options)
    )


def empty_slots(stack, rows, capacity=CAPACITY):
    # Scratch slots may hold anything, NaN too: nobody reads one that was not written.
    return torch.full((2 * stack.num_layers, rows, capacity, stack.kv_heads, stack.head_size), float("nan"))


def random_tokens(rows, n, seed=1):
    return torch.randint(0, SIZES["vocab_size"], (rows, n), generator=torch.Generator().manual_seed(seed))


def run_chain(stack, slots, tokens, start=0, **options):
    rows, n = tokens.shape
    places = start + torch.arange(n).expand(rows, n)
    length = torch.full((rows,), start)
    return stack_forward(stack, slots, tokens, places, places, length, start + n, **options)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_the_torch_decoder(kind, instruction_set):
    _, decoder, stack = build_pair(kind)
    tokens = random_tokens(2, 9)
    logits, features, _ = decoder.forward(decoder.init_cache(2, CAPACITY), tokens, features=True)
    result = run_chain(stack, empty_slots(stack, 2), tokens, states=True, instruction_set=instruction_set)
    torch.testing.assert_close(result.states, features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("format", ["fp16", "bf16", "int8", "int4"])
def test_a_format_equals_the_decoder_of_its_weights_within_its_rounding_of_inputs(format):
    _, decoder, stack = build_pair("llama", format)
    tokens = random_tokens(1, 9)
    logits, _, _ = decoder.forward(decoder.init_cache(1, CAPACITY), tokens)
    error = (run_chain(stack, empty_slots(stack, 1), tokens).logits - logits).norm() / logits.norm()
    # Relative errors of the weights, see test_cpu_packed, grown over seven products a layer.
    assert error < {"fp16": 1e-3, "bf16": 1e-2, "int8": 3e-2, "int4": 0.4}[format]


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["llama", "llama-odd", "qwen3"])
def test_nodes_at_once_equal_nodes_one_by_one_bit_for_bit(kind, format, instruction_set):
    stack = build_pair(kind, format).stack
    tokens = random_tokens(1, 13)
    slots = empty_slots(stack, 1)
    together = run_chain(stack, slots, tokens, threads=2, instruction_set=instruction_set)
    single = empty_slots(stack, 1)
    for i in range(13):
        one = run_chain(
            stack, single, tokens[:, i : i + 1], start=i, threads=1, best=True, instruction_set=instruction_set
        )
        assert torch.equal(one.logits[0, 0], together.logits[0, i])
        assert torch.equal(one.best, one.logits.argmax(-1))
    assert torch.equal(slots[:, :, :13], single[:, :, :13])


@pytest.mark.parametrize("instruction_set", SETS)
def test_many_nodes_equal_few_over_a_long_cache_bit_for_bit(instruction_set):
    # 500 nodes over 1000 slots are too many for threads to share blocks of the cache; 50 are not.
    stack, n = build_pair("mistral").stack, 1000
    tokens, states = random_tokens(1, n), []
    for size in (500, 50):
        slots = empty_slots(stack, 1, capacity=n)
        parts = [
            run_chain(stack, slots, tokens[:, begin : begin + size], begin, states=True, logits=False,
                      instruction_set=instruction_set).states
            for begin in range(0, n, size)
        ]  # fmt: skip
        states.append(torch.cat(parts, 1))
    assert states[0].isfinite().all()
    assert torch.equal(*states)


@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_of_ragged_rows_equals_its_rows_alone(format):
    stack = build_pair("llama", format).stack
    prompts, tokens = random_tokens(3, 12, seed=2), random_tokens(3, 5, seed=3)
    length = torch.tensor([4, 12, 7])
    slots = empty_slots(stack, 3)
    run_chain(stack, slots, prompts, logits=False)
    # What lies past a row's length is scratch, and must not be looked at.
    for row in range(3):
        slots[:, row, length[row] :] = float("nan")
    places = length[:, None] + torch.arange(5)
    result = stack_forward(stack, slots, tokens, places, places, length, 17)
    for row in range(3):
        alone = empty_slots(stack, 1)
        run_chain(stack, alone, prompts[row : row + 1, : length[row]], logits=False)
        expected = run_chain(stack, alone, tokens[row : row + 1], start=int(length[row]))
        assert torch.equal(result.logits[row], expected.logits[0])


TREE = [-1, 0, 0, 1, 2, 2, 4]


def tree_mask(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


@pytest.mark.parametrize("format", FORMATS)
def test_a_tree_equals_its_paths_bit_for_bit(format):
    stack = build_pair("llama", format).stack
    prompt, tokens = random_tokens(1, 6, seed=4), random_tokens(1, len(TREE), seed=5)
    mask = tree_mask(TREE)
    depth = mask.sum(1) - 1
    slots = empty_slots(stack, 1)
    run_chain(stack, slots, prompt, logits=False)
    places = 6 + torch.arange(len(TREE))[None]
    start = torch.tensor([6])
    result = stack_forward(stack, slots, tokens, 6 + depth[None], places, start, 6 + len(TREE), mask[None], start)
    for node in range(len(TREE)):
        path = mask[node].nonzero()[:, 0]
        alone = empty_slots(stack, 1)
        run_chain(stack, alone, prompt, logits=False)
        expected = run_chain(stack, alone, tokens[:, path], start=6)
        assert torch.equal(result.logits[0, node], expected.logits[0, -1])


def test_the_mask_may_cover_all_slots_or_the_last_ones():
    stack = build_pair("llama").stack
    prompt, tokens = random_tokens(2, 6, seed=4), random_tokens(2, len(TREE), seed=5)
    slots = empty_slots(stack, 2)
    run_chain(stack, slots, prompt, logits=False)
    mask = tree_mask(TREE).expand(2, -1, -1)
    length, extent = torch.tensor([6, 6]), 6 + len(TREE)
    places = (6 + torch.arange(len(TREE))).expand(2, -1)
    narrow = stack_forward(stack, slots, tokens, places, places, length, extent, mask, length)
    wide = torch.cat([torch.ones(2, len(TREE), 6, dtype=torch.bool), mask], 2)
    assert torch.equal(stack_forward(stack, slots, tokens, places, places, length, extent, wide).logits, narrow.logits)


def test_a_tree_equals_the_torch_decoder():
    _, decoder, stack = build_pair("llama")
    prompt, tokens = random_tokens(2, 6, seed=4), random_tokens(2, len(TREE), seed=5)
    mask = tree_mask(TREE).expand(2, -1, -1)
    depth = mask.sum(2) - 1
    _, _, cache = decoder.forward(decoder.init_cache(2, CAPACITY), prompt, logits=False)
    expected, _, _ = decoder.forward(cache, tokens, depth, mask)
    slots = empty_slots(stack, 2)
    run_chain(stack, slots, prompt, logits=False)
    length = torch.tensor([6, 6])
    places = (6 + torch.arange(len(TREE))).expand(2, -1)
    result = stack_forward(stack, slots, tokens, 6 + depth, places, length, 6 + len(TREE), mask, length)
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)


def test_the_first_layers_alone_are_the_early_exit():
    _, decoder, stack = build_pair("llama")
    tokens = random_tokens(1, 5)
    first = decoder.early_exit(2)
    expected, _, _ = first.forward(first.init_cache(1, CAPACITY), tokens)
    result = run_chain(stack, empty_slots(stack, 1), tokens, num_layers=2)
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)


def test_embedded_tokens_may_be_given():
    stack = build_pair("llama").stack
    tokens = random_tokens(2, 3)
    from_tokens = run_chain(stack, empty_slots(stack, 2), tokens)
    table = random_weights(config_of("llama"))["model.embed_tokens.weight"]
    places = torch.arange(3).expand(2, 3)
    given = stack_forward(
        stack, empty_slots(stack, 2), table[tokens], places, places, torch.zeros(2, dtype=torch.int64), 3
    )
    assert torch.equal(given.logits, from_tokens.logits)


def test_argmax_takes_the_lowest_id_of_equals_and_shows_nan():
    spec, _, stack = build_pair("llama-odd")
    hidden = torch.zeros(1, 2, spec.hidden)
    hidden[0, 1] = float("nan")
    options = {"num_layers": 0, "best": True, "logits": False}
    places = torch.arange(2)[None]
    result = stack_forward(
        stack, empty_slots(stack, 1), hidden, places, places, torch.zeros(1, dtype=torch.int64), 2, **options
    )
    assert result.logits is None
    assert result.best.tolist() == [[0, 0]]
    assert result.best_value[0, 0] == 0.0
    assert result.best_value[0, 1].isnan()


def test_many_rows_are_looped_over():
    stack = build_pair("llama", "int8").stack
    tokens = random_tokens(1, 150)
    long = run_chain(stack, empty_slots(stack, 1, 200), tokens, threads=2)
    halves = empty_slots(stack, 1, 200)
    first = run_chain(stack, halves, tokens[:, :70])
    second = run_chain(stack, halves, tokens[:, 70:], start=70)
    assert torch.equal(torch.cat([first.logits, second.logits], 1), long.logits)


def test_more_threads_than_cores_and_callers_at_once_change_nothing():
    stack = build_pair("llama", "int4").stack
    tokens = random_tokens(1, 7)
    expected = run_chain(stack, empty_slots(stack, 1), tokens, threads=1).logits
    results = []

    def call(threads):
        results.extend(run_chain(stack, empty_slots(stack, 1), tokens, threads=threads).logits for _ in range(5))

    callers = [threading.Thread(target=call, args=(threads,)) for threads in (2, 5, 3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 15
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    stack = build_pair("llama").stack
    tokens = random_tokens(1, 7)
    expected = run_chain(stack, empty_slots(stack, 1), tokens, threads=2).logits
    child = os.fork()
    if child == 0:
        same = torch.equal(run_chain(stack, empty_slots(stack, 1), tokens, threads=2).logits, expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "llama-odd"])
def test_what_a_forward_spends_is_its_time_and_changes_no_bit(kind, threads):
    stack = build_pair(kind, "int8").stack
    tokens = random_tokens(1, 6)
    spent = torch.zeros(threads, len(library.WORKS), dtype=torch.int64)
    expected = run_chain(stack, empty_slots(stack, 1), tokens, threads=threads).logits
    begin = time.perf_counter_ns()
    found = run_chain(stack, empty_slots(stack, 1), tokens, threads=threads, spent=spent).logits
    passed = time.perf_counter_ns() - begin
    assert torch.equal(found, expected)
    # A thread that came late may have found all its work done.
    assert spent[0].sum() > 0
    assert (spent.sum(1) <= passed).all()
    works = [work for work in library.WORKS if threads > 1 or work != "wait"]
    assert all(spent[:, library.WORKS.index(work)].sum() > 0 for work in works)


def test_what_lies_outside_memory_raises():
    stack = build_pair("llama").stack
    slots, tokens = empty_slots(stack, 1), random_tokens(1, 3)
    with pytest.raises(IndexError, match="vocabulary"):
        run_chain(stack, slots, tokens + SIZES["vocab_size"])
    with pytest.raises(IndexError, match="slot"):
        run_chain(stack, slots, tokens, start=CAPACITY - 1)
    with pytest.raises(ValueError, match="slots is"):
        run_chain(stack, slots.double(), tokens)
    with pytest.raises(ValueError, match="contiguous"):
        run_chain(stack, slots.expand(-1, 2, -1, -1, -1), tokens.expand(2, -1))
    with pytest.raises(ValueError, match="groups of slots"):
        run_chain(stack, slots[:4], tokens)
    with pytest.raises(ValueError, match="spent is"):
        run_chain(stack, slots, tokens, threads=2, spent=torch.zeros(1, len(library.WORKS), dtype=torch.int64))


def test_architectures_it_does_not_compute_are_refused():
    spec = build_pair("llama").spec
    from dataclasses import replace

    assert refuse_spec(spec) is None
    assert "silu, not gelu" in refuse_spec(replace(spec, activation="gelu"))
    assert "RMSNorm" in refuse_spec(replace(spec, rms=False))
    assert "rotary" in refuse_spec(replace(spec, rotary=None))
