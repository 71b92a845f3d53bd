"""`verify_greedy` in CUDA C++: two launches, the same choices as the definition bit for bit."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec_kernels.cuda import library
from specdec_kernels.ops.walk import Verification

_LARGEST, _THREADS = "P5qP", 256
_WALK = "Pq" + 2 * "P3q" + "P4q4P"
# What a walk holds of a node in shared memory (cuda/verify_greedy.cu), of which 48 KiB are always there.
_NODE_BYTES = 16
MOST_NODES = (48 << 10) // _NODE_BYTES
# Enough blocks for every multiprocessor of a large device, and enough of a row for each. A walk has a thread for each
# word of a node, at most a warp.
_BLOCKS, _LEAST_SHARE, _MOST_SPLITS = 256, 2048, 16


def verify_greedy(
    logits: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b n"],
    parents: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    *,
    chain: bool = False,
) -> Verification:
    """See `verify.verify_greedy`; logits of float32, float16 or bfloat16. Raises `ValueError` past `MOST_NODES`."""
    b, n, v = logits.shape
    if n > MOST_NODES:
        raise ValueError(f"verify_greedy in CUDA C++ holds {MOST_NODES} nodes in shared memory, not {n}; use triton")
    device = logits.device
    logits = logits if logits.stride(2) == 1 or v == 1 else logits.contiguous()
    tokens, parents = (ids if ids.element_size() in (4, 8) else ids.long() for ids in (tokens, parents))
    splits, share = choose_splits(b * n, v, logits.element_size())
    words = torch.empty((b, n, splits), dtype=torch.int64, device=device)
    path = torch.empty((b, n), dtype=torch.int64, device=device)
    ends = torch.empty((2, b), dtype=torch.int64, device=device)
    accept_prob = torch.empty((b, n), dtype=torch.float32, device=device)
    count, next_token = ends[0], ends[1]
    if b:
        kind = str(logits.dtype).removeprefix("torch.")
        library.load("verify_greedy", f"largest_{kind}", _LARGEST, _THREADS, device, early=True)(
            (b * n, splits), logits.data_ptr(), *logits.stride()[:2], n, v, share, words.data_ptr()
        )
        library.load("verify_greedy", "walk", _WALK, _THREADS, device, early=True)(
            (b, 1), words.data_ptr(), splits,
            tokens.data_ptr(), *tokens.stride(), tokens.element_size(),
            parents.data_ptr(), *parents.stride(), parents.element_size(),
            valid.data_ptr(), *valid.stride(), n, chain,
            path.data_ptr(), count.data_ptr(), next_token.data_ptr(), accept_prob.data_ptr(),
            shared=n * _NODE_BYTES,
        )  # fmt: skip
    return Verification(path, count, next_token, accept_prob)


def choose_splits(nodes: int, vocabulary: int, item: int) -> tuple[int, int]:
    """How many blocks share a row of logits of `item` bytes each, and how many logits each of them reads.

    Shares are of whole 16-byte vectors, so that all but the first begin as aligned as the row does.
    """
    splits = max(1, min(_MOST_SPLITS, vocabulary // _LEAST_SHARE, -(-_BLOCKS // max(nodes, 1))))
    lanes = 16 // item
    return splits, -(-vocabulary // (splits * lanes)) * lanes
