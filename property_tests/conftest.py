"""Hypothesis profiles: `dev` by default, `ci` derandomized, `thorough` for a long look (HYPOTHESIS_PROFILE)."""

import os

import torch
from hypothesis import HealthCheck, settings

# Fixtures here hold no state, and enumeration takes longer than Hypothesis expects of one example.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=50, **COMMON)
settings.register_profile("ci", max_examples=200, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=5000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
torch.set_num_threads(1)
# Triton decides when a kernel is defined whether to interpret it; without a GPU that is the only way to run one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
