# `pip install rust-just` brings `just`. The first recipe is the default.

python := env("PYTHON", "python")

default: lint types test

# Everything a contributor needs, into the current environment.
setup:
    {{python}} -m pip install -c constraints.txt -e ".[dev]"

lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .

fmt:
    {{python}} -m ruff check --fix .
    {{python}} -m ruff format .

types:
    {{python}} -m mypy

test *args:
    {{python}} -m pytest -n auto {{args}}

# Property tests alone; `just props thorough` looks for a long time.
props profile="dev":
    HYPOTHESIS_PROFILE={{profile}} {{python}} -m pytest -n auto property_tests

# Token identity with Hugging Face on the real model; stores its rows with commit and settings.
proof *args:
    {{python}} benchmarks/proof.py {{args}}

bench *args:
    {{python}} benchmarks/decode_cpu.py {{args}}

# Registers and spills of the CUDA kernels; needs nvcc or NVRTC, no GPU.
cuda-registers:
    {{python}} benchmarks/cuda_registers.py --out docs/results/cuda_registers.json

# Every operation against its definition, torch.compile of it, and the time its bytes need.
bench-kernels *args:
    {{python}} benchmarks/kernels.py {{args}}

# The K sweep over the built-in suite and 20 questions of a Spec-Bench file; goes on where it stopped.
k-sweep questions *args:
    {{python}} -m specdec_cli sweep benchmarks/k_sweep.yaml --out docs/results/k_sweep/suite {{args}}
    {{python}} -m specdec_cli sweep benchmarks/k_sweep.yaml --prompts {{questions}} --limit 20 --out docs/results/k_sweep/questions {{args}}
    rm -f docs/results/k_sweep/*/summary.json docs/results/k_sweep/*/.lock

# Every table and figure of the K sweep again, from its rows alone.
k-sweep-report:
    {{python}} -m specdec_cli report docs/results/k_sweep/suite
    {{python}} -m specdec_cli report docs/results/k_sweep/questions
