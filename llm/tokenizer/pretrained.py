"""Vocabularies trained elsewhere, with our special tokens behind them: tiktoken's and tokenizer.json files."""

from pathlib import Path

from llm.errors import UserError
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.compression import SAMPLE_TEXTS, read_hf_tokenizer, tiktoken_encoding
from llm.tokenizer.hf_files import byte_alphabet, merge_pair
from llm.utils.files import parse_json

BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def load_pretrained(name: str, key: str = "stage.pretrained") -> Tokenizer:
    """Load a tiktoken encoding such as cl100k_base, or the byte-level BPE of a Hugging Face tokenizer.json.

    Its own special tokens are left out; ours come behind its last token. Raises UserError if the vocabulary is of
    another kind, or if the original gives other tokens on texts of several kinds.
    key: what asks for it, named in errors.
    """
    if Path(name).suffix == ".json":
        original = read_hf_tokenizer(key, Path(name))
        tokenizer = _from_hf(name, key, original.to_str())

        def encode(text: str) -> list[bytes]:
            return [_bytes_of(token) for token in original.encode(text, add_special_tokens=False).tokens]
    else:
        encoding = tiktoken_encoding(key, name)
        ranks = encoding._mergeable_ranks
        tokenizer = _tokenizer(name, key, sorted(ranks, key=ranks.get), encoding._pat_str)

        def encode(text: str) -> list[bytes]:
            return encoding.decode_tokens_bytes(encoding.encode_ordinary(text))

    for kind, text in SAMPLE_TEXTS.items():
        if [tokenizer.tokens[i] for i in tokenizer.encode(text)] != encode(text):
            raise UserError(
                f"{key}={name}: tokens of {kind} text differ from the original's, so its merges do not "
                "follow the order of its ids; train a tokenizer of your own, or choose one such as cl100k_base"
            )
    return tokenizer


def _from_hf(name: str, key: str, text: str) -> Tokenizer:
    content = parse_json(text.encode(), name)
    model, pattern = content["model"], _pattern_of(content["pre_tokenizer"])
    if model["type"] != "BPE" or model.get("byte_fallback") or pattern is None:
        raise UserError(
            f"{key}={name}: a {model['type']} tokenizer whose text is not split by one pattern into bytes; "
            "only byte-level BPE can be used, such as that of GPT-2, Llama 3 or Qwen"
        )
    if kind := (content.get("normalizer") or {}).get("type"):
        print(f"{key}={name}: its normalizer ({kind}) is left out: text is encoded as it stands", flush=True)
    special = {token["content"] for token in content.get("added_tokens", [])}
    tokens = [t for t in sorted(model["vocab"], key=model["vocab"].get) if t not in special]
    try:
        return _tokenizer(name, key, [_bytes_of(token) for token in tokens], pattern)
    except KeyError as error:
        raise UserError(f"{key}={name}: {error} in a token is not a byte of byte-level BPE") from error


def _bytes_of(token: str) -> bytes:
    return bytes(BYTE_OF[character] for character in token)


def _pattern_of(pre_tokenizer: dict | None) -> str | None:
    """Return the regular expression that cuts text into pieces; None if the text is cut in another way."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    splits = [p["pattern"].get("Regex") for p in parts if p and p["type"] == "Split" and not p.get("invert")]
    byte_level = [p for p in parts if p and p["type"] == "ByteLevel" and not p.get("add_prefix_space")]
    if len(byte_level) != 1 or len(parts) != 1 + len(splits):
        return None
    if byte_level[0].get("use_regex", True):
        return GPT2_PATTERN if not splits else None
    return splits[0] if len(splits) == 1 else None


def _tokenizer(name: str, key: str, tokens: list[bytes], pattern: str) -> Tokenizer:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(tokens, pattern)
        for token in tokens:  # it is saved with its merges
            if len(token) > 1:
                merge_pair(token, ranks)
    except ValueError as error:
        raise UserError(f"{key}={name}: {error}; choose another one, such as cl100k_base") from error
    return tokenizer
