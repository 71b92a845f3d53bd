"""What only the lean decoder promises: early exit, which checkpoints it takes, and what it says of the others."""

import pytest
import torch

from specdec import cache as kv
from specdec import tree
from specdec.models.decoder import build_decoder, supports
from specdec.models.families import FAMILIES
from specdec.models.fused import OPERATIONS
from specdec_kernels.dispatch import implementations

CPU = torch.device("cpu")
TEXT = torch.tensor([[7, 3, 55, 21, 9, 40, 12], [30, 2, 2, 8, 60, 17, 5]])


def decoder(module, **options):
    settings = {"name": "tiny", "dtype": module.dtype, "device": CPU, **options}
    return build_decoder(module.config, settings.pop("tensors", module.state_dict()), **settings)


def first_layers(module, layers):
    """A transformers model of the first layers with the same embedding, final norm and head."""
    options = {**module.config.to_dict(), "num_hidden_layers": layers}
    if "layer_types" in options:
        options["layer_types"] = options["layer_types"][:layers]
    config = type(module.config).from_dict(options)
    short = type(module)(config).eval()
    missing = short.load_state_dict(module.state_dict(), strict=False).missing_keys
    assert not missing
    return short


@pytest.mark.parametrize("layers", [1, 2])
def test_early_exit_is_the_model_of_the_first_layers(module, layers):
    model, short = decoder(module), first_layers(module, layers)
    early = model.early_exit(layers)
    assert (early.adapter, early.num_layers, early.vocab_size) == ("decoder", layers, model.vocab_size)
    logits, _, _ = early.forward(early.init_cache(2, 8), TEXT)
    with torch.no_grad():
        expected = short(TEXT).logits
    assert (logits - expected).abs().max() < 1e-4


def test_early_exit_runs_over_a_borrowed_cache_and_leaves_it_intact(module):
    model = decoder(module)
    early, short = model.early_exit(2), first_layers(module, 2)
    _, _, cache = model.forward(model.init_cache(2, 16), TEXT[:, :5], logits=False)
    scratch = kv.borrow(cache)
    _, _, scratch = early.forward(scratch, TEXT[:, 5:6])
    logits, _, _ = early.forward(scratch, TEXT[:, 6:])
    with torch.no_grad():
        expected = short(TEXT).logits[:, -1:]
    assert (logits - expected).abs().max() < 1e-4
    logits, _, _ = model.forward(cache, TEXT[:, 5:])
    with torch.no_grad():
        expected = module(TEXT).logits[:, -2:]
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layers", [-1, 0, 3, 4])
def test_early_exit_refuses_layers_it_does_not_have(make_tiny, layers):
    with pytest.raises(ValueError, match="1 to 2 of the 3 layers"):
        decoder(make_tiny("llama")).early_exit(layers)


def test_a_cache_of_fewer_layers_is_refused(make_tiny):
    model = decoder(make_tiny("llama"))
    with pytest.raises(ValueError, match="has 4 groups"):
        model.forward(model.early_exit(2).init_cache(2, 16), TEXT)


def test_the_torch_linears_give_the_same_model(module):
    model = decoder(module, linear="torch")
    assert model.about["linear"] == "torch"
    logits, _, _ = model.forward(model.init_cache(2, 8), TEXT)
    with torch.no_grad():
        assert (logits - module(TEXT).logits).abs().max() < 1e-4


def test_the_model_says_which_linear_runs_and_why(make_tiny):
    about = decoder(make_tiny("llama"), dtype=torch.float64).about
    assert about["linear"] == "torch"
    assert "float32" in about["linear_reason"]


def test_a_linear_that_cannot_run_is_refused(make_tiny):
    with pytest.raises(ValueError, match="float32"):
        decoder(make_tiny("llama"), dtype=torch.bfloat16, linear="onednn")


