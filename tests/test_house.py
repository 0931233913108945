"""The house is in order: exports in step, notebooks clean, the import light, the package whole."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def run(*command, cwd=ROOT, **env):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the notebooks, exported afresh and cleaned."
    copy = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT / name, copy)
    run(BIN / "nbdev-export", cwd=copy)
    run(BIN / "nbdev-clean", cwd=copy)
    return copy


def test_the_package_is_what_the_notebooks_export(exported):
    modules = lambda root: {p.relative_to(root): p.read_text() for p in (root / "kdlab").rglob("*.py") if p.name != "_cli_table.py"}
    fresh, committed = modules(exported), modules(ROOT)
    assert set(committed) == set(fresh)
    assert [str(p) for p in fresh if fresh[p] != committed[p]] == [], "run `make export`"


def test_notebooks_are_clean(exported):
    changed = [p.relative_to(ROOT) for p in NOTEBOOKS if p.read_text() != (exported / p.relative_to(ROOT)).read_text()]
    assert changed == [], "run `make export`"
    for path in NOTEBOOKS:
        assert "widgets" not in json.loads(path.read_text())["metadata"], f"{path.name} stores widget state"


def test_the_readme_is_the_index_notebook():
    sys.path.insert(0, str(ROOT / "docs"))
    try: from readme import readme
    finally: sys.path.pop(0)
    assert (ROOT / "README.md").read_text() == readme(), "run `make export`"


def test_the_readme_lists_the_environment_variables():
    sources = [ROOT / "setup.py", *(ROOT / "kdlab").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    read = {name for path in sources for name in re.findall(r'(?:environ(?:ment)?\.get|getenv|choice_of)\("(KDLAB_\w+)"', path.read_text())}
    listed = set(re.findall(r"`(KDLAB_\w+)`", (ROOT / "README.md").read_text()))
    assert len(read) > 5 and read == listed


def test_the_import_is_light():
    code = "import sys, kdlab; kdlab.SoftKL, kdlab.functional.forward_kl; print(*sorted(sys.modules))"
    loaded = set(run(sys.executable, "-c", code).split())
    assert "torch" in loaded
    assert not loaded & {"plotly", "ipywidgets", "anywidget", "IPython", "sklearn", "scipy", "pandas"}


def test_figures_and_widgets_import_no_torch():
    code = "import sys, kdlab.figures.kit, kdlab.figures.gap, kdlab.widgets.gap, kdlab.widgets.temperature; print(*sorted(sys.modules))"
    assert "torch" not in run(sys.executable, "-c", code).split()


def test_every_public_name_can_be_had():
    import kdlab as kd
    assert set(kd.__all__) <= set(dir(kd))
    for name in kd.__all__: assert getattr(kd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): kd.nothing


def test_the_wheel_holds_every_package_and_the_data(tmp_path):
    source = tmp_path / "source"
    tracked = run("git", "ls-files", "-z").split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, KDLAB_EXT="0")
    wheel, = tmp_path.glob("kdlab-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert "none-any" in wheel.name
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "kdlab").rglob("*.py")} <= held
    assert "kdlab/py.typed" in held and any(n.startswith("kdlab/course/") and n.endswith(".ipynb") for n in held)
    entry, = (n for n in held if n.endswith("entry_points.txt"))
    assert "kdlab=kdlab.cli:main" in zipfile.ZipFile(wheel).read(entry).decode().replace(" ", "")
