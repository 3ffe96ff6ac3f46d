"""The tools that make an APK without Google's: where they are, which are missing and how to get them.

JDK, aapt2, zipalign and apksigner are packages of Debian and Ubuntu; the Kotlin compiler and R8 are npm packages; the API that the app
compiles against is made from signatures in Debian's source package of the Android framework. The last three are kept in a directory of
the user's, which `install_tools` fills. Run as: python -m cfmoe.package.android_tools
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfmoe.errors import CFMoEError, os_error

Progress = Callable[[str, int, int], None]
Command = list[str | Path]

# What an installation is made of; a directory is never changed once it has its name.
_NPM_PACKAGES = ("kotlin-compiler@2.4.20", "node-bundletool@1.0.0")
_KOTLIN, _KOTLIN_STDLIB = "kotlin-compiler/lib/kotlin-compiler.jar", "kotlin-compiler/lib/kotlin-stdlib.jar"
_BUNDLETOOL = "node-bundletool/bundletool.jar"
_SHA256 = {
    _KOTLIN: "038d406cc51d5fe3f6b5a16366a3f083b783bceb9e576e3103e695c3ce04e0fa",
    _KOTLIN_STDLIB: "2226de463d309d4a5500a481320b3dea515a6981dcae1def531fbc158884e25f",
    _BUNDLETOOL: "a099cfa1543f55593bc2ed16a70a7c67fe54b1747bb7301f37fdfd6d91028e29",
}
_NPM_DIRECTORY, _STUBS = "npm-1", "android-api29-1.jar"  # raised when what is put there changes
_SOURCE_PACKAGE, _SIGNATURES = "android-platform-frameworks-base", "api/current.txt"
_FRAMEWORK = Path("/usr/share/android-framework-res/framework-res.apk")
_DIRECTORY_VARIABLE = "CFMOE_ANDROID_TOOLS"

# Command → the package of Debian and Ubuntu that has it.
_COMMANDS = {
    "java": "openjdk-17-jdk-headless",
    "javac": "openjdk-17-jdk-headless",
    "keytool": "openjdk-17-jdk-headless",
    "aapt2": "aapt",
    "zipalign": "zipalign",
    "apksigner": "apksigner",
}
_FRAMEWORK_PACKAGE = "android-framework-res"


@dataclass(frozen=True)
class AndroidTools:
    """Every tool by its path."""

    java: Path
    javac: Path
    keytool: Path
    aapt2: Path
    zipalign: Path
    apksigner: Path
    framework: Path  # resources that an app's own may refer to
    kotlin: Path  # the compiler's jar
    kotlin_stdlib: Path
    bundletool: Path  # R8 is in it
    api: Path  # what the app compiles against


@dataclass(frozen=True)
class MissingTool:
    """`remedy` is a command, or a sentence, that brings it."""

    name: str
    remedy: str


def tools_directory() -> Path:
    """Where `install_tools` puts what no package manager keeps: $CFMOE_ANDROID_TOOLS, or a place in the user's cache."""
    if given := os.environ.get(_DIRECTORY_VARIABLE):
        return Path(given).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cfmoe" / "android-tools"


def find_tools() -> AndroidTools:
    """The tools. Raises CFMoEError that lists everything that is missing, with how to get it."""
    missing = missing_tools()
    if missing:
        raise CFMoEError(missing_message(missing))
    commands = {name: _command(name) for name in _COMMANDS}
    npm = tools_directory() / _NPM_DIRECTORY
    found = {name: path for name, path in commands.items() if path is not None}
    return AndroidTools(
        **found,
        framework=_FRAMEWORK,
        kotlin=npm / _KOTLIN,
        kotlin_stdlib=npm / _KOTLIN_STDLIB,
        bundletool=npm / _BUNDLETOOL,
        api=tools_directory() / _STUBS,
    )


def missing_tools() -> list[MissingTool]:
    """What is not here; empty where an APK can be made."""
    missing = [MissingTool(name, f"sudo apt-get install {package}") for name, package in _COMMANDS.items() if _command(name) is None]
    if not _FRAMEWORK.is_file():
        missing.append(MissingTool("Android's framework resources", f"sudo apt-get install {_FRAMEWORK_PACKAGE}"))
    directory = tools_directory()
    install = "python -m cfmoe.package.android_tools"
    for name, path in (("the Kotlin compiler", _KOTLIN), ("Kotlin's library", _KOTLIN_STDLIB), ("R8", _BUNDLETOOL)):
        if not (directory / _NPM_DIRECTORY / path).is_file():
            missing.append(MissingTool(name, install))
    if not (directory / _STUBS).is_file():
        missing.append(MissingTool("Android's API", install))
    return missing


def missing_message(missing: Sequence[MissingTool]) -> str:
    """One line: what is missing, then what to do, packages in one command."""
    packages = sorted({tool.remedy.rpartition(" ")[2] for tool in missing if tool.remedy.startswith("sudo apt-get")})
    steps = [f"sudo apt-get install {' '.join(packages)}"] if packages else []
    steps += sorted({tool.remedy for tool in missing if not tool.remedy.startswith("sudo apt-get")})
    return f"an APK cannot be made here: {', '.join(tool.name for tool in missing)} missing; run {', then '.join(steps)}"


