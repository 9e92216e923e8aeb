"""Hugging Face form of a tokenizer: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.

tiktoken stores tokens by rank and joins any two neighbours whose bytes form a token; Hugging Face stores the pairs. The
pair of a token is found by encoding its bytes with the earlier tokens only, which leaves exactly the two halves that
were merged when it was learnt. The files are written by hand, so that saving needs neither `tokenizers` nor
`transformers`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from llm.tokenizer.chat_template import chat_template

BOS, EOS = "<|bos|>", "<|assistant_end|>"
UNLIMITED = int(1e30)  # what transformers writes for a tokenizer without a length limit

# Where an answer begins in a rendered chat and where it ends; without it `transformers serve` takes Qwen's for a Qwen3.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant_start|>",
    "fields": {"content": {"close": [EOS, BOS], "content": "text"}},
}


def write_hf_tokenizer(
    folder: Path, tokens: Sequence[bytes], pattern: str, special_tokens: Sequence[str], max_length: int | None
) -> None:
    """Write the three files. Ids equal those of `llm.tokenizer.bpe.Tokenizer`; nothing is added around a text.

    Unlike ours, a Hugging Face tokenizer turns special tokens written in a text into their ids unless called with
    `split_special_tokens=True`. Its chat template depends on that, and refuses a message that contains a special token.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [t for t in special_tokens if t not in (BOS, EOS)],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length or UNLIMITED,
        "response_template": RESPONSE_TEMPLATE,
    }
    contents = {
        "tokenizer.json": json.dumps(hf_tokenizer(tokens, pattern, special_tokens), ensure_ascii=False, indent=1),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "chat_template.jinja": chat_template(special_tokens),
    }
    for name, text in contents.items():
        (folder / name).write_text(text.rstrip("\n") + "\n" if name.endswith("json") else text, encoding="utf-8")


def hf_tokenizer(tokens: Sequence[bytes], pattern: str, special_tokens: Sequence[str]) -> dict:
    """Return the content of tokenizer.json: split by the pattern, bytes written as printable characters, BPE."""
    alphabet = byte_alphabet()

    def printable(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    ranks = {token: i for i, token in enumerate(tokens)}
    pairs = (merge_pair(token, ranks) for token in tokens if len(token) > 1)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(tokens) + i, "content": name, **flags, "special": True} for i, name in enumerate(special_tokens)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": for_oniguruma(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            "vocab": {printable(token): i for i, token in enumerate(tokens)},
            "merges": [[printable(left), printable(right)] for left, right in pairs],
        },
    }


def for_oniguruma(pattern: str) -> str:
    """Rewrite a pattern for Hugging Face's regex engine, which reads `x{1,3}+` as repeated and `$` as a line's end."""
    atomic = re.sub(r"(\\p\{\w+\}|\[[^]]*\]|\w)(\{\d+,?\d*\})\+", r"(?>\1\2)", pattern)
    return re.sub(r"(?<!\\)\$", r"\\z", atomic)


def merge_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two earlier tokens whose merge is `token` (at least two bytes). Raises ValueError if there are none.

    They are its BPE encoding by the tokens before it.
    """
    limit = ranks[token]
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], limit))
        joined = parts[best] + parts[best + 1]
        if ranks.get(joined, limit) >= limit:
            raise ValueError(f"token {token!r} cannot be made by merging two earlier tokens")
        parts[best : best + 2] = [joined]
    return parts[0], parts[1]


def byte_alphabet() -> list[str]:
    """Return GPT-2's printable character for each byte: Latin-1 if visible, else the next free one from U+0100."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    alphabet, free = [], 256
    for byte in range(256):
        if byte in visible:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(free))
            free += 1
    return alphabet
