"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, fed with random shapes and values."""
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-g", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", "-Wno-ignored-attributes",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SECONDS = os.environ.get("KDLAB_FUZZ_SECONDS", "10")


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    "The fuzz program, built with both sanitizers."
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("fuzz")
    if compiler is None: pytest.skip("no g++: the sanitizer run is skipped")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run([compiler, *FLAGS, probe, "-o", folder / "probe"], capture_output=True).returncode:
        pytest.skip("this g++ has no sanitizers: the run is skipped")

    def compiled(source):
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS, "-I", ROOT / "csrc", "-c", source, "-o", target], check=True)
        return target

    sources = [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "tests" / "native" / "fuzz.cpp"]
    with ThreadPoolExecutor(2) as pool: objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, *FLAGS, *objects, "-o", folder / "fuzz"], check=True)
    return folder / "fuzz"


def test_random_cases_agree_with_the_definition_and_stay_in_bounds(fuzz):
    done = subprocess.run([fuzz, SECONDS], capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 100
