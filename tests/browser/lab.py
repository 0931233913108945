"""A private JupyterLab and a Chromium that opens notebooks in it, runs them, and keeps a record of what went wrong.

    with Lab(folder) as lab, chromium() as browser:
        book = lab.open(browser, "lesson.ipynb")
        book.run_all()
        book.assert_clean()
        book.shot("lesson_light")
"""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / ".browser"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SETTINGS = {
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
    "docmanager-extension/plugin": {"autosave": False},  # one that meets a save of ours leaves it waiting for ever
    "notebook-extension/tracker": {"windowingMode": "none"},  # else cells off screen are not in the page
}


def find_chromium():
    "Path of a Chromium: the one named in KDLAB_CHROMIUM, on the PATH, or installed by Playwright; else None."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = os.environ.get("KDLAB_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found:
        return found
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        path = p.chromium.executable_path
    return path if Path(path).exists() else None


def need(what, reason):
    "Skip the test when `what` is missing; fail it where KDLAB_REQUIRE_BROWSER=1."
    if not what:
        (pytest.fail if os.environ.get("KDLAB_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)
    return what


@contextmanager
def chromium():
    "A running browser."
    need(find_spec("playwright"), "browser checks skipped: Playwright is not installed (pip install playwright)")
    from playwright.sync_api import sync_playwright
    path = need(find_chromium(), "browser checks skipped: no Chromium found. Install one (Debian: apt install "
                                 "chromium; or: playwright install chromium), or name it in KDLAB_CHROMIUM")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def is_local(url):
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "about", "file") or parts.hostname in ("127.0.0.1", "localhost")


class Record:
    "What a page did that it should not: console errors, failed requests, requests that leave the machine."

    def __init__(self, page):
        self.console, self.failed, self.outside = [], [], []
        page.on("console", lambda m: self.console.append(f"{m.text} {m.location}") if m.type == "error" else None)
        page.on("pageerror", lambda e: self.console.append(f"{e} {getattr(e, 'stack', '')}"))
        page.on("request", lambda r: None if is_local(r.url) else self.outside.append(r.url))
        page.on("requestfailed", lambda r: self.failed.append(f"{r.url} {r.failure}"))
        page.on("response", lambda r: self.failed.append(f"{r.url} {r.status}") if r.status >= 400 else None)

    def clear(self):
        for one in (self.console, self.failed, self.outside):
            one.clear()


class Traffic:
    "Bytes that a page receives, over http and over its websockets."

    def __init__(self, page):
        self.bytes = 0
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on("Network.loadingFinished", lambda e: self._add(e["encodedDataLength"]))
        session.on("Network.webSocketFrameReceived", lambda e: self._add(_frame_size(e["response"])))

    def _add(self, n):
        self.bytes += int(n)


def _frame_size(frame):
    "Binary frames come as base64."
    return len(frame["payloadData"]) * (0.75 if frame["opcode"] == 2 else 1)


def write_notebook(path, cells):
    "A notebook of code cells."
    notebook = new_notebook(cells=[new_code_cell(c) for c in cells])
    notebook.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(notebook, path)
    return path


class Lab:
    "A JupyterLab on a free port with its own token, configuration, settings, workspaces and runtime folder."

    def __init__(self, folder, start_timeout=90):
        self.folder, self.timeout = Path(folder), start_timeout
        self.root = self.folder / "notebooks"
        self.token = secrets.token_hex(16)

    def __enter__(self):
        need(shutil.which("jupyter-lab") or Path(sys.executable).with_name("jupyter-lab").exists(),
             "browser checks skipped: JupyterLab is not installed (pip install 'kdlab[lab]')")
        self.root.mkdir(parents=True, exist_ok=True)
        names = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
                 "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
                 "IPYTHONDIR": "ipython"}
        env = os.environ | {name: str(self.folder / sub) for name, sub in names.items()}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        for sub in names.values():
            (self.folder / sub).mkdir(exist_ok=True)
        for name, values in SETTINGS.items():
            file = self.folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = (self.folder / "server.log").open("w")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={self.port}",
             "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
             f"--ServerApp.root_dir={self.root}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"],
            env=env, stdout=self.log, stderr=subprocess.STDOUT, cwd=self.folder)
        self._wait()
        return self

    def _wait(self):
        end = time.monotonic() + self.timeout
        while time.monotonic() < end and self.server.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/api/status?token={self.token}", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.__exit__()
        raise RuntimeError("JupyterLab did not start:\n" + (self.folder / "server.log").read_text()[-3000:])

    def __exit__(self, *_):
        self.server.terminate()
        try:
            self.server.wait(15)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        self.log.close()

    def open(self, browser, notebook, width=1280, height=2400):
        "A copy of `notebook` in a page of its own; the viewport is tall because cells off screen are not drawn."
        notebook = Path(notebook)
        copy = self.root / notebook.name
        if copy.resolve() != notebook.resolve():
            shutil.copy(notebook, copy)
        page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        book = Book(page, Record(page))
        page.goto(f"{self.url}/lab/workspaces/{notebook.stem}/tree/{copy.name}?token={self.token}")
        book.ready()
        return book


    def show(self, browser, name, cells, height=2400):
        "A new notebook of these cells, run."
        book = self.open(browser, write_notebook(self.folder / f"{name}.ipynb", cells), width=1360, height=height)
        book.run_all()
        return book