def test_float64_is_computed_throughout(module):
    model = decoder(module, dtype=torch.float64)
    logits, _, _ = model.forward(model.init_cache(2, 8), TEXT)
    pieces, cache = [], model.init_cache(2, 8)
    for piece in TEXT.split((2, 1, 4), 1):
        part, _, cache = model.forward(cache, piece)
        pieces.append(part)
    assert logits.dtype == torch.float64
    assert (torch.cat(pieces, 1) - logits).abs().max() < 1e-10
    with torch.no_grad():
        assert (logits - module(TEXT).logits).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_close_and_give_float32_logits(module, dtype):
    model = decoder(module, dtype=dtype)
    logits, _, cache = model.forward(model.init_cache(2, 16), TEXT)
    with torch.no_grad():
        expected = module(TEXT).logits
    assert logits.dtype == torch.float32
    assert cache.store.slots[0].dtype == dtype
    # 0.02 in bfloat16 and 0.003 in float16 on average over these models.
    assert (logits - expected).abs().mean() < 0.06 * expected.std()
    single, _, _ = model.forward(cache, TEXT[:, :1])
    assert single.isfinite().all()


def test_a_checkpoint_of_the_bare_backbone_loads(module):
    prefix = f"{module.base_model_prefix}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in module.state_dict().items()}
    model = decoder(module, tensors=tensors)
    logits, _, _ = model.forward(model.init_cache(2, 8), TEXT)
    with torch.no_grad():
        assert (logits - module(TEXT).logits).abs().max() < 1e-4


def test_a_tied_head_may_be_missing(make_tiny):
    module = make_tiny("smollm2")
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name != "lm_head.weight"}
    model = decoder(module, tensors=tensors)
    logits, _, _ = model.forward(model.init_cache(2, 8), TEXT)
    with torch.no_grad():
        assert (logits - module(TEXT).logits).abs().max() < 1e-4


def test_neox_heads_load_under_their_name_on_the_hub(make_tiny):
    module = make_tiny("neox")
    tensors = module.state_dict()
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(1)
    assert decoder(module, tensors=tensors).num_layers == 3


def test_a_missing_tensor_is_named(make_tiny):
    module = make_tiny("llama")
    tensors = module.state_dict()
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias"):
        decoder(module, tensors=tensors)


def test_a_tensor_of_another_shape_is_named(make_tiny):
    module = make_tiny("llama")
    tensors = {**module.state_dict(), "model.norm.weight": torch.ones(31)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[31\] where the configuration says \[32\]"):
        decoder(module, tensors=tensors)


def test_tensors_that_would_change_the_model_are_refused(make_tiny):
    module = make_tiny("llama")
    tensors = {**module.state_dict(), "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    with pytest.raises(ValueError, match="q_norm"):
        decoder(module, tensors=tensors)


def test_every_architecture_is_supported(module):
    assert supports(module.config) is None


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("bloom", {}, "'bloom' is not one of gpt2, gpt_neox, llama"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ("llama", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        ("llama", {"num_key_value_heads": 3}, "evenly"),
        ("llama", {"head_dim": 7}, "need pairs"),
        ("llama", {"rope_parameters": None}, "rope_parameters"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 8192}, "sliding window of 4096"),
        ("qwen2", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, "sliding window of 8"),
        ("gpt2", {"add_cross_attention": True}, "encoder"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled"),
        ("gpt2", {"scale_attn_weights": False}, "scaled"),
        ("opt", {"do_layer_norm_before": False}, "OPT-350M"),
        ("opt", {"word_embed_proj_dim": 16}, "projected from 16"),
        ("opt", {"_remove_final_layer_norm": True}, "no final norm"),
        ("opt", {"layer_norm_elementwise_affine": False}, "no weights"),
        ("gpt_neox", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.1}}, "need pairs"),
    ],
)
def test_unsupported_configurations_come_with_the_reason(kind, changes, reason):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    found = supports(config)
    assert found is not None
    assert reason in found
    if kind in FAMILIES:
        with pytest.raises(ValueError, match="use the Hugging Face adapter"):
            build_decoder(config, {}, name="x", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 40}),
    ],
)
def test_sliding_windows_that_nothing_slides_through_are_supported(kind, changes):
    from transformers import AutoConfig

    assert supports(AutoConfig.for_model(kind, **changes)) is None


# What `specdec.models.fused` runs: the fused forward takes these, and refuses the others.
FUSED = ("llama", "llama-llama3-rope", "llama-linear-rope", "smollm2", "mistral", "qwen2", "qwen3")
PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 2, 3]])


