"""Sphinx configuration of the documentation (`make docs`).

Formulas become MathML, which browsers draw themselves. Links to files outside docs lead to pages with the source, or to
an address that FATHOM_REPOSITORY names, such as https://github.com/owner/fathom/blob/main. External links are listed in
docs/_build/links.txt, and not asked.
"""

import os
import re
import shutil
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REPOSITORY = os.environ.get("FATHOM_REPOSITORY", "").rstrip("/")
PICTURES = (".png", ".svg")  # linked files that are copied as they are
MARK = "https://source.invalid/"  # links to files of the repository, until the pages that have them are known
CODE = re.compile(r"(^```.*?^```|!\[[^\]]*\]\([^)]*\))", flags=re.DOTALL | re.MULTILINE)  # and pictures: left alone
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
CHAPTERS = "\n".join(f"guide/{page.stem}" for page in sorted((DOCS / "guide").glob("[0-9]*.md")))
TREE = f"""
```{{toctree}}
:hidden:
:caption: Guide

guide/index
guide/first-hour
{CHAPTERS}
guide/sizes
guide/troubleshooting
guide/faq
glossary
```

```{{toctree}}
:hidden:
:caption: Manual
:glob:

[a-fh-z]*
```

```{{toctree}}
:hidden:
:caption: Reference
:glob:

reference/*
```
"""

project = "Fathom"
author = "Fathom contributors"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6
root_doc = "index"
exclude_patterns = ["_build", "notebooks", "guide/examples", "**/images"]
nitpicky = True
html_math_renderer = "mathml"  # MathJax would be loaded from elsewhere
html_theme = "furo"
html_title = "Fathom"
html_copy_source = False
html_show_sourcelink = False
linked: set[str] = set()
external: dict[str, set[str]] = {}


def outside_links(app, docname, source):
    """Mark links to files that are no pages, and add the tree of pages to the entry."""
    folder = (DOCS / docname).parent

    def marked(found):
        path = os.path.normpath(folder / found[2])
        if path.startswith(f"{DOCS}{os.sep}") and path.endswith(".md"):
            return found[0]
        if not os.path.exists(path) or not path.startswith(f"{ROOT}{os.sep}"):
            return found[0]  # Sphinx says so
        return f"{found[1]}{MARK}{os.path.relpath(path, ROOT)}{found[3]}"

    parts = CODE.split(source[0])
    source[0] = "".join(part if number % 2 else LINK.sub(marked, part) for number, part in enumerate(parts))
    if docname == "index":
        source[0] += TREE


def resolve(app, doctree, docname):
    """Lead marked links to source pages, and note external ones."""
    from docutils import nodes

    for node in doctree.findall(nodes.reference):
        address = node.get("refuri", "")
        if address.startswith(MARK):
            path, _, anchor = address.removeprefix(MARK).partition("#")
            linked.add(path)
            if REPOSITORY:
                node["refuri"] = f"{REPOSITORY}/{path}" + (f"#{anchor}" if anchor else "")
            else:
                anchor = re.sub(r"^L(?=\d)", "L-", anchor)
                up, page = "../" * docname.count("/"), path if path.endswith(PICTURES) else f"{path}.html"
                node["refuri"] = f"{up}source/{page}" + (f"#{anchor}" if anchor.startswith("L-") else "")
        elif re.match(r"https?:", address):
            external.setdefault(address, set()).add(docname)


def formula(display):
    """Return what writes a formula as MathML: inline, or with display="block" on a line of its own."""
    from docutils.nodes import SkipNode
    from latex2mathml.converter import convert

    def write(writer, node):
        math = convert(node.astext(), display=display)
        writer.body.append(f'<div class="math-block">{math}</div>' if display == "block" else math)
        raise SkipNode

    return write, None


def finish(app, error):
    """Write the pages with the source, copy linked pictures, and list the external links."""
    if error:
        return
    out = Path(app.outdir)
    light, dark = HtmlFormatter(style="default"), HtmlFormatter(style="github-dark")
    style = (
        "body{font-size:14px;margin:1em} a{color:inherit;text-decoration:none} :target{background:#fc08}"
        f"{light.get_style_defs()}@media (prefers-color-scheme:dark){{body{{background:#131416;color:#ccc}}"
        f"{dark.get_style_defs()}}}"
    )
    for path in () if REPOSITORY else sorted(linked):
        file, page = ROOT / path, out / "source" / f"{path}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(PICTURES):
            shutil.copy(file, page.with_suffix(""))
            continue
        if file.is_dir():
            text = "".join(f"{child.name}\n" for child in sorted(file.iterdir()) if child.name[0] not in "._")
        else:
            text = file.read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(file.name, stripnl=False)
        except ClassNotFound:
            lexer = TextLexer(stripnl=False)
        code = highlight(text, lexer, HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True))
        page.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{path}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{style}</style><h1>{path}</h1>{code}</html>',
            encoding="utf-8",
        )
    lines = [f"{address}  {' '.join(sorted(pages))}\n" for address, pages in sorted(external.items())]
    (out.parent / "links.txt").write_text("".join(lines), encoding="utf-8")


def setup(app):
    """Register the steps with Sphinx."""
    app.add_lexer("mermaid", TextLexer)
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("source-read", outside_links)
    app.connect("doctree-resolved", resolve)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
