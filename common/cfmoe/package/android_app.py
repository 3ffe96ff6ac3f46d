"""The app's own part of an APK, without engine and model: resources, manifest, and classes.dex from Kotlin.

It takes most of the time and depends on little, so that it is made once for given sources and tools, and kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cfmoe.errors import CFMoEError, os_error
from cfmoe.package.android_tools import AndroidTools, Command, run_tool, tools_directory

_FORMAT = 1  # raised when this module makes something else of the same sources
_KEPT = 3
_JVM = ("-Xmx1500m", "-XX:+UseSerialGC")  # Java would take more threads and memory than two cores thank for
_BYTECODE = "11"  # of Kotlin's classes; newer ones mark sealed classes, which this R8 does not read
_SETTINGS = ("cfmoe.applicationId", "cfmoe.versionName", "cfmoe.versionCode", "cfmoe.minSdk", "cfmoe.targetSdk")


@dataclass(frozen=True)
class BuiltApp:
    """A directory that is not to be changed."""

    path: Path

    @property
    def base(self) -> Path:
        """Manifest and resources, as an archive."""
        return self.path / "base.apk"

    @property
    def classes(self) -> Path:
        """The app's class files."""
        return self.path / "classes"

    @property
    def dex(self) -> list[Path]:
        """The classes for Android, with what they use of Kotlin's library."""
        return sorted((self.path / "dex").glob("*.dex"))


def build_app(tools: AndroidTools, app_dir: Path, advance: Callable[[int], None] | None = None) -> BuiltApp:
    """Builds the sources in `app_dir`, unless that was done before; `advance` hears 0, 1, 2 as its three parts begin.

    Raises CFMoEError with what a compiler says, and where the user's cache cannot be written.
    """
    step = advance or (lambda stage: None)
    settings = read_settings(app_dir)
    kept = tools_directory() / "apps"
    place = kept / _digest(tools, app_dir)
    if place.is_dir():
        place.touch()
        return BuiltApp(place)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=kept) as temporary:
            work = Path(temporary) / "app"
            work.mkdir()
            step(0)
            link_resources(tools, app_dir, settings, work)
            step(1)
            compile_kotlin(tools, app_dir, work)
            step(2)
            _shrink(tools, app_dir, int(settings["cfmoe.minSdk"]), work)
            try:
                work.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was faster
                    raise
        for old in sorted(kept.glob("[!.]*"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)  # what stays is tried again the next time
    except OSError as error:
        raise os_error(error, error.filename or kept, "write") from error
    return BuiltApp(place)


def _digest(tools: AndroidTools, app_dir: Path) -> str:
    """Of everything that the result depends on."""
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    main = app_dir / "app" / "src" / "main"
    sources = [app_dir / "gradle.properties", app_dir / "app" / "proguard-rules.pro", *main.rglob("*")]
    for path in sorted(path for path in sources if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(app_dir).as_posix()} {len(content)}\n".encode() + content)
    for tool in (tools.aapt2, tools.framework, tools.kotlin, tools.bundletool, tools.api):
        facts = tool.stat()
        digest.update(f"{tool} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def read_settings(app_dir: Path) -> dict[str, str]:
    """The app's identity and versions, from its gradle.properties, where Gradle reads them too."""
    path = app_dir / "gradle.properties"
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise os_error(error, path, "read") from error
    pairs = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    missing = [name for name in _SETTINGS if name not in pairs]
    if missing:
        raise CFMoEError(f"{path} lacks {', '.join(missing)}; take the file from the app's sources")
    return {name: pairs[name].strip() for name in _SETTINGS}


def link_resources(tools: AndroidTools, app_dir: Path, settings: dict[str, str], work: Path) -> Path:
    """Manifest and resources as aapt2 makes them, in `work`; returns that archive. Compiles the class R beside it."""
    main = app_dir / "app" / "src" / "main"
    manifest = work / "AndroidManifest.xml"
    # Gradle takes the package from its own script, and refuses it here.
    text = (main / "AndroidManifest.xml").read_text("utf-8")
    manifest.write_text(text.replace("<manifest ", f'<manifest package="{settings["cfmoe.applicationId"]}" ', 1), "utf-8")
    resources, base = work / "resources.zip", work / "base.apk"
    run_tool([tools.aapt2, "compile", "--dir", main / "res", "-o", resources], "compile the app's resources")
    version = ["--version-code", settings["cfmoe.versionCode"], "--version-name", settings["cfmoe.versionName"]]
    version += ["--min-sdk-version", settings["cfmoe.minSdk"], "--target-sdk-version", settings["cfmoe.targetSdk"]]
    command: Command = [tools.aapt2, "link", "-I", tools.framework, "--manifest", manifest, "--java", work / "generated", *version]
    run_tool([*command, "-o", base, resources], "link the app's resources")
    sources = sorted((work / "generated").rglob("*.java"))
    java: Command = [tools.javac, "-nowarn", "-Xlint:-options", "-source", "8", "-target", "8", "-bootclasspath", tools.api]
    run_tool([*java, "-d", work / "classes", *sources], "compile the names of the app's resources")
    return base


def compile_kotlin(tools: AndroidTools, app_dir: Path, work: Path) -> Path:
    """The app's classes, compiled against Android's API alone, in a directory that holds the class R already."""
    classes = work / "classes"
    class_path = os.pathsep.join(map(str, (tools.api, tools.kotlin_stdlib, classes)))
    run_kotlin(tools, [app_dir / "app" / "src" / "main" / "kotlin"], class_path, classes, ["-no-jdk"])
    return classes


def run_kotlin(tools: AndroidTools, sources: list[Path], class_path: str, out: Path, options: list[str]) -> None:
    """Compiles Kotlin sources; warnings are errors. Raises CFMoEError with what the compiler says."""
    command: Command = [tools.java, *_JVM, "-XX:TieredStopAtLevel=1", "-cp", tools.kotlin, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
    fixed = ["-no-reflect", "-no-stdlib", "-Werror", "-jvm-target", _BYTECODE]
    run_tool([*command, *fixed, *options, "-cp", class_path, "-d", out, *sources], "compile the app")


def _shrink(tools: AndroidTools, app_dir: Path, min_sdk: int, work: Path) -> None:
    """The app and what it uses of Kotlin's library, as dex files."""
    jar, dex = work / "app.jar", work / "dex"
    shutil.make_archive(str(jar.with_suffix("")), "zip", work / "classes")
    jar.with_suffix(".zip").rename(jar)
    dex.mkdir()
    command: Command = [tools.java, *_JVM, "-cp", tools.bundletool, "com.android.tools.r8.R8", "--release", "--min-api", str(min_sdk)]
    rules = app_dir / "app" / "proguard-rules.pro"
    run_tool(
        [*command, "--lib", tools.api, "--pg-conf", rules, "--output", dex, jar, tools.kotlin_stdlib],
        "translate the app for Android",
    )
    jar.unlink()
