"""Prints what pyproject.toml requires to build and run with all extras, one requirement a line, so that pip can install it before
the project itself is built. Run as: python scripts/requirements.py"""

import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    groups = [project["build-system"]["requires"], project["project"]["dependencies"], *extras]
    print("\n".join(sorted({requirement for group in groups for requirement in group})))


if __name__ == "__main__":
    main()
