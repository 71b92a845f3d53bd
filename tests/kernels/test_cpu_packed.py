"""Packed linear layers of the CPU kernels against their definition."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from specdec_kernels.cpu import library
from specdec_kernels.cpu.packed import (
    FORMATS,
    GROUP,
    INPUT_GROUP,
    Arena,
    adopt,
    build_linear,
    linear,
    pack,
    pack_blocks,
    reference,
    unpack,
)

pytestmark = pytest.mark.skipif(library.available() is not None, reason=f"the CPU kernels: {library.available()}")
SETS = library.load().instruction_sets if library.available() is None else ()


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("out", "into"), [(16, 32), (33, 24), (50, 77), (7, 1), (1, 130), (100, 1100)])
def test_every_format_equals_its_definition(format, out, into, instruction_set):
    weight, bias, x = numbers(out, into), numbers(out, seed=1), numbers(13, into, seed=2)
    packed = pack(weight, bias, format)
    result = linear(packed, x, instruction_set=instruction_set)
    # Integers are summed exactly; what is left is the rounding of up to 1100 float32 sums of unit normals.
    torch.testing.assert_close(result, reference(packed, x), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("format", "bound"),
    [("fp32", 0.0), ("fp16", 3e-4), ("bf16", 2e-3), ("int8", 6e-3), ("int4", 0.075)],
)
def test_a_format_loses_no_more_than_it_says(format, bound):
    weight = numbers(64, 512)
    loss = (unpack(pack(weight, None, format)) - weight).norm() / weight.norm()
    assert loss <= bound


def q8_0(out, into, seed=3):
    """Q8_0 blocks as a GGUF file has them, and their float32 values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (out, into // GROUP, GROUP), generator=generator, dtype=torch.int8)
    # The extreme that a quantizer always leaves.
    values[:, :, 5] = 127
    scales = (torch.rand(out, into // GROUP, 1, generator=generator) / 50 + 1e-4).half()
    blocks = torch.cat([scales.view(torch.uint8), values.view(torch.uint8)], -1).flatten(1)
    return blocks, (values.float() * scales.float()).flatten(1)


def q4_1(out, into, seed=4, *, symmetric=False):
    """Q4_1 blocks and their float32 values; `symmetric` ones are Q4_0's: -8 to 7 times a scale of either sign."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (out, into // GROUP, GROUP), generator=generator, dtype=torch.uint8)
    values[:, :, 5] = 0
    scales = (torch.rand(out, into // GROUP, 1, generator=generator) / 9 + 1e-4).half()
    if symmetric:
        scales, values = scales * (1 - 2 * (values[:, :, :1] % 2)), values.clamp(max=14)
        minima = -8 * scales
    else:
        values[:, :, 6] = 15
        minima = (-8 * scales.float() * (0.5 + torch.rand(scales.shape, generator=generator))).half()
    nibbles = values[:, :, :16] | values[:, :, 16:] << 4
    blocks = torch.cat([scales.view(torch.uint8), minima.view(torch.uint8), nibbles], -1).flatten(1)
    return blocks, (values.float() * scales.float() + minima.float()).flatten(1)


@pytest.mark.parametrize("make", [q8_0, q4_1, partial(q4_1, symmetric=True)])
def test_blocks_of_a_gguf_file_are_repacked_without_loss_and_found_again_in_float32(make):
    blocks, weight = make(50, 96)
    packed = pack_blocks(blocks, 96, None)
    assert torch.equal(unpack(packed), weight)
    found = pack(weight, None, packed.format)
    assert torch.equal(unpack(found), weight)
    x = numbers(3, 96)
    assert torch.equal(linear(found, x), linear(packed, x))


def test_blocks_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    weight = numbers(20, 64)
    blocks = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0))
    expected = torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(unpack(pack_blocks(blocks, 64, None)), expected)
    blocks, values = q4_1(20, 64)
    expected = torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_1))
    assert torch.equal(values, expected)


def test_channels_that_matter_are_rounded_with_more_care():
    weight = numbers(64, 256)
    importance = torch.ones(256)
    importance[::8] = 100.0
    error = [
        (unpack(pack(weight, None, "int4", importance=counted)) - weight)[:, ::8].norm()
        for counted in (None, importance)
    ]
    assert error[1] < 0.8 * error[0]


def test_int8_has_a_scale_per_32_channels():
    weight = numbers(40, 150) * torch.logspace(-1, 1, 150)
    error = (unpack(pack(weight, None, "int8")) - weight).abs()
    for begin in range(0, 150, GROUP):
        step = weight[:, begin : begin + GROUP].abs().amax(1, keepdim=True) / 127
        # Half a step, and what rounding its size to float16 adds over 127 steps.
        assert (error[:, begin : begin + GROUP] <= step * (0.5 + 127 * 2**-11)).all()


@pytest.mark.parametrize("instruction_set", SETS)
def test_inputs_of_int8_are_rounded_to_8_bits_per_row_and_16_channels(instruction_set):
    x = numbers(3, 64) * torch.logspace(0, 3, 64)
    error = (linear(pack(torch.eye(64), None, "int8"), x, instruction_set=instruction_set) - x).abs()
    for begin in range(0, 64, INPUT_GROUP):
        # 127 times float16's 1 / 127 is 1 within 2^-11.
        size = x[:, begin : begin + INPUT_GROUP].abs().amax(1, keepdim=True)
        assert (error[:, begin : begin + INPUT_GROUP] <= size * (0.5 / 127 + 2**-11)).all()


@pytest.mark.parametrize("instruction_set", SETS)
def test_integer_sums_are_exact_at_their_extremes(instruction_set):
    # Pairs of 128 x 127 are the most that an int16 must hold: a file may have -128, which no quantizer writes.
    values = torch.full((16, 64), -128, dtype=torch.int8)
    values[::2] = 127
    scales = torch.ones(16, 2, 1).half()
    blocks = torch.cat([scales.view(torch.uint8), values.view(16, 2, GROUP).view(torch.uint8)], -1).flatten(1)
    x = torch.full((2, 64), 127.0)
    x[1] = -127.0
    packed = pack_blocks(blocks, 64, None)
    assert torch.equal(linear(packed, x, instruction_set=instruction_set), x @ values.float().T)


def test_a_row_of_zeros_is_its_bias():
    bias = numbers(20)
    for format in FORMATS:
        result = linear(pack(numbers(20, 48), bias, format), torch.zeros(2, 48))
        assert torch.equal(result, bias.expand(2, -1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row_only(format, bad):
    x = numbers(6, 64)
    x[2, 40] = bad
    result = linear(pack(numbers(32, 64), None, format), x)
    assert not result[2].isfinite().any()
    assert result[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_and_weights_may_be_strided(format):
    weight, x = numbers(64, 33).T, numbers(2, 64, 5).transpose(1, 2)
    packed = pack(weight, None, format)
    result = linear(packed, x)
    assert result.shape == (2, 5, 33)
    assert torch.equal(result, linear(packed, x.contiguous()))


def test_the_float_format_is_the_plain_product():
    weight, x = numbers(48, 96), numbers(2, 3, 96)
    torch.testing.assert_close(linear(pack(weight, None), x), functional.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_packing_works_in_inference_mode_and_with_no_rows():
    with torch.inference_mode():
        packed = pack(torch.ones(4, 3), None, "int8")
        assert torch.allclose(linear(packed, torch.ones(2, 3)), torch.full((2, 4), 3.0), rtol=1e-3)
    assert linear(packed, torch.ones(0, 3)).shape == (0, 4)


def test_an_arena_hands_out_memory_that_does_not_overlap():
    arena = Arena(1 << 16)
    parts = [arena(size) for size in (100, 1, 60000, 70000, 64)]
    for value, part in enumerate(parts):
        part.fill_(value)
    assert all((part == value).all() for value, part in enumerate(parts))
    assert all(part.data_ptr() % 64 == 0 for part in parts)


def test_wrong_arguments_raise():
    packed = pack(torch.ones(4, GROUP), None)
    with pytest.raises(ValueError, match="not one of fp32"):
        pack(torch.ones(4, 3), None, "int2")
    with pytest.raises(ValueError, match="not Q8_0 or Q4_1 blocks"):
        pack_blocks(torch.zeros(4, 33, dtype=torch.uint8), 32, None)
    with pytest.raises(ValueError, match="takes"):
        adopt("int8", 4, GROUP, torch.zeros(8, dtype=torch.uint8), None, None)
    with pytest.raises(ValueError, match="weights take 32"):
        linear(packed, torch.ones(2, 3))
    with pytest.raises(ValueError, match="float64"):
        linear(packed, torch.ones(2, GROUP, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not run here"):
        linear(packed, torch.ones(2, GROUP), instruction_set="mmx")


def test_the_kernels_say_where_they_cannot_run():
    assert library.refuse(torch.device("cpu"), torch.float32) is None
    assert "not on meta" in library.refuse(torch.device("meta"), torch.float32)
    assert "not in bfloat16" in library.refuse(torch.device("cpu"), torch.bfloat16)


def test_one_layer_is_a_function():
    weight, x = numbers(20, 48), numbers(2, 48)
    assert torch.equal(build_linear(weight, None, "int4")(x), linear(pack(weight, None, "int4"), x))
