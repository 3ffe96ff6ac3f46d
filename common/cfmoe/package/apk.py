"""An installable, signed APK from the app's sources, the engine and a model: with Google's Gradle where it is, without it elsewhere.

Without: aapt2 links resources and manifest, the Kotlin compiler and R8 make classes.dex, this package writes the archive, and apksigner
signs it. The same input gives the same bytes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from cfmoe.errors import CFMoEError, os_error
from cfmoe.package.android_app import build_app
from cfmoe.package.android_tools import AndroidTools, Command, Progress, find_tools, run_tool
from cfmoe.package.apk_archive import check_alignment, check_native, write_archive

_STAGES = 5  # three of build_app, archive, signature
_DEBUG_PASSWORD = "android"  # as of every Android debug key: it protects nothing
_PASSWORD_VARIABLE, _ALIAS_VARIABLE = "CFMOE_KEYSTORE_PASSWORD", "CFMOE_KEY_ALIAS"


def build_apk(
    app_dir: Path,
    native_libs: dict[str, Path],
    assets: Path,
    out: Path,
    *,
    keystore: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the APK `out`, replacing one that is there, and returns it.

    `native_libs` maps ABI/NAME ("arm64-v8a/libcfmoe-engine.so") to files; what is below `assets` becomes the APK's assets/. Signed with
    `keystore`, whose password is in $CFMOE_KEYSTORE_PASSWORD and whose only key, or $CFMOE_KEY_ALIAS, is used; else with a debug key that
    is made once for this user. Raises CFMoEError with what is missing or wrong; then `out` is as before.
    """
    tools = find_tools()
    for name, path in native_libs.items():
        abi, _, file = name.partition("/")
        if not re.fullmatch(r"lib[\w.+-]+\.so", file):
            raise CFMoEError(f"{name} is no ABI/libNAME.so, and Android unpacks no other; rename it")
        check_native(abi, path)
    if not assets.is_dir():
        raise CFMoEError(f"{assets} is not a directory; give the directory whose content becomes assets/")
    key = _signing_key(tools, keystore)

    def advance(stage: int) -> None:
        if progress is not None:
            progress("Android app", stage, _STAGES)

    app = build_app(tools, app_dir, advance)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            unsigned, signed = Path(temporary) / "unsigned.apk", Path(temporary) / "signed.apk"
            advance(3)
            write_archive(app.base, app.dex, native_libs, assets, unsigned)
            run_tool([tools.zipalign, "-c", "4", unsigned], "check the APK's alignment")
            advance(4)
            # Android 8 and newer read schemes 2 and 3; scheme 1 is for older ones.
            sign: Command = [tools.apksigner, "sign", "--v1-signing-enabled", "false", *key.options]
            run_tool([*sign, "--out", signed, unsigned], "sign the APK", key.environment)
            run_tool([tools.apksigner, "verify", "-Werr", signed], "verify the APK's signature")
            check_alignment(signed)
            signed.replace(out)
    except OSError as error:
        raise os_error(error, error.filename or out, "write") from error
    advance(_STAGES)
    return out


class _Key:
    """What apksigner needs; passwords travel in the environment."""

    def __init__(self, store: Path, password: str, alias: str | None) -> None:
        self.options: list[str | Path] = ["--ks", store, "--ks-pass", f"env:{_PASSWORD_VARIABLE}"]
        if alias:
            self.options += ["--ks-key-alias", alias]
        self.environment = {_PASSWORD_VARIABLE: password}


def _signing_key(tools: AndroidTools, keystore: Path | None) -> _Key:
    if keystore is None:
        return _Key(_debug_keystore(tools), _DEBUG_PASSWORD, None)
    if not keystore.is_file():
        raise CFMoEError(f"{keystore} is not a file; give a keystore, or none for a debug key")
    password = os.environ.get(_PASSWORD_VARIABLE)
    if not password:
        raise CFMoEError(f"{keystore} needs its password; set ${_PASSWORD_VARIABLE}")
    return _Key(keystore, password, os.environ.get(_ALIAS_VARIABLE))


def _debug_keystore(tools: AndroidTools) -> Path:
    """This user's debug key, made the first time. Apps signed with one key can replace each other on a phone."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(home) / "cfmoe" / "android-debug.p12"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(error, path.parent, "create") from error
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        # RSA: its signatures have no random part, so that the same APK is signed to the same bytes.
        command: Command = [tools.keytool, "-genkeypair", "-keystore", temporary, "-storetype", "PKCS12", "-storepass", _DEBUG_PASSWORD]
        command += ["-alias", "debug", "-keyalg", "RSA", "-keysize", "2048", "-validity", "10000", "-dname", "CN=CFMoE debug key"]
        run_tool(command, "make a debug key")
        temporary.replace(path)
    except OSError as error:
        raise os_error(error, path, "write") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def build_with_gradle(
    app_dir: Path,
    native_libs: dict[str, Path],
    assets: Path,
    out: Path,
    *,
    keystore: Path | None = None,
) -> Path:
    """The same APK by Gradle and the Android SDK at $ANDROID_HOME. Needs a network the first time; raises CFMoEError as `build_apk`."""
    gradle = shutil.which("gradle")
    if gradle is None:
        raise CFMoEError("gradle is missing; install Gradle 8.11 or newer, or unset ANDROID_HOME to build without it")
    version = re.search(r"Gradle (\d+)\.(\d+)", run_tool([gradle, "--version"], "ask Gradle for its version"))
    if version is None or (int(version[1]), int(version[2])) < (8, 11):
        # Old ones ignore *.gradle.kts, build nothing and report success.
        found = version[0] if version else "an unknown Gradle"
        raise CFMoEError(f"{found} is too old for the Android plugin; install Gradle 8.11 or newer, or unset ANDROID_HOME")
    options = []
    if keystore is not None:
        if not os.environ.get(_PASSWORD_VARIABLE):
            raise CFMoEError(f"{keystore} needs its password; set ${_PASSWORD_VARIABLE}")
        options.append(f"-Pcfmoe.keystore={keystore.absolute()}")
    with tempfile.TemporaryDirectory(prefix="cfmoe-gradle-") as temporary:
        libraries = Path(temporary) / "jniLibs"
        for name, path in native_libs.items():
            (libraries / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, libraries / name)
        options += [f"-Pcfmoe.jniLibs={libraries}", f"-Pcfmoe.assets={assets.absolute()}"]
        built = app_dir / "app" / "build" / "outputs" / "apk" / "release" / "app-release.apk"
        built.unlink(missing_ok=True)
        run_tool([gradle, "--project-dir", app_dir, "--console=plain", *options, ":app:assembleRelease"], "build the app with Gradle")
        if not built.is_file():
            raise CFMoEError(f"Gradle reported success and made no {built}; build the app in Android Studio to see why")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            staged = out.with_name(f".{out.name}.new")
            shutil.copyfile(built, staged)
            staged.replace(out)
        except OSError as error:
            raise os_error(error, out, "write") from error
    return out
