"""Messages as the page shows them: questions as they were typed, answers in Markdown without HTML, images and links."""

import re
from collections.abc import Iterator, Sequence

from llm.serving.chat import Message
from llm.tokenizer.chat_format import content_text, split_calls

_FENCE = re.compile(r"( {0,3})(`{3,}|~{3,})[ \t]*([\w+-]*)[^`]*")  # first line of a code block
_CODE = re.compile(r"(`[^`\n]*`)")
_HARMLESS = re.compile(r"[^<\[|]*")  # code that means nothing in HTML or Markdown, should its frame not hold
_ESCAPES = (
    (re.compile(r"[\\<\[]"), r"\\\g<0>"),  # raw HTML, backslashes, links and images
    (re.compile(r"(?<=[\w)])\*(?=[\w(])"), r"\\*"),  # 3*4*5 is a product, not emphasis
    (re.compile(r"^(?=#{1,6} *-?\$?\d)", re.MULTILINE), r"\\"),  # "#### 12" is a result, not a heading
)

_SIGNS = re.compile(r"^ | $|[!-/:-@\[-`{-~\n\t]")  # what may mean something to a reader of Markdown or HTML


def display(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return what the chatbot component shows for the conversation."""
    return [{"role": m["role"], "content": _shown(m)} for m in messages]


def _shown(message: Message) -> str:
    if message["role"] == "user":
        return typed(content_text(message["content"]))
    return markdown(message["content"], [*message.get("notes", ()), *filter(None, [message.get("speed")])])


def typed(text: str) -> str:
    """Return Markdown that shows a text letter by letter: one paragraph, in which all signs are character references.

    The style of the page keeps its blanks and line breaks.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
    return _SIGNS.sub(lambda sign: f"&#{ord(sign[0])};", text)


def markdown(content: str | list[dict[str, str]], notes: list[str] | tuple[str, ...] = ()) -> str:
    """Return a message in Markdown: its text, calculator calls like `12*3 = 36` in a frame, notes in small."""
    parts = [(False, content)] if isinstance(content, str) else split_calls(content)
    pieces = [_tool(text) if is_call else escape(text) for is_call, text in parts]
    return "".join(pieces) + "".join(f'\n\n<span class="note">{_verbatim(note)}</span>' for note in notes)


def _tool(text: str) -> str:
    return f'<span class="tool" title="calculator">{_verbatim(text)}</span>'


def _verbatim(text: str) -> str:
    """Return text that means nothing in HTML or Markdown: every sign becomes a character reference."""
    return re.sub(r"[^\w ]|_", lambda sign: f"&#{ord(sign[0])};", text)


def escape(text: str) -> str:
    """Return text in which Markdown stays Markdown, but HTML, links, images, products and `#### 12` appear as written.

    A code block is framed anew, so that nothing around it can open it; one that has no end (yet) is escaped.
    """
    pieces, lines = [], []
    rest = iter(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    for line in rest:
        if start := _FENCE.fullmatch(line):
            pieces += [_prose("\n".join(lines)), _block(start, rest)]
            lines = []
        else:
            lines.append(line)
    return "".join([*pieces, _prose("\n".join(lines))])


def _block(start: re.Match, rest: Iterator[str]) -> str:
    """Return the code block behind its first line, which `start` has matched; takes its lines from `rest`."""
    indent, fence, language = len(start[1]), start[2], start[3]
    end = re.compile(rf" {{0,3}}{re.escape(fence)}{fence[0]}*[ \t]*")
    lines = []
    for line in rest:
        if end.fullmatch(line):
            code = "\n".join(lines)
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
            language = "" if language == "mermaid" else language  # a drawing may load images
            return f"\n\n{fence}{language}\n{code}\n{fence}\n\n"
        lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    return f"\n\n<pre><code>{_verbatim(chr(10).join(lines))}</code></pre>\n\n"


def _prose(text: str) -> str:
    """Return text outside of code blocks with its HTML, links, images, products and results escaped."""
    pieces = _CODE.split(text)
    for i in range(0, len(pieces), 2):
        for pattern, replacement in _ESCAPES:
            pieces[i] = pattern.sub(replacement, pieces[i])
    for i in range(1, len(pieces), 2):
        if not _HARMLESS.fullmatch(pieces[i]):
            pieces[i] = f"<code>{_verbatim(pieces[i][1:-1])}</code>"
    return "".join(pieces)
