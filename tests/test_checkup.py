"The check-up: what it finds, and that it works where something is missing."
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import kdlab as kd
from kdlab import checkup, ops
from kdlab.checkup import Checkup, Fact

ROOT = Path(__file__).parents[1]


def asked(code):
    "Run Python in a process of its own."
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_lists_what_the_metadata_lists():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lines = lambda key: tuple(config["DEFAULT"][key].split())
    assert checkup.NEEDED == lines("requirements") and checkup.OPTIONAL == lines("lab_requirements")


def test_here(capsys):
    found = kd.doctor()
    said = capsys.readouterr().out
    assert found.ok and said == f"{found}\n" and "Ready." in repr(found)
    import torch
    assert found.facts["torch"].text == torch.__version__ and len(said.splitlines()) == len(found.facts) + 2
    live = "plain torch" if ops._C is None else "compiled core"
    assert found.facts["backend"].text.startswith(live)


@pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")
def test_names_the_instruction_sets_of_the_core(capsys):
    facts, info = kd.doctor().facts, ops._C.info()
    assert facts["backend"].state == "ok" and facts["backend"].text.startswith("compiled core")
    assert all(isa in facts["instruction set"].text for isa in info["isas"])


@pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")
@pytest.mark.parametrize("name, said", [("torch", "plain torch, because KDLAB_BACKEND=torch"), ("cpp", "compiled core and nothing else")])
def test_says_what_the_environment_asks_for(monkeypatch, capsys, name, said):
    monkeypatch.setattr(ops, "_preferred", name)
    fact = kd.doctor().facts["backend"]
    assert fact.text.startswith(said) and fact.state == "note" and "unset" in fact.fix


@pytest.mark.parametrize("built, why", [(True, "does not load: broken"), (False, "was not built")])
def test_without_the_core(monkeypatch, capsys, built, why):
    monkeypatch.setattr(ops, "_C", None)
    monkeypatch.setattr(ops, "core_missing", "broken")
    find = checkup.importlib.util.find_spec
    spec = lambda name: (built or None) if name == "kdlab._C" else find(name)
    monkeypatch.setattr(checkup.importlib.util, "find_spec", spec)
    found = kd.doctor()
    fact = found.facts["backend"]
    assert found.ok and fact.state == "note"
    assert fact.text == f"plain torch; the compiled core {why}" and "KDLAB_EXT=1" in fact.fix
    assert "instruction set" not in found.facts and "backend" in found.verdict


@pytest.mark.parametrize("module, name, ok", [("plotly", "plotly", False), ("sklearn", "scikit-learn", False),
                                              ("jupyterlab", "jupyterlab", True)])
def test_a_missing_package_comes_with_its_pip_line(monkeypatch, capsys, module, name, ok):
    monkeypatch.setitem(sys.modules, module, None)
    found = kd.doctor()
    assert found.ok is ok and found.facts[name].text == "not installed"
    assert re.fullmatch(rf'pip install "{name}>=[\d.,<]+"', found.facts[name].fix)


def test_without_torch_and_numpy():
    done = asked("import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
                 "from kdlab.cli import main; sys.exit(main(['doctor']))")
    assert done.returncode == 1 and "Not ready: torch, numpy." in done.stdout
    assert 'pip install "torch>=2.6"' in done.stdout


def test_a_torch_that_does_not_load(monkeypatch, capsys):
    load = checkup.importlib.import_module
    def broken(name):
        if name == "torch": raise OSError("libtorch_cpu.so: cannot open")
        return load(name)
    monkeypatch.setattr(checkup.importlib, "import_module", broken)
    found = kd.doctor()
    assert not found.ok and "libtorch_cpu.so: cannot open" in found.facts["torch"].text


@pytest.mark.parametrize("version, text, state", [
    ("2.5.1+cpu", "2.5.1+cpu is too old", "missing"), ("2.6.0", "2.6.0", "ok"), ("2.10.0", "2.10.0", "ok")])
def test_versions_compare_as_numbers(monkeypatch, version, text, state):
    monkeypatch.setattr(checkup.importlib.metadata, "version", lambda name: version)
    assert checkup.package("torch>=2.6")[1:3] == (state, text)


def test_a_version_can_be_too_new(monkeypatch):
    monkeypatch.setattr(checkup.importlib.metadata, "version", lambda name: "8.0.1")
    assert checkup.package("plotly>=6.1,<8").text == "8.0.1 is too new"


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(checkup.shutil, "which", lambda name: None)
    fact = checkup._compiler()
    assert fact.state == "note" and fact.fix


def test_only_what_is_needed_decides():
    assert Checkup([Fact("a", "note", "gone")]).ok and not Checkup([Fact("a", "missing", "gone")]).ok
