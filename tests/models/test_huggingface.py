"""What only the Hugging Face adapter promises: windows, models the decoder does not know, and clear refusals."""

import pytest
import torch

from specdec import cache as kv
from specdec import tree
from specdec.models.huggingface import build_huggingface

TEXT = torch.tensor([[7, 3, 55, 21, 9, 40, 12], [30, 2, 2, 8, 60, 17, 5]])
NODES = torch.tensor([[13, 4, 5, 50, 51, 6, 7], [14, 24, 34, 44, 54, 3, 2]])
# Wide, then deep: the slots of the last nodes run ahead of their positions.
PARENTS = torch.tensor([-1, 0, 0, 0, 3, 4, 5])
PATHS = ([0], [0, 1], [0, 2], [0, 3], [0, 3, 4], [0, 3, 4, 5], [0, 3, 4, 5, 6])
BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}


def assert_trees_equal_plain_forwards(module, model):
    """Ragged rows and a tree, scored in two windows, that is deeper than the sliding windows used here."""
    lengths = [7, 4]
    _, _, cache = model.forward(model.init_cache(2, 16), TEXT, logits=False)
    cache = kv.truncate(cache, torch.tensor(lengths))
    visible = tree.ancestors(PARENTS.expand(2, -1))
    depth = tree.depths(visible)
    first, _, cache = model.forward(cache, NODES[:, :3], depth[:, :3], visible[:, :3, :3])
    rest, _, _ = model.forward(cache, NODES[:, 3:], depth[:, 3:] - 3, visible[:, 3:])
    logits = torch.cat([first, rest], 1)
    for row, length in enumerate(lengths):
        for path in PATHS:
            with torch.no_grad():
                text = torch.cat([TEXT[row, :length], NODES[row, path]])
                expected = module(input_ids=text[None], use_cache=False).logits[0, -1]
            assert (logits[row, path[-1]] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("gemma2", {"sliding_window": 3, "head_dim": 8}),
        ("phi3", {}),
    ],
)
def test_windows_and_foreign_architectures_equal_plain_forwards(new_module, grouped_sizes, kind, options):
    module = new_module(kind, **{**grouped_sizes, **options})
    assert_trees_equal_plain_forwards(module, build_huggingface(module, name=kind))


def test_opt_350m_is_served_though_the_decoder_refuses_it(new_module):
    module = new_module(
        "opt", vocab_size=61, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=48, do_layer_norm_before=False, word_embed_proj_dim=16,
    )  # fmt: skip
    assert_trees_equal_plain_forwards(module, build_huggingface(module, name="opt"))


def test_a_node_that_sees_nothing_harms_nobody_in_eager_attention(new_module, grouped_sizes):
    module = new_module("llama", **grouped_sizes)
    module.set_attn_implementation("eager")
    model = build_huggingface(module, name="llama")
    visible = tree.ancestors(PARENTS.expand(2, -1))
    depth, visible = tree.depths(visible), visible.clone()
    visible[:, 1] = False
    logits, _, cache = model.forward(model.init_cache(2, 16), NODES, depth, visible)
    with torch.no_grad():
        expected = module(input_ids=NODES[:, PATHS[-1]]).logits[:, -1]
    assert (logits[:, 6] - expected).abs().max() < 1e-4
    assert all(slots.isfinite().all() for slots in cache.store.slots)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_served(new_module, grouped_sizes, dtype):
    module = new_module("llama", dtype=dtype, **grouped_sizes)
    model = build_huggingface(module, name="llama")
    logits, _, cache = model.forward(model.init_cache(2, 8), TEXT)
    with torch.no_grad():
        expected = module(input_ids=TEXT).logits
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert cache.store.slots[0].dtype == model.dtype == dtype
    assert (logits - expected).abs().max() < (1e-10 if dtype == torch.float64 else 0.3)


def test_the_bundle_describes_the_model(make_tiny):
    model = build_huggingface(make_tiny("gpt2"), name="tiny")
    assert (model.adapter, model.name, model.num_layers) == ("huggingface", "tiny", 3)
    assert (model.vocab_size, model.max_length, model.early_exit) == (61, 48, None)
    assert model.about["class"] == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("mamba", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "no key-value cache"),
        ("bloom", BLOOM, "position and a mask"),
        ("gpt_neo", {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 3,
                     "attention_types": [[["global", "local"], 1]]}, "tree differ from plain forwards"),
        ("falcon", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "alibi": True}, "trial forward failed"),
    ],
)  # fmt: skip
def test_models_it_cannot_run_are_refused_when_built(new_module, kind, options, reason):
    with pytest.raises(ValueError, match=reason):
        build_huggingface(new_module(kind, **options), name=kind)


def test_keys_and_values_of_different_shape_are_refused(new_module, grouped_sizes):
    module = new_module(
        "deepseek_v3",
        **{**grouped_sizes, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        n_group=1, topk_group=1, first_k_dense_replace=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="keys and values differ in shape"):
        build_huggingface(module, name="mla")


def test_hybrid_layers_are_named(new_module, grouped_sizes):
    module = new_module("lfm2", **grouped_sizes, layer_types=["conv", "full_attention", "conv"])
    with pytest.raises(ValueError, match="its layers include conv"):
        build_huggingface(module, name="lfm2")


def test_a_model_in_training_mode_is_refused(new_module, grouped_sizes):
    module = new_module("llama", **grouped_sizes).train()
    with pytest.raises(ValueError, match="training mode"):
        build_huggingface(module, name="llama")


def test_attention_that_takes_no_mask_is_refused(new_module, grouped_sizes):
    module = new_module("llama", **grouped_sizes)
    module.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="load it with attn_implementation='sdpa'"):
        build_huggingface(module, name="llama")