def fused(module, dtype, *names, **changes):
    """The fused forward where it runs by name only, its operations by those of `names` or else by torch."""
    kernels = dict.fromkeys(names, "triton")
    return decoder(module, dtype=dtype, stack="triton", kernels={**kernels, **changes})


@pytest.mark.parametrize("compute", ["torch", "triton"])
@pytest.mark.parametrize("kind", FUSED)
def test_the_fused_forward_is_the_model(make_tiny, kind, compute):
    interpreted(compute)
    module = make_tiny(kind)
    names = ("tree_attention", "rope_write", "rms_norm_residual", "silu_mul") if compute == "triton" else ()
    model = fused(module, torch.float32, *names)
    assert model.about["stack"] == "triton"
    assert model.about["tree_attention"] == compute
    with torch.no_grad():
        expected = module(TEXT).logits
    cache, pieces = model.init_cache(2, 24), []
    for piece in TEXT.split((1, 4, 2), 1):
        logits, _, cache = model.forward(cache, piece)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - expected).abs().max() < 1e-4
    cache = kv.truncate(cache, torch.tensor([7, 3]))
    definition = decoder(module, stack="torch", linear="torch")
    _, _, same = definition.forward(definition.init_cache(2, 24), TEXT, logits=False)
    visible = tree.ancestors(PARENTS.expand(2, -1))
    options = (TEXT.flip(1), tree.depths(visible), visible)
    scored, states, _ = model.forward(cache, *options, features=True)
    expected, wanted, _ = definition.forward(kv.truncate(same, torch.tensor([7, 3])), *options, features=True)
    assert (scored - expected).abs().max() < 1e-4
    assert (states - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_fused_forward_of_a_few_rows_is_close_in_bfloat16(make_tiny, kind):
    interpreted("triton")
    module = make_tiny(kind)
    model = fused(module, torch.bfloat16, *(op for op in OPERATIONS if op not in ("layers", "attend")))
    logits, _, _ = model.forward(model.init_cache(2, 80), TEXT)
    with torch.no_grad():
        expected = module(TEXT).logits
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() < 0.06 * expected.std()
    # Past the rows of `product`, and past the nodes of a bit mask.
    text = torch.arange(34).expand(2, -1) % 61
    plain = decoder(module, dtype=torch.bfloat16, stack="torch", linear="torch")
    for window in (None, torch.ones(2, 34, 34, dtype=torch.bool).tril()):
        long, _, _ = model.forward(model.init_cache(2, 40), text, None, window)
        short, _, _ = plain.forward(plain.init_cache(2, 40), text, None, window)
        assert (long - short).abs().mean() < 0.06 * short.std()


def test_a_tree_wider_than_bit_masks_goes_through_the_dense_mask(make_tiny):
    interpreted("torch")
    module = make_tiny("llama")
    model, definition = fused(module, torch.float32), decoder(module, stack="torch", linear="torch")
    n = 66
    parents = torch.arange(n)[None].sub(1).div(2, rounding_mode="floor")
    visible, text = tree.ancestors(parents), torch.arange(n)[None] % 61
    for window in (None, visible):
        depth = None if window is None else tree.depths(window)
        logits, _, _ = model.forward(model.init_cache(1, n), text, depth, window)
        expected, _, _ = definition.forward(definition.init_cache(1, n), text, depth, window)
        assert (logits - expected).abs().max() < 1e-4


def test_the_fused_forward_refuses_what_it_does_not_run(make_tiny):
    with pytest.raises(ValueError, match="decoder_stack: triton runs pre-norm RMSNorm"):
        decoder(make_tiny("gpt2"), stack="triton")
    interpreted("torch")
    with pytest.raises(ValueError, match="no operation 'attention'; it has layers, product, attend, tree_attention"):
        fused(make_tiny("llama"), torch.float32, attention="torch")
    with pytest.raises(ValueError, match="product: triton is built for float16 and bfloat16, not for float32"):
        fused(make_tiny("llama"), torch.float32, "product")


def interpreted(compute):
    """Skip unless Triton can be had: its interpreter is chosen by the environment before its kernels are defined."""
    if implementations("decoder_stack", CPU, torch.float32)["triton"] is not None:
        pytest.skip(f"{compute}: needs triton and TRITON_INTERPRET=1, set before its kernels are imported")
