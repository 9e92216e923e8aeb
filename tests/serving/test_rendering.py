"""Hostile answers as the browser chat renders them: nothing is HTML, an image or a link with a hidden address."""

import random

import pytest

pytest.importorskip("gradio")
markdown_it = pytest.importorskip("markdown_it")  # a reader of Markdown, which rich brings along

from llm.serving.rendering import display, markdown, typed  # noqa: E402

IMAGE = "<img src=http://evil.example/a.png>"
READER = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
OURS = ("<code>", "</code>", "<pre><code>", "<span class=", "</span>")


def harmful(text: str, render=markdown) -> list[str]:
    """Return what a reader of Markdown takes for an image, a link or HTML not ours in the rendering of a message."""
    found = []
    for block in READER.parse(render(text)):
        for token in (block, *(block.children or ())):
            is_html = token.type in ("html_inline", "html_block")
            if token.type in ("image", "link_open") or is_html and not token.content.startswith(OURS):
                found.append(f"{token.type} {token.content} {token.attrs}")
            if is_html and "<img" in token.content:
                found.append(token.content)
    return found


def seen(rendered: str) -> str:
    """Return the text of a rendering that is one paragraph of plain text, to the letter."""
    opened, inline, closed = READER.parse(rendered) or [None] * 3
    if inline is None:
        return ""
    assert (opened.type, closed.type) == ("paragraph_open", "paragraph_close")
    assert {child.type for child in inline.children} <= {"text", "text_special"}, rendered
    return "".join(child.content for child in inline.children)


HOSTILE = {
    "html": IMAGE,
    "image": "![a](http://evil.example/a.png)",
    "image by reference": "![a][b]\n\n[b]: http://evil.example/a.png",
    "link": "[click](http://evil.example)",
    "link with a program": "[click](javascript:alert(1))",
    "fence without end": f"```\n{IMAGE}",
    "fence within a line": f"a ```\n{IMAGE}\n",
    "fence within a list": f"- ```\n{IMAGE}\n```\n{IMAGE}",
    "fence of a list item that ends": f"- a\n  ```\n{IMAGE}\n```",
    "fence as the address of a reference": f"[a]:\n```\n{IMAGE}\n```",
    "fence with a tick": f"```a`\n{IMAGE}\n```",
    "fence of tildes that holds ticks": f"~~~\n```\n~~~\n{IMAGE}\n~~~",
    "code in a table": f"|a|b|c|\n|-|-|-|\n| ` | {IMAGE} | ` |",
    "quote": f"> ```\n> a\n{IMAGE}",
    "drawing": f"```mermaid\n{IMAGE}\n```",
    "returns": f"```\r{IMAGE}\r```\r{IMAGE}",
    "code over two lines": f"`a\n{IMAGE}\nb`",
    "escaped already": f"\\{IMAGE} \\\\{IMAGE} &lt;img&gt;",
}


def test_the_reader_sees_what_is_not_escaped():
    assert [token.type for token in READER.parse("![a](b)")[1].children] == ["image"]
    assert READER.parse(IMAGE)[0].type == "html_block"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_text(name):
    assert harmful(HOSTILE[name]) == [] == harmful(HOSTILE[name], typed)
    assert "mermaid" not in markdown(HOSTILE[name])


def test_no_order_of_marks_opens_a_way():
    marks = [
        "```",
        "~~~",
        "````",
        "`",
        "``",
        "\n",
        "\n",
        "\n\n",
        " ",
        "   ",
        "    ",
        "- ",
        "> ",
        "1. ",
        "|",
        "\n|-|-|\n",
    ]
    marks += ["$$", "\\", "#", "*", "_", "a", "\t", "\r", "<", ">", "<pre>", "</code>", "<!--", "[b]: x\n"]
    marks += [*(IMAGE, "![a](b)", "[a](b)", "[a]", "[a]:", "<a href=b>", "<script>", "&lt;")] * 2
    rng = random.Random(16)
    for _ in range(1000):
        text = "".join(rng.choices(marks, k=rng.randint(2, 14)))
        assert harmful(text) == [], text
        assert seen(typed(text)) == text.replace("\r\n", "\n").replace("\r", "\n"), text


def test_a_block_that_is_closed_keeps_its_language_and_text():
    code = "for i in range(3):\n    print(i < 2, a[i])\n"
    assert markdown(f"so\n```python\n{code}```\n") == f"so\n\n```python\n{code}```\n\n"


def test_answers_are_markdown_without_html():
    assert markdown("**bold**, 2*3*4 and 5 * 6") == r"**bold**, 2\*3\*4 and 5 * 6"
    assert markdown("<b>x</b> `i` a\\b") == r"\<b>x\</b> `i` a\\b"
    assert markdown("so\n#### 12\n# Title\n#### Title") == "so\n\\#### 12\n# Title\n#### Title"
    assert markdown("a\n```py\n<a*b*c>\n#### 1\n```\n<") == "a\n\n```py\n<a*b*c>\n#### 1\n```\n\n\\<"
    assert markdown("  ~~~\n  x\n `````\n ~~~~ \n") == "\n\n``````\nx\n`````\n``````\n\n"
    assert markdown("`<b>` `_a|b_`") == "<code>&#60;b&#62;</code> <code>&#95;a&#124;b&#95;</code>"
    call = [{"type": "python", "text": "2*3"}, {"type": "python_output", "text": "6"}, {"type": "text", "text": "6"}]
    assert markdown(call) == '<span class="tool" title="calculator">2&#42;3 &#61; 6</span>6'
    assert markdown(call[:1]) == '<span class="tool" title="calculator">2&#42;3</span>'
    assert markdown("a", ["<note>"]) == 'a\n\n<span class="note">&#60;note&#62;</span>'


@pytest.mark.parametrize(
    "text",
    [
        "# no title",
        "1. one\n2. two",
        "*a* _b_ `c` ~~d~~",
        "    x  y\n\n\tz",
        "a\n---",
        "&amp; &#42; www.example.org",
        "| a |\n|-|",
    ],
)
def test_what_was_typed_is_shown_to_the_letter(text):
    assert seen(typed(text)) == text
    assert seen(display([{"role": "user", "content": text}])[0]["content"]) == text


def test_notes_and_the_speed_stand_below_an_answer():
    message = {"role": "assistant", "content": "a", "notes": ["cut"], "speed": "3 tokens, 9 per second"}
    (shown,) = display([message])
    assert shown["content"].startswith('a\n\n<span class="note">cut</span>') and "9 per second" in shown["content"]
