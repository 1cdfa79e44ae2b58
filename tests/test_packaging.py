"""The package as it is shipped: complete, light to import, and no impostor of Hugging Face's `kernels`."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **options).stdout


def test_every_package_is_listed():
    # a forgotten one works in an editable install and is missing from the wheel
    found = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "kvtool").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"kvtool.kernels"}


def test_every_data_file_is_shipped():
    # what git tracks under kvtool/ and is not Python must match a package-data pattern of its package
    tracked = subprocess.run(["git", "ls-files", "kvtool"], cwd=ROOT, capture_output=True, text=True, check=True)
    shipped = set()
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        shipped |= {path for pattern in patterns for path in folder.glob(pattern)}
    data = {ROOT / line for line in tracked.stdout.split("\n") if line and not line.endswith(".py")}
    assert data <= shipped


def test_importing_kvtool_is_light():
    heavy = {"torch", "transformers", "triton", "numpy", "scipy"}
    assert run(f"import sys, kvtool; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


@pytest.mark.alone
def test_importing_kvtool_takes_under_a_second_and_a_half():
    # the import's own time, not the interpreter's start; a loaded machine is slower, hence the best of three
    code = "import time; t = time.perf_counter(); import kvtool; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 1.5


def test_public_names_all_resolve():
    assert run("import kvtool; [getattr(kvtool, n) for n in kvtool.__all__]; print('ok')").strip() == "ok"


def test_the_library_below_the_runtime_imports_without_transformers_and_triton():
    code = "import sys, kvtool.methods, kvtool.calibration; print({'transformers', 'triton'} & set(sys.modules))"
    assert run(code).strip() == "set()"


def test_kernels_folder_does_not_pass_for_hugging_faces_package():
    # transformers probes any importable `kernels`; run from the root, the folder is importable
    run("from transformers.utils import is_kernels_available; assert not is_kernels_available()", cwd=ROOT)


def test_kernels_are_importable_only_below_kvtool():
    assert run("import kvtool.kernels as k; print(k.__name__)").strip() == "kvtool.kernels"


def test_citation_names_this_version():
    import kvtool

    assert f"version: {kvtool.__version__}" in (ROOT / "CITATION.cff").read_text()
