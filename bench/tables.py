"""Time of what tables cost in a training step on a CPU: gradients of their rows, and the update of tables of n-grams.

    OMP_NUM_THREADS=1 python bench/tables.py [--vocab 8192] [--width 256] [--tables 3] [--rows 16] [--tokens 2048]
                                             [--micro 4] [--repeats 20]

A step has `--micro` micro-batches of `--tokens` tokens, as frequent as words. Embeddings (`--tables` of them) make a
gradient of every micro-batch anew, as autograd does, or keep one. Tables of pairs and triples have `--rows` rows per
token; of their update only the rows of a step count, by our kernel or by torch. Prints a table and a last line of JSON;
`copy_gb_s` is the rate at which this machine copies.
"""

import _bench  # isort: skip  (puts the project on the path)
from types import SimpleNamespace
from unittest.mock import patch

import torch

from llm.model.linear import Table
from llm.model.ngrams import NGrams
from llm.optim import row_adamw_cpu
from llm.optim.other_rules import ROW_ADAMW, row_adamw_update

GROUP = {"lr": 0.1, "betas": (0.75, 0.95), "eps": 1e-10, "weight_decay": 0.0}


def embeddings(args, keeps: bool):
    """Return a step of tables that hand out rows, and whose gradients are made anew or kept."""
    tables = [Table(args.vocab, args.width) for _ in range(args.tables)]
    for table in tables:
        table.weight.data.normal_()
        table.keeps_gradient = keeps

    def step(batches: list[torch.Tensor], grads: torch.Tensor) -> None:
        for table in tables:
            table.weight.grad = None
        for ids in batches:
            torch.autograd.backward([table(ids) for table in tables], [grads] * len(tables))

    return step


def ngrams(args):
    """Return the tables of n-grams, with a kept gradient, and a step without their update."""
    shape = {"ngram_bos": 0, "vocab_size": args.vocab, "ngrams": (2, 3), "ngram_width": args.width, "n_layer": 1}
    net = NGrams(SimpleNamespace(**shape, ngram_rows=args.rows))
    net.init_weights()
    for table in net.tables.values():
        table.keeps_gradient = True

    def step(batches: list[torch.Tensor], grads: torch.Tensor) -> None:
        for table in net.tables.values():
            table.weight.grad = None
        for ids in batches:
            net(ids, None).backward(grads)

    return net, step


def main() -> None:
    """Measure and print."""
    numbers = {"vocab": 8192, "width": 256, "tables": 3, "rows": 16, "tokens": 2048, "micro": 4, "repeats": 20}
    args, draw = _bench.arguments(__doc__, numbers), torch.Generator().manual_seed(0)
    batches = [(args.vocab ** torch.rand(1, args.tokens, generator=draw)).long() - 1 for _ in range(args.micro)]
    grads = torch.randn(1, args.tokens, args.width, generator=draw)
    net, ngram_step = ngrams(args)
    weights = [table.weight for table in net.tables.values()]
    states = [ROW_ADAMW.new_state(GROUP, weight.detach()) for weight in weights]

    @torch.no_grad()
    def update() -> None:
        row_adamw_update(GROUP, weights, [w.grad for w in weights], states)

    def update_by_torch() -> None:
        with patch.object(row_adamw_cpu, "computes", return_value=False):
            update()

    anew, kept = embeddings(args, False), embeddings(args, True)
    steps = {
        "embeddings_anew": lambda: anew(batches, grads),
        "embeddings_kept": lambda: kept(batches, grads),
        "ngrams": lambda: ngram_step(batches, grads),
        "ngrams_update": update,
        "ngrams_update_torch": update_by_torch,
    }
    seconds = _bench.alternating(steps, args.repeats)
    result = vars(args) | {f"{name}_ms": 1000 * value for name, value in seconds.items()}
    _bench.show(result | {"copy_gb_s": _bench.copy_rate() / 1e9})


if __name__ == "__main__":
    main()
