"""Read the tokenizer.pkl of nanochat, a pickled `tiktoken.Encoding`, without unpickling it.

`pickletools` splits the file into its instructions. The few that make up plain data are carried out here; no class is
looked up and nothing is called, so a forged file can do no more than be refused.
"""

import pickletools
from pathlib import Path
from typing import Any

from llm.errors import UserError, reason_of
from llm.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer

CLASS = ("tiktoken.core", "Encoding")
CONSTANTS = {"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "NONE": lambda: None}
LITERALS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
LITERALS |= {"BININT", "BININT1", "BININT2", "LONG1"}
IGNORED = {"PROTO", "FRAME", "STOP"}
MARK = object()


def read_tokenizer(path: Path) -> Tokenizer:
    """Return nanochat's tokenizer. Raises UserError for a file that is anything else than one pickled Encoding."""
    try:
        state = encoding_state(path.read_bytes())
        ranks, special = state["mergeable_ranks"], state["special_tokens"]
        tokens = sorted(ranks, key=ranks.get)
        if [ranks[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError("the ids of its tokens have gaps")
        if special != {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}:
            raise ValueError(
                f"its special tokens are {', '.join(map(str, special))}; needed: {', '.join(SPECIAL_TOKENS)}"
            )
        return Tokenizer(tokens, state["pat_str"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error, path)})") from error
    except Exception as error:  # noqa: BLE001  a forged or damaged file can fail in any way
        raise UserError(f"{path}: not a tokenizer of nanochat ({error})") from error


def encoding_state(data: bytes) -> dict[str, Any]:
    """Return the state in a pickled tiktoken.Encoding: pat_str, mergeable_ranks, special_tokens.

    Raises ValueError for any instruction beyond those of plain data and of this one class.
    """
    stack: list[Any] = []
    memo: list[Any] = []
    for instruction, value, _ in pickletools.genops(data):
        name = instruction.name
        if name in LITERALS:
            stack.append(value)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name == "MARK":
            stack.append(MARK)
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name not in IGNORED:
            _combine(name, stack)
    if len(stack) != 1 or not isinstance(stack[0], dict) or stack[0].get("class") != CLASS:
        raise ValueError("it does not hold one tiktoken.Encoding")
    return stack[0]["state"]


def _combine(name: str, stack: list[Any]) -> None:
    """Carry out an instruction that takes values from the stack."""
    if name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        if (module, attribute) != CLASS:
            raise ValueError(f"it names {module}.{attribute}")
        stack.append(CLASS)
    elif name == "NEWOBJ":
        arguments, kind = stack.pop(), stack.pop()
        if kind != CLASS or arguments != ():
            raise ValueError("it makes an object of another kind")
        stack.append({"class": CLASS})
    elif name == "BUILD":
        state = stack.pop()
        stack[-1]["state"] = state
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        stack[-1][key] = value
    elif name == "SETITEMS":
        start = len(stack) - 1 - stack[::-1].index(MARK)
        items = stack[start + 1 :]
        del stack[start:]
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    else:
        raise ValueError(f"it has the instruction {name}")
