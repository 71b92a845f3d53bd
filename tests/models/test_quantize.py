"""`quantize`: a folder with packed weights that loads as the model it was made from."""

import json
import os
import subprocess
import sys

import pytest
import torch

from specdec.models import store
from specdec.models.loading import load
from specdec.models.quantize import FORMATS, quantize
from specdec.models.report import ModelError
from specdec_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.available() is not None, reason=f"the CPU kernels: {library.available()}")
TOKENS = torch.tensor([[3, 4, 5, 250, 6, 3]])


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def logits_of(loaded, tokens=TOKENS):
    return loaded.model.forward(loaded.model.init_cache(1, tokens.shape[1]), tokens)[0]


def refusal(*arguments, **options):
    with pytest.raises(ModelError) as caught:
        quantize(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_the_folder_is_the_model_quantized_while_loading(make_folder, tmp_path, format, tied):
    source = str(make_folder("llama", tie_word_embeddings=tied, attention_bias=True))
    folder = quantize(source, format, tmp_path / "packed")
    loaded, expected = load(str(folder), device="cpu"), load(source, device="cpu", quantize=format)
    assert loaded.model.about["weights"] == format
    assert torch.equal(logits_of(loaded), logits_of(expected))
    assert (loaded.eos_ids, loaded.name) == (expected.eos_ids, "packed")
    assert loaded.tokenizer("Grüße 1")["input_ids"] == expected.tokenizer("Grüße 1")["input_ids"]
    exit_of = [loaded.model.early_exit(1), expected.model.early_exit(1)]
    assert torch.equal(*(model.forward(model.init_cache(1, 6), TOKENS)[0] for model in exit_of))


def test_the_folder_records_what_it_was_made_of_and_is_made_once(make_folder, tmp_path, home):
    source = str(make_folder("llama"))
    folder = quantize(source, "int8")
    assert folder == home / "packed" / "llama-257-int8"
    marker = json.loads((folder / store.MARKER).read_text())
    assert marker["source"] | {"sha256": 0} == {
        "model": source, "sha256": 0, "weights": "int8", "calibrated": False, "bytes": marker["source"]["bytes"],
    }  # fmt: skip
    assert marker["files"]["packed.safetensors"]["bytes"] >= marker["source"]["bytes"]
    made = (folder / "packed.safetensors").stat().st_mtime_ns
    assert quantize(source, "int8") == folder
    assert (folder / "packed.safetensors").stat().st_mtime_ns == made
    assert load("packed/llama-257-int8", device="cpu").model.about["weights"] == "int8"
    [entry] = [entry for entry in store.list_models() if entry.name.startswith("packed/")]
    assert (entry.present, entry.source) == (True, f"quantized to int8 from {source}")
    store.remove(entry.name)
    assert not folder.exists()


def test_an_interrupted_run_leaves_nothing(make_folder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    source = str(make_folder("llama"))
    monkeypatch.setattr("specdec.models.quantize._copy_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, "int4", tmp_path / "out")
    assert not [path for path in tmp_path.glob("*out*") if path.suffix != ".lock"]


def test_what_cannot_be_quantized_is_refused(make_folder, tmp_path):
    source = str(make_folder("llama"))
    assert "format 'int3' is not one of fp16" in refusal(source, "int3")
    assert "calibration decides nothing in int8" in refusal(source, "int8", calibrate=True)
    assert "neither an existing path" in refusal("no such model", "int8")
    assert "cannot be packed into a folder: the CPU stack runs" in refusal(str(make_folder("gpt2")), "int8")
    packed = str(quantize(source, "int8", tmp_path / "packed"))
    assert "is packed already" in refusal(packed, "int4")
    assert "holds something else" in refusal(source, "int4", tmp_path / "packed")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "holds something else" in refusal(source, "int4", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "is packed in int8, not int4"),
        ({"dtype": "bfloat16"}, "which compute in float32 on a CPU"),
        ({"adapter": "huggingface"}, "which compute in float32 on a CPU"),
    ],
)
def test_a_packed_folder_is_run_as_it_is_or_not_at_all(make_folder, tmp_path, options, message):
    folder = quantize(str(make_folder("llama")), "int8", tmp_path / "packed")
    with pytest.raises(ModelError, match=message):
        load(str(folder), **{"device": "cpu", **options})


def damaged(folder, change):
    """The folder with its weights changed and its marker made to agree, as a disk that lies would have it."""
    path = folder / "packed.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    marker = json.loads((folder / store.MARKER).read_text())
    marker["files"][path.name]["bytes"] = path.stat().st_size
    (folder / store.MARKER).write_text(json.dumps(marker))


def about(header):
    return json.loads(header["__metadata__"]["specdec"])


def set_about(header, **values):
    header["__metadata__"]["specdec"] = json.dumps(about(header) | values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("layers.1.down.data"), "layers.1.down has no data"),
        (lambda header: header.pop("final_norm"), "final_norm is None where"),
        (lambda header: header["head.data"]["data_offsets"].reverse(), "head.data does not lie in the file"),
        (lambda header: header["head.data"].update(data_offsets=[0, 1 << 40]), "head.data does not lie in the file"),
        (lambda header: header.pop("__metadata__"), "was not written by specdec"),
        (lambda header: set_about(header, layout=0), "was written by another version"),
        (
            lambda header: set_about(header, matrices=about(header)["matrices"] | {"head": ["int8", 999, 32]}),
            "a int8 matrix of 999 by 32",
        ),
    ],
)
def test_a_damaged_folder_is_refused(make_folder, tmp_path, change, message):
    folder = quantize(str(make_folder("llama")), "int8", tmp_path / "packed")
    damaged(folder, change)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def outdated(folder):
    """The folder as a version with another layout left it: its marker names none."""
    marker = json.loads((folder / store.MARKER).read_text())
    del marker["layout"]
    (folder / store.MARKER).write_text(json.dumps(marker))


