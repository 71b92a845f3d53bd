import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.models import store
from specdec.models.loading import choose_device, choose_dtype, load
from specdec.models.report import ModelError
from specdec.models.weights import Weights

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def logits_of(model, tokens):
    window = torch.tensor([tokens])
    return model.forward(model.init_cache(1, 16), window)[0]


def reference(folder, tokens):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return module(torch.tensor([tokens])).logits


# Folders


def test_folder_loads_with_the_decoder_and_says_why(make_folder):
    folder = make_folder("llama")
    loaded = load(str(folder), device="cpu")
    assert (loaded.adapter, loaded.adapter_reason) == ("decoder", "llama is a known architecture")
    assert (loaded.source, loaded.path, loaded.revision, loaded.name) == ("folder", folder, None, folder.name)
    assert (loaded.model.vocab_size, loaded.model.dtype, loaded.model.device.type) == (257, torch.float32, "cpu")
    assert loaded.eos_ids == (256,)
    assert loaded.tokenizer.decode(loaded.tokenizer("Grüße 1")["input_ids"]) == "Grüße 1"
    torch.testing.assert_close(logits_of(loaded.model, [1, 2, 3]), reference(folder, [1, 2, 3]), atol=1e-5, rtol=1e-5)


def test_both_adapters_compute_the_same(make_folder):
    folder = str(make_folder("gpt2"))
    lean, stock = load(folder, device="cpu"), load(folder, adapter="huggingface", device="cpu")
    assert (stock.adapter, stock.adapter_reason) == ("huggingface", "asked for")
    torch.testing.assert_close(
        logits_of(lean.model, [4, 5, 6]), logits_of(stock.model, [4, 5, 6]), atol=1e-5, rtol=1e-5
    )


def test_auto_falls_back_to_transformers_and_says_why_but_a_named_adapter_does_not(make_folder):
    folder = str(make_folder("opt", activation_function="tanh"))
    loaded = load(folder, device="cpu")
    assert loaded.adapter == "huggingface"
    assert loaded.adapter_reason.startswith("the decoder adapter cannot run it: ")
    with pytest.raises(ModelError, match="use adapter auto or huggingface"):
        load(folder, adapter="decoder", device="cpu")


def test_eos_ids_come_from_the_generation_config_and_the_tokenizer(make_folder):
    folder = make_folder("llama", eos_ids=[7, 9])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8]}))
    assert load(str(folder), device="cpu").eos_ids == (9, 8, 256)
    (folder / "generation_config.json").unlink()
    assert load(str(folder), device="cpu").eos_ids == (7, 9, 256)


def test_file_hashes_change_with_the_weights(make_folder):
    loaded = load(str(make_folder("llama")), device="cpu")
    before = loaded.file_hashes()
    assert before.keys() == {"config.json", "model.safetensors"}
    path = loaded.path / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    after = loaded.file_hashes()
    assert after["config.json"] == before["config.json"]
    assert after["model.safetensors"] != before["model.safetensors"]


def test_checkpoints_in_parts_load_and_a_missing_part_is_named(make_folder):
    folder = make_folder("llama")
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: whole[name].clone() for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = logits_of(load(str(folder), device="cpu").model, [1, 2])
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits_of(load(str(folder), device="cpu").model, [1, 2]), expected)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of its 2 weight files \(b\.safetensors\)"):
        load(str(folder), device="cpu")