def install_tools(progress: Progress | None = None) -> None:
    """Fetches what is missing in `tools_directory`: npm packages, and the API from Debian's sources (45 MB). Safe to interrupt.

    Raises CFMoEError where npm or apt-get is missing or fails, or where what came is not what was expected.
    """
    advance = progress or (lambda stage, done, total: None)
    directory = tools_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(error, directory, "create") from error
    advance("Kotlin compiler and R8", 0, 1)
    if not (directory / _NPM_DIRECTORY).is_dir():
        _install_npm(directory)
    advance("Kotlin compiler and R8", 1, 1)
    advance("Android's API", 0, 1)
    if not (directory / _STUBS).is_file():
        _install_api(directory)
    advance("Android's API", 1, 1)


def _command(name: str) -> Path | None:
    home = os.environ.get("JAVA_HOME")
    if home and name in ("java", "javac", "keytool") and os.access(Path(home) / "bin" / name, os.X_OK):
        return Path(home) / "bin" / name
    found = shutil.which(name)
    return Path(found) if found else None


def _install_npm(directory: Path) -> None:
    if shutil.which("npm") is None:
        raise CFMoEError("npm is missing, which brings the Kotlin compiler and R8; run sudo apt-get install npm")
    with tempfile.TemporaryDirectory(prefix=".new-", dir=directory) as temporary:
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", "--prefix", temporary]
        run_tool([*command, *_NPM_PACKAGES], "fetch the Kotlin compiler and R8 with npm")
        modules = Path(temporary) / "node_modules"
        for name, expected in _SHA256.items():
            path = modules / name
            if not path.is_file():
                raise CFMoEError(f"npm brought no {name}; check its registry and try again")
            with open(path, "rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
            if got != expected:
                raise CFMoEError(f"npm brought another {name} than expected (SHA-256 {got}); check its registry and try again")
        _move(modules, directory / _NPM_DIRECTORY)


def _install_api(directory: Path) -> None:
    from cfmoe.package.android_stubs import write_stubs

    if shutil.which("apt-get") is None:
        raise CFMoEError(
            f"apt-get is missing, which brings Android's API; on Debian or Ubuntu run python -m cfmoe.package.android_tools, "
            f"then copy {directory / _STUBS} from there"
        )
    with tempfile.TemporaryDirectory(prefix=".new-", dir=directory) as temporary:
        work = Path(temporary)
        signatures = work / "current.txt"
        archive = _fetch_source(work)
        try:
            with tarfile.open(archive) as sources:
                member = next((entry for entry in sources if entry.name.removeprefix("./") == _SIGNATURES), None)
                content = sources.extractfile(member) if member is not None else None
                if content is None:
                    raise CFMoEError(f"the sources of {_SOURCE_PACKAGE} hold no {_SIGNATURES}; use those of Debian 12")
                signatures.write_bytes(content.read())
        except tarfile.TarError as error:
            raise CFMoEError(f"{archive.name} is damaged: {error}; try again") from error
        stubs = work / _STUBS
        write_stubs(signatures, stubs)
        _move(stubs, directory / _STUBS)


def _fetch_source(work: Path) -> Path:
    """The framework's source archive, fetched and verified by apt with lists of its own: the system's are left alone."""
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT) $(SIGNED_BY)"
    listed = run_tool(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], "ask apt for its sources")
    lines = []
    for row in sorted(set(listed.splitlines())):
        uri, release, component, *signed = row.split()
        # Without a key of its own a source is verified with the system's keys; apt prints the variable's name then.
        key = f"[signed-by={signed[0]}] " if signed and not signed[0].startswith("$") else ""
        lines.append(f"deb-src {key}{uri} {release} {component}\n")
    for name in ("lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    (work / "sources.list").write_text("".join(lines))
    options = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-qq", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    run_tool([*apt, "update"], "read apt's lists of sources")
    run_tool([*apt, "source", "--download-only", _SOURCE_PACKAGE], f"fetch the sources of {_SOURCE_PACKAGE}", directory=work)
    archives = sorted(work.glob(f"{_SOURCE_PACKAGE}_*.orig.tar.*"))
    if not archives:
        raise CFMoEError(f"apt-get brought no source archive of {_SOURCE_PACKAGE}; use the sources of Debian 12")
    return archives[0]


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if not target.exists():  # else another process was faster
            raise os_error(error, target, "create") from error


def run_tool(command: Sequence[str | Path], doing: str, environment: dict[str, str] | None = None, directory: Path | None = None) -> str:
    """Standard output of a tool, run with additions to the environment. Raises CFMoEError with what it said where it fails."""
    try:
        result = subprocess.run(
            [str(part) for part in command],
            cwd=directory,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise os_error(error, str(command[0]), "run") from error
    if result.returncode != 0:
        said = " ".join((result.stderr.strip() or result.stdout.strip() or "it said nothing").split())
        raise CFMoEError(f"cannot {doing}: {Path(command[0]).name} ended with {result.returncode}: {said[:2000]}")
    return result.stdout


def _main() -> int:
    try:
        install_tools(lambda stage, done, total: print(f"{stage}: {'here' if done else 'fetching'}", file=sys.stderr))
    except CFMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missing = missing_tools()
    if missing:
        print(f"error: {missing_message(missing)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())
