"""The formats of chat rows, declared in one table, and the keys that rows of them may have.

A key of a row is as strict as a key of the configuration. It is used by the row's format (`FORMATS`), or refused with
its reason (`REFUSED`), or known to say nothing about the conversation (`IGNORED`). Any other key is an error that names
it. A key without a value (null, "", [] or {}) counts as absent, because tables give one to every row.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from llm.errors import UserError

ROLES = ("system", "user", "assistant")
FROM_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation")
SWITCHES = ("weight", "train", "loss")  # of a message: 0 or false = it is read, but not trained; 0.5 = half as much

TOOLS = "the model has no tools but its calculator (parts of type python), so the call or its result would be lost"
PREFERENCE = (
    "a row of a preference, of which a chat would train one answer only: say which, for one "
    "fields={user: prompt, assistant: chosen} with ignore=[rejected]"
)
REASONING = "the chat format has no place for reasoning, so the answer would be trained without it"

# Keys that change the meaning of a row or message and that no format can use -> why.
REFUSED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id", "tool_choice"), TOOLS),
    **dict.fromkeys(("chosen", "rejected"), PREFERENCE),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), REASONING),
    **dict.fromkeys(
        ("image", "images", "image_url", "audio", "audios", "video", "videos"), "the model reads text only"
    ),
    "name": "the chat format cannot say who of several people speaks",
    "refusal": "the answer is a refusal beside its content, and would be lost",
}

# Keys that say nothing about the conversation: names, numbers, origins, grades.
IGNORED = frozenset(
    """
    id _id idx index uid uuid hash row row_id qid question_id prompt_id response_id conversation_id conv_id dialogue_id
    dialog_id session_id message_id message_tree_id parent_id user_id tree_state

    source sources dataset dataset_name data_source origin url link license licence author title model model_name
    generator synthetic created created_at created_date date timestamp split version views avatarUrl metadata meta

    category categories topic topics full_topic subject subcategory domain tags keywords task task_type task_name type
    lang language level difficulty quality score scores score_chosen score_rejected rating rank grade review_count
    review_result detoxify emojis upvotes likes

    turn turns n_turns num_turns num_tokens token_count length markdown parallel_tool_calls skip_prompt_formatting
    """.split()
)


@dataclass(frozen=True)
class Format:
    """One format of rows: the keys that it needs, the other keys that it uses, and how it becomes messages.

    read(row, reading): the messages, a list of {"role", "content"} and, where the weight is not 1, "train": the weight,
    or False for 0.
    """

    name: str
    needs: tuple[str, ...]
    uses: tuple[str, ...]
    read: Callable[[dict, "Reading"], list]


@dataclass(frozen=True)
class Reading:
    """Configuration of reading the rows of a task. key: the place in it, such as data.tasks.chat."""

    key: str = "data.tasks.<name>"
    fields: Mapping[str, str] = field(default_factory=dict)  # name in the table -> column of the row, dotted if nested
    roles: Mapping[str, str] = field(default_factory=dict)  # role as the rows spell it -> one of ROLES
    ignore: Collection[str] = ()  # further keys without meaning
    merge_neighbours: bool = False

    def role(self, name: Any, names: Mapping[str, str], number: int) -> str:
        """Return the role that a message calls `name`. Raises UserError for an unknown one and for those of tools."""
        role = self.roles.get(name, names.get(name)) if isinstance(name, str) else None
        if role is None and name in TOOL_ROLES:
            raise UserError(f"message {number} has role {name!r}: {TOOLS}. {self.way_out()}")
        if role is None:
            declare = f"; another name of a role is declared by {self.key}.roles={{{name}: <{' or '.join(ROLES)}>}}"
            raise UserError(
                f"message {number} has role {_short(name)}, expected one of {', '.join(ROLES)}"
                f"{declare if isinstance(name, str) else ''}"
            )
        return role

    def way_out(self, *keys: str) -> str:
        """Return what to do about rows that cannot be used, or that can be without `keys`."""
        skip = "Leave such rows out with data.bad_rows=skip"
        return f"{skip}, or read them without it: {self.key}.ignore=[{','.join(keys)}]" if keys else skip

    def check_keys(self, thing: Mapping, used: Collection[str], what: str) -> None:
        """Raise UserError for a key of a row, message or part (`what`) that is neither used nor without meaning.

        A key with dots stands in an object inside the row.
        """
        unknown = []
        for key, value in thing.items():
            name = key.rpartition(".")[2]
            if key in used or name in IGNORED or key in self.ignore or _absent(value):
                continue
            if name in REFUSED:
                if value not in ("[]", "{}"):
                    raise UserError(f"{key!r} of {what}: {REFUSED[name]}. {self.way_out(key)}")
                continue
            unknown.append(key)
        if unknown:
            names, listed = ", ".join(map(repr, unknown)), ",".join(map(str, unknown))
            raise UserError(
                f"{what} has {'a key' if len(unknown) == 1 else 'keys'} of unknown meaning: {names}. Say which column "
                f"is which, as in {self.key}.fields={{user: question, assistant: answer}}, or that it means nothing: "
                f"{self.key}.ignore=[{listed}]"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Lists of messages


def read_messages(messages: Any, reading: Reading, key: str = "messages") -> list[dict]:
    """Return the messages of a list of {role, content} or of ShareGPT's {from, value}, each checked key by key."""
    if not isinstance(messages, list):
        raise UserError(f"{key!r} must be a list of messages, found {_kind(messages)}")
    return [
        message if _is_plain(message) else _message(message, number, reading)
        for number, message in enumerate(messages, start=1)
    ]