def test_a_folder_of_another_layout_is_refused(make_folder, tmp_path):
    source = str(make_folder("llama"))
    folder = quantize(source, "int8", tmp_path / "packed")
    outdated(folder)
    with pytest.raises(ModelError, match="packed by another version of specdec"):
        load(str(folder), device="cpu")
    assert "packed by another version of specdec; remove it" in refusal(source, "int8", folder)


def test_a_truncated_folder_is_refused(make_folder, tmp_path):
    folder = quantize(str(make_folder("llama")), "int8", tmp_path / "packed")
    os.truncate(folder / "packed.safetensors", 5000)
    with pytest.raises(ModelError, match="has 5000 bytes instead of"):
        load(str(folder), device="cpu")


def test_another_architecture_in_the_configuration_is_refused(make_folder, tmp_path):
    folder = quantize(str(make_folder("llama")), "int8", tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    content = json.dumps(config | {"vocab_size": 300}, indent=2) + "\n"
    assert len(content) == (folder / "config.json").stat().st_size
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match="head is \\(257, 32\\) where the configuration says \\(300, 32\\)"):
        load(str(folder), device="cpu")


def test_calibration_weighs_channels_by_their_inputs(make_folder, tmp_path, monkeypatch):
    from specdec.models import calibration

    folder = make_folder("llama")
    monkeypatch.setattr(calibration, "_WINDOW", 16)
    measured = calibration.measure_importance(folder, tokens=48)
    assert measured.keys() == {f"layers.{i}.{name}" for i in range(2) for name in ("qkv", "out", "gate", "up", "down")}
    # RMSNorm with unit weights: the mean square over channels is one.
    assert all(abs(float(measured[f"layers.{i}.qkv"].mean()) - 1) < 1e-2 for i in range(2))
    monkeypatch.setattr(calibration, "measure_importance", lambda _: measured)
    plain = load(str(quantize(str(folder), "int4")), device="cpu")
    weighed = load(str(quantize(str(folder), "int4", calibrate=True)), device="cpu")
    assert weighed.path.name == "llama-257-int4-calibrated"
    assert not torch.equal(logits_of(plain), logits_of(weighed))


@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_loading_takes_no_more_memory_than_the_weights(make_folder, tmp_path, format):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "tie_word_embeddings": True}
    folder = make_folder("llama", **sizes)
    if format == "int8":
        folder = quantize(str(folder), "int8", tmp_path / "packed")
    # In both a first model brings in all code, so that the second adds only itself.
    code = (
        "import sys\n"
        "from specdec.models.loading import load\n"
        "from specdec_kernels.memory import memory\n"
        "load(sys.argv[2], device='cpu')\n"
        "before = memory()['rss_peak']\n"
        "model = load(sys.argv[1], device='cpu').model\n"
        "print(memory()['rss_peak'] - before, model.about['weight_bytes'] / 2**20)\n"
    )
    small = make_folder("llama", vocab_size=260)
    if format == "int8":
        small = quantize(str(small), "int8", tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(small)], check=True, capture_output=True, text=True
    )
    grown, size = map(float, done.stdout.split())
    assert size > 40
    assert 0.9 * size < grown < 1.3 * size


def test_the_built_in_model_keeps_its_weights_in_int4(smollm2):
    from specdec.models.weights import Weights
    from specdec_kernels.cpu.packed import pack, unpack

    weights = Weights(smollm2.path)
    for name in ("model.layers.7.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight"):
        assert torch.equal(unpack(pack(weights[name], None, "int4")), weights[name])
