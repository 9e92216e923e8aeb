"""The guide: its links to code lead to the right lines, its chapters have their form, and its runner finds what fails.

`python tests/test_guide.py --fix` writes the lines of moved code into the links.
`make test-guide` runs the commands of the chapters.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import guide_pages
import pytest
import run_guide
from processes import is_alive

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path("docs/guide/images/fake.png")
CHAPTER = """# A fake chapter

After it you can count.

![A line that rises](images/fake.png)

## The idea

See [`code.py` `def one`](../../code.py#L1) and [`code.py` `def two`](../../code.py#L5).

## The formula

$1 + 1 = 2$

## In the code

See [`code.py` `return 1`](../../code.py#L2) and [`code.py`
`return 2`](../../code.py#L6).

## Try it

```bash
# a comment is no heading
mkdir runs && python code.py
```

| printed | expected | within |
|---|---:|---:|
| bytes per token | 3.42 | 0.05 |
| `tokens` | 18,603 | 0 |
| share | 75% | 1 |

## What goes wrong

Nothing.

## What it costs

Nothing.

## Exercise

Count.

<details><summary>Answer</summary>

Two.

</details>
"""
CODE = """def one():
    return 1


def two():
    return 2


print("bytes per token: 9")
print("bytes per token: \\x1b[1m3.40\\x1b[0m, tokens = 18,603, | share | 75.0 % |")
"""


@pytest.fixture
def book(tmp_path):
    """A project with one good chapter, of which git tracks all files; returns (root, page)."""
    page = tmp_path / "docs/guide/01-fake.md"
    (tmp_path / PICTURE).parent.mkdir(parents=True)
    (tmp_path / PICTURE).write_bytes(b"png")
    (tmp_path / "code.py").write_text(CODE)
    page.write_text(CHAPTER)
    for arguments in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path, page


@pytest.mark.parametrize("page", guide_pages.pages(ROOT), ids=lambda page: page.stem)
def test_links_to_code_lead_to_their_lines(page):
    wrong = guide_pages.link_problems(page, ROOT)
    assert not wrong, "\n".join([f"{page.name}: python tests/test_guide.py --fix rewrites moved lines", *wrong])


@pytest.mark.parametrize("page", guide_pages.chapters(ROOT), ids=lambda page: page.stem)
def test_a_chapter_has_its_parts(page):
    assert guide_pages.chapter_problems(page) == []


GLOSSARY = ROOT / "docs/glossary.md"
TERMS = re.findall(r"^- .*(?:\n  .*)*", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)


def plain(text: str) -> str:
    """Return a text in small letters, with single spaces where it has line ends, hyphens and underscores."""
    return re.sub(r"[\s_-]+", " ", text.replace("`", "")).lower()


@pytest.mark.parametrize("entry", TERMS, ids=lambda entry: re.sub(r"\W+", "-", entry[2:26]).strip("-"))
def test_a_term_is_used_where_the_glossary_leads(entry):
    targets = re.findall(r"\]\(([^)#\s]+)\)", entry)
    assert targets, "no link to a page that uses the term"
    used = " ".join(plain((GLOSSARY.parent / target).read_text(encoding="utf-8")) for target in targets)
    missing = [
        term
        for term in re.findall(r"\*\*([^*]+)\*\*", entry)
        if not re.search(rf"(?<!\w){re.escape(plain(term))}(?:e?s)?(?!\w)", used)
    ]
    assert not missing, f"{missing}: not on {targets}"


def test_the_glossary_leads_to_every_chapter_and_has_each_term_once():
    text = GLOSSARY.read_text(encoding="utf-8")
    assert not [page.name for page in guide_pages.chapters(ROOT) if f"(guide/{page.name})" not in text]
    terms = [plain(term) for entry in TERMS for term in re.findall(r"\*\*([^*]+)\*\*", entry)]
    assert sorted(set(terms)) == sorted(terms)


# ---------------------------------------------------------------------------------------------------------------------
# The checks themselves


def test_a_good_chapter_has_no_problem(book):
    root, page = book
    assert guide_pages.chapter_problems(page) == []
    assert guide_pages.link_problems(page, root) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("## The formula", "## Formula", "has the headings"),
        ("## What it costs\n\nNothing.\n\n", "", "has the headings"),
        ("# A fake chapter\n", "", "does not begin with"),
        ("After it you can count.\n\n![A line that rises](images/fake.png)", "", "no paragraph below its title"),
        ("![A line that rises](images/fake.png)", "", "has no picture"),
        ("![A line that rises]", "![]", "no words for those who cannot see"),
        ("images/fake.png", "images/missing.png", "no such file"),
        ("[`code.py` `def one`](../../code.py#L1)", "code", "has 3 links to lines of code"),
        ("```bash", "```sh", "has 0 bash blocks"),
        ("| printed |", "| shown |", "no table with the header"),
        ("| share | 75% | 1 |\n", "", "the table has 2 rows"),
        ("| share | 75% | 1 |", "| share | most | 1 |", "could not convert"),
        ("| share | 75% | 1 |", "| share | 75% |", "rows without three cells"),
        ("Two.", "", "has no answer"),
    ],
)
def test_each_kind_of_bad_chapter_is_found(book, old, new, problem):
    _, page = book
    assert old in CHAPTER
    page.write_text(CHAPTER.replace(old, new))
    found = guide_pages.chapter_problems(page)
    assert any(problem in one for one in found), found


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("code.py#L1)", "code.py#L2)", r"line 2 does not contain 'def one'; lines \[1\] do"),
        ("`def one`", "`def none`", "nor does another line"),
        ("`code.py` `def one`", "`gone.py` `def one`", "gone.py does not exist"),
        ("(../../code.py#L1)", "(../code.py#L1)", "is another file"),
        ("[`code.py` `def one`](../../code.py#L1)", "[code](../../code.py#L1)", "1 links to lines are not of the form"),
    ],
)
def test_each_kind_of_bad_link_is_found(book, old, new, problem):
    root, page = book
    assert old in CHAPTER
    page.write_text(CHAPTER.replace(old, new))
    (found,) = guide_pages.link_problems(page, root)
    assert re.search(problem, found), found


def test_the_fixer_follows_moved_lines_and_leaves_what_is_gone(book):
    root, page = book
    (root / "code.py").write_text("import os\n\n" + CODE.replace("def two", "def three"))
    changed, left = guide_pages.fix(page, root)
    assert changed == [
        "code.py 'def one': line 1 -> 3",
        "code.py 'return 1': line 2 -> 4",
        "code.py 'return 2': line 6 -> 8",
    ]
    assert left == ["code.py: line 5 does not contain 'def two', nor does another line"]
    assert page.read_text() == CHAPTER.replace("#L1)", "#L3)").replace("#L2)", "#L4)").replace("#L6)", "#L8)")
    assert guide_pages.fix(page, root) == ([], left)


def test_the_fixer_takes_the_nearest_of_several_lines(book):
    root, page = book
    (root / "code.py").write_text("\n" + CODE + "\n" * 30 + "def one_more():\n    return 10\n")
    changed, left = guide_pages.fix(page, root)
    assert changed[0] == "code.py 'def one': line 1 -> 2 (of 2 lines that have the text)" and not left


@pytest.mark.parametrize(
    ("output", "value"),
    [
        ("loss: 3.5", 3.5),
        ("loss = -1e-3 and more", -1e-3),
        ("| final loss | 1,234.5 |", 1234.5),
        ("loss 3\nloss .25 nats", 0.25),
        ("loss 3.", 3.0),
        ("gloss 3", None),
        ("loss of 3", None),
        ("loss -", None),
        ("", None),
    ],
)
def test_the_last_number_behind_the_words_is_read(output, value):
    assert guide_pages.Row("loss", 0, 0).value(output) == value


def test_words_are_not_the_beginning_of_longer_ones():
    output = "pass@1: 0.145\npass@16: 0.541\n"
    assert guide_pages.Row("pass@1", 0, 0).value(output) == 0.145
    assert guide_pages.Row("pass@16", 0, 0).value(output) == 0.541


def test_bounds_belong_to_what_is_expected_and_nan_does_not():
    row = guide_pages.Row("loss", 0.3, 0.1)
    assert row.holds(0.4) and row.holds(0.2) and not row.holds(0.41) and not row.holds(None)
    assert not row.holds(row.value("loss 0.3\nloss nan")) and not row.holds(row.value("loss inf"))


# ---------------------------------------------------------------------------------------------------------------------
# The runner


def test_the_runner_runs_a_chapter_in_a_copy(book, capsys):
    root, _ = book
    assert run_guide.main([], root) == 0
    table = capsys.readouterr().out.splitlines()[-1]
    assert table.startswith("| 01-fake | ") and table.endswith("| bytes per token 3.4, tokens 18603, share 75 | yes |")
    assert not (root / "runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("3.42 | 0.05", "3.50 | 0.05", "bytes per token: 3.4, expected 3.5 within 0.05"),
        ("| share |", "| portion |", "printed no number behind 'portion'"),
        ("python code.py", "python code.py && false", "ended with status 1"),
        ("python code.py", "python code.py; false; true", "ended with status 1"),
        ("python code.py", "false | python code.py", "ended with status 1"),
        ("python code.py", "python code.py && sleep 60", "longer than 3 s"),
    ],
)
def test_the_runner_says_what_is_wrong(book, capsys, old, new, problem):
    root, page = book
    assert old in CHAPTER
    page.write_text(CHAPTER.replace(old, new))
    assert run_guide.main(["01", "--limit", "3"], root) == 1
    printed = capsys.readouterr().out
    assert f"wrong: {problem}" in printed and printed.rstrip().endswith("| no |")


def test_what_a_chapter_starts_ends_with_it(book, tmp_path):
    root, page = book
    page.write_text(CHAPTER.replace("python code.py", f"sleep 600 & echo $! > {tmp_path}/pid; python code.py"))
    begin = time.monotonic()
    assert run_guide.main([], root) == 0
    assert time.monotonic() - begin < 300 and not is_alive(int((tmp_path / "pid").read_text()))


def test_a_name_that_fits_no_chapter_is_refused(book, capsys):
    root, page = book
    with pytest.raises(SystemExit):
        run_guide.main(["07"], root)
    assert "no chapter begins with ['07']; there are ['01-fake']" in capsys.readouterr().err
    page.unlink()
    with pytest.raises(SystemExit):
        run_guide.main([], root)
    assert "has no chapter" in capsys.readouterr().err


def fix_all() -> int:
    """Put the links of all pages right, say what was changed and return 1 if something is left to the writer."""
    wrong = False
    for page in guide_pages.pages(ROOT):
        changed, left = guide_pages.fix(page, ROOT)
        print("".join(f"{page.name}: {line}\n" for line in changed), end="")
        print("".join(f"{page.name}: cannot be fixed here: {line}\n" for line in left), end="", file=sys.stderr)
        wrong |= bool(left)
    return int(wrong)


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit("usage: python tests/test_guide.py --fix")
    sys.exit(fix_all())
