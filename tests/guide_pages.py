"""Pages of docs/guide: what they hold, what is wrong with them, and lines of code links put right."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEADINGS = (
    "The idea",
    "The formula",
    "In the code",
    "Try it",
    "What goes wrong",
    "What it costs",
    "Exercise",
)
FEWEST_LINKS, FEWEST_ROWS, LARGEST_PICTURE = 4, 3, 80_000
# [`llm/model/gpt.py` `class GPT`](../../llm/model/gpt.py#L120): path, text of that line, target, line.
CODE_LINK = re.compile(r"\[`([^`\s]+)`\s+`([^`]+)`\]\(([^)\s#]+)#L(\d+)\)")
ANY_LINE_LINK = re.compile(r"\]\([^)\s]*#L\d+[^)\s]*\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
HEADER = ["printed", "expected", "within"]
NUMBER = re.compile(r"[-+]?(?:nan\b|inf\b|(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d+)?)", re.I)


@dataclass(frozen=True)
class CodeLink:
    """Link of a page to a line of code."""

    page: Path
    path: str  # as the text of the link names the file, from the top of the repository
    text: str  # what the line must contain
    target: str  # as the link has it, relative to the page
    line: int
    start: int  # position of the link in the page
    end: int

    @property
    def file(self) -> Path:
        return (self.page.parent / self.target).resolve()

    def lines(self) -> list[int]:
        """Return the numbers of all lines of the file that contain the text."""
        lines = self.file.read_text(encoding="utf-8").split("\n")
        return [number for number, line in enumerate(lines, start=1) if self.text in line]

    def problem(self, root: Path) -> str | None:
        """Return what is wrong with the link, None if nothing is."""
        if not (root / self.path).is_file():
            return f"{self.path} does not exist"
        if self.file != (root / self.path).resolve():
            return f"{self.path}: the target {self.target} is another file"
        found = self.lines()
        if self.line in found:
            return None
        where = f"; lines {found} do" if found else ", nor does another line"
        return f"{self.path}: line {self.line} does not contain {self.text!r}{where}"


@dataclass(frozen=True)
class Row:
    """Number that the command of a chapter prints behind some words."""

    words: str
    expected: float
    within: float

    def value(self, output: str) -> float | None:
        """Return the last number that the output has behind the words, None if there is none."""
        words = r"\s+".join(re.escape(word) for word in self.words.split())
        end = r"(?!\w)" if self.words[-1].isalnum() else ""  # pass@1 is not the beginning of pass@16
        found = re.findall(rf"(?<!\w){words}{end}[\s:=|]*({NUMBER.pattern})", output, NUMBER.flags)
        return number(found[-1]) if found else None

    def holds(self, value: float | None) -> bool:
        """Return True for a number within the bounds; both ends belong to them."""
        return value is not None and abs(value - self.expected) <= self.within + 1e-12


def number(text: str) -> float:
    """Return the number of a text such as 3.42, 18,603 or 75%; ValueError if there is none."""
    return float(text.strip().strip("`").removesuffix("%").replace(",", ""))


def chapters(root: Path) -> list[Path]:
    """Return the chapters of the guide, in their order."""
    return sorted((root / "docs/guide").glob("[0-9][0-9]-*.md"))


def pages(root: Path) -> list[Path]:
    """Return all pages of the guide, chapters and others."""
    return sorted((root / "docs/guide").glob("*.md"))


def code_links(page: Path) -> Iterator[CodeLink]:
    """Yield the links of a page to lines of code."""
    for found in CODE_LINK.finditer(page.read_text(encoding="utf-8")):
        path, text, target, line = found.groups()
        yield CodeLink(page, path, " ".join(text.split()), target, int(line), *found.span())


def link_problems(page: Path, root: Path) -> list[str]:
    """Return what is wrong with the links of a page to lines of code."""
    text = page.read_text(encoding="utf-8")
    wrong = [problem for link in code_links(page) if (problem := link.problem(root))]
    if (count := len(ANY_LINE_LINK.findall(text))) != (good := len(list(code_links(page)))):
        wrong.append(f"{count - good} links to lines are not of the form [`path` `text`](path#L1)")
    return wrong


def sections(text: str) -> dict[str, str]:
    """Return the text below each heading of a page by the heading; code blocks hold no headings."""
    found, name, fenced = {"": ""}, "", False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if not fenced and (heading := re.match(r"(#{1,2}) +(.+?) *$", line)):
            name = heading[0] if heading[1] == "#" else heading[2]
            found[name] = ""
        else:
            found[name] += line + "\n"
    return found


def command(page: Path) -> str:
    """Return the bash block of a chapter's "Try it"; ValueError if it has none or several."""
    text = sections(page.read_text(encoding="utf-8")).get("Try it", "")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    if len(blocks) != 1:
        raise ValueError(f'"Try it" has {len(blocks)} bash blocks, not one')
    return blocks[0]


