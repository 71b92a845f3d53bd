"""What every figure of a summary means: printed with tables, stored in manifests."""

from collections.abc import Mapping

DEFINITIONS: Mapping[str, str] = {
    "tokens_per_sec": "new tokens / wall seconds of the batch, prefill and drafting included; mean over samples",
    "speedup": "geometric mean over prompts of (tokens per second of the cell / of plain decoding), paired by prompt, "
    "turn and iteration; the interval resamples prompts (95 %, bootstrap)",
    "speedup_of_means": "mean tokens per second of the cell / mean tokens per second of plain decoding",
    "latency_ms": "from the prompt to the sample's last token, prefill included",
    "time_to_first_token_ms": "prefill and first round",
    "per_token_latency_ms": "(wall - time to first token) / tokens after the first round",
    "acceptance_rate": "accepted drafts / drafted tokens, all rounds pooled; the corrected or bonus token is no draft",
    "mean_accepted_length": "new tokens / rounds, pooled; corrected and bonus tokens and rounds without draft included",
    "tokens_per_forward": "new tokens / forwards of the target, prefill included, pooled",
    "per_position": "of the rounds whose draft reached depth i, the share in which depth i was accepted",
    "per_position_conditional": "of those in which depth i - 1 was accepted, the share in which depth i was, too",
    "alpha": "mean over judged positions of sum min(p, q) of the target's and the draft's law: the expected acceptance",
    "memory_mib": "largest of all samples; the process holds the models of all cells, device sizes are its allocator's",
    "hist": "hist[k][j]: rounds with a draft k deep of which j were accepted",
    "identical_to_plain": "share of the samples whose tokens are those of plain decoding; for greedy and coupled cells",
}
