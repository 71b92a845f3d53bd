"""Random Llamas: the lean decoder and transformers hold the same model, and sizes are the published ones."""

import pytest
import torch

from specdec.models.synthetic import RandomWeights, llama, llama_config, llama_huggingface

TEXT = torch.tensor([[7, 3, 55, 21, 9, 40, 12]])


def test_decoder_and_transformers_hold_the_same_random_model():
    model, module = llama("nano", "cpu", torch.float32, 3), llama_huggingface("nano", "cpu", torch.float32, 3)
    logits, _, _ = model.forward(model.init_cache(1, 8), TEXT)
    with torch.no_grad():
        assert (logits - module(TEXT).logits).abs().max() < 1e-4
    other = llama("nano", "cpu", torch.float32, 4)
    assert not torch.equal(other.forward(other.init_cache(1, 8), TEXT)[0], logits)


@pytest.mark.parametrize(("size", "billions"), [("1b", 1.2358), ("3b", 3.2127), ("8b", 8.0303)])
def test_parameter_counts_are_the_published_ones(size, billions):
    shapes = RandomWeights(llama_config(size), "meta", torch.bfloat16)._shapes
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=1e-4)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="use one of nano, 1b, 3b, 8b"):
        llama_config("2b")
