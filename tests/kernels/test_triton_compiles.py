"""Triton kernels compile for GPUs that are not here: the interpreter accepts more than the compiler does.

Every operation of the kernel table is called on the arguments of its cases, in a process whose driver says that there
is such a GPU; kernels are specialized and compiled as they would be there, and not launched.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from specdec_kernels.dispatch import OPERATIONS

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which other tests run the kernels"),
]

ROOT = Path(__file__).parents[2]
TABLED = sorted(
    op
    for op, rows in OPERATIONS.items()
    if op not in ("decoder_stack", "linear") and "triton" in [row.name for row in rows]
)
# Bytes of shared memory that one block may have there.
SHARED = {"80": 163 << 10, "90": 227 << 10}

COMPILE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from kernels import cases
from specdec_kernels.dispatch import OPERATIONS
from specdec_kernels.ops import law_triton

class Elsewhere:
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[2]), 32)

compiled = []
launch = JITFunction.run
def compile_only(self, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    compiled.append([self.__name__, kernel.metadata.shared, len(kernel.asm["cubin"])])
    return kernel

driver.set_active(Elsewhere())
JITFunction.run = compile_only
# Chosen by where tensors are, which is the CPU here.
law_triton.crowded = lambda device: {"maxnreg": 32}
law_triton.together = lambda device: 108
if int(sys.argv[2]) >= 90:
    law_triton.early = lambda device: {"early": True, "launch_pdl": True}
found = {}
for op in sys.argv[3:]:
    function = next(row for row in OPERATIONS[op] if row.name == "triton").load()
    # One of a kind: temperature and top-p, chains and trees.
    for case in {case.label: case for case in reversed(cases().get(op, []))}.values():
        call = case.make(torch.Generator().manual_seed(0))
        compiled.clear()
        try:
            function(*call.args, **call.options)
            found[f"{op} {case.label}"] = list(compiled)
        except Exception as error:
            found[f"{op} {case.label}"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=sorted(SHARED))
def kernels(request):
    """What was compiled for each case, or the error, for one compute capability; and that capability."""
    environ = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "SPECDEC_FORCE_PY")}
    command = [sys.executable, "-c", COMPILE, str(ROOT / "benchmarks"), request.param, *TABLED]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), request.param


@pytest.mark.parametrize("op", TABLED)
def test_the_kernels_of_an_operation_compile_and_fit(kernels, op):
    found, capability = kernels
    mine = {name: compiled for name, compiled in found.items() if name.split()[0] == op}
    assert mine, f"benchmarks/kernels.py has no case for {op}"
    for name, compiled in mine.items():
        assert isinstance(compiled, list), f"{name}: {compiled}"
        assert compiled, f"{name} launches nothing"
        for kernel, shared, size in compiled:
            assert size > 0
            assert shared <= SHARED[capability], f"{name}: {kernel} needs {shared} bytes of shared memory"
