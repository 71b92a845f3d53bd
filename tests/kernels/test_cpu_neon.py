"""The kernels for 64-bit Arm: cross-compiled, and the products run in an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from specdec_kernels.cpu.build import SOURCE, compile_flags
from specdec_kernels.cpu.packed import FORMATS, pack, reference

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++"),
    pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A program with all kernels in it; that it links shows that all of them compile."""
    program = tmp_path_factory.mktemp("arm") / "driver"
    sources = [*sorted(SOURCE.glob("*.cpp")), Path(__file__).with_name("linear_driver.cpp")]
    command = [COMPILER, *compile_flags(), "-static", f"-I{SOURCE}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    return program


def multiply(driver, instruction_set, packed, x, folder):
    files = {"data": packed.data, "scales": packed.scales, "x": x}
    for name, tensor in files.items():
        raw = b"" if tensor is None else tensor.contiguous().numpy().tobytes()
        (folder / name).write_bytes(raw)
    shape = (packed.matrix.format, packed.out_features, packed.in_features, packed.matrix.columns)
    paths = (folder / name for name in (*files, "y"))
    subprocess.run([EMULATOR, driver, instruction_set, *map(str, (*shape, *paths))], check=True, timeout=60)
    return torch.frombuffer(bytearray((folder / "y").read_bytes()), dtype=torch.float32).view(len(x), -1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("instruction_set", ["neon", "portable"])
def test_a_product_on_arm_equals_its_definition(driver, instruction_set, format, tmp_path):
    generator = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(50, 70, generator=generator), None, format)
    x = torch.randn(7, 70, generator=generator)
    y = multiply(driver, instruction_set, packed, x, tmp_path)
    torch.testing.assert_close(y, reference(packed, x), rtol=1e-5, atol=1e-4)
    alone = torch.cat([multiply(driver, instruction_set, packed, row[None], tmp_path) for row in x])
    assert torch.equal(y, alone)
