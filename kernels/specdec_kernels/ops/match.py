"""Where the end of a text occurred before."""

import torch
from jaxtyping import Int
from torch import Tensor

from specdec_kernels.arrays import iota


def suffix_match(
    tokens: Int[Tensor, "b t"],
    length: Int[Tensor, " b"],
    *,
    longest: int,
    shortest: int = 1,
    matches: int = 1,
    window: int = 0,
) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b k"]]:
    """The `matches` places before the last token that agree with the text's end over the most tokens; (end, size).

    `end`: the place of the occurrence's last token; `size`: over how many tokens, up to `longest`, the text up to
    there agrees with all of the text, of which `length` tokens count. More tokens first, then the later place. Where
    fewer than `shortest` agree there is no match, and `end` and `size` are 0. `window` > 0 takes places among the last
    so many tokens only. `tokens` are not negative; at most t places are returned.
    """
    width = tokens.shape[1]
    index = iota(width, tokens.device)
    agree = (index < (length - 1)[:, None]).long()
    if window:
        agree = agree * (index >= (length - window)[:, None])
    size = torch.zeros_like(agree)
    for back in range(min(longest, width)):
        wanted = tokens.gather(1, (length - 1 - back).clamp_min(0)[:, None])
        shifted = torch.nn.functional.pad(tokens, (back, 0), value=-1)[:, :width]
        agree = agree * (shifted == wanted)
        size = size + agree
    # More tokens first, then the later place; both fit one integer, and 0 is no match.
    score = torch.where(size >= shortest, size * width + index, 0)
    best = score.amax(1, keepdim=True) if matches == 1 else score.topk(min(matches, width), dim=1).values
    return best % width, best // width
