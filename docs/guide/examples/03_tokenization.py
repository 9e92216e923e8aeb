"""Chapter 3, tokenization: byte pair encoding in twenty lines, against the Rust trainer, and what a vocabulary buys."""

import argparse
from collections import Counter

import regex

from llm.data.embedded import documents
from llm.tokenizer import Tokenizer
from llm.tokenizer.bpe import MIN_VOCAB_SIZE, SPLIT_PATTERN
from llm.tokenizer.compression import SAMPLE_TEXTS

MERGES, SIZES = 100, (280, 320, 384, 512, 768, 1024, 1536)
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=1, help="of the texts")
parser.add_argument("--plot", help="write the picture to this file")
args = parser.parse_args()
train = list(documents("train", 1500, seed=args.seed))
held_out = "\n".join(documents("test", 200, seed=args.seed))


def joined(piece: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    """Return a piece with every occurrence of the pair made one token, from left to right."""
    tokens: list[bytes] = []
    for token in piece:
        if tokens and (tokens[-1], token) == pair:
            tokens[-1] = pair[0] + pair[1]
        else:
            tokens.append(token)
    return tuple(tokens)


def merges_by_hand(texts: list[str], n: int) -> list[bytes]:
    """Return the first n tokens of BPE: join the most frequent pair of neighbours, n times."""
    words = Counter(match.group() for text in texts for match in regex.finditer(SPLIT_PATTERN, text))
    pieces = {tuple(bytes([b]) for b in word.encode()): count for word, count in words.items()}
    rank = {bytes([b]): b for b in range(256)}
    for _ in range(n):
        pairs: Counter = Counter()
        for piece, count in pieces.items():
            for pair in zip(piece, piece[1:], strict=False):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], -rank[pair[0]], -rank[pair[1]]))  # of equals the oldest
        rank[best[0] + best[1]] = len(rank)
        pieces = {joined(piece, best): count for piece, count in pieces.items()}
    return list(rank)[256:]


ours = merges_by_hand(train, MERGES)
theirs = Tokenizer.train(train, MIN_VOCAB_SIZE + MERGES).tokens[256:]
print("the first ten:", *(repr(token.decode()) for token in ours[:10]))
print(f"of {MERGES} tokens, both trainers have {len(set(ours) & set(theirs))}")

ratios = {}
for size in SIZES:
    tokenizer = Tokenizer.train(train, size)
    ratios[size] = len(held_out.encode()) / len(tokenizer.encode(held_out))
    print(f"vocabulary {size}, bytes per token: {ratios[size]:.2f}")
korean = SAMPLE_TEXTS["korean"]
print(f"Korean, bytes per token: {len(korean.encode()) / len(tokenizer.encode(korean)):.2f}")
print(f"Korean, text that comes back: {tokenizer.decode(tokenizer.encode(korean)) == korean:d}")

if args.plot:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.semilogx(list(ratios), list(ratios.values()), marker="o", base=2)
    axis.set(xlabel="size of the vocabulary", ylabel="bytes per token, held-out text")
    axis.set_xticks(SIZES, [str(size) for size in SIZES])
    figure.tight_layout()
    figure.savefig(args.plot, dpi=80)
