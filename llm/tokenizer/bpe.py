"""Byte-level BPE tokenizer: trained with rustbpe, encoded with tiktoken, stored as text files (no pickle).

Ids 0..255 are the single bytes, then come the merges, and the nine special tokens last. A folder holds
`tokenizer.tiktoken` (one "base64 rank" line per token), `fathom_tokenizer.json` (pattern, special tokens, fingerprint)
and the Hugging Face files written by `llm.tokenizer.hf_files`, which give the same ids.
"""

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from llm.errors import UserError, reason_of
from llm.tokenizer.hf_files import write_hf_tokenizer
from llm.utils.files import parse_json, read_bytes

# Order and position (after the merges) are those of nanochat.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)


def split_pattern(digits: int = 2, marks: bool = False) -> str:
    """Return the regular expression that cuts text into pieces before any merge; a token never crosses a cut.

    It is GPT-4's pattern with two changes. Numbers come in groups of at most `digits` digits (three would spend a small
    vocabulary on numbers). Contractions are spelled out instead of case-insensitive, so that every regex engine agrees
    on them. marks: combining marks belong to words, as the vowel signs of Hindi, Thai or Arabic need.
    """
    letter, letters = (r"\p{L}\p{M}", r"[\p{L}\p{M}]+") if marks else (r"\p{L}", r"\p{L}+")
    return "|".join(
        (
            r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])",  # 's 'd 'm 't 'll 've 're
            rf"[^\r\n{letter}\p{{N}}]?+{letters}",  # a word with at most one leading space or sign
            rf"\p{{N}}{{1,{digits}}}" if digits > 1 else r"\p{N}",
            rf" ?[^\s{letter}\p{{N}}]++[\r\n]*",  # signs, with the line ends after them
            r"\s*[\r\n]",
            r"\s+(?!\S)",  # spaces before a word, except the last, which belongs to the word
            r"\s+",
        )
    )