def _is_plain(message: Any) -> bool:
    """Return True for a message of a known role and a text and no other key: by far the most are."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ROLES
        and type(message.get("content")) is str
    )


def takes_turns(row: Any) -> bool:
    """Return True for the commonest row: `messages` alone, each plain, none empty, no two of one role in a row."""
    messages = row.get("messages") if type(row) is dict and len(row) == 1 else None
    if type(messages) is not list:
        return False
    before = None
    for message in messages:
        if not _is_plain(message):
            return False
        role = message["role"]
        if role == before or not message["content"][:1].isalnum():
            return False
        before = role
    return True


def _message(message: Any, number: int, reading: Reading) -> dict:
    if not isinstance(message, Mapping):
        raise UserError(f"message {number} must be an object with role and content, found {_kind(message)}")
    where = f"message {number}"
    speaker = "role" if "role" in message and message["role"] is not None else "from"
    role = reading.role(message.get(speaker), _FROM if speaker == "from" else _ROLE, number)
    holders = [key for key in ("content", "value", "text") if message.get(key) is not None]
    if len(holders) > 1:
        raise UserError(f"{where} ({role}) has both {holders[0]!r} and {holders[1]!r}: its text must be one of them")
    reading.check_keys(message, (speaker, *holders, *SWITCHES), f"{where} ({role})")
    if not holders:
        raise UserError(f"{where} ({role}): content must be a string or a list of parts, found nothing")
    content = _content(message[holders[0]], role, where, reading)
    weight = _weight(message, where) if role == "assistant" else 1.0
    return {"role": role, "content": content} | ({} if weight == 1 else {"train": weight or False})


_ROLE = {role: role for role in ROLES}
_FROM = _ROLE | FROM_ROLES


def _content(content: Any, role: str, where: str, reading: Reading) -> Any:
    if isinstance(content, str) or not isinstance(content, list):
        return content
    parts = []
    for part in content:
        if isinstance(part, Mapping):
            reading.check_keys(part, ("type", "text", *REFUSED), f"a part of {where} ({role})")
            part = {"type": part.get("type"), "text": part.get("text")}
        parts.append(part)
    return parts


def _weight(message: Mapping, where: str) -> float:
    """Return the factor on the loss of a message, from 0 to 1: the product of those that its keys give."""
    weight = 1.0
    for key in SWITCHES:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(
                f"{key!r} of {where} is {_short(value)}: must be a number from 0 (not trained) to 1, false or true"
            )
        weight *= value
    return weight


def _lists(key: str) -> Callable[[dict, Reading], list]:
    """Return the reader of rows with a list of messages, and with a system message and the prompt beside it."""

    def read(row: dict, reading: Reading) -> list:
        messages = read_messages(row[key], reading, key)
        prompt = row.get("prompt")
        asked = [message["content"] for message in messages if message["role"] == "user"][:1]
        if not _absent(prompt) and asked != [prompt]:
            raise UserError(f"'prompt' beside {key!r} is not the first question there, so one of the two would be lost")
        return _with_system(row, messages)

    return read


def _with_system(row: dict, messages: list) -> list:
    """Return the messages behind the row's own system message; UserError where the messages begin with another."""
    keys = [key for key in ("system", "system_prompt") if not _absent(row.get(key))]
    texts = list(dict.fromkeys(_text(key, row[key]) for key in keys))
    if messages and messages[0]["role"] == "system":
        texts += [messages[0]["content"]] * (messages[0]["content"] not in texts)
        messages = messages[1:]
    if len(texts) > 1:
        raise UserError(f"{keys[0]!r} and another system message of the row differ: a conversation has one")
    return [*({"role": "system", "content": text} for text in texts), *messages]


