"""Tokenizers of transformers, behind the interface of `llm.tokenizer.bpe.Tokenizer`."""

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.tokenizer.bpe import without_surrogates
from llm.tokenizer.chat_format import content_text
from llm.tokenizer.compression import SAMPLE_TEXTS
from llm.tokenizer.pretrained import BYTE_OF

CALCULATOR_MARKS = ("python_start", "python_end", "output_start", "output_end")


class HFTokenizer:
    """Tokenizer of transformers with the methods of `llm.tokenizer.bpe.Tokenizer` that evaluation uses.

    Every sequence begins with `bos_id`: the BOS token or, where there is none, the end of text (as GPT-2 separates its
    documents). Special tokens written in a text are ordinary text, and lone surrogates become U+FFFD. stops: ids that
    end a completion. Raises UserError for a tokenizer with neither token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stops: Sequence[int] = ()):
        self.hf, self.vocab_size = tokenizer, vocab_size
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise UserError("model=hf: its tokenizer has neither a BOS nor an EOS token to begin a text with")
        self.bos_id = first
        ends = {*stops, tokenizer.eos_token_id, first}
        self.stop_ids = frozenset(i for i in ends if i is not None)
        self._lock = threading.Lock()  # a call with other options changes the tokenizer's state

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing added around it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, with nothing added around it."""
        texts = [without_surrogates(text) for text in texts]  # tokenizers raises a TypeError for one
        with self._lock:
            return self.hf(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt with the tokenizer's own additions, and its BOS token if that differs from EOS.

        As in lm-eval's models of transformers, special tokens in the text get their own ids, and nothing is added to a
        text that begins with the BOS token, as chats do.
        """
        adds = not (self.hf.bos_token and text.startswith(self.hf.bos_token))
        with self._lock:
            ids = self.hf(without_surrogates(text), add_special_tokens=adds, split_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        own = self.bos_id != self.hf.eos_token_id and ids[:1] != [self.bos_id]
        return [self.bos_id, *ids] if own else ids

    def encode_document(self, text: str) -> np.ndarray:
        """Return the first token and the ids of the text, int32."""
        return np.array([self.bos_id, *self.encode(text)], dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, with special tokens by name."""
        return self.hf.decode(list(ids), clean_up_tokenization_spaces=False)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the raw bytes of the ids, special tokens by name."""
        return b"".join(self._bytes[i] for i in ids)

    def special_id(self, name: str) -> int:
        """Return the id of one of Fathom's special tokens, which only models trained by it have. Raises ValueError."""
        found = self.hf.get_vocab().get(f"<|{name.strip('<|>')}|>")
        if found is None:
            raise ValueError(f"the tokenizer has no special token {name!r}")
        return found

    @cached_property
    def has_tools(self) -> bool:
        """True if there are tokens that mark calculator calls."""
        return all(f"<|{name}|>" in self.hf.get_vocab() for name in CALCULATOR_MARKS)

    @property
    def has_chat_format(self) -> bool:
        """True if the tokenizer has a chat template."""
        return bool(self.hf.chat_template)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], is_open: bool = False) -> str:
        """Return messages as text by the model's template, up to where the assistant answers or (is_open) goes on.

        Raises UserError for messages that the template refuses, as some do with a system message.
        """
        from jinja2 import TemplateError

        try:
            return self.hf.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=not is_open, continue_final_message=is_open
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses these messages: {error}") from error

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of messages up to the assistant's answer: by the model's template, else in plain words."""
        texts = [{"role": m["role"], "content": content_text(m["content"])} for m in messages]
        if self.has_chat_format:
            text = without_surrogates(self.chat_text(texts))
            with self._lock:
                return self.hf(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
        turns = [f"{m['role'].capitalize()}:\n{m['content']}\n\n" for m in texts]
        return [self.bos_id, *self.encode("".join(turns) + "Assistant:\n")]

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of every token, int32 (vocab_size,); 0 for special tokens.

        Raises UserError if they do not add up to the bytes of a text, as with tokenizers that change case or
        characters: their bits per byte would be those of another text. A space that some put before a text counts.
        """
        sizes = np.array([len(one) for one in self._bytes], dtype=np.int32)
        sizes[[i for i in self.special_ids if i < len(sizes)]] = 0
        for kind, text in SAMPLE_TEXTS.items():
            found, expected = int(sizes[self.encode(text)].sum()), len(text.encode())
            if found not in (expected, expected + 1):
                raise UserError(
                    f"eval=[bpb]: the tokens of {kind} text stand for {found} bytes, the text has {expected}: this "
                    "model's tokenizer changes the text, so bits per byte cannot be measured; leave bpb out"
                )
        return sizes

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        added = self.hf.added_tokens_decoder.items()
        return frozenset({*self.hf.all_special_ids, *(i for i, token in added if token.special)})

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Bytes of every id. Added tokens are stored as they are, others in the alphabet of their kind."""
        added = {i: str(token) for i, token in self.hf.added_tokens_decoder.items()}
        n = len(self.hf)
        tokens = self.hf.convert_ids_to_tokens(range(n))
        byte_level = all(_is_byte_level(token) for i, token in enumerate(tokens) if i not in added)
        to_bytes = _byte_level if byte_level else _pieces
        known = [
            added[i].encode() if i in added else to_bytes(token) if token is not None else b""
            for i, token in enumerate(tokens)
        ]
        return known + [b""] * max(0, self.vocab_size - n)  # rows that only pad the head


def _is_byte_level(token: str | None) -> bool:
    """Return True if a token is written in GPT-2's alphabet of bytes."""
    return token is None or all(character in BYTE_OF for character in token)


def _byte_level(token: str) -> bytes:
    """Return the bytes of a token of GPT-2 and its kin: a printable character per byte."""
    return bytes(BYTE_OF[character] for character in token)


def _pieces(token: str) -> bytes:
    """Return the bytes of a SentencePiece token: text with ▁ for a space, and <0x0A> for a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
