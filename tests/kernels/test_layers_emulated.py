"""`cuda/layers.cu` without a GPU: its threads as fibers that take turns in any order (emulated/gpu.hpp)."""

import ctypes
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdec_kernels import compiling
from specdec_kernels.cpu import build
from specdec_kernels.ops import attention, layers, layers_cuda

HERE = Path(__file__).parent / "emulated"
CUDA = Path(layers_cuda.__file__).parents[1] / "cuda"
SHARED = 232448
# More than share a key head, and no multiple of them.
BLOCKS = 9


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The kernel as a function of its structure, and the number of its blocks and the seed to set."""
    library = tmp_path_factory.mktemp("emulated") / "layers.so"
    # Some systems' compilers check by themselves that a jump goes up the stack, and fibers have others.
    checks = ("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0")
    flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", *checks, "-w", f"-I{HERE}", f"-I{CUDA}")
    try:
        compiler = build.find_compiler()
    except compiling.BuildError as error:
        pytest.skip(str(error))
    compiling.run([compiler, *flags, str(HERE / "layers.cpp"), "-o", str(library)])
    run = ctypes.CDLL(str(library)).run_layers
    run.restype = ctypes.c_char_p
    run.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint64)
    return run


@pytest.fixture
def run(emulated, monkeypatch):
    """The operation on a few blocks; `run.seed` draws the order of everything."""
    made = SimpleNamespace(seed=0)

    def load(source, name, parameters, threads, device, **options):
        _, kind, size = name.split("_")

        def launch(grid, *arguments, shared):
            assert shared <= options["most_shared"]
            packed = struct.pack(f"@{parameters}", *arguments)
            error = emulated(kind == "float16", int(size), packed, grid[0], shared, made.seed)
            assert error is None, error

        return launch

    properties = SimpleNamespace(multi_processor_count=BLOCKS, shared_memory_per_block_optin=SHARED)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(layers_cuda.library, "load", load)
    made.bind = layers_cuda.bind_layers
    return made


def model(dtype, *, hidden=72, inner=48, kv_heads=1, group=2, size=64, vocab=21, count=2, extras=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    def weight(out, into):
        return normal(out, into, scale=into**-0.5)

    every, queries = (group + 2) * kv_heads * size, group * kv_heads * size
    stack = [
        layers.Layer(
            weight(every, hidden),
            normal(every) if extras else None,
            weight(hidden, queries),
            normal(hidden) if extras else None,
            weight(2 * inner, hidden),
            normal(2 * inner) if extras else None,
            weight(hidden, inner),
            normal(hidden) if extras else None,
            normal(hidden),
            normal(hidden),
            normal((group + 1) * kv_heads, size) if extras else None,
        )
        for _ in range(count)
    ]
    return stack, layers.Ends(
        normal(30, hidden), normal(hidden), weight(vocab, hidden), normal(vocab) if extras else None
    )


def nodes(stack, size, kv_heads, n, committed, dtype):
    generator = torch.Generator().manual_seed(n)
    angle = torch.randn((1, n, size // 2), generator=generator) * 10
    slots = torch.randn((2 * len(stack), 1, committed + n + 3, kv_heads, size), generator=generator).to(dtype)
    slots[:, :, committed:] = torch.nan
    return (
        torch.randint(30, (1, n), generator=generator),
        torch.stack((angle.cos(), angle.sin()), -1),
        slots,
        torch.tensor([committed]),
    )


CASES = {
    "one node": (1, 5, torch.bfloat16, {}),
    "two tiles of queries": (8, 20, torch.bfloat16, {"group": 3, "count": 1}),
    "heads of 128, biases and norms of heads": (3, 0, torch.bfloat16, {"size": 128, "extras": True}),
    "inputs of several tiles": (2, 17, torch.float16, {"hidden": 1096, "inner": 1160, "count": 1}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tree", [False, True])
def test_all_layers_are_the_layers_in_any_order_of_events(run, case, tree):
    n, committed, dtype, shape = CASES[case]
    stack, ends = model(dtype, **shape)
    given = nodes(stack, shape.get("size", 64), 1, n, committed, dtype)
    ancestors = None
    if tree:
        visible = torch.rand((1, n, n), generator=torch.Generator().manual_seed(1)) < 0.5
        ancestors = attention.pack_ancestors(visible.tril(-1))
    options = {"width": n, "count": len(stack), "logits": True}
    exact, apart = given[2].nan_to_num(), layers.bind_layers(stack, ends, 1e-5)
    wanted = apart(given[0], given[1], exact, given[3], ancestors, **options)
    bound, found = run.bind(stack, ends, 1e-5), []
    for run.seed in range(3):
        slots = given[2].clone()
        found.append((*bound(given[0], given[1], slots, given[3], ancestors, **options), slots))
    new = slice(committed, committed + n)
    for made, expected in zip((*found[0][:2], found[0][2][:, :, new]), (*wanted, exact[:, :, new]), strict=True):
        error, largest = (made.double() - expected.double()).abs(), expected.double().abs().max().clamp(min=1)
        assert error.max() <= 40 * torch.finfo(dtype).eps * largest
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_node_has_the_same_bits_alone_and_in_company(run):
    n, committed, dtype = 4, 14, torch.bfloat16
    stack, ends = model(dtype, count=1)
    tokens, rotation, slots, length = nodes(stack, 64, 1, n, committed, dtype)
    bound = run.bind(stack, ends, 1e-5)
    hidden, logits = bound(tokens, rotation, slots.clone(), length, None, width=n, count=1, logits=True)
    for node in range(n):
        here = slice(node, node + 1)
        state, scores = bound(
            tokens[:, here], rotation[:, here], slots, length + node, None, width=1, count=1, logits=True
        )
        assert torch.equal(state, hidden[:, here])
        assert torch.equal(scores, logits[:, here])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_with_the_bits_of_nothing_told_yet_come_to_an_end(run, dtype):
    # They are NaNs, which checkpoints and caches can hold.
    stack, ends = model(dtype, count=1, extras=True)
    tokens, rotation, slots, length = nodes(stack, 64, 1, 2, 5, dtype)
    for tensor in (*stack[0], *ends, slots):
        tensor.view(torch.int16).fill_(-1)
    hidden, logits = run.bind(stack, ends, 1e-5)(
        tokens, rotation, slots, length, None, width=2, count=1, logits=True
    )  # fmt: skip
    assert hidden.isnan().all()
    assert logits.isnan().all()