PLOTS = "[...document.querySelectorAll('.js-plotly-plot')]"
NOTEBOOK = "window.jupyterapp?.shell.currentWidget"
KERNEL = f"{NOTEBOOK}?.sessionContext?.session?.kernel"


class Book:
    "A notebook that is open in the browser."

    def __init__(self, page, record):
        self.page, self.record = page, record

    def ready(self, timeout=60):
        "Wait for the notebook and its kernel."
        self.page.wait_for_function(f"() => {KERNEL}?.status === 'idle'", timeout=timeout * 1000)

    def command(self, name, args=None, timeout=60):
        "Have JupyterLab do it, and wait: `evaluate` alone would wait for ever."
        late = "new Promise((_, no) => setTimeout(() => no(new Error(`${name} took over ${s} s`)), 1000 * s))"
        self.page.evaluate("([name, args, s]) => Promise.race([window.jupyterapp.commands.execute(name, args).then(() => 1), "
                           f"{late}])", [name, args or {}, timeout])

    def run_all(self, timeout=120):
        "Run all cells and wait until the kernel is idle."
        self.page.set_default_timeout(timeout * 1000)
        self.command("notebook:run-all-cells", timeout=timeout)
        self.ready(timeout)
        self.page.set_default_timeout(20_000)

    def execute(self, code):
        "Run code in the kernel, outside any cell; fail if it raises."
        reply = self.page.evaluate(f"code => {KERNEL}.requestExecute({{ code }}).done.then(r => r.content)", code)
        assert reply["status"] == "ok", reply

    def outputs(self):
        "All outputs of the notebook, as in its file."
        cells = self.page.evaluate(f"() => {NOTEBOOK}.content.model.toJSON().cells")
        return [out for cell in cells for out in cell.get("outputs", [])]

    def stderr(self):
        "What cells wrote to stderr, and the errors that stopped one."
        bad = [o for o in self.outputs() if o["output_type"] == "error" or o.get("name") == "stderr"]
        return ["".join(o.get("traceback") or o.get("text")) for o in bad]

    def save_and_reload(self):
        "Save, load the page again on the same kernel, and wait."
        self.command("docmanager:save")
        self.page.reload()
        self.ready()

    def drawn(self, plots):
        "Wait until that many plots are drawn."
        many = f"{PLOTS}.filter(p => p.querySelector('.main-svg')).length"
        self.page.wait_for_function(f"n => {many} === n", arg=plots, timeout=60_000)

    def words(self, view):
        "The sentence of a view."
        return self.page.locator(".kd-text").nth(view).text_content()

    def changed(self, view, before):
        "The sentence, once it is a new one."
        new = "([i, was]) => document.querySelectorAll('.kd-text')[i].textContent !== was"
        self.page.wait_for_function(new, arg=[view, before])
        return self.words(view)

    def theme(self, name):
        "Switch to 'JupyterLab Dark' or 'JupyterLab Light'."
        self.command("apputils:change-theme", {"theme": name})
        self.page.wait_for_function("(n) => document.body.dataset.jpThemeName === n", arg=name)
        self.page.wait_for_timeout(400)  # the theme's colours fade in

    def shot(self, name, selector=None):
        "A screenshot in .browser/, of the whole page or of the first element that matches."
        SHOTS.mkdir(exist_ok=True)
        target = self.page if selector is None else self.page.locator(selector).first
        target.screenshot(path=SHOTS / f"{name}.png")
        return SHOTS / f"{name}.png"

    def violations(self):
        "What axe-core finds in the views: (rule, impact, where)."
        need(find_spec("axe_playwright_python"), "axe checks skipped: pip install axe-playwright-python")
        from axe_playwright_python.sync_playwright import Axe
        found = Axe().run(self.page, context=".kd-widget").response["violations"]
        return [(v["id"], v["impact"], [n["html"] for n in v["nodes"]][:3]) for v in found]

    def assert_clean(self):
        "No stderr, no console error, no failed request, nothing that left the machine."
        found = dict(stderr=self.stderr(), console=self.record.console, failed=self.record.failed,
                     outside=self.record.outside)
        assert {what: lines for what, lines in found.items() if lines} == {}
