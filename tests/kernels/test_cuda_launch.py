"""Launching without a GPU: what the driver would be told, and the shapes that the launches choose."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec_kernels.cuda import build, driver
from specdec_kernels.ops import keep_cuda, product_cuda, verify_cuda


class Driver(ctypes.CDLL):
    """Records launches; `statuses` are its answers in turn, then 0."""

    def __init__(self, *statuses):
        self.statuses, self.launches, self.contexts, self.limits = list(statuses), [], [], []
        self.cuLaunchKernelEx, self.cuGetErrorString = self.launch, self.describe
        self.cuCtxSetCurrent = self.contexts.append
        self.cuFuncSetAttribute = lambda *limit: self.limits.append(limit) or 0

    def launch(self, config, function, parameters, extra):
        config = config._obj
        at = parameters[0] if extra is None else extra[1]
        size = struct.calcsize("@Pqf4x") if extra is None else ctypes.c_size_t.from_address(extra[3]).value
        attribute = config.attributes[0]
        self.launches.append(
            {
                "grid": (config.grid_x, config.grid_y, config.grid_z),
                "block": (config.block_x, config.block_y, config.block_z),
                "shared": config.shared,
                "stream": config.stream,
                "attribute": config.count and (attribute.id, attribute.value[0]),
                "values": ctypes.string_at(at, size),
                "tags": extra and (extra[0], extra[2], extra[4]),
            }
        )
        return self.statuses.pop(0) if self.statuses else 0

    def describe(self, status, message):
        message._obj.value = b"out of patience"


def kernel_of(fake, monkeypatch, parameters, capability=(9, 0), **options):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    module = object.__new__(driver.Module)
    module.driver, module.index, module.context, module.function = fake, 0, "primary", lambda name: name
    return driver.Kernel(module, "some", parameters, 64, **options)


def test_a_launch_tells_the_driver_its_shape_stream_and_arguments(monkeypatch):
    fake = Driver()
    kernel = kernel_of(fake, monkeypatch, "Pqf4x", early=True)
    kernel((3, 2), 4096, -5, 0.5, shared=40)
    kernel((1, 1), 1, 2, 3.0)
    first, second = fake.launches
    assert first["grid"] == (3, 2, 1)
    assert first["block"] == (64, 1, 1)
    assert (first["shared"], second["shared"]) == (40, 0)
    assert first["stream"] == 77
    assert first["attribute"] == (6, 1)
    assert first["tags"] == (1, 2, None)
    assert first["values"] == struct.pack("@Pqf4x", 4096, -5, 0.5)
    assert second["values"] == struct.pack("@Pqf4x", 1, 2, 3.0)


@pytest.mark.parametrize("options", [{}, {"early": True, "capability": (8, 9)}])
def test_a_launch_that_must_wait_carries_no_attribute(monkeypatch, options):
    fake = Driver()
    kernel_of(fake, monkeypatch, "q", **options)((1, 1), 1)
    assert fake.launches[0]["attribute"] == 0


def test_blocks_that_wait_for_each_other_run_at_the_same_time(monkeypatch):
    fake = Driver()
    kernel_of(fake, monkeypatch, "Pqf4x", cooperative=True, most_shared=70000)((2, 1), 4096, -5, 0.5, shared=70000)
    (launch,) = fake.launches
    assert launch["attribute"] == (2, 1)
    assert launch["values"] == struct.pack("@Pqf4x", 4096, -5, 0.5)
    assert launch["tags"] is None
    assert fake.limits == [("some", 8, 70000)]


def test_a_thread_without_a_context_gets_torchs_and_launches(monkeypatch):
    fake = Driver(201)
    kernel_of(fake, monkeypatch, "q")((1, 1), 1)
    assert len(fake.launches) == 2
    assert fake.contexts == ["primary"]


def test_a_refused_launch_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match=r"some: the launch failed \(out of patience\)"):
        kernel_of(Driver(1), monkeypatch, "q")((1, 1), 1)


def test_the_structures_are_the_drivers():
    # cuda.h: an attribute is an enumeration padded to 8 bytes before a union of 64; a configuration ends in a count.
    assert ctypes.sizeof(driver._Attribute) == 72
    assert ctypes.sizeof(driver._Config) == 56
    assert driver._Config.stream.offset == 32


@given(numbers=st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_the_widest_vector_divides_all_it_must(numbers):
    width = keep_cuda.vector_bytes(*numbers)
    assert not any(number % width for number in numbers)
    assert width == 16 or any(number % (2 * width) for number in numbers)


@given(pairs=st.integers(1, 5000), vectors=st.integers(1, 5000))
def test_the_vectors_of_a_block_divide_its_threads_and_are_whole_warps(pairs, vectors):
    across = keep_cuda.choose_across(pairs, vectors)
    assert across in (32, 64, 128)
    assert across == 32 or across < 2 * vectors


@given(nodes=st.integers(0, 5000), vocabulary=st.integers(1, 300_000), item=st.sampled_from([2, 4]))
def test_splits_cover_a_row_in_whole_vectors(nodes, vocabulary, item):
    splits, share = verify_cuda.choose_splits(nodes, vocabulary, item)
    # A walk has a thread of one warp for each.
    assert 1 <= splits <= 32
    assert splits * share >= vocabulary
    assert share * item % 16 == 0


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "made", "gated", "norm", "name", "warps"),
    [
        (1, 2048, 2048, torch.bfloat16, False, False, "product_bfloat16_bfloat16_16_1", 16),
        (8, 2112, 8192, torch.bfloat16, False, True, "product_bfloat16_bfloat16_16_1_norm", 16),
        (9, 2112, 8192, torch.bfloat16, False, False, "product_bfloat16_bfloat16_32_2", 32),
        (9, 2113, 2048, torch.bfloat16, True, True, "product_bfloat16_bfloat16_8_2_gated_norm", 8),
        (1, 4224, 3072, torch.bfloat16, False, False, "product_bfloat16_bfloat16_16_1", 16),
        (1, 4224, 3072, torch.bfloat16, True, False, "product_bfloat16_bfloat16_8_1_gated", 8),
        (16, 128256, 4096, torch.float32, False, False, "product_bfloat16_float32_8_2", 8),
    ],
)
def test_the_kernel_of_a_product(rows, outputs, inputs, made, gated, norm, name, warps):
    chosen = product_cuda.choose_kernel(rows, outputs, inputs, torch.bfloat16, made, gated=gated, norm=norm)
    assert chosen == (name, warps)


@given(outputs=st.integers(1, 300_000), inputs=st.integers(1, 30_000), gated=st.booleans(), norm=st.booleans())
def test_the_warps_of_a_product_do_not_depend_on_its_rows(outputs, inputs, gated, norm):
    chosen = [
        product_cuda.choose_kernel(rows, outputs, inputs, torch.bfloat16, torch.bfloat16, gated=gated, norm=norm)[1]
        for rows in (1, 8, 9, 16)
    ]
    assert len(set(chosen)) == 1


def test_every_kernel_that_a_launch_can_name_is_compiled(tmp_path):
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"no compiler: {error}")
    wanted = {
        "kv_keep": {f"kv_keep_{width}" for width in (1, 2, 4, 8, 16)},
        "verify_greedy": {"walk", *(f"largest_{kind}" for kind in ("float32", "float16", "bfloat16"))},
        "attend": {f"attend_{kind}_{size}" for kind in ("float16", "bfloat16") for size in (64, 128)},
        "layers": {f"layers_{kind}_{size}" for kind in ("float16", "bfloat16") for size in (64, 128)},
        "product": {
            product_cuda.choose_kernel(rows, outputs, inputs, kind, made, gated=gated, norm=norm)[0]
            for rows in (1, 16)
            for outputs in (16, 4096, 128256)
            for inputs in (64, 8192)
            for kind in (torch.float16, torch.bfloat16)
            for made in (kind, torch.float32)
            for gated in (False, True)
            for norm in (False, True)
        },
    }
    assert set(wanted) == set(build.sources())
    for source, names in wanted.items():
        compiler.compile(build.SOURCE / f"{source}.cu", "sm_90a", tmp_path / source)
        # The names of its symbols, each ended by a zero.
        cubin = (tmp_path / source).read_bytes()
        assert not [name for name in names if b"\0%s\0" % name.encode() not in cubin]
