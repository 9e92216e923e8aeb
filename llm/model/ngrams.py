"""Tables of hashed n-grams (`arch.ngrams`): rows that the last two or three token ids choose together.

What a table gives for an n-gram is [T_1[h_1], ..., T_k[h_k]], k parts side by side, each from a part of the table with
a hash of its own, so that few n-grams share all of it. The hash is that of Carter and Wegman (1979),
h_j = ((sum_i a_ji x_(t-i)) mod p) mod rows, over the ids x_t, x_(t-1), ... of one document; `vocab_size` stands for
what would lie before its start. Tables begin at zero. Sources: hashed bigrams in the residual stream, modded-nanogpt
#201 (2026); several hashes per n-gram, Engram (DeepSeek, 2026).
"""

import math

import torch
from torch import nn

from llm.model.config import GPTConfig
from llm.model.linear import Table
from llm.model.table_rows import clear_rows

PRIME = 2**31 - 1
FIRST_SHARE = 0.1  # of a row in the input of every block
PARTS = 4  # of a row, where they divide its width
# Drawn once from [1, PRIME), a row per part, a column per id from the newest on. They are part of every saved model.
FACTORS = (
    (185_981_177, 1_137_067_680, 2_021_590_067),
    (323_902_399, 40_330_515, 1_565_646_089),
    (196_216_772, 1_595_807_544, 793_371_239),
    (133_916_831, 1_636_180_724, 1_168_765_833),
)


class RowTable(Table):
    """Table of which a step uses few rows. A gradient that is kept lists in `rows` what was added to."""

    def add_gradient(self, ids: torch.Tensor, grads: torch.Tensor) -> None:
        """Add grads (n, width) to the rows ids (n,) of the gradient, which begins a step as zeros."""
        super().add_gradient(ids, grads)
        if self.weight.grad is self.kept:
            self.kept.rows = [*getattr(self.kept, "rows", ()), ids]

    def clear_kept(self) -> None:
        """Fill with zeros what the last step has added to."""
        for rows in self.kept.rows:
            clear_rows(self.kept, rows)
        self.kept.rows = []


class NGrams(nn.Module):
    """The tables of a network, one for each n of `config.ngrams`, and a number per layer by which their sum is scaled.

    `scalars` (n_layer,) are applied by the network. `init_weights` fills the weights.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.bos_id, self.nothing, self.orders = config.ngram_bos, config.vocab_size, config.ngrams
        width = config.ngram_width
        self.parts = math.gcd(PARTS, width)
        self.rows = config.ngram_rows * config.vocab_size
        self.tables = nn.ModuleDict(
            {str(n): RowTable(self.parts * self.rows, width // self.parts) for n in self.orders}
        )
        self.scalars = nn.Parameter(torch.empty(config.n_layer))

    def forward(self, ids: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Return the sum of the tables' rows (B, T, width) for ids (B, T).

        before: (B, n - 1) ids in front of them, or more, the newest last; None = the rows begin here.
        """
        line = self.line(ids, before)
        return sum(self.tables[str(n)](self.hashes(line[..., :n])).flatten(-2) for n in self.orders)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the tables to zero, and the numbers of the layers to `FIRST_SHARE`."""
        for table in self.tables.values():
            table.weight.zero_()
        self.scalars.fill_(FIRST_SHARE)

    def line(self, ids: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Return ids (B, T, n) of every token and of those before it in its document, `nothing` before its start."""
        T, most = ids.size(1), max(self.orders)
        if before is None:
            before = ids.new_full((len(ids), most - 1), self.nothing)
        whole, found = torch.cat((before[:, 1 - most :], ids), dim=1), [ids]
        for i in range(1, most):
            begins = (found[-1] == self.bos_id) | (found[-1] == self.nothing)
            found.append(whole[:, most - 1 - i :][:, :T].masked_fill(begins, self.nothing))
        return torch.stack(found, dim=-1)

    def hashes(self, line: torch.Tensor) -> torch.Tensor:
        """Return the rows (B, T, parts) of the table that n-grams (B, T, n) choose, one in each of its parts."""
        ids, found = line.unbind(-1), []
        for part, factors in enumerate(FACTORS[: self.parts]):
            mixed = sum(x * a for x, a in zip(ids, factors, strict=False))  # below 3 x 2^55
            found.append(mixed % PRIME % self.rows + part * self.rows)
        return torch.stack(found, dim=-1)
