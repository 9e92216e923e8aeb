"""Compare the compression of tokenizers: `python -m llm.tokenizer runs/demo/tokenizer/model --against gpt2`.

The texts differ in kind on purpose: a tokenizer trained on English prose should beat GPT-2 on prose and lose elsewhere.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from llm.errors import UserError, reason_of
from llm.tokenizer.bpe import Tokenizer, without_surrogates

SAMPLE_TEXTS = {
    "news": (
        "The harbour council voted on Tuesday to reopen the old ferry line across the bay, eleven years after it was "
        "closed to save money. Two electric boats, each with room for 120 passengers, will run every half hour from 6 "
        'a.m. to 11 p.m. starting next spring. "People never stopped asking for it," said councillor Maria Oduya, '
        "whose district has no bridge. Opponents warned that the $14.5 million plan relies on a state grant that has "
        "not yet been approved, and that fares of $3.20 would cover barely a third of the costs. A survey carried out "
        "in August found that 62% of residents would use the boats at least once a week."
    ),
    "korean": (
        "어제 저녁 우리 동네 도서관에서 작은 음악회가 열렸다. 아이들과 어른들이 함께 앉아 "
        "피아노와 가야금 소리를 들었고, 연주가 끝난 뒤에는 모두가 따뜻한 차를 마시며 "
        "이야기를 나누었다. 도서관장은 올해 책을 빌린 사람이 작년보다 15% 늘었다고 말했다. "
        "다음 달에는 할머니들이 옛날이야기를 들려주는 모임이 있을 예정이다."
    ),
    "code": (
        "def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:\n"
        '    """Join overlapping intervals; the result is sorted."""\n'
        "    merged: list[tuple[int, int]] = []\n"
        "    for start, end in sorted(intervals):\n"
        "        if merged and start <= merged[-1][1]:\n"
        "            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))\n"
        "        else:\n"
        "            merged.append((start, end))\n"
        "    return merged\n\n\n"
        "class Counter:\n"
        "    def __init__(self):\n"
        "        self.counts = {}\n\n"
        "    def add(self, key, n=1):\n"
        "        self.counts[key] = self.counts.get(key, 0) + n  # missing keys start at 0\n\n\n"
        'if __name__ == "__main__":\n'
        "    print(merge_intervals([(8, 10), (1, 3), (2, 6)]))\n"
    ),
    "math": (
        "\\begin{theorem}\nFor every integer $n \\ge 1$, $\\sum_{k=1}^{n} k^2 = \\frac{n(n+1)(2n+1)}{6}$.\n"
        "\\end{theorem}\n\\begin{proof}\nFor $n = 1$ both sides are $1$. Suppose the identity holds for $n$. Then\n"
        "\\begin{align*}\n\\sum_{k=1}^{n+1} k^2 &= \\frac{n(n+1)(2n+1)}{6} + (n+1)^2 \\\\\n"
        "&= \\frac{(n+1)\\left(2n^2 + 7n + 6\\right)}{6} = \\frac{(n+1)(n+2)(2n+3)}{6},\n\\end{align*}\n"
        "which is the claim for $n + 1$. For example, $1 + 4 + 9 + \\dots + 10000 = 338350$. \\qedhere\n\\end{proof}\n"
    ),
    "science": (
        "Plants capture the energy of sunlight in photosynthesis, a chain of reactions that takes place in the "
        "chloroplasts. Pigments in the thylakoid membrane absorb photons and pass excited electrons along a transport "
        "chain, which pumps protons across the membrane; the gradient drives the synthesis of ATP. Water molecules "
        "replace the lost electrons and release oxygen. In the surrounding stroma the enzyme rubisco fixes carbon "
        "dioxide, and the Calvin cycle spends ATP and NADPH to build three-carbon sugars, from which the cell makes "
        "glucose, starch and cellulose. Above roughly 30 degrees Celsius the efficiency falls, because rubisco binds "
        "oxygen more often."
    ),
}


def named_encoders(names: Sequence[str]) -> dict[str, Callable[[str], Sequence[int]]]:
    """Return encoders by the names of their columns: the end of a path, or all of it where another has that end."""
    ends = Counter(Path(name).name for name in set(names))
    return {name if ends[Path(name).name] > 1 else Path(name).name: named_encoder(name) for name in names}


def named_encoder(name: str) -> Callable[[str], Sequence[int]]:
    """Return the encoder of a tokenizer folder, a Hugging Face tokenizer.json, or a tiktoken encoding such as gpt2.

    tiktoken fetches an encoding once from the network and keeps it in TIKTOKEN_CACHE_DIR. Raises UserError if there is
    no such encoder.
    """
    path = Path(name)
    if path.is_dir():
        return Tokenizer.load(path).encode
    if path.suffix == ".json":
        tokenizer = read_hf_tokenizer("--against", path)
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    return tiktoken_encoding("--against", name).encode_ordinary


def tiktoken_encoding(key: str, name: str):
    """Return the tiktoken.Encoding `name`. Raises UserError that begins with `key`, the option that gave the name."""
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise UserError(
            f"{key} {name}: neither a tokenizer folder, a tokenizer.json nor a tiktoken encoding "
            f"({', '.join(tiktoken.list_encoding_names())})"
        )
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' exceptions are OSErrors
        raise UserError(
            f"{key} {name}: tiktoken could not fetch it ({type(error).__name__}); "
            "go online once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from error


def read_hf_tokenizer(key: str, path: Path):
    """Return the `tokenizers.Tokenizer` of a file. Raises UserError that begins with `key`, the option that gave it."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{key} {path}: needs the package tokenizers (pip install '.[hf]')") from error
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{key} {path}: not a readable tokenizer.json ({error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Print the compression table of one tokenizer; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llm.tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of a Fathom tokenizer or model")
    parser.add_argument(
        "--against", nargs="*", default=[], help="tiktoken names, tokenizer folders, tokenizer.json files"
    )
    parser.add_argument("--text", nargs="*", default=[], type=Path, help="further UTF-8 text files to compress")
    args = parser.parse_args(argv)
    try:
        texts = SAMPLE_TEXTS | {path.name: _read_text(path) for path in args.text}
        table = compression_table(Tokenizer.load(args.folder), texts, named_encoders(args.against))
        print(format_compression_table(table))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read as UTF-8 text ({reason_of(error, path)})") from error


def compression_table(
    tokenizer: Tokenizer, texts: dict[str, str], others: dict[str, Callable[[str], Sequence]]
) -> list[dict]:
    """Return one row per text: bytes, tokens, bytes per token, and tokens and bytes per token of each other encoder.

    `<other>_diff` is the share of tokens saved against that encoder in percent: positive means that `tokenizer` needs
    fewer.
    """
    rows = []
    for name, text in texts.items():
        text = without_surrogates(text)
        n_bytes, n_tokens = len(text.encode()), len(tokenizer.encode(text))
        row = {"text": name, "bytes": n_bytes, "tokens": n_tokens, "ratio": n_bytes / max(n_tokens, 1)}
        for other, encode in others.items():
            n_other = len(encode(text))
            row[f"{other}_tokens"] = n_other
            row[f"{other}_ratio"] = n_bytes / max(n_other, 1)
            row[f"{other}_diff"] = 100 * (n_other - n_tokens) / max(n_other, 1)
        rows.append(row)
    return rows


def format_compression_table(rows: Sequence[dict]) -> str:
    """Return the rows of `compression_table` as an aligned Markdown table."""
    if not rows:
        return ""
    cells = [list(rows[0])] + [[_format_cell(key, row[key]) for key in rows[0]] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        padded = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def _format_cell(key: str, value: str | int | float) -> str:
    if key.endswith("_diff"):
        return f"{value:+.1f}%"
    if key == "ratio" or key.endswith("_ratio"):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
