"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, fed with random shapes and values."""
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", "-Wno-ignored-attributes",
         "-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"] # checks as calls compile four times as fast
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=all"] # for the portable kernels: the same sources as the others
SECONDS = os.environ.get("KDLAB_FUZZ_SECONDS", "10")


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    "A folder with the fuzz programs, built with both sanitizers."
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("fuzz")
    if compiler is None: pytest.skip("no g++: the sanitizer run is skipped")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run([compiler, *FLAGS, *UNDEFINED, probe, "-o", folder / "probe"], capture_output=True).returncode:
        pytest.skip("this g++ has no sanitizers: the run is skipped")

    def compiled(source):
        target, more = folder / f"{source.stem}.o", [] if "avx" in source.stem else UNDEFINED
        subprocess.run([compiler, *FLAGS, *more, "-I", ROOT / "csrc", "-c", source, "-o", target], check=True)
        return target

    programs = sorted((ROOT / "tests" / "native").glob("fuzz*.cpp"))
    with ThreadPoolExecutor(2) as pool:
        *objects, = pool.map(compiled, [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp"), reverse=True), *programs])
    kernels = objects[:-len(programs)]
    for main in objects[len(kernels):]:
        subprocess.run([compiler, *FLAGS, *UNDEFINED, *kernels, main, "-o", folder / main.stem], check=True)
    return folder


@pytest.mark.parametrize("program, share", [("fuzz", 1), ("fuzz_sparse", 0.3), ("fuzz_features", 0.3)])
def test_random_cases_agree_with_the_definition_and_stay_in_bounds(fuzz, program, share):
    command = [fuzz / program, str(float(SECONDS) * share)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 100