def test_dtype_is_float32_on_the_cpu_unless_asked_and_the_checkpoints_own_elsewhere(make_folder):
    folder = str(make_folder("llama", dtype="bfloat16"))
    assert load(folder, device="cpu").model.dtype == torch.float32
    assert load(folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert Weights(Path(folder)).dtype == torch.bfloat16
    assert choose_dtype(None, torch.device("cuda")) is None


def test_loading_prints_nothing(make_folder, capfd):
    folder = str(make_folder("llama"))
    capfd.readouterr()
    load(folder, device="cpu")
    load(folder, device="cpu", adapter="huggingface")
    assert capfd.readouterr() == ("", "")


def test_hub_model_is_fetched_without_pickles_or_code_and_pinned(make_folder, monkeypatch):
    import huggingface_hub

    snapshot, asked = make_folder("llama"), {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = load("owner/model@abc", device="cpu")
    assert (loaded.source, loaded.name, loaded.revision) == ("hub", "owner/model@abc", snapshot.name)
    assert (asked["name"], asked["revision"]) == ("owner/model", "abc")
    assert not {"*.bin", "*.py", "*"} & {*asked["allow_patterns"]}


# Refusals


def refusal(name, **options):
    with pytest.raises(ModelError) as caught:
        load(str(name), **{"device": "cpu", **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_path_that_does_not_exist_is_named(tmp_path):
    assert f"there is no file or folder {tmp_path / 'no'}" in refusal(tmp_path / "no")
    assert "there is no file or folder model.gguf" in refusal("model.gguf")


def test_near_miss_of_a_built_in_name_is_suggested():
    assert "did you mean 'smollm2-135m'" in refusal("smollm2_135m")


def test_hub_that_cannot_be_reached_names_the_alternatives(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("no-such-owner/no-such-model")
    assert "the hub cannot be reached" in message
    assert "a local model folder, a .gguf file, or a built-in model (smollm2-135m)" in message


def test_folder_without_a_model_is_refused(tmp_path):
    assert "has no config.json" in refusal(tmp_path)


def test_damaged_config_is_refused(make_folder):
    folder = make_folder("llama")
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(folder)


def test_unknown_model_type_is_refused(make_folder):
    folder = make_folder("llama")
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    assert "does not describe a model that transformers knows" in refusal(folder)


def test_truncated_safetensors_are_refused(make_folder):
    folder = make_folder("llama")
    os.truncate(folder / "model.safetensors", 5000)
    assert "not a readable safetensors file" in refusal(folder)


def test_pickled_weights_are_refused_with_the_remedy(make_folder):
    folder = make_folder("llama")
    (folder / "model.safetensors").unlink()
    pickled = folder / "pytorch_model.bin"
    pickled.write_bytes(b"cos\nsystem\n")
    for name in (folder, pickled):
        message = refusal(name)
        assert "can run code" in message
        assert "save_pretrained" in message


def test_folder_of_gguf_files_asks_for_one(make_folder):
    folder = make_folder("llama")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    assert f"name the one to load, such as {folder / 'model.gguf'}" in refusal(folder)


def test_code_of_a_model_is_not_run_unless_asked_for(make_folder):
    folder = make_folder("llama")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    assert "trust_remote_code" in refusal(folder)
    assert not (folder / "ran").exists()


def test_folder_without_a_tokenizer_is_refused(make_folder):
    folder = make_folder("llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "put the model's tokenizer.json" in refusal(folder)


def test_unsupported_choices_are_refused_before_anything_is_read():
    assert "dtype 'int3' is not supported; use one of float64, float32" in refusal("x", dtype="int3")
    assert "device 'tpu9'" in refusal("x", device="tpu9")
    assert "device 'meta' is not supported" in refusal("x", device="meta")
    for device in ("cuda:99", "cuda:256", "cuda:999"):
        assert f"device '{device}' is not available" in refusal("x", device=device)
    assert "adapter 'vllm' is not one of" in refusal("x", adapter="vllm")
    with pytest.raises(ModelError, match="does not exist on mps"):
        choose_dtype("float64", torch.device("mps"))


def test_auto_device_prefers_mps_then_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for mps, cuda, expected in [(True, True, "mps"), (False, True, "cuda"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert choose_device("auto").type == expected


# GGUF files


def interleave(weight, heads):
    """Llama's rows as GGUF keeps them: the halves that rotate together become neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_sentencepiece(writer):
    """A vocabulary as Llama 2 has it: 256 bytes and one merge, `▁a` and `b`."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1e3, -1e3, -1e3, -1.0, -2.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_tokenizer(writer, folder, pre, merges):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    # One byte gives way to the token that the one merge makes.
    writer.add_token_list([*tokens[:255], "ab", "<end>"])
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(256)
    writer.add_chat_template("{{ messages[0]['content'] }}<end>")


def write_config(writer, config):
    writer.add_context_length(config.get("max_position_embeddings", 64))
    writer.add_embedding_length(config.get("hidden_size", 32))
    writer.add_block_count(2)
    writer.add_head_count(4)
    if config["model_type"] == "gpt2":
        writer.add_feed_forward_length(128)
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(2)
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)


def write_gguf(path, folder, *, pre="gpt-2", merges=("a b",), factors=None, extra=None, types=None):
    """The model in `folder` (llama or gpt2) as a GGUF file, float32 except for the matrix whose name is returned.
    `types(name)`: instead, the GGUF type of each matrix whose rows fill blocks, or `None` for float32."""
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize

    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    writer = GGUFWriter(path, kind)
    write_config(writer, config)
    if pre is None:
        write_sentencepiece(writer)
    else:
        write_tokenizer(writer, folder, pre, merges)
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], 2)
    quantized = "model.layers.0.mlp.up_proj.weight" if kind == "llama" else "transformer.h.0.mlp.c_fc.weight"
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, 4 if "q_proj" in name else 2)
        if kind == "gpt2" and array.ndim == 2 and ".h." in name:
            array = np.ascontiguousarray(array.T)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        chosen = ("Q8_0" if name == quantized else None) if types is None else types(name)
        if chosen is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind_of_blocks = GGMLQuantizationType[chosen]
            writer.add_tensor(theirs, quantize(array, kind_of_blocks), raw_dtype=kind_of_blocks)
        else:
            writer.add_tensor(theirs, array)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    if extra is not None:
        writer.add_tensor(extra, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantized


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gguf_file_becomes_the_model_it_was_made_from(make_folder, tmp_path, home, kind):
    folder = make_folder(kind, **({"tie_word_embeddings": True} if kind == "llama" else {}))
    quantized = write_gguf(tmp_path / "m.gguf", folder)
    loaded = load(str(tmp_path / "m.gguf"), device="cpu")
    assert (loaded.source, loaded.adapter, loaded.eos_ids) == ("gguf", "decoder", (256,))
    assert loaded.revision == f"sha256:{store.sha256(tmp_path / 'm.gguf')}"
    original, converted = load_file(folder / "model.safetensors"), load_file(loaded.path / "model.safetensors")
    assert converted.keys() == original.keys()
    for name, tensor in original.items():
        if name == quantized:
            torch.testing.assert_close(converted[name], tensor, atol=1e-3, rtol=0.0)
        else:
            assert torch.equal(converted[name], tensor), name
    torch.testing.assert_close(
        logits_of(loaded.model, [3, 4, 5]), reference(loaded.path, [3, 4, 5]), atol=1e-5, rtol=1e-5
    )
    assert loaded.tokenizer.apply_chat_template(QUESTION, tokenize=False).endswith("France?<end>")
    assert loaded.tokenizer.tokenize("cab<end>") == ["c", "ab", "<end>"]


def mixed_types(name):
    """As files in the wild mix them: the embedding finer than the layers, one matrix of a stack of another type."""
    return {"model.embed_tokens.weight": "Q8_0", "model.layers.1.self_attn.v_proj.weight": "Q5_0"}.get(name, "Q4_1")


@pytest.mark.parametrize(
    ("types", "format", "exact"),
    [
        (lambda name: "Q8_0", "int8", True),
        (lambda name: "Q4_0", "int4", True),
        (lambda name: "Q4_1", "int4", True),
        # The stack with the Q5_0 matrix is rounded again, the others are not.
        (mixed_types, "int4", False),
    ],
)
def test_gguf_blocks_are_repacked_without_a_float32_model(make_folder, tmp_path, home, types, format, exact):
    # 64 channels, so that every matrix has whole blocks.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    write_gguf(tmp_path / "m.gguf", make_folder("llama", **sizes), types=types)
    dequantized = load(str(tmp_path / "m.gguf"), device="cpu")
    loaded = load(str(tmp_path / "m.gguf"), device="cpu", quantize=format)
    assert (loaded.source, loaded.model.about["weights"]) == ("gguf", format)
    assert sorted(path.name for path in loaded.path.glob("*.safetensors")) == ["packed.safetensors"]
    assert loaded.tokenizer.get_vocab() == dequantized.tokenizer.get_vocab()
    assert loaded.eos_ids == dequantized.eos_ids
    tokens = [3, 4, 5, 250, 6]
    expected, found = logits_of(dequantized.model, tokens), logits_of(loaded.model, tokens)
    # Inputs are rounded to 8 bits, weights are the same.
    bound = 0.03 if exact else 0.06
    assert (found - expected).norm() < bound * expected.norm()
    assert f"repacked to {format} from {tmp_path / 'm.gguf'}" in {entry.source for entry in store.list_models()}


def test_gguf_blocks_are_repacked_again_where_the_layout_has_changed(make_folder, tmp_path, home):
    write_gguf(tmp_path / "m.gguf", make_folder("llama", hidden_size=64), types=lambda name: "Q8_0")
    folder = load(str(tmp_path / "m.gguf"), device="cpu", quantize="int8").path
    marker = json.loads((folder / store.MARKER).read_text())
    (folder / store.MARKER).write_text(json.dumps(marker | {"layout": 1}))
    size = marker["files"]["packed.safetensors"]["bytes"]
    (folder / "packed.safetensors").write_bytes(b"what an older version wrote".ljust(size))
    assert load(str(tmp_path / "m.gguf"), device="cpu", quantize="int8").path == folder


def test_gguf_blocks_of_another_format_are_rounded(make_folder, tmp_path, home):
    write_gguf(tmp_path / "m.gguf", make_folder("llama", hidden_size=64), types=lambda name: "Q8_0")
    loaded = load(str(tmp_path / "m.gguf"), device="cpu", quantize="int4")
    assert (loaded.path / "model.safetensors").is_file()
    assert loaded.model.about["weights"] == "int4"


def test_gguf_file_is_converted_once_and_listed_until_removed(make_folder, tmp_path, home, monkeypatch):
    from specdec.models import gguf_weights

    write_gguf(tmp_path / "m.gguf", make_folder("llama"))
    heard = []
    first = load(str(tmp_path / "m.gguf"), device="cpu", progress=lambda *report: heard.append(report[0]))
    assert "dequantizing" in heard
    monkeypatch.setattr(gguf_weights, "convert_gguf", None)
    assert load(str(tmp_path / "m.gguf"), device="cpu").path == first.path
    entry = store.list_models()[-1]
    assert (entry.name, entry.path, entry.present) == (f"gguf/{first.path.name}", first.path, True)
    assert str(tmp_path / "m.gguf") in entry.source
    assert load(entry.name, device="cpu").revision == first.revision
    store.remove(entry.name)
    assert len(store.list_models()) == 1


def test_stretched_rotation_is_recovered_or_refused(make_folder, tmp_path, home):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = make_folder("llama", head_dim=64, max_position_embeddings=16384, rope_parameters=rope)
    plain = 1.0 / 10000.0 ** (np.arange(0, 64, 2) / 64)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), torch.device("cpu"))
    write_gguf(tmp_path / "m.gguf", folder, factors=plain / stretched.numpy())
    loaded = load(str(tmp_path / "m.gguf"), device="cpu")
    assert json.loads((loaded.path / "config.json").read_text())["rope_parameters"] == rope
    write_gguf(tmp_path / "odd.gguf", folder, factors=np.linspace(1, 5, 32))
    assert "stretches its positions in an unknown way" in refusal(tmp_path / "odd.gguf")


def test_sentencepiece_vocabulary_is_read_with_its_start_token(make_folder, tmp_path, home):
    write_gguf(tmp_path / "m.gguf", make_folder("llama", vocab_size=264), pre=None)
    loaded = load(str(tmp_path / "m.gguf"), device="cpu")
    ids = loaded.tokenizer("ab ab")["input_ids"]
    assert loaded.tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ab", "▁ab"]
    assert loaded.eos_ids == (2,)
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "ab ab"


def test_gguf_file_that_is_not_understood_is_refused(make_folder, tmp_path, home):
    folder = make_folder("llama")
    write_gguf(tmp_path / "rule.gguf", folder, pre="somebody-elses")
    assert "splits text by the rule 'somebody-elses'" in refusal(tmp_path / "rule.gguf")
    write_gguf(tmp_path / "merges.gguf", folder, merges=("! !",))
    assert "vocabulary is not consistent" in refusal(tmp_path / "merges.gguf")
    write_gguf(tmp_path / "extra.gguf", folder, extra="blk.0.surprise.weight")
    assert "'blk.0.surprise.weight' has no place" in refusal(tmp_path / "extra.gguf")
    write_gguf(tmp_path / "cut.gguf", folder)
    os.truncate(tmp_path / "cut.gguf", 9000)
    assert "not a readable GGUF file" in refusal(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    assert "not a readable GGUF file" in refusal(tmp_path / "text.gguf")
    assert [entry.name for entry in store.list_models()] == ["smollm2-135m"]


# The built-in model


def test_built_in_model_is_the_instruct_model(smollm2):
    assert (smollm2.name, smollm2.source, smollm2.adapter) == ("smollm2-135m", "built-in", "decoder")
    assert smollm2.model.vocab_size == len(smollm2.tokenizer) == 49152
    assert smollm2.eos_ids == (smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>"),) == (2,)
    assert smollm2.revision.startswith("sha256:bcc81830")


@pytest.mark.parametrize("text", ["Hello world", "  def f(x):\n\treturn x + 12345\n", "Grüße, 日本 🙂", "a  1  b"])
def test_built_in_tokenizer_round_trips_text(smollm2, text):
    assert smollm2.tokenizer.decode(smollm2.tokenizer(text)["input_ids"]) == text


def test_built_in_tokenizer_keeps_every_digit_apart(smollm2):
    assert smollm2.tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_built_in_chat_template_is_chatml_with_the_models_system_prompt(smollm2):
    chat = smollm2.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_built_in_model_answers(smollm2):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(smollm2.path)
    prompt = smollm2.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    answer = module.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert smollm2.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_stored_model_loads_without_what_makes_loading_slow(smollm2):
    code = (
        "import sys\n"
        "from specdec.models.loading import load\n"
        "load('smollm2-135m', device='cpu')\n"
        "slow = {'gguf', 'transformers.modeling_utils', 'transformers.models.llama.configuration_llama'}\n"
        "assert not slow & {*sys.modules}, slow & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
