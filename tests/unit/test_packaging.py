"""What is on disk is what gets installed, under the names that it is imported by.

An editable install finds modules that a wheel lacks, and from the root of the work tree the bare
names are importable by accident: only a wheel, looked at from elsewhere, shows what a user gets.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = set(SETTINGS["tool"]["setuptools"]["packages"])
FOLDERS = SETTINGS["tool"]["setuptools"]["package-dir"]

# Prints the file of each named package, or null, with nothing but the wheel and the standard library in sight.
FIND = """
import json, sys
from importlib.util import find_spec
site, *names = sys.argv[1:]
sys.path[:] = [site, *(path for path in sys.path if "site-packages" not in path)]
print(json.dumps({name: spec.origin if (spec := find_spec(name)) else None for name in names}))
"""

# Loads every entry point of the wheel, and prints the file of its module.
LOAD = """
import json, sys
from importlib.metadata import distributions
site = sys.argv[1]
sys.path.insert(0, site)
(wheel,) = distributions(path=[site])
entries = {entry.value: (entry.load(), sys.modules[entry.module].__file__) for entry in wheel.entry_points}
print(json.dumps({value: file for value, (_, file) in entries.items()}))
"""


def run(*command: str, cwd: Path) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def isolated(code: str, *arguments: str, cwd: Path) -> dict[str, str | None]:
    """What the code prints under ``python -I``, which adds neither the folder it runs in nor PYTHONPATH."""
    return json.loads(run(sys.executable, "-I", "-c", code, *arguments, cwd=cwd))


def installed(package: str) -> str:
    return package.replace(".", "/")


def tree() -> set[str]:
    """Every module and typing marker on disk, by the path that it has once installed."""
    return {
        f"{installed(package)}/{path.relative_to(ROOT / folder)}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made by way of the sdist from a copy of the tree, where no earlier build left anything."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), cwd=copy)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    ZipFile(wheel).extractall(folder)
    return folder


def test_packages_names_every_folder_with_modules():
    assert {str(Path(file).parent).replace("/", ".") for file in tree()} == PACKAGES


def test_packages_are_typed_and_have_an_init():
    assert {f"{installed(package)}/__init__.py" for package in PACKAGES} <= tree()
    assert {f"{installed(package)}/py.typed" for package in FOLDERS} <= tree()


def test_type_checker_sees_the_same_folders():
    links = {f"sapin.{link.name}": link.resolve() for link in (ROOT / "deploy/pkgroot/sapin").iterdir()}
    assert links == {package: ROOT / folder for package, folder in FOLDERS.items()}


def test_wheel_is_the_tree_and_the_licence(wheel: Path):
    names = set(ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == tree()
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_only_names_under_sapin_are_importable(site: Path, tmp_path: Path):
    found = isolated(FIND, str(site), *FOLDERS, *FOLDERS.values(), cwd=tmp_path)
    under_sapin = {package: str(site / installed(package) / "__init__.py") for package in FOLDERS}
    assert found == under_sapin | dict.fromkeys(FOLDERS.values())


def test_entry_points_load_from_the_wheel(site: Path, tmp_path: Path):
    groups = [SETTINGS["project"]["scripts"], *SETTINGS["project"]["entry-points"].values()]
    loaded = isolated(LOAD, str(site), cwd=tmp_path)
    assert set(loaded) == {value for group in groups for value in group.values()}
    assert all(Path(file).is_relative_to(site) for file in loaded.values()), loaded


def test_dependencies_fit_together():
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "check", cwd=ROOT)