SPLIT_PATTERN = split_pattern()
# Patterns that stage.pattern knows by the names under which llama.cpp does. qwen2: Qwen2's (arXiv 2407.10671), with
# contractions spelled out as llama.cpp has them.
NAMED_PATTERNS = {
    "qwen2": r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

PROBE = "It's 1,234 °C — naïve 中文 हिन्दी ไทย عربي\r\n\tx_y  z\u0301!\n"
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
RANKS_FILE = "tokenizer.tiktoken"
META_FILE = "fathom_tokenizer.json"
FORMAT_VERSION = 1
# The regex engine gives up inside a whitespace run of about a million characters; runs longer than this are cut first.
MAX_WHITESPACE_RUN = 100_000
_LONG_WHITESPACE = re.compile(rf"\s{{{MAX_WHITESPACE_RUN}}}")


class Tokenizer:
    """Byte-level BPE tokenizer. Immutable; `fingerprint` identifies everything that decides the ids.

    Args:
        tokens: byte strings by id, without the special tokens; must contain all 256 single bytes.
        pattern: the regular expression that cuts text into pieces.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str = SPLIT_PATTERN):
        self.tokens = tuple(tokens)
        self.pattern = pattern
        ranks = {token: i for i, token in enumerate(self.tokens)}
        if len(ranks) != len(self.tokens) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError("a byte-level vocabulary holds every single byte and no token twice")
        self._special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "fathom", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self._special_ids
        )
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.bos_id = self._special_ids["<|bos|>"]
        self.special_ids = frozenset(self._special_ids.values())
        self.stop_ids = frozenset({self.bos_id, self._special_ids["<|assistant_end|>"]})  # end a completion
        self.fingerprint = _fingerprint(self.tokens, pattern)

    has_tools = True  # it has special tokens for calculator calls

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> "Tokenizer":
        """Train on the texts, streaming. `vocab_size` counts the special tokens.

        Raises UserError if the vocabulary is smaller than bytes plus special tokens, or the text is too small for it.
        """
        import rustbpe

        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"stage.vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
                f"need at least {MIN_VOCAB_SIZE}"
            )
        trainer = rustbpe.Tokenizer()
        pieces = (piece for text in texts for piece in _pieces(without_surrogates(text)))
        trainer.train_from_iterator(pieces, vocab_size=vocab_size - len(SPECIAL_TOKENS), pattern=pattern)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        possible = len(ranks) + len(SPECIAL_TOKENS)
        if possible < vocab_size:
            if possible == MIN_VOCAB_SIZE:
                raise UserError("the text to train the tokenizer on is empty; check data.path and stage.max_chars")
            raise UserError(
                f"stage.vocab_size={vocab_size} is too large for this text, which yields {possible} tokens at most; "
                f"set stage.vocab_size={possible} or less, or give more text (data.path, data.size, stage.max_chars)"
            )
        return cls([bytes(token) for token, _ in ranks], pattern)

    def special_id(self, name: str) -> int:
        """Return the id of a special token, written "<|bos|>" or "bos". Raises ValueError for an unknown one."""
        token_id = self._special_ids.get(name)
        if token_id is None:
            token_id = self._special_ids.get(f"<|{name}|>")
        if token_id is None:
            raise ValueError(f"no special token {name!r}; there are {', '.join(SPECIAL_TOKENS)}")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Special tokens written in it are ordinary text; lone surrogates become U+FFFD."""
        if len(text) <= MAX_WHITESPACE_RUN:
            return self._encoding.encode_ordinary(text)
        return [token_id for piece in _pieces(text) for token_id in self._encoding.encode_ordinary(piece)]

    def encode_start(self, text: str, chars: int) -> tuple[list[int], int]:
        """Return the ids of a beginning of a text, and its length of at least `chars` characters (all, if less).

        It ends between two pieces of the split pattern, so that its ids are the first ids of the whole text. The end
        is found without splitting the rest.
        """
        import regex

        text = without_surrogates(text)
        ends = (match.end() for match in regex.finditer(self.pattern, text))
        end = next((end for end in ends if end >= chars), len(text))
        return self.encode(text[:end]), end

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, BOS first.

        If the text begins with <|bos|>, as a rendered chat does, its special tokens get their own ids.
        """
        if text.startswith("<|bos|>"):
            encode = self._encoding.encode
            return [one for piece in _pieces(text) for one in encode(piece, allowed_special="all")]
        return [self.bos_id, *self.encode(text)]

    def encode_document(self, text: str) -> np.ndarray:
        """Return BOS and the ids of the text, int32.

        Threads can run it in parallel, because tiktoken releases Python's lock.
        """
        text = without_surrogates(text)
        pieces = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(text)]
        return np.concatenate([np.array([self.bos_id], np.uint32), *pieces]).view(np.int32)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 4) -> list[list[int]]:
        """Return `encode` of each text, computed by threads: tiktoken releases Python's lock."""
        with ThreadPoolExecutor(num_threads) as executor:
            return list(executor.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; special tokens appear by name, bytes that are not UTF-8 as U+FFFD."""
        return self._encoding.decode(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the raw bytes of the ids, for streaming: one token may hold part of a character."""
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        """Return the length in bytes of every token, int32 (vocab_size,); 0 for special tokens.

        Bits per byte leaves out tokens without bytes.
        """
        lengths = [len(token) for token in self.tokens] + [0] * len(SPECIAL_TOKENS)
        return np.array(lengths, dtype=np.int32)

    def save(self, folder: str | os.PathLike, max_length: int | None = None) -> None:
        """Write all files into `folder`.

        max_length: context in tokens of the model they accompany, for Hugging Face users.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_hf_tokenizer(folder, self.tokens, self.pattern, SPECIAL_TOKENS, max_length)
        lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(self.tokens))
        (folder / RANKS_FILE).write_text("".join(lines), encoding="ascii")
        meta = {
            "format_version": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": list(SPECIAL_TOKENS),
            "fingerprint": self.fingerprint,
        }
        (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read a saved tokenizer. Raises UserError if a file is missing, damaged or of another tokenizer."""
        folder = Path(folder)
        meta = _read_meta(folder / META_FILE)
        tokens = _read_ranks(folder / RANKS_FILE)
        if _fingerprint(tokens, meta["pattern"]) != meta["fingerprint"]:
            raise UserError(
                f"{folder}: {RANKS_FILE} and {META_FILE} do not belong together (fingerprint differs); "
                "copy both again from the same run, or train the tokenizer again with stage=tokenizer"
            )
        try:
            return cls(tokens, meta["pattern"])
        except ValueError as error:
            raise UserError(f"{folder}: not a usable tokenizer ({error}); train one with stage=tokenizer") from error


def checked_pattern(pattern: str) -> str:
    """Return the pattern, or the one of that name, if the regex engine takes it and it loses no character of Unicode.

    Raises UserError otherwise.
    """
    pattern, text = NAMED_PATTERNS.get(pattern, pattern), PROBE + _every_character()
    try:
        encoding = tiktoken.Encoding(
            "probe", pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
        )
        kept = encoding.decode(encoding.encode_ordinary(text))
    except Exception as error:  # the engine's own error type is not exported
        raise UserError(f"stage.pattern={pattern}: not a regular expression that tiktoken takes ({error})") from error
    if kept != text:
        lost = text[len(os.path.commonprefix([text, kept]))]
        raise UserError(
            f"stage.pattern={pattern}: leaves out parts of a text, such as {lost!r}; end it with |\\s+|. for what is "
            "left"
        )
    return pattern


def _every_character() -> str:
    """Return all characters of Unicode, each between letters, in short lines: engines look far ahead in long ones."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    return "\n".join("a".join(["", *characters[at : at + 100], ""]) for at in range(0, len(characters), 100))


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, max_chars: int, doc_cap: int, pattern: str = SPLIT_PATTERN
) -> Tokenizer:
    """Train on the first `doc_cap` characters of each document until `max_chars` characters have been read.

    The cap keeps a few huge documents from ruling the merges. Raises UserError if the text does not yield `vocab_size`
    tokens.
    """

    def cropped() -> Iterator[str]:
        left, cap = int(max_chars), int(doc_cap)
        for document in documents:
            text = document[: min(cap, left)]
            left -= len(text)
            yield text
            if left <= 0:
                return

    return Tokenizer.train(cropped(), vocab_size, pattern)


def _fingerprint(tokens: Sequence[bytes], pattern: str) -> str:
    """Return a SHA-256 over pattern, tokens in id order and special tokens, each preceded by its length."""
    digest = hashlib.sha256()
    for item in (pattern.encode(), *tokens, *(name.encode() for name in SPECIAL_TOKENS)):
        digest.update(len(item).to_bytes(4, "little") + item)
    return digest.hexdigest()


def without_surrogates(text: str) -> str:
    """Replace lone surrogates (from JSON escapes) by U+FFFD as tiktoken does; the trainer stops at them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pieces(text: str) -> Iterator[str]:
    """Yield the text, cut inside whitespace runs that are too long for the regex engine."""
    start = 0
    if len(text) > MAX_WHITESPACE_RUN:
        for match in _LONG_WHITESPACE.finditer(text):
            yield text[start : match.end()]
            start = match.end()
    if start < len(text) or not text:
        yield text[start:]


def _read_file(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({reason_of(error, path)}); a tokenizer folder holds {RANKS_FILE} and "
            f"{META_FILE}. Train a tokenizer with stage=tokenizer"
        ) from error


def _read_meta(path: Path) -> dict:
    """Return the content of fathom_tokenizer.json, checked. Raises UserError if it is damaged or of another version."""
    try:
        meta = parse_json(_read_file(path), path)
        if not isinstance(meta, dict) or not all(isinstance(meta[k], str) for k in ("pattern", "fingerprint")):
            raise ValueError("pattern and fingerprint must be strings")
        version, specials = meta["format_version"], meta["special_tokens"]
    except UserError:
        raise
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); copy it again or train a tokenizer (stage=tokenizer)") from error
    if version != FORMAT_VERSION or specials != list(SPECIAL_TOKENS):
        raise UserError(
            f"{path}: format_version {str(version)[:40]} with {str(specials)[:200]} is not what this version "
            f"of Fathom reads ({FORMAT_VERSION} with {list(SPECIAL_TOKENS)}); train the tokenizer again with "
            "stage=tokenizer"
        )
    return meta


def _read_ranks(path: Path) -> list[bytes]:
    """Return the tokens of tokenizer.tiktoken by id. Raises UserError that names a damaged line."""
    tokens = []
    for number, line in enumerate(_read_file(path).splitlines()):
        try:
            token, rank = line.split()
            if int(rank) != number:
                raise ValueError(f"rank {int(rank)}, expected {number}")
            tokens.append(base64.b64decode(token, validate=True))
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}: line {number + 1} is damaged ({error}); copy the file again, "
                "or train a tokenizer with stage=tokenizer"
            ) from error
    return tokens