# ---------------------------------------------------------------------------------------------------------------------
# Single exchanges


def _exchange(asked: str, answered: str) -> Callable[[dict, Reading], list]:
    """Return the reader of a question and its answer under the names of two keys; each a text or a list of messages.

    Text of `input` and of `context` stands behind the question, with a blank line between; `history` goes before.
    """

    def read(row: dict, reading: Reading) -> list:
        question, answer, whole = row[asked], row[answered], row.get("text")
        if not _absent(whole) and not (isinstance(whole, str) and str(question) in whole and str(answer) in whole):
            raise UserError(f"'text' does not repeat {asked!r} and {answered!r}, so it would be lost")
        more = {key: row[key] for key in ("input", "context") if key != asked and not _absent(row.get(key))}
        if isinstance(question, list):
            if more:
                raise UserError(f"{next(iter(more))!r} beside a list of messages in {asked!r}: put it into a message")
            messages = read_messages(question, reading, asked)
        else:
            texts = [_text(key, value) for key, value in ({asked: question} | more).items()]
            messages = [{"role": "user", "content": "\n\n".join(text for text in texts if text)}]
        if isinstance(answer, list):
            messages += read_messages(answer, reading, answered)
        else:
            messages.append({"role": "assistant", "content": _text(answered, answer)})
        return _with_system(row, [*_history(row), *messages])

    return read


def _history(row: dict) -> list:
    """Return the earlier turns of a row: pairs of a question and an answer."""
    history = row.get("history")
    if _absent(history):
        return []
    messages = []
    pairs = history if isinstance(history, list) else [history]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"'history' must be a list of [question, answer] pairs, found {_short(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# Other shapes


def _transcript(row: dict, reading: Reading) -> list:
    """Return the turns of one text that "USER:" and "ASSISTANT:" divide (Glaive)."""
    chat = _text("chat", row["chat"])
    pieces = re.split(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):", chat)
    if len(pieces) < 3 or pieces[0].strip():
        raise UserError(f"'chat' must be turns that begin with USER: or ASSISTANT:, found {_short(chat)}")
    if "FUNCTION RESPONSE" in pieces or "<functioncall>" in chat:
        raise UserError(f"'chat' calls a function: {TOOLS}. {reading.way_out()}")
    roles = {"USER": "user", "ASSISTANT": "assistant"}
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    texts = ((roles[who], text.strip().removesuffix("<|endoftext|>").strip()) for who, text in turns)
    messages = [{"role": role, "content": text} for role, text in texts]
    if isinstance(row.get("system"), str):
        row = row | {"system": row["system"].removeprefix("SYSTEM:").strip()}
    return _with_system(row, messages)


