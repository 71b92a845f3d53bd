"""Linear layers of models that no fused stack runs: which implementation, and quantized ones."""

import pytest
import torch

from specdec.models.decoder import build_decoder
from specdec.models.families import FAMILIES
from specdec.models.products import fastest, shapes_of
from specdec.models.report import ModelError
from specdec_kernels.cpu import library
from specdec_kernels.dispatch import Choice
from specdec_kernels.linear import Timing

CPU = torch.device("cpu")
TEXT = torch.tensor([[7, 3, 55, 21, 9, 40, 12]])
needs_kernels = pytest.mark.skipif(library.available() is not None, reason=f"CPU kernels: {library.available()}")


def decoder(module, **options):
    settings = {"name": "tiny", "dtype": torch.float32, "device": CPU, **options}
    return build_decoder(module.config, module.state_dict(), **settings)


def logits_of(model):
    return model.forward(model.init_cache(1, TEXT.shape[1]), TEXT)[0]


def timing(seconds, alone=True):
    return Timing({1: [seconds], 4: [seconds]}, alone)


@pytest.mark.parametrize(
    ("timings", "expected"),
    [
        (
            {"cpu": timing(2.0), "onednn": timing(3.0)},
            Choice("cpu", "measured fastest", (("onednn", "takes 1.50 times as long as cpu"),)),
        ),
        (
            {"cpu": timing(2.0), "onednn": timing(1.0, alone=False)},
            Choice(
                "cpu",
                "measured fastest of those whose rows stand alone",
                (("onednn", "gives a row other bits in other company"),),
            ),
        ),
        (
            {"onednn": timing(1.0, alone=False), "torch": timing(4.0, alone=False)},
            Choice("onednn", "measured fastest", (("torch", "takes 4.00 times as long as onednn"),)),
        ),
    ],
)
def test_the_fastest_whose_rows_stand_alone_is_chosen(timings, expected):
    assert fastest(timings) == expected


@pytest.mark.parametrize("kind", ["gpt2", "opt", "neox"])
def test_what_is_measured_is_what_the_model_multiplies_with(make_tiny, kind):
    module, found = make_tiny(kind), {}

    def count(linear, inputs, output):
        shape = output.shape[-1], inputs[0].shape[-1]
        found[shape] = found.get(shape, 0) + 1

    linears = [part for part in module.modules() if type(part).__name__ in ("Linear", "Conv1D")]
    hooks = [part.register_forward_hook(count) for part in linears]
    with torch.no_grad():
        module(TEXT)
    for hook in hooks:
        hook.remove()
    shapes = shapes_of(FAMILIES[module.config.model_type].describe(module.config))
    assert sum(out * into * count for (out, into), count in shapes.items()) == sum(
        out * into * count for (out, into), count in found.items()
    )


def test_a_model_without_a_stack_runs_what_was_measured_fastest(make_tiny, monkeypatch):
    monkeypatch.delenv("SPECDEC_FORCE_PY", raising=False)
    asked = []

    def compare(shapes, names, format):
        asked.append((names, format))
        return {name: timing(1.0 if name == "torch" else 2.0) for name in names}

    about = decoder(make_tiny("gpt2"), compare=compare).about
    [(names, format)] = asked
    assert (names[-1], format) == ("torch", "fp32")
    assert "fbgemm" not in names
    assert (about["stack"], about["linear"], about["linear_reason"]) == ("torch", "torch", "measured fastest")
    assert set(about["linear_rejected"]) == {*names} - {"torch"}


@pytest.mark.parametrize("options", [{"linear": "torch"}, {"dtype": torch.float64}])
def test_nothing_is_measured_where_there_is_no_choice(make_tiny, options):
    def compare(*_):
        raise AssertionError("measured")

    assert decoder(make_tiny("gpt2"), compare=compare, **options).about["linear"] == "torch"


def test_the_definition_alone_is_left_where_it_is_forced(make_tiny, monkeypatch):
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    assert decoder(make_tiny("gpt2"), compare=lambda *_: {}).about["linear_reason"] == "SPECDEC_FORCE_PY=1"
    with pytest.raises(ModelError, match="needs the CPU kernels, which do not run here: cpu is ruled out"):
        decoder(make_tiny("gpt2"), quantize="int8")


@needs_kernels
@pytest.mark.parametrize("kind", ["gpt2", "opt", "neox"])
# Largest difference of a logit from float32, in standard deviations of the logits; found: 0.0015, 0.018, 0.052, 0.46.
@pytest.mark.parametrize(("format", "most"), [("fp16", 0.005), ("bf16", 0.05), ("int8", 0.1), ("int4", 1.0)])
def test_families_without_a_stack_are_quantized_too(make_tiny, kind, format, most):
    exact, rounded = logits_of(decoder(make_tiny(kind))), decoder(make_tiny(kind), quantize=format)
    assert (rounded.about["weights"], rounded.about["linear"]) == (format, "cpu")
    error = (logits_of(rounded) - exact).abs().max() / exact.std()
    assert 0 < error < most


def test_a_named_implementation_keeps_the_format_or_is_refused(make_tiny):
    with pytest.raises(ValueError, match="torch keeps weights in fp32, not in int8"):
        decoder(make_tiny("gpt2"), linear="torch", quantize="int8")
    with pytest.raises(ValueError, match="fbgemm keeps weights in fp16, not in fp32"):
        decoder(make_tiny("gpt2"), linear="fbgemm")
