"""Copy candidate (`arch.copy_candidate`): the token that followed where the document last read as it does now.

The last L tokens of a document are looked for earlier in it. Of `COPY_LENGTHS` the largest L that is found counts, of
its places the newest, and what followed there is the candidate c. With e(c), the normed embedding, and b, the number of
L among them, x + s_b e(c) + v_b takes the place of x in the input of the first block and in that of the last norm,
each with trained numbers s_b and vectors v_b of its own, zero at first. Where nothing is found nothing is added.
Source: the copy candidate of modded-nanogpt (DocCopy, October 2026), whose bounds of the lengths are not known.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from llm.model.config import COPY_LENGTHS as LENGTHS
from llm.model.config import GPTConfig

WIDE = 1 << 32  # above every id


class CopyAdded(nn.Module):
    """The part that one place of a network adds for candidates: `scale` (n,), `bias` (n, n_embd), a row per length."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(len(LENGTHS)))
        self.bias = nn.Parameter(torch.empty(len(LENGTHS), config.n_embd))

    def forward(self, x: torch.Tensor, embedded: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return x (B, T, C) with what is added for candidates e(c) (B, T, C) of lengths with these numbers (B, T)."""
        chosen = (numbers.unsqueeze(-1) == torch.arange(1, len(LENGTHS) + 1, device=x.device)).to(x.dtype)  # (B, T, n)
        share = (chosen @ self.scale.to(x.dtype)).unsqueeze(-1)
        return x + share * embedded + chosen @ self.bias.to(x.dtype)


@torch.no_grad()
def copy_candidates(
    ids: torch.Tensor, before: torch.Tensor | None, bos_id: int | None, nothing: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return candidates (B, T) for ids (B, T), and the numbers (B, T) of their lengths, from 1; both 0 for none.

    before: (B, S) ids in front of them, the newest last and `nothing` for none; None = the rows begin here. `bos_id`
    begins a document, and nothing is looked for beyond its start. No number is read on the host, and no hash is used:
    what is found is equal.
    """
    T, line = ids.size(1), ids if before is None else torch.cat((before, ids), dim=1)
    starts = (line == bos_id) | (F.pad(line[:, :-1], (1, 0), value=nothing) == nothing)
    find = _found_by_looking if T == 1 else _found_by_sorting
    places, numbers = (found[:, -T:] for found in find(line, starts))
    return line.gather(1, places).masked_fill(numbers == 0, 0), numbers


def _found_by_looking(line: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return place and number (B, 1) of the candidate behind the last token of line (B, N), by 16 N comparisons."""
    N, documents = line.size(1), starts.cumsum(1)
    line = line.masked_fill(documents != documents[:, -1:], -1)
    alike, numbers = torch.ones_like(starts), torch.zeros_like(line)
    for back in range(min(N, max(LENGTHS))):
        wanted = line[:, N - 1 - back].unsqueeze(1)
        alike = alike & (F.pad(line, (back, 0), value=-1)[:, :N] == wanted) & (wanted >= 0)
        if back + 1 in LENGTHS:
            numbers = numbers + alike
    numbers[:, -1] = 0  # the last token does not stand in front of itself
    best = (numbers * N + torch.arange(N, device=line.device)).amax(1, keepdim=True)
    return (best % N + 1).clamp(max=N - 1), best // N


def _found_by_sorting(line: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return places and numbers (B, N) of the candidates behind all tokens of line (B, N), by a sort per length.

    Each length is the sum of the one before it and an earlier one. Sequences of one length get names, equal where the
    sequences and the documents of all their tokens are. One that reaches beyond the start of its document has no equal,
    so that rows can stand one behind the other.
    """
    n = line.numel()
    named, earlier = _named(starts.flatten().cumsum(0) * WIDE + line.flatten())
    names, at, numbers = {1: named}, earlier, (earlier >= 0).long()
    for number, (shorter, length) in enumerate(pairwise(LENGTHS), 2):
        rest = F.pad(names[length - shorter], (shorter, 0))[:n]
        names[length], earlier = _named(names[shorter] * (n + 1) + rest)
        at, numbers = torch.where(earlier >= 0, earlier, at), torch.where(earlier >= 0, number, numbers)
    places = at.view_as(line) % line.size(1) + 1
    return places.clamp(max=line.size(1) - 1), numbers.view_as(line)


def _named(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a number from 1 to n for each of keys (n,), equal for equal ones, and the place of the equal one before.

    Of several the place is that of the newest; -1 stands for none.
    """
    ordered, order = torch.sort(keys, stable=True)
    again = F.pad(ordered[1:] == ordered[:-1], (1, 0))
    found = torch.stack(((~again).cumsum(0), torch.where(again, order.roll(1), -1)))
    return torch.empty_like(found).scatter_(1, order.expand(2, -1), found).unbind(0)
