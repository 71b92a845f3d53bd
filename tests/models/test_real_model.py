"""A sample of the proof on the real model; the whole of it is `just proof`."""

import dataclasses

import pytest
import torch

from specdec import Sampling, controllers, drafters, output_tokens, policies
from specdec.divergence import first_divergence
from specdec.models.huggingface import build_huggingface
from specdec.models.loading import load
from specdec.state import init_state, prefill
from specdec.step import build_step, decode, iterate

TEXTS = ("Repeat this three times: the quick brown fox jumps over the lazy dog.", "Name three colours of the sky.")
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def reference(smollm2):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def adapters(smollm2, reference):
    return {
        "decoder": smollm2,
        "huggingface": dataclasses.replace(
            smollm2, model=build_huggingface(reference, name="smollm2-135m"), adapter="huggingface"
        ),
    }


@pytest.fixture(scope="module")
def prompts(smollm2):
    return [
        smollm2.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in TEXTS
    ]


@pytest.fixture(scope="module")
def wanted(reference, prompts):
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
            )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def make_drafter(name, model):
    return {
        "none": drafters.none,
        "ngram": drafters.ngram,
        "suffix-tree": lambda: drafters.suffix(nodes=6),
        "early_exit": lambda: drafters.early_exit(model, 4, mode="greedy"),
        "model-tree": lambda: drafters.draft_model(model.early_exit(4), mode="greedy", branching=(2, 2)),
    }[name]()


@pytest.mark.parametrize(
    ("adapter", "drafter"),
    [
        ("decoder", "none"),
        ("decoder", "ngram"),
        ("decoder", "suffix-tree"),
        ("decoder", "early_exit"),
        ("decoder", "model-tree"),
        ("huggingface", "none"),
        ("huggingface", "suffix-tree"),
    ],
)
def test_greedy_output_is_that_of_transformers(adapters, prompts, wanted, adapter, drafter):
    loaded = adapters[adapter]
    state = decode(
        prompts,
        model=loaded.model,
        drafter=make_drafter(drafter, loaded.model),
        policy=policies.greedy(),
        controller=controllers.fixed(3),
        max_new_tokens=NEW_TOKENS,
        eos_ids=loaded.eos_ids,
    )
    for prompt, tokens, theirs in zip(prompts, output_tokens(state), wanted, strict=True):
        parted = first_divergence(loaded.model, prompt, tokens, theirs)
        # Near ties may fall either way in float32; anything wider than that is a bug.
        assert parted is None or (parted.numerics and parted.margin < 1e-3), str(parted)


def test_coupled_output_is_the_same_for_all_drafters_depths_and_batches(smollm2, prompts):
    def run(drafter, k, rows):
        state = decode(
            [prompts[row] for row in rows],
            model=smollm2.model,
            drafter=drafter,
            policy=policies.coupled(),
            controller=controllers.fixed(k),
            max_new_tokens=NEW_TOKENS,
            sampling=Sampling(temperature=0.8),
            eos_ids=smollm2.eos_ids,
            seed=[50 + row for row in rows],
        )
        return output_tokens(state)

    plain = [run(drafters.none(), 0, [row])[0] for row in range(2)]
    assert run(drafters.ngram(), 5, [0, 1]) == plain
    assert run(drafters.suffix(), 2, [1])[0] == plain[1]
    assert run(drafters.early_exit(smollm2.model, 4, mode="coupled"), 3, [0, 1]) == plain


@pytest.mark.parametrize("adapter", ["decoder", "huggingface"])
@pytest.mark.parametrize("drafter", ["ngram", "suffix-tree"])
def test_after_every_round_the_cache_equals_a_fresh_prefill(adapters, prompts, adapter, drafter):
    model = adapters[adapter].model
    parts = {"model": model, "drafter": make_drafter(drafter, model), "controller": controllers.fixed(3)}
    step = build_step(policy=policies.greedy(), **parts)
    state = init_state(prompts[:1], max_new_tokens=8, **parts)
    for state, _ in iterate(step, state):  # noqa: B020 (the state is what the loop is about)
        length = state.length - 1
        fresh, _ = prefill(model, state.tokens, length, int(length) + 1)
        for ours, theirs in zip(state.cache.store.slots, fresh.store.slots, strict=True):
            kept = slice(0, int(length))
            assert torch.allclose(ours[:, :, kept], theirs[:, :, kept], rtol=1e-3, atol=1e-3)


def test_loading_twice_gives_one_model(smollm2):
    again = load("smollm2-135m", device="cpu")
    assert again.file_hashes() == smollm2.file_hashes()
