"""The documentation says what is there: links, files, targets, commands, keys and the drawing of the packages.

`python tests/test_docs.py` draws the packages in docs/design.md anew, after their imports have changed.
"""

import re
import runpy
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import grimp
import pytest

from llm.cli.compose import compose, parse
from llm.cli.overrides import check_overrides, config_groups, group_options
from llm.config.schema import known_keys
from llm.stages.pretrain import derived_without_tokenizer
from llm.stages.start import gpu_words

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT / "docs", ROOT / "docs/guide")
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = FRONT + [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]
DESIGN = ROOT / "docs/design.md"
HISTORY = ("lab_notebook.md", "CHANGELOG.md")  # tell of commits whose files, commands and keys had other names
PRESENT = [page for page in PAGES if page.name not in HISTORY]
OURS = [page for page in PRESENT if not page.name.startswith("extend")]  # the others name what plugins add
COMMANDS = ("train", "evaluate", "serve")
PLACEHOLDER = re.compile(r"<[^>]*>|\.\.\.")
# Floors that docs/design.md keeps free for later packages.
PLANNED = ("llm/objectives/",)
ANYTHING = re.compile(r"(data\.tasks|data\.sources|data\.mixture|callbacks|hydra)\b")  # keys below are the user's own
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
present = pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.relative_to(ROOT).as_posix())
ours = pytest.mark.parametrize("page", OURS, ids=lambda page: page.relative_to(ROOT).as_posix())


def code_of(text: str) -> Iterator[str]:
    """Yield the lines of code blocks (continued lines joined) and the code spans of a page."""
    text = text.replace("\\\n", " ")
    fenced = False
    prose = []
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or re.match(r" {4,}\S", line):
            yield line.strip()
        else:
            prose.append(line.strip())
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "\n".join(prose)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_every_link_leads_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if re.fullmatch(r"L\d+", anchor) and file.suffix != ".md":
            anchor = ""  # a line of code: tests/test_guide.py looks for what it should hold
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong, f"{page.name} links to {wrong}"


@pages
def test_lines_have_at_most_120_characters(page):
    lines = enumerate(page.read_text().split("\n"), start=1)
    # The notebook's tables are measurements that stay as they were written.
    kept = "|" if page.name == "lab_notebook.md" else "\0"
    long = [number for number, line in lines if len(line) > 120 and not line.startswith(kept)]
    assert not long, f"{page.name}: lines {long}"


def test_the_front_page_is_short_and_shows_pictures():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 9_000
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text.decode())
    assert len(pictures) >= 2
    assert all((ROOT / picture).stat().st_size <= 60_000 for picture in pictures)


SIZES = re.findall(r"^\| `([^`]+)` \| ([\d.,]+) M \| (.+) \|$", (ROOT / "docs/guide/sizes.md").read_text(), flags=re.M)


@pytest.mark.parametrize("keys, parameters, rest", SIZES, ids=[row[0] for row in SIZES])
def test_the_table_of_sizes_has_what_a_dry_run_says(keys, parameters, rest):
    tokens, gpus, time, price, memory = rest.split(" | ")
    cfg = compose("train", ["stage=pretrain", "model.vocab_size=32768", "dry_run=true", *keys.split()])
    values = derived_without_tokenizer(cfg)
    assert float(parameters.replace(",", "")) == pytest.approx(values["params_total"] / 1e6, rel=2e-3)
    assert tokens == f"{values['planned_tokens'] / 1e9:.2f} B"
    words = gpu_words(values)
    assert words.startswith(f"about {time} and {price} on {gpus} at ") and f"{memory} of memory (fits)" in words


def test_the_table_of_sizes_is_found():
    assert len(SIZES) >= 5


@present
def test_every_named_file_exists(page):
    named = set()
    for code in code_of(page.read_text()):
        named.update(re.findall(r"(?<![\w/.<-])(?:llm|callbacks|tasks|tests|conf|bench|docs)/[\w./-]*[\w/]", code))
    mine = re.compile(r"conf/(local|experiment/mine)|callbacks/\w+\.yaml")  # what a user makes
    missing = [name for name in sorted(named) if not (ROOT / name).exists() and not mine.match(name)]
    missing = [name for name in missing if name not in PLANNED]
    assert not missing, f"{page.name} names {missing}"