def rows(page: Path) -> list[Row]:
    """Return the table of a chapter's "Try it"; ValueError where it is missing, too short or no numbers."""
    text = sections(page.read_text(encoding="utf-8")).get("Try it", "")
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in re.findall(r"^\|.*", text, re.M)]
    if HEADER not in lines:
        raise ValueError(f'"Try it" has no table with the header | {" | ".join(HEADER)} |')
    table = lines[lines.index(HEADER) + 2 :]
    if len(table) < FEWEST_ROWS:
        raise ValueError(f"the table has {len(table)} rows, fewer than {FEWEST_ROWS}")
    if bad := [row for row in table if len(row) != len(HEADER) or not row[0]]:
        raise ValueError(f"rows without three cells: {bad}")
    return [Row(words.strip("`"), number(expected), number(within)) for words, expected, within in table]


def chapter_problems(page: Path) -> list[str]:
    """Return what is wrong with the form of a chapter: headings, links, pictures, command and table, exercise."""
    text = page.read_text(encoding="utf-8")
    parts, wrong = sections(text), []
    title, *rest = [name for name in parts if name] or [""]
    if not title.startswith("# "):
        wrong.append("does not begin with # and a title")
    elif not parts[title].strip():
        wrong.append("has no paragraph below its title")
    if tuple(rest) != HEADINGS:
        wrong.append(f"has the headings {rest}, not {list(HEADINGS)}")
    if (count := len(list(code_links(page)))) < FEWEST_LINKS:
        wrong.append(f"has {count} links to lines of code, fewer than {FEWEST_LINKS}")
    pictures = PICTURE.findall(text)
    if not pictures:
        wrong.append("has no picture")
    for alt, path in pictures:
        file = page.parent / path
        if not alt.strip() or not file.is_file() or file.stat().st_size > LARGEST_PICTURE:
            wrong.append(f"{path}: no words for those who cannot see, no such file, or above {LARGEST_PICTURE:,} bytes")
    for part in (command, rows):
        try:
            part(page)
        except ValueError as error:
            wrong.append(str(error))
    if not re.search(r"<details>\s*<summary>Answer</summary>.*\S.*</details>", parts.get("Exercise", ""), re.DOTALL):
        wrong.append("has no answer to its exercise")
    return wrong


def fix(page: Path, root: Path) -> tuple[list[str], list[str]]:
    """Write the lines of moved texts into the links of a page, the nearest where several lines have the text.

    Returns:
        what was changed, and what nobody but the writer can put right
    """
    text = page.read_text(encoding="utf-8")
    changed, left = [], []
    for link in reversed(list(code_links(page))):
        if not (problem := link.problem(root)):
            continue
        found = link.lines() if link.file.is_file() and link.file == (root / link.path).resolve() else []
        if not found:
            left.append(problem)
            continue
        line = min(found, key=lambda other: abs(other - link.line))
        old = text[link.start : link.end]
        text = text[: link.start] + old.replace(f"#L{link.line})", f"#L{line})") + text[link.end :]
        others = f" (of {len(found)} lines that have the text)" if len(found) > 1 else ""
        changed.append(f"{link.path} {link.text!r}: line {link.line} -> {line}{others}")
    if changed:
        page.write_text(text, encoding="utf-8")
    return changed[::-1], left[::-1]
