"""`suffix_match` in Triton: one program a row, one launch, no array of the text's size in between."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

_BLOCK = 4096
# Tokens of a suffix that are compared before asking whether any place still agrees.
_STEP = 4


def suffix_match(
    tokens: Int[Tensor, "b t"],
    length: Int[Tensor, " b"],
    *,
    longest: int,
    shortest: int = 1,
    matches: int = 1,
    window: int = 0,
) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b k"]]:
    """See `match.suffix_match`."""
    rows, width = tokens.shape
    end, size = torch.empty((2, rows, min(matches, width)), dtype=torch.int64, device=tokens.device)
    if end.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        _match[(rows,)](
            tokens, length, end, size, width, *tokens.stride(), length.stride(0), longest, shortest, window,
            MATCHES=end.shape[1], BLOCK=block, STEP=min(_STEP, longest), num_warps=max(4, block // 256),
        )  # fmt: skip
    return end, size


@triton.jit
@no_type_check
def _match(
    tokens, length, end, size, width, row_stride, token_stride, length_stride, longest, shortest, window,
    MATCHES: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    text = tokens + row * row_stride
    last = tl.load(length + row * length_stride).to(tl.int32) - 1
    first = tl.maximum(last + 1 - window, 0) if window > 0 else 0
    # One pass a match: the scores differ, so the next match is the best one below the last.
    below = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for match in range(MATCHES):
        best = tl.zeros((BLOCK,), tl.int64)
        for start in range(first // BLOCK * BLOCK, last, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = (place >= first) & (place < last)
            agree = inside.to(tl.int32)
            total = tl.zeros((BLOCK,), tl.int32)
            back = tl.full((), 0, tl.int32)
            agreed = last >= 0
            while (back < longest) & agreed:
                # Whether they agree so far or not, so that all are asked for at once.
                for _ in tl.static_range(STEP):
                    asked = (back <= last) & (back < longest)
                    wanted = tl.load(text + (last - back) * token_stride, mask=asked, other=-2)
                    found = tl.load(text + (place - back) * token_stride, mask=inside & (place >= back), other=-1)
                    agree = agree * (found == wanted).to(tl.int32)
                    total += agree
                    back += 1
                if back < longest:
                    agreed = tl.max(agree, 0) > 0
            score = tl.where(total >= shortest, total.to(tl.int64) * width + place, 0)
            best = tl.maximum(best, tl.where(score < below, score, 0))
        below = tl.max(best, 0)
        tl.store(end + row * MATCHES + match, below % width)
        tl.store(size + row * MATCHES + match, below // width)
