"""Goldens: what numpy scripts wrote beside them, and whether they would write it again."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "goldens"


def load(name): return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def script(name):
    "The script as a module."
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(HERE))
    try: spec.loader.exec_module(module)
    finally: sys.path.remove(str(HERE))
    return module


def imports(name):
    "What the script imports, and what it shares with others imports."
    found = set(re.findall(r"^(?:from|import) (\w+)", (HERE / f"{name}.py").read_text(encoding="utf-8"), re.M))
    return found | (imports("writing") if "writing" in found else set())


def same(a, b, rel):
    "The same nest; another libm may round otherwise."
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k], rel) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(same(x, y, rel) for x, y in zip(a, b))
    return a == b or a == pytest.approx(b, rel=rel, abs=rel / 100)


def is_what_its_script_writes(name, rel):
    return same(json.loads(script(name).text()), load(name), rel)