TREE_KEYS = ("role", "text", "replies", "deleted", "rank", "labels")


def _tree(row: dict, reading: Reading) -> list:
    """Return the best branch of a tree of messages (OASST): of each message the reply of the lowest rank.

    Messages without a rank come after those with one, in the order of the file; deleted ones are passed over. A
    question at the end that nobody answered is left out.
    """
    node, messages = row["prompt"], []
    while node is not None:
        if not isinstance(node, Mapping) or not isinstance(node.get("replies", []), list | None):
            raise UserError(f"'prompt' must be a message with a list of replies, found {_short(node)}")
        number = len(messages) + 1
        role = reading.role(node.get("role"), _FROM, number)
        reading.check_keys(node, TREE_KEYS, f"message {number} ({role})")
        messages.append({"role": role, "content": node.get("text")})
        replies = [
            reply for reply in node.get("replies") or [] if not (isinstance(reply, Mapping) and reply.get("deleted"))
        ]
        node = min(replies, key=_rank, default=None)
    return messages[:-1] if len(messages) > 1 and messages[-1]["role"] == "user" else messages


def _rank(reply: Any) -> float:
    rank = reply.get("rank") if isinstance(reply, Mapping) else None
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank):
        raise UserError(f"'rank' of a reply must be a number or null, found {_short(rank)}")
    return float("inf") if rank is None else rank


# ---------------------------------------------------------------------------------------------------------------------
# The table

SYSTEM = ("system", "system_prompt", "label")
AROUND = ("input", "context", "history", *SYSTEM)
# The first format whose keys a row has is the row's. `label` may stand in all but trees: false is a wrong answer (KTO).
FORMATS = (
    Format("messages", ("messages",), ("prompt", *SYSTEM), _lists("messages")),
    Format("ShareGPT", ("conversations",), ("prompt", *SYSTEM), _lists("conversations")),
    Format("OASST tree", ("message_tree_id", "prompt"), (), _tree),
    Format("transcript (Glaive)", ("chat",), SYSTEM, _transcript),
    Format("user and assistant", ("user", "assistant"), AROUND, _exchange("user", "assistant")),
    Format("Alpaca", ("instruction", "output"), ("text", *AROUND), _exchange("instruction", "output")),
    Format("Dolly", ("instruction", "response"), AROUND, _exchange("instruction", "response")),
    Format("prompt and completion", ("prompt", "completion"), AROUND, _exchange("prompt", "completion")),
    Format("prompt and response", ("prompt", "response"), AROUND, _exchange("prompt", "response")),
    Format("question and answer", ("question", "answer"), AROUND, _exchange("question", "answer")),
    Format("question and response", ("question", "response"), AROUND, _exchange("question", "response")),
    Format("query and response", ("query", "response"), AROUND, _exchange("query", "response")),
    Format("input and output", ("input", "output"), AROUND, _exchange("input", "output")),
)
FIELDS = tuple(dict.fromkeys(key for form in FORMATS for key in (*form.needs, *form.uses)))


def format_of(row: Mapping) -> Format | None:
    """Return the format of a row by its keys: the first of the table whose keys have values, else are there at all."""
    return _format(frozenset(key for key, value in row.items() if value is not None)) or _format(frozenset(row))


@lru_cache
def _format(keys: frozenset[str]) -> Format | None:
    return next((form for form in FORMATS if keys.issuperset(form.needs)), None)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{key!r} must be text, found {_kind(value)}")
    return value


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return f"{type(value).__name__} {value}" if value is not None else "null"
    return type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def pick(row: Mapping, column: str, what: str) -> Any:
    """Return the value of a column, or of a field inside it (`doc.question`); UserError beginning with `what`."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError(f"{what}: the row has no {column!r} (found: {', '.join(map(str, row)) or 'nothing'})")
        value = value[name]
    return value
