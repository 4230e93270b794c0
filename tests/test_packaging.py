"""What is installed: one package, every file of it, and every library that it imports."""

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("models", "passes", "recipes")  # real folders at the root, links inside aqtx/


def project_files() -> list[str]:
    """Files that git has or would take."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in listed if (ROOT / name).is_symlink() or (ROOT / name).is_file())


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the project without what builds and runs have left in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in project_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    litter = folder / "passes" / "__pycache__" / "old.cpython-311.pyc"
    litter.parent.mkdir()
    litter.write_bytes(b"\0")  # what an earlier run leaves behind must not be shipped
    return folder


def build_wheel(source: Path, out: Path) -> set[str]:
    """Build a wheel and list its files, without its metadata."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def installed_name(name: str) -> str:
    """Where a project file is installed: `passes/emit.py` as `aqtx/passes/emit.py`."""
    return f"aqtx/{name}" if name.split("/")[0] in LINKS else name


@pytest.fixture(scope="module")
def wheel_files(clone, tmp_path_factory) -> set[str]:
    return build_wheel(clone, tmp_path_factory.mktemp("wheel"))


def test_only_aqtx_is_installed_and_all_of_it(wheel_files):
    expected = {
        installed_name(name)
        for name in project_files()
        if name.split("/")[0] in ("aqtx", *LINKS) and not (ROOT / name).is_symlink()
    }
    assert sorted(wheel_files - expected) == []
    assert sorted(expected - wheel_files) == []


def test_the_sdist_builds_the_same_wheel(clone, wheel_files, tmp_path):
    code = f"import setuptools.build_meta as build; build.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert build_wheel(unpacked, tmp_path / "wheel") == wheel_files
    assert (unpacked / "LICENSE").is_file()


@pytest.fixture(scope="module")
def editable(clone, tmp_path_factory) -> Path:
    """What `pip install -e` of a clone named `aqtx` puts into site-packages; the clone lies beside it."""
    folder = tmp_path_factory.mktemp("editable")
    shutil.copytree(clone, folder / "aqtx", symlinks=True)
    code = f"import setuptools.build_meta as build; build.build_editable({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "aqtx", check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder


@pytest.mark.parametrize("place", [".", "aqtx", "aqtx/tests", "/"])
def test_an_editable_install_is_found_from_anywhere(editable, place):
    """Also from the folder that holds the clone, where `aqtx` could be taken for an empty namespace package."""
    code = (
        f"import sys, site; site.addsitedir({str(editable / 'site-packages')!r}); sys.path.insert(0, '');"
        "import aqtx; print(aqtx.__file__)"
    )
    # -S: no site-packages but ours, where this project may be installed as well
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=editable / place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (editable / place / done.stdout.strip()).resolve() == editable / "aqtx" / "aqtx" / "__init__.py"


def test_the_linked_folders_are_relative_links_to_one_copy():
    for name in LINKS:
        assert (ROOT / "aqtx" / name).is_symlink()
        assert (ROOT / "aqtx" / name).readlink() == Path("..") / name


def imported_roots() -> dict[str, str]:
    """Third-party top-level module -> the first file that imports it."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "aqtx").rglob("*.py")) + [
        file for link in LINKS for file in (ROOT / link).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [node.args[0].value] if _imports_by_name(node) else []
            for name in names:
                found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name != "aqtx"}


def _imports_by_name(node: ast.AST) -> bool:
    """`import_quietly("torchao.utils")` is an import too."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_quietly"):
        return False
    return isinstance(node.args[0], ast.Constant)


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {normal(requirement) for requirement in project["dependencies"]}


def normal(requirement: str) -> str:
    name = requirement
    for sign in "=<>!~[; ":
        name = name.split(sign)[0]
    return name.lower().replace("_", "-")


def test_every_imported_library_is_declared_and_every_declared_one_imported():
    distributions = packages_distributions()
    needed = {normal(distributions[root][0]): path for root, path in imported_roots().items()}
    assert {name: path for name, path in needed.items() if name not in declared()} == {}
    assert declared() - needed.keys() == set()


def test_the_package_imports_without_the_project_root_on_the_path(clone, tmp_path, wheel_files):
    """`aqtx` from a wheel finds its passes and recipes, and leaves no top-level `passes` behind."""
    del wheel_files
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-t", tmp_path, clone],
        check=True,
        capture_output=True,
    )
    alone = (
        f"import sys; sys.path.remove({str(ROOT)!r}) if {str(ROOT)!r} in sys.path else None"  # an editable install's
    )
    code = (
        "import aqtx.runs.recipe as r, importlib.util as u, pathlib;"
        f"assert pathlib.Path(r.__file__).is_relative_to({str(tmp_path)!r}), r.__file__;"
        "assert 'emit' in r.load_passes();"
        "assert not any(u.find_spec(name) for name in ('passes', 'models', 'recipes'));"
        "from aqtx.runs.recipe import load_recipe; load_recipe('quickstart')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{alone}; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
