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