@present
def test_every_dotted_name_of_the_library_exists(page):
    wrong = []
    for name in re.findall(r"(?<![\w/.])llm(?:\.\w+)+", "\n".join(code_of(page.read_text()))):
        path = ROOT / name.replace(".", "/")
        if path.is_dir() or path.with_suffix(".py").is_file():
            continue
        files = [path.parent.with_suffix(".py"), path.parent / "__init__.py"]
        if not any(file.is_file() and re.search(rf"\b{path.name}\b", file.read_text()) for file in files):
            wrong.append(name)
    assert not wrong, f"{page.name} names {wrong}"


@present
def test_every_make_target_exists(page):
    named = {found[1] for code in code_of(page.read_text()) if (found := re.match(r"make ([a-z][a-z-]*)", code))}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named <= targets, f"{page.name} names make {sorted(named - targets)}"


@lru_cache
def names(command: str) -> tuple[dict, dict]:
    return config_groups(command), known_keys(command)


def wrong_override(command: str, override: str, own_options: bool) -> str | None:
    """Say what is wrong with `key=value` of an entry point; None if its key, group and option exist."""
    key, _, value = override.lstrip("+~").partition("=")
    groups, keys = names(command)
    if key in groups and re.fullmatch(r"[\w,\[\]]+", value) and not own_options:
        unknown = [option for option in re.findall(r"\w+", value) if option not in group_options(key)]
        return f"{override}: no option {unknown} of {key}" if unknown else None
    known = key in keys or key in groups or ANYTHING.match(key) or any(name.startswith(f"{key}.") for name in keys)
    return None if known else f"{override}: no key {key} of {command}.py"


@ours
def test_every_command_is_one_that_the_entry_points_take(page):
    wrong = []
    for code in code_of(page.read_text()):
        found = re.search(r"\b(train|evaluate|serve)\.py((?:\s+\S+)+)$", code.partition("  #")[0].rstrip())
        if not found:
            continue
        words = shlex.split(PLACEHOLDER.sub("x", found[2]), comments=True)
        own = any(word.startswith(("plugins=", "--config-dir")) for word in words)
        settings = [word for word in words if re.match(r"[+~]*[a-z_][\w./@]*(=|$)", word) and "=" in word]
        parse(settings)  # Hydra's grammar
        wrong += [problem for word in settings if (problem := wrong_override(found[1], word, own))]
    assert not wrong, "\n".join(wrong)


@ours
def test_every_dotted_key_is_known(page):
    keys = {name for command in COMMANDS for name in names(command)[1]}
    starts = "|".join(sorted({name.partition(".")[0] for name in keys if "." in name}))
    wrong = set()
    for code in code_of(page.read_text()):
        for key in re.findall(rf"(?<![\w./+~:-])((?:{starts})(?:\.[a-z_0-9]+)+)(?==)", code):
            known = key in keys or ANYTHING.match(key) or any(name.startswith(f"{key}.") for name in keys)
            wrong |= set() if known else {key}
    assert not wrong, f"{page.name}: no key {sorted(wrong)}"


def test_the_experiment_to_copy_composes(tmp_path):
    text = (ROOT / "docs/data.md").read_text()
    section = text[text.index("## A configuration of your own") :]
    for block in re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL):
        if name := re.search(r"^# my_conf/(\S+\.yaml)", block, flags=re.MULTILINE):
            (tmp_path / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name[1]).write_text(block)
    assert {p.name for p in tmp_path.rglob("*.yaml")} >= {"mine.yaml", "pretrain.yaml", "tokenizer.yaml"}
    for stage in ("tokenizer", "pretrain"):
        check_overrides("train", ["--config-dir", str(tmp_path), "experiment=mine", f"stage={stage}"])


