"""What a sweep stores of one sample: the row of `rows.jsonl`. Its JSON Schema ships as `schemas/row.schema.json`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# What makes a row one of its run: cell, iteration, prompt, turn.
Key = tuple[str, int, str, int]

# What two runs of the same work may differ in; a test compares everything else byte by byte.
TIMING_FIELDS = frozenset(
    {
        "finished_at",
        "wall_s",
        "prefill_s",
        "draft_s",
        "verify_s",
        "accept_s",
        "other_s",
        "time_to_first_token_s",
        "per_token_latency_s",
        "tokens_per_sec",
        "batch_wall_s",
        "round_seconds",
        "memory_mib",
        "shared_machine",
        "traceback",
    }
)


class Row(BaseModel):
    """One sample: a turn of a prompt, decoded once by one cell. A field that does not apply is null.

    What follows from other fields is not stored, nor is what all rows of a run share: see the manifest.
    """

    model_config = ConfigDict(extra="forbid", title="specdec sweep row")

    format: Literal[2] = 2
    cell: str = Field(description="id of the cell")
    baseline: str = Field(description="id of the plain cell that this one is compared with")
    is_baseline: bool
    synthetic: bool = Field(description="decoded by a toy model; never to be shown among real rows")
    iteration: int = Field(ge=0)
    prompt_id: str
    prompt_idx: int = Field(ge=0, description="place of the prompt in the set")
    category: str
    turn: int = Field(ge=0)

    model: str
    drafter: str
    policy: str
    controller: str
    k: int | None = Field(description="depth asked for; hist tells what was drafted in every round")
    temperature: float
    max_new_tokens: int
    batch_size: int
    dtype: str = Field(description="as the loaded weights have it")
    device: str
    seed: int
    sample_seed: int = Field(description="from seed, iteration, prompt and turn; the same in every cell")

    context: str = Field(description="id of what the model was given, in contexts.jsonl")
    success: bool
    error: str | None = None
    error_type: str | None = None
    traceback: str | None = None

    completion_token_ids: list[int] = []
    completion_text: str = ""
    stop_reason: str | None = None

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    hist: list[list[int]] = Field(default=[[0]], description="hist[k][j]: rounds with k drafted of which j accepted")
    accept_lengths: list[int] = Field(default=[], description="tokens committed by each round, bonus included")
    drafted_depths: list[int] = Field(default=[], description="depth drafted in each round")
    acceptance_rate: float | None = None
    alpha: float | None = Field(
        default=None, description="mean over judged positions of sum min(p, q), where both exist"
    )
    alpha_positions: int = 0
    batch_tokens: int = Field(default=0, description="new tokens of all samples decoded together with this one")

    finished_at: str | None = None
    wall_s: float | None = Field(
        default=None, description="from the prompt to this sample's last token, prefill included"
    )
    prefill_s: float | None = None
    draft_s: float | None = None
    verify_s: float | None = None
    accept_s: float | None = None
    other_s: float | None = None
    time_to_first_token_s: float | None = Field(default=None, description="prefill and first round")
    per_token_latency_s: float | None = Field(
        default=None, description="seconds for each token after the first round's"
    )
    tokens_per_sec: float | None = Field(default=None, description="batch_tokens / batch_wall_s")
    batch_wall_s: float | None = None
    shared_machine: bool = Field(
        default=False, description="timed while other cells ran on the machine; no figure is made of such times"
    )
    memory_mib: dict[str, float] | None = Field(
        default=None,
        description="while its batch was decoded; rss_peak: the process (over its whole life where the system is not "
        "Linux); allocated, reserved and their peaks: the device, on CUDA, and without peaks on MPS",
    )
    round_seconds: list[dict[str, float]] | None = Field(
        default=None,
        description="of every round of the batch, by phase, in its first row; with detailed_metrics or profile",
    )

    @property
    def key(self) -> Key:
        return (self.cell, self.iteration, self.prompt_id, self.turn)


def row_key(row: Mapping[str, Any]) -> Key:
    """The key of a stored row."""
    return (row["cell"], row["iteration"], row["prompt_id"], row["turn"])


def without_timing(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that must not differ between two runs of the same work."""
    return {name: value for name, value in row.items() if name not in TIMING_FIELDS}
