"""Package metadata comes from settings.ini; the extension in csrc/ is built when it can be.

KDLAB_EXT=auto (default) builds it and carries on without it if that fails; 0 leaves it out; 1 insists on it.
"""
import os
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
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


def extensions():
    "The compiled core as arguments of `setup`, or nothing where KDLAB_EXT=0."
    choice = os.environ.get("KDLAB_EXT", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"KDLAB_EXT must be auto, 0 or 1, not {choice!r}")
    if choice == "0":
        return {}
    try:
        from pybind11.setup_helpers import Pybind11Extension, build_ext
    except ImportError:
        if choice == "1":
            raise SystemExit("KDLAB_EXT=1 needs pybind11: pip install pybind11")
        return {}

    class Build(build_ext):
        def initialize_options(self):
            super().initialize_options()
            self.force = True  # a change of flags alone would not rebuild

    msvc = sys.platform == "win32"
    openmp = [] if sys.platform == "darwin" else ["/openmp"] if msvc else ["-fopenmp"]
    ext = Pybind11Extension(
        "kdlab._C",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")),
        include_dirs=["csrc"],
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
        cxx_std=17,
        # No silent a*b+c fusion: the same numbers whatever the compiler inlines.
        extra_compile_args=(["/O2"] if msvc else ["-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden",
                                                  "-Wno-ignored-attributes", "-Wno-psabi"]) + openmp,
        extra_link_args=[] if msvc else openmp,
        optional=choice == "auto",
    )
    return {"ext_modules": [ext], "cmdclass": {"build_ext": Build}}


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
