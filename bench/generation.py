"""Tokens per second of generative evaluation: prompts in batches, and one prompt after the other.

    python bench/generation.py [--depth 4] [--vocab 8192] [--prompts 64] [--batch 64] [--tokens 32] [--dtype auto]
                               [--repeats 1]

Greedy answers to prompts of 32 to 160 tokens by a model with random weights that never ends its turn, one sample each,
through the engine as evaluation uses it. Both ways take turns in one process. Prints a table and a last line of JSON.
"""

import _bench  # isort: skip  (puts the project on the path)
import torch

from llm.cli.overrides import compose
from llm.eval.task_scores import batches_by_length
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.gpt import GPT
from llm.scaling.rules import model_config


class Numbers:
    """Tokenizer without words, tools and ends of turns."""

    bos_id, has_tools, stop_ids = -1, False, frozenset()


def main() -> None:
    """Answer all prompts both ways and print the rates."""
    numbers = {"depth": 4, "vocab": 8192, "prompts": 64, "batch": 64, "tokens": 32, "repeats": 1}
    args = _bench.arguments(__doc__, numbers)
    cfg = compose("train", [f"model=d{args.depth}", "model.seq_len=512"])
    torch.manual_seed(0)
    net = GPT(model_config(cfg.model, cfg.arch, args.vocab)).init_weights(0).to(_bench.DEVICE)
    net.compute_dtype = args.dtype
    engine, params = Engine(net, Numbers()), SamplingParams(temperature=0.0, max_new_tokens=args.tokens)
    lengths = torch.randint(32, 161, (args.prompts,)).tolist()
    prompts = [torch.randint(1, args.vocab, (n,)).tolist() for n in lengths]
    written = {}

    def answer_all(batch: int) -> None:
        written[batch] = {}
        for rows in batches_by_length(range(len(prompts)), prompts, batch):
            for i, samples in zip(rows, engine.generate([prompts[i] for i in rows], params), strict=True):
                written[batch][i] = samples[0].ids

    seconds = _bench.alternating({str(n): lambda n=n: answer_all(n) for n in (1, args.batch)}, args.repeats, warmup=1)
    tokens = sum(map(len, written[args.batch].values()))
    assert tokens == args.prompts * args.tokens
    result = vars(args) | {f"batch_{n}_tok_s": tokens / s for n, s in seconds.items()}
    result["ratio"] = seconds["1"] / seconds[str(args.batch)]
    same = sum(written[1][i] == written[args.batch][i] for i in range(args.prompts))
    result["same_answers"] = same / args.prompts
    _bench.show(result)


if __name__ == "__main__":
    main()
