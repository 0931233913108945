"The command line: help, errors, the experiment behind `kdlab distill`, and JupyterLab."
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import kdlab as kd
from kdlab import commands
from kdlab.cli import main, make_parser, read_table
from kdlab.cli_export import make_table

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def kdlab(*words, **options):
    "The command in a process of its own."
    return subprocess.run([sys.executable, "-m", "kdlab", *words], capture_output=True, text=True, env=ENV, **options)


def begin(*words, env):
    "Python in the background; Ctrl-C reaches it even if the tests themselves run where it is ignored."
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def refused(capsys, *words):
    "What a command that must fail as the user's mistake says."
    try: status = main(list(words))
    except SystemExit as end: status = end.code
    said = capsys.readouterr()
    assert status == 2 and "Traceback" not in said.err and len(said.err.strip().splitlines()) == 1
    return said.err


# ---- help ----

def test_table_is_in_step():
    assert read_table() == make_table(), "run python -m kdlab.cli_export"


@pytest.mark.parametrize("words", [[], ["--help"], ["distill", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(words):
    code = ("import sys\nfrom kdlab.cli import main\n"
            f"try: main({words})\nexcept SystemExit as end: assert not end.code\n"
            "print([m for m in ('torch', 'numpy', 'plotly', 'sklearn', 'kdlab.commands') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr


@pytest.mark.parametrize("command", ["lab", "distill", "doctor"])
def test_help_has_every_option_and_an_example(capsys, command):
    with pytest.raises(SystemExit) as end: main([command, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"examples:\n  kdlab {command}" in said
    for p in inspect.signature(getattr(commands, command)).parameters.values():
        assert f"--{'no-' if p.default is True else ''}{p.name}" in said
    if command == "distill": assert all(name in said for name in (*kd.tasks.TASKS, *kd.nets.NETS))


@pytest.mark.parametrize("command", ["lab", "distill", "doctor"])
def test_options_default_to_the_signature(command):
    parsed = vars(make_parser(read_table()).parse_args([command]))
    assert {k: parsed.pop(k) for k in ("command", "version")} == {"command": command, "version": False}
    assert parsed == {p.name: p.default for p in inspect.signature(getattr(commands, command)).parameters.values()}


@pytest.mark.parametrize("line, name, value", [("-T 8", "T", 8.), ("--T=8", "T", 8.), ("--seeds 3", "seeds", 3),
                                               ("--out a", "out", "a")])
def test_options_have_types(line, name, value):
    got = vars(make_parser(read_table()).parse_args(["distill", *line.split()]))[name]
    assert got == value and type(got) is type(value)


def test_python_m_kdlab():
    done = kdlab("--version")
    assert done.returncode == 0 and done.stdout == f"kdlab {kd.__version__}\n"


# ---- mistakes ----

@pytest.mark.parametrize("line, says", [
    ("distil", "did you mean distill?"), ("lap", "did you mean lab?"), ("distill --epoch 3", "did you mean --epochs?"),
    ("distill --seeds two", "invalid int value: 'two'"), ("distill --task digts", "did you mean 'digits'?"),
    ("distill --task digits-fex", "did you mean 'digits-few'?"),
    ("distill --teacher teacher_cn", "did you mean 'teacher_cnn'?"),
    ("distill --student studnt_mlp", "did you mean 'student_mlp'?"),
    ("distill --task moons --teacher teacher_cnn", "use mlp"),
    ("distill -T 0", "T must be > 0, got 0.0"), ("distill -T nan", "T must be > 0, got nan"),
    ("distill --device abacus", "device abacus cannot be used: "),
    ("distill --alpha 1.5", "alpha must be between 0 and 1, got 1.5"),
    ("distill --epochs 0", "epochs must be >= 1, got 0"), ("distill --seeds 0", "seeds must be >= 1, got 0")])
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *line.split())
    assert not list(tmp_path.iterdir()) # nothing was begun


def test_traceback_on_demand(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in (["--traceback", "distill", "-T", "0"], ["distill", "-T", "0", "--traceback"]):
        with pytest.raises(ValueError, match="T must be"): main(words)
    monkeypatch.setenv("KDLAB_TRACEBACK", "1")
    with pytest.raises(ValueError, match="T must be"): main(["distill", "-T", "0"])


def test_mistakes_of_kdlab_keep_their_traceback(monkeypatch):
    def broken(): raise AssertionError("a bug")
    monkeypatch.setattr(commands, "doctor", broken)
    with pytest.raises(AssertionError): main(["doctor"])


def test_a_missing_package_points_to_the_doctor(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "kdlab.reports", None)
    assert "kdlab doctor says what is missing" in refused(capsys, "distill")


def test_doctor():
    done = kdlab("doctor")
    assert done.returncode == 0 and "Ready." in done.stdout


# ---- distill ----

QUICK = ["--task", "moons", "--seeds", "2", "--epochs", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A finished experiment on moons."
    out = tmp_path_factory.mktemp("runs") / "moons"
    assert main(["distill", *QUICK, "--out", str(out)]) == 0
    return out


def results(folder): return json.loads((folder / "results.json").read_text())


def test_runs_can_be_loaded(folder):
    for seed in (0, 1):
        runs = {arm: kd.load(folder / f"seed-{seed}" / arm) for arm in ("teacher", "alone", "distilled")}
        assert all(run.finished and run.epoch == 3 for run in runs.values())
        assert runs["alone"].plan["student_start"] == runs["distilled"].plan["student_start"] # the same first weights
        asked = kd.distilling.fingerprint(runs["teacher"].student)
        assert runs["distilled"].plan["teacher_fingerprint"] == asked
        assert runs["alone"].teacher is None and "KL" not in runs["alone"].plan["objective"]
        assert runs["distilled"].plan["objective"] == (0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(T=4)).equation()


def test_results_are_those_of_the_test_set(folder):
    from kdlab.experiments import accuracy, paired
    seeds = results(folder)["seeds"]
    for seed, measured in enumerate(seeds):
        test = kd.tasks.get("moons", seed).test
        for arm in ("teacher", "alone", "distilled"):
            student = kd.load(folder / f"seed-{seed}" / arm).student
            assert measured[arm]["accuracy"] == pytest.approx(accuracy(student, test))
    expected = paired(*([s[arm]["accuracy"] for s in seeds] for arm in ("distilled", "alone")))
    assert results(folder)["difference"] == expected._asdict() | {"verdict": expected.verdict}


def test_report_is_there_and_needs_no_network(folder):
    from plotly.offline import get_plotlyjs
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert get_plotlyjs() in page and "http" not in page.replace(get_plotlyjs(), "")
    assert "--task moons" in page and f"--out {folder}" in page


def test_again_reads_what_is_there(folder):
    code = ("import sys\nfrom kdlab.cli import main\n"
            f"status = main(['distill', *{QUICK}, '--out', {str(folder)!r}])\n"
            "assert status == 0 and 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert "distilled minus alone" in done.stdout and str(folder / "report.html") in done.stdout


def test_a_lost_report_is_written_again_without_training(folder, monkeypatch):
    before = results(folder)
    (folder / "report.html").unlink()
    monkeypatch.setattr(kd.distilling, "_one_epoch", None) # training would fail
    assert main(["distill", *QUICK, "--out", str(folder)]) == 0
    assert (folder / "report.html").exists() and results(folder) == before


def test_other_settings_need_another_folder(folder, capsys):
    before = sorted(p.stat().st_mtime_ns for p in folder.rglob("*"))
    said = refused(capsys, "distill", *QUICK, "--T", "8", "--out", str(folder))
    assert "T is 4.0 there and 8.0 here" in said and "--out" in said
    assert sorted(p.stat().st_mtime_ns for p in folder.rglob("*")) == before


def test_more_seeds_keep_those_that_are_there(folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("run.pt")}
    assert main(["distill", *QUICK[:2], "--seeds", "3", "--epochs", "3", "--out", str(folder)]) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()) and len(list(folder.rglob("run.pt"))) == 9
    assert len(results(folder)["seeds"]) == 3


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert "is not empty and holds no experiment" in refused(capsys, "distill", *QUICK, "--out", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_broken_results_file_is_named(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    assert "results.json cannot be read" in refused(capsys, "distill", *QUICK, "--out", str(tmp_path))


def test_teacher_and_students_take_as_many_steps():
    data = commands._samples("digits-few", 0)
    assert [len(data[arm]) for arm in commands.ARMS] == [1000, 40, 40]
    steps = {len(commands._repeat(data[arm], len(data["teacher"]), 0)) for arm in commands.ARMS}
    assert steps == {16}
    seen = [y for _, y in commands._repeat(data["alone"], 1000, 0)]
    assert sum(map(len, seen)) == 1000


def test_hidden_labels_reach_only_the_distilled_student_and_only_as_inputs():
    data = commands._samples("digits-100-labels", 0)
    assert len(data["alone"]) == 100 and (data["alone"].y >= 0).all()
    assert len(data["distilled"]) == 1000 and (data["distilled"].y == -100).sum() == 900


@pytest.mark.parametrize("alpha, parts", [(0., {"SoftKL"}), (1., {"CrossEntropy"}), (.3, {"SoftKL", "CrossEntropy"})])
def test_alpha_is_the_weight_of_the_labels(alpha, parts):
    terms = {type(loss).__name__: w for w, loss in commands._losses(alpha, 4.)["distilled"].terms()}
    assert set(terms) == parts and terms.get("CrossEntropy", 0) == pytest.approx(alpha)
    assert sum(terms.values()) == pytest.approx(1)


@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_and_continued(tmp_path, how, status):
    out, words = tmp_path / "runs", ["distill", "--task", "moons", "--seeds", "1", "--epochs", "60"]
    stopped = begin("-m", "kdlab", *words, "--out", str(out), env=ENV)
    until = time.monotonic() + 120
    saved = out / "seed-0/alone/run.json"
    epochs = lambda: len(json.loads(saved.read_text())["history"]) if saved.exists() else 0
    while not epochs() and time.monotonic() < until: time.sleep(0.01)
    stopped.send_signal(how)
    said = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == status and "Traceback" not in said and not (out / "results.json").exists()
    if how == signal.SIGINT: assert f"The same command goes on from what is in {out}" in said
    begun = epochs()
    assert 0 < begun < 60
    teacher = (out / "seed-0/teacher/run.pt").stat().st_mtime_ns
    assert main([*words, "--out", str(out)]) == 0
    assert (out / "seed-0/teacher/run.pt").stat().st_mtime_ns == teacher # was finished, is not trained again
    whole = tmp_path / "whole"
    assert main([*words, "--out", str(whole)]) == 0
    for arm, measured in results(out)["seeds"][0].items(): # as if nothing had happened
        assert measured | {"seconds": 0} == results(whole)["seeds"][0][arm] | {"seconds": 0}


# ---- lab ----

LAB = """
import sys
from pathlib import Path
from kdlab import commands
folder = Path(sys.argv[1])
commands._lessons = lambda: (folder, folder)
sys.exit(commands.lab(port=9300, browser=False))
"""


@pytest.mark.skipif(commands.find_spec("jupyterlab") is None, reason="JupyterLab is not installed")
@pytest.mark.parametrize("how, status", [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_lab_prints_an_address_that_answers_and_ends_its_server(tmp_path, how, status):
    import nbformat
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "01_first.ipynb")
    env = ENV | {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    lab = begin("-c", LAB, str(tmp_path), env=env)
    try:
        assert lab.stdout.readline() == "JupyterLab runs at\n"
        address = lab.stdout.readline().strip()
        assert "/lab/tree/01_first.ipynb?token=" in address
        page = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=60)
        assert page.status == 200 and "JupyterLab" in page.read().decode()
    finally:
        lab.send_signal(how)
        lab.communicate(timeout=60)
    assert lab.returncode == status
    with pytest.raises(urllib.error.URLError):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=5)


def test_lab_without_jupyterlab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jupyterlab", None)
    assert 'pip install "jupyterlab>=4.2"' in refused(capsys, "lab")


def test_lab_names_the_nearest_lesson(capsys, tmp_path, monkeypatch):
    (tmp_path / "01_what_a_teacher_knows.ipynb").touch()
    monkeypatch.setattr(commands, "_lessons", lambda: (tmp_path, tmp_path))
    assert "did you mean '01_what_a_teacher_knows.ipynb'" in refused(capsys, "lab", "--notebook", "01_what_a_teacher")


def test_shipped_lessons_are_copied_and_never_overwritten(tmp_path, monkeypatch):
    package = tmp_path / "site" / "kdlab"
    (package / "course").mkdir(parents=True)
    (package / "course" / "01_first.ipynb").write_text("new")
    monkeypatch.setattr(kd, "__file__", str(package / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert commands._lessons() == (tmp_path / "kdlab-course",) * 2
    assert (tmp_path / "kdlab-course" / "01_first.ipynb").read_text() == "new"
    (tmp_path / "kdlab-course" / "01_first.ipynb").write_text("my notes")
    commands._lessons()
    assert (tmp_path / "kdlab-course" / "01_first.ipynb").read_text() == "my notes"


def test_a_busy_port_is_passed_over():
    import socket
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert commands._free(port) > port
