"""Package metadata comes from settings.ini; the extension in csrc/ is built when it can be.

KDLAB_EXT=auto (default) builds it and carries on without it if that fails; 0 leaves it out; 1 insists on it.
KDLAB_CUDA does the same for the CUDA kernels, a module of their own that nvcc builds (auto: where it is found, on
Linux); KDLAB_CUDA_ARCHS="75 80 90" says for which devices, the last one also as PTX for newer ones.
"""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lines = lambda key: [line.strip() for line in cfg[key].splitlines() if line.strip()]


class BuildWithCourse(build_py):
    "The lessons go into the package, where `kdlab lab` finds them without a checkout."

    def run(self):
        super().run()
        if not self.editable_mode:
            course = Path(self.build_lib) / "kdlab" / "course"
            shutil.copytree(ROOT / "nbs" / "course", course, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))


def choice_of(name):
    "auto, 0 or 1, from the environment."
    choice = os.environ.get(name, "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, not {choice!r}")
    return choice


def find_nvcc():
    "The CUDA compiler: on the path, or where CUDA_HOME says."
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


def cuda_extension():
    "The module of CUDA kernels, or nothing where it is not wanted or cannot be built."
    choice = choice_of("KDLAB_CUDA")
    able = find_nvcc() and sys.platform == "linux"
    if choice == "1" and not able:
        raise SystemExit("KDLAB_CUDA=1 needs Linux and nvcc (the CUDA toolkit) on the path or in CUDA_HOME/bin")
    if choice == "0" or not able:
        return []
    longest_first = sorted((ROOT / "csrc" / "cuda").glob("*.c*"), key=lambda p: (-p.stat().st_size, p.name))
    sources = [str(p.relative_to(ROOT)) for p in longest_first]
    return [Extension("kdlab._CUDA", sources, optional=choice == "auto")]


def build_cuda(sources, folder, target):
    "Compile with nvcc, two sources at a time, and link with the static CUDA runtime: it loads without a driver."
    import pybind11
    from setuptools.errors import CompileError
    from sysconfig import get_path

    archs = os.environ.get("KDLAB_CUDA_ARCHS", "75 80 90").replace(",", " ").split()
    # The sources differ from 9.0 on (clusters) and nowhere else: two passes of the front end serve all devices.
    plain = sorted((a for a in archs if a.isdigit()), key=int)       # not 90a, which stands for that device alone
    front = lambda arch: next((a for a in plain if arch in plain and (int(a) < 90) == (int(arch) < 90)), arch)
    code = [f"-gencode=arch=compute_{front(a)},code=sm_{a}" for a in archs]
    code += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{pybind11.get_include()}",
             f"-I{get_path('include')}", f'-DKDLAB_CUDA_ARCHS="{" ".join(archs)}"', "-Xptxas=-v"]
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source):
        out = folder / f"{Path(source).name}.o"
        command = [find_nvcc(), *flags, *code, "--threads=2", "-c", source, "-o", str(out)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise CompileError(f"nvcc could not compile {source}:\n{done.stderr}")
        return str(out), done.stderr

    with ThreadPoolExecutor(2) as pool:
        objects, said = zip(*pool.map(compiled, sources))
    log = ROOT / "build" / "cuda_resources.txt"     # registers and spills of every kernel; tests read it
    log.parent.mkdir(exist_ok=True)
    log.write_text("".join(said), encoding="utf-8")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if subprocess.run([find_nvcc(), "-shared", "-cudart=static", *code[-1:], *objects, "-o", target]).returncode:
        raise CompileError("nvcc could not link the CUDA kernels")


def extensions():
    "The compiled core as arguments of `setup`, or nothing where KDLAB_EXT=0."
    choice = choice_of("KDLAB_EXT")
    if choice == "0":
        return {}
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
    except ImportError:
        if choice == "1":
            raise SystemExit("KDLAB_EXT=1 needs pybind11: pip install pybind11")
        return {}

    class Build(build_ext):
        def initialize_options(self):
            super().initialize_options()
            self.force = True  # a change of flags alone would not rebuild

        def build_extension(self, ext):
            if ext.name != "kdlab._CUDA":
                return super().build_extension(ext)
            build_cuda(ext.sources, Path(self.build_temp) / "cuda", self.get_ext_fullpath(ext.name))

    ParallelCompile("MAX_JOBS").install()
    msvc = sys.platform == "win32"
    openmp = [] if sys.platform == "darwin" else ["/openmp"] if msvc else ["-fopenmp"]
    ext = Pybind11Extension(
        "kdlab._C",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp") if p.parent.name != "cuda"),
        include_dirs=["csrc"],
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
        cxx_std=17,
        # No silent a*b+c fusion: the same numbers whatever the compiler inlines.
        extra_compile_args=(["/O2"] if msvc else ["-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden",
                                                  "-Wno-ignored-attributes", "-Wno-psabi"]) + openmp,
        extra_link_args=[] if msvc else openmp,
        optional=choice == "auto",
    )
    return {"ext_modules": [ext, *cuda_extension()], "cmdclass": {"build_ext": Build}}


core = extensions()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["kdlab*"]),
    package_data={"kdlab": ["py.typed", "**/*.json", "**/*.npz", "**/*.js", "**/*.css"]},
    install_requires=lines("requirements"),
    extras_require={
        "lab": lines("lab_requirements"),
        "log": lines("log_requirements"),
        "models": lines("models_requirements"),
        "dev": lines("lab_requirements") + lines("dev_requirements"),
    },
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
    ext_modules=core.get("ext_modules", []),
    cmdclass=core.get("cmdclass", {}) | {"build_py": BuildWithCourse},
)
