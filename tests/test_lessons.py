"""The house rules for notebooks: short cells, one import cell, the parts of a lesson, nothing that needs a network."""
import ast
import json
import re
from pathlib import Path
from statistics import median

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
LESSONS = sorted(p for p in NOTEBOOKS if "course" in p.parts)
API = sorted(p for p in NOTEBOOKS if {"api", "guides"} & set(p.parts))
NETWORK = re.compile(r"https?://(?!127\.0\.0\.1|localhost)|urlopen|urlretrieve|requests\.get|[!%]pip\b|\b(wget|curl) ")
OWN_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|mnt)/|[A-Z]:\\\\")
NO_ALT = re.compile(r"!\[\s*\]\([^)]*\)|<img(?![^>]*\balt=\"[^\"]+\")[^>]*>")
REMOTE = re.compile(r"!\[[^]]*\]\(https?:[^)]*\)|<img[^>]*src=\"https?:[^>]*>")
PARTS = ("## What you saw", "## Quiz", "## Exercises", "## Further reading")


def code(notebook):
    "Sources of the code cells."
    return [c.source for c in notebook.cells if c.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def lines(source):
    "Lines that a reader reads: not blank, and no directive of nbdev."
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def imports(source):
    "Import statements of a cell, wherever they stand."
    python = re.sub(r"^\s*[!%].*$", "", source, flags=re.M)  # without commands of IPython
    return [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Import | ast.ImportFrom)]


def too_long(notebook, most, middle):
    sizes = [len(lines(source)) for source in code(notebook)]
    for n, source in zip(sizes, code(notebook)):
        if n > most:
            yield f"a code cell of {n} lines, at most {most}: {lines(source)[0]!r}"
    if median(sizes) > middle:
        yield f"the median code cell has {median(sizes):g} lines, at most {middle}"


def general(notebook):
    "What holds for every notebook."
    first = next((c.source for c in notebook.cells if c.cell_type == "markdown"), "")
    if not re.match(r"# \S.*\n+> \S", first):
        yield "the first prose cell does not start with '# Title' and '> subtitle'"
    if "widgets" in notebook.metadata:
        yield "metadata.widgets holds widget state"
    if len(json.dumps(notebook)) > 200_000:
        yield "it is larger than 200 kB"
    for source in code(notebook):
        yield from (f"needs a network: {m.group()!r}" for m in NETWORK.finditer(source))
        yield from ("import *" for node in imports(source) if any(name.name == "*" for name in node.names))
    for cell in notebook.cells:
        yield from (f"a path of one machine: {m.group()!r}" for m in OWN_PATH.finditer(json.dumps(cell)))
    yield from (f"an image without alt text: {m.group()}" for m in NO_ALT.finditer(prose(notebook)))
    yield from (f"an image from the network: {m.group()}" for m in REMOTE.finditer(prose(notebook)))


def outputs(notebook):
    "What outputs a lesson may keep: small text."
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            kinds = set(out.get("data", {}))
            if out.output_type == "error" or out.get("name") == "stderr":
                yield f"a stored error: {cell.source[:40]!r}"
            if kinds - {"text/plain", "text/html", "text/markdown", "image/png"}:
                yield f"a stored output that no page can show: {sorted(kinds)}"
            if "image/png" in kinds and not out.get("metadata", {}).get("image/png", {}).get("alt"):
                yield f"a stored picture without alt text: {cell.source[:40]!r}"


def api_rules(notebook):
    yield from general(notebook)
    yield from too_long(notebook, 40, 12)
    exported = [source for source in code(notebook) if re.match(r"#\|\s*exporti?\b", source)]
    top = [ast.parse(source).body for source in exported]
    with_imports = [body for body in top if any(isinstance(node, ast.Import | ast.ImportFrom) for node in body)]
    if len(with_imports) > 1:
        yield f"{len(with_imports)} exported cells import, one should"
    if any(not isinstance(node, ast.Import | ast.ImportFrom) for body in with_imports for node in body):
        yield "an exported cell mixes imports and code"


def lesson_rules(notebook):
    yield from general(notebook)
    yield from outputs(notebook)
    yield from too_long(notebook, 25, 6)
    if len(code(notebook)) > 40:
        yield f"{len(code(notebook))} code cells, at most 40"
    if sum(bool(imports(source)) for source in code(notebook)) != 1:
        yield "imports stand in several cells, or in none"
    yield from (f"a line of code of {len(line)} characters, at most 100: {line[:40]!r}"
                for source in code(notebook) for line in lines(source) if len(line) > 100)
    text = prose(notebook)
    head = next(c.source for c in notebook.cells if c.cell_type == "markdown")
    wanted = ("You will learn", "It needs", "Minutes")
    yield from (f"the first cell does not say {what!r}" for what in wanted if what not in head)
    if [part for part in re.findall(r"^## .*", text, re.M) if part in PARTS] != list(PARTS):
        yield f"it does not end with {', '.join(PARTS)}, in this order"
    if text.count("**Predict.**") < 3 or text.count("**Conclusion.**") < 3:
        yield "it asks for fewer than three predictions, or draws fewer than three conclusions"
    quiz = text.partition("## Quiz")[2].partition("\n## ")[0]
    if len(re.findall(r"<details><summary>.+?</summary>", quiz)) != 3 or quiz.count("</details>") != 3:
        yield "the quiz does not have three questions with folded answers"
    exercises = re.findall(r"^### .*\((?:easy|medium|hard), (\d+) minutes\)", text, re.M)
    if not 1 <= len(exercises) <= 2 or len(exercises) != sum("kd.check(" in source for source in code(notebook)):
        yield "it does not have one or two exercises with difficulty, minutes and a check"


def test_there_are_lessons():
    assert LESSONS and API


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson(path):
    found = list(lesson_rules(nbformat.read(path, 4)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", API, ids=lambda p: "/".join(p.parts[-2:]))
def test_api(path):
    found = list(api_rules(nbformat.read(path, 4)))
    assert not found, "\n".join(found)


def test_the_linter_finds_what_it_looks_for():
    stored = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}})
    cells = [new_markdown_cell("# Title without subtitle"),
             new_markdown_cell('![](a.png) <img src="https://a.b/c.png">'),
             new_code_cell("import math\n" + "x = 1\n" * 25, outputs=[stored]), new_code_cell("from math import *"),
             new_code_cell("open('/home/me/x')"), new_code_cell("!wget http://a.b", outputs=[new_output("error")])]
    notebook = new_notebook(cells=cells)
    notebook.metadata["widgets"] = {}
    found = "\n".join(lesson_rules(notebook))
    for what in ("subtitle", "metadata.widgets", "network: 'http://'", "import *", "one machine: '/home/'",
                 "without alt text", "from the network", "no page can show", "stored error", "26 lines", "several cells", "You will learn",
                 "What you saw", "three predictions", "folded answers", "one or two exercises"):
        assert what in found, what


def test_the_linter_knows_imports_that_are_mixed_with_code():
    good = [new_markdown_cell("# T\n> s"), new_code_cell("#| export\nimport math"), new_code_cell("#| export\nx = 1")]
    assert list(api_rules(new_notebook(cells=good))) == []
    mixed = new_notebook(cells=[*good, new_code_cell("#| export\nimport json\ny = 2")])
    assert list(api_rules(mixed)) == ["2 exported cells import, one should", "an exported cell mixes imports and code"]
