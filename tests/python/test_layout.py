"""The repository's layout: one namespace over several roots, small files, a README whose file tree is true."""

from __future__ import annotations

import re
import tomllib

from support import ROOT

PACKAGE_ROOTS = ("common", "tune", "compile", "runtime_ext/python")


def test_namespace_has_no_init() -> None:
    """An __init__.py in one root would hide the packages of the others."""
    assert [root for root in PACKAGE_ROOTS if (ROOT / root / "cfmoe" / "__init__.py").exists()] == []


def test_every_package_is_in_the_wheel() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    found = {
        f"cfmoe/{path.name}": f"{root}/cfmoe/{path.name}"
        for root in PACKAGE_ROOTS
        if (ROOT / root / "cfmoe").is_dir()
        for path in (ROOT / root / "cfmoe").iterdir()
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists())
    }
    listed = {name: source for name, source in packages.items() if not name.startswith("cfmoe/assets/")}
    assert found == listed
    assert all((ROOT / source).exists() for source in packages.values())


def test_modules_say_what_they_are_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for root in PACKAGE_ROOTS
        for path in (ROOT / root).rglob("*.py")
        if not path.read_text().startswith(('"""', 'r"""'))
    ]
    assert silent == []


def test_readme_tree_is_true() -> None:
    """Every path of the README's file tree exists, and every directory of the top is in it."""
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"## File tree\n+```\n(.*?)```", readme, re.DOTALL)
    assert tree is not None
    paths = [line.split()[0] for line in tree.group(1).splitlines() if line.strip()]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    ignored = {"build", "dist", "out"}
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - ignored
    assert top - {path.split("/")[0] for path in paths} == set()