def test_every_row_of_records_and_screenings_can_be_drawn(tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs/draw_records.py"))
    counts = {}
    for function, at in (("draw_records", 0), ("draw_switches", 2)):
        whole = drawn[function]

        def counted(path, rows, whole=whole, at=at):
            counts[path.name] = len([float(row[at]) for row in rows])
            whole(path, rows)

        drawn["main"].__globals__[function] = counted
    drawn["main"](tmp_path)
    assert counts["records.png"] >= 15 and counts["switches.png"] >= 32
    assert {path.name for path in tmp_path.iterdir()} == set(counts)


def arrows() -> dict[str, set[str]]:
    """Return which packages each package imports; `llm.errors` and the version in `llm` itself are left out."""
    graph = grimp.build_graph("llm", "callbacks", "tasks", cache_dir=None, exclude_type_checking_imports=True)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            start, end = package_of(module), package_of(imported)
            if start != end and end not in ("llm", "llm.errors"):
                found.setdefault(start, set()).add(end)
    return found


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "llm" else parts[0]


def reachable(found: dict[str, set[str]], start: str) -> set[str]:
    seen, ahead = set(), [start]
    while ahead:
        for package in found.get(ahead.pop(), ()):
            if package not in seen:
                seen.add(package)
                ahead.append(package)
    return seen


def contract() -> list[str]:
    """Return the floors of the contract in pyproject.toml, from the top down: packages with a colon between them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(contract["layers"] for contract in contracts if contract["type"] == "layers")


def floors() -> list[str]:
    """Return the packages from the top down, as the contract lists them."""
    return [package for floor in contract() for package in re.split(r"\s*[:|]\s*", floor)]


def drawing(found: dict[str, set[str]]) -> str:
    """Return the arrows that no longer path implies, as a Mermaid flow chart."""
    lines = ["flowchart TD"]
    for package in floors():
        targets = found.get(package, set())
        direct = {t for t in targets if not any(t in reachable(found, other) for other in targets - {t})}
        if direct:
            lines.append(f"    {short(package)} --> " + " & ".join(short(p) for p in floors() if p in direct))
    return "\n".join(lines)


def listing(found: dict[str, set[str]]) -> str:
    """Return all arrows, a paragraph per package."""
    lines = []
    for package in floors():
        if targets := found.get(package):
            text = f"{short(package):<10} -> " + " ".join(short(p) for p in floors() if p in targets)
            lines.append(textwrap.fill(text, width=100, subsequent_indent=" " * 14))
    return "\n".join(lines)


def short(package: str) -> str:
    return package.removeprefix("llm.")


def redrawn(text: str) -> str:
    """Return docs/design.md with the drawing, the list of arrows and the floors that belong into it now."""
    found, blocks = arrows(), []
    for start, language, content in (
        ("### Arrows", "mermaid", drawing(found)),
        ("### Arrows", "text", listing(found)),
        ("### Contracts", "text", "\n".join(contract())),
    ):
        before, mark, after = text.partition(start)
        block = f"```{language}\n{content}\n```"
        blocks.append(block)
        pattern = re.compile(rf"```{language}\n.*?```", flags=re.DOTALL)
        text = before + mark + pattern.sub(lambda _, block=block: block, after, count=1)
    assert all(block in text for block in blocks)
    return text


def test_the_drawing_of_the_packages_shows_their_imports():
    text = DESIGN.read_text()
    assert set(arrows()) <= set(floors()), "a package that no floor of pyproject.toml holds"
    assert redrawn(text) == text, "python tests/test_docs.py draws it anew"


def test_the_page_lists_the_packages_as_the_contract_does():
    listed = re.findall(r"^\| `((?:llm\.)?[a-z]+)` \|", DESIGN.read_text(), flags=re.MULTILINE)
    assert listed[: len(floors())] == floors()


if __name__ == "__main__":
    DESIGN.write_text(redrawn(DESIGN.read_text()))


def test_what_the_pages_link_to_outside_docs_becomes_a_page_or_a_copy(tmp_path, monkeypatch):
    monkeypatch.delenv("FATHOM_REPOSITORY", raising=False)
    sphinx = runpy.run_path(str(ROOT / "docs/conf.py"))
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            source = [page.read_text(encoding="utf-8")]
            sphinx["outside_links"](None, page.relative_to(ROOT / "docs").with_suffix("").as_posix(), source)
            sphinx["linked"].update(re.findall(rf"{sphinx['MARK']}([^)#]+)", source[0]))
    sphinx["finish"](SimpleNamespace(outdir=tmp_path / "html"), None)
    places = tmp_path / "html/source"
    assert (places / "docs/images/switches.png").read_bytes() == (ROOT / "docs/images/switches.png").read_bytes()
    assert "GPT" in (places / "llm/model/gpt.py.html").read_text()
    assert len([place for place in places.rglob("*") if place.is_file()]) == len(sphinx["linked"]) > 40
