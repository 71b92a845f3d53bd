"""`verify_greedy` in CUDA C++: two launches, the same choices as the definition bit for bit."""

from ctypes import c_int64, c_void_p

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec_kernels.cuda import library
from specdec_kernels.ops.walk import Verification

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_IDS = (c_void_p, c_int64, c_int64, c_int64)
_ARGUMENTS = (*_IDS, *_IDS, *_IDS, c_void_p, *(c_int64,) * 7, *(c_void_p,) * 5)
# Enough blocks for every multiprocessor of a large device several times, and enough of a row for each.
_BLOCKS, _LEAST_SHARE, _MOST_SPLITS = 1024, 2048, 64


def verify_greedy(
    logits: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b n"],
    parents: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    *,
    chain: bool = False,
) -> Verification:
    """See `verify.verify_greedy`; logits of float32, float16 or bfloat16."""
    b, n, v = logits.shape
    device = logits.device
    logits = logits if logits.stride(2) == 1 or v == 1 else logits.contiguous()
    tokens, parents = (ids if ids.element_size() in (4, 8) else ids.long() for ids in (tokens, parents))
    splits = max(1, min(_MOST_SPLITS, v // _LEAST_SHARE, -(-_BLOCKS // max(b * n, 1))))
    words = torch.empty((b, n, splits), dtype=torch.int64, device=device)
    path = torch.empty((b, n), dtype=torch.int64, device=device)
    ends = torch.empty((2, b), dtype=torch.int64, device=device)
    accept_prob = torch.empty((b, n), dtype=torch.float32, device=device)
    count, next_token = ends[0], ends[1]
    library.load("verify_greedy", _ARGUMENTS, device)(
        logits.data_ptr(), _KINDS[logits.dtype], *logits.stride()[:2],
        tokens.data_ptr(), tokens.element_size(), *tokens.stride(),
        parents.data_ptr(), parents.element_size(), *parents.stride(),
        valid.data_ptr(), *valid.stride(), b, n, v, splits, int(chain),
        words.data_ptr(), path.data_ptr(), count.data_ptr(), next_token.data_ptr(), accept_prob.data_ptr(),
    )  # fmt: skip
    return Verification(path, count, next_token, accept_prob)
