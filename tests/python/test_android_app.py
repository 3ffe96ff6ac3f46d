"""The Android app: its sources against Android's API, its APK, and its engine client, on the JVM, against the real engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest

from cfmoe.errors import CFMoEError
from cfmoe.package import android_tools
from cfmoe.package.android_app import build_app, read_settings, run_kotlin
from cfmoe.package.android_stubs import write_stubs
from cfmoe.package.android_tools import AndroidTools, find_tools
from cfmoe.package.apk import build_apk
from cfmoe.package.apk_archive import PAGE, check_alignment, check_native
from chat_artifact import write_chat_artifact, write_conversations
from engine_process import host_engine
from support import ROOT

APP = ROOT / "android_app"
MAIN = APP / "app" / "src" / "main"
ANDROID = "{http://schemas.android.com/apk/res/android}"
LIBRARIES = [Path("/usr/share/java/junit4.jar"), Path("/usr/share/java/hamcrest-core.jar"), Path("/usr/share/java/com.android.json.jar")]


# What needs no tools.


def test_manifest_asks_for_nothing_and_unpacks_the_engine() -> None:
    manifest = ElementTree.parse(MAIN / "AndroidManifest.xml").getroot()
    assert not [node.tag for node in manifest.iter() if node.tag.startswith("uses-permission")]
    assert "package" not in manifest.attrib  # the Gradle plugin refuses it
    application = manifest.find("application")
    assert application is not None
    assert application.attrib[f"{ANDROID}extractNativeLibs"] == "true"
    activities = application.findall("activity")
    assert [activity.attrib[f"{ANDROID}exported"] for activity in activities] == ["true"]
    for node in (application, *activities):
        source = node.attrib[f"{ANDROID}name"].removeprefix(".")
        assert (MAIN / "kotlin" / "org" / "cfmoe" / "app" / f"{source}.kt").is_file()


def test_sources_use_no_network_and_no_androidx() -> None:
    for source in MAIN.rglob("*.kt"):
        imports = re.findall(r"^import (\S+)", source.read_text(), re.MULTILINE)
        assert not [name for name in imports if re.match(r"androidx\.|java\.net\.|android\.net\.(?!Uri)|android\.webkit", name)], source


def test_texts_are_resources_and_used() -> None:
    strings = {node.attrib["name"]: node for node in ElementTree.parse(MAIN / "res" / "values" / "strings.xml").getroot()}
    everything = "\n".join(path.read_text() for path in [*MAIN.rglob("*.kt"), *(MAIN / "res").rglob("*.xml"), MAIN / "AndroidManifest.xml"])
    for name in strings:
        assert re.search(rf"R\.(string|plurals)\.{name}\b|@string/{name}\b", everything), f"{name} is not used"
    for layout in (MAIN / "res" / "layout").glob("*.xml"):
        for node in ElementTree.parse(layout).getroot().iter():
            for attribute in ("text", "hint", "contentDescription"):
                value = node.attrib.get(ANDROID + attribute, "@string/")
                assert value.startswith("@string/"), f"{layout.name}: {value}"


def test_what_shows_no_text_is_described() -> None:
    """Sliders, bars and choices are announced by a description; the two drawn views get theirs from the panel."""
    described_in_code = {"memory_bar", "heat_map"}
    panel = (MAIN / "kotlin" / "org" / "cfmoe" / "app" / "panel" / "PanelScreen.kt").read_text()
    for layout in (MAIN / "res" / "layout").glob("*.xml"):
        for node in ElementTree.parse(layout).getroot().iter():
            if node.tag in ("SeekBar", "ProgressBar", "Spinner", "ImageView", "ImageButton") or "." in node.tag:
                identity = node.attrib[f"{ANDROID}id"].removeprefix("@+id/")
                assert f"{ANDROID}contentDescription" in node.attrib or identity in described_in_code, f"{layout.name}: {identity}"
    assert panel.count(".contentDescription = ") == len(described_in_code)


def test_colours_have_a_night_form() -> None:
    def names(folder: str) -> set[str]:
        return {node.attrib["name"] for node in ElementTree.parse(MAIN / "res" / folder / "colors.xml").getroot()}

    assert names("values") - names("values-night") == {"icon_ground"}


def test_settings_are_read_where_gradle_reads_them(tmp_path: Path) -> None:
    settings = read_settings(APP)
    script = (APP / "app" / "build.gradle.kts").read_text()
    for name in settings:
        assert f'setting("{name.removeprefix("cfmoe.")}")' in script
    assert settings["cfmoe.minSdk"] == "26"
    (tmp_path / "gradle.properties").write_text("cfmoe.minSdk=26\n")
    with pytest.raises(CFMoEError, match=r"lacks cfmoe\.applicationId"):
        read_settings(tmp_path)


def test_missing_tools_are_listed_with_their_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("CFMOE_ANDROID_TOOLS", str(tmp_path / "tools"))
    with pytest.raises(CFMoEError) as caught:
        find_tools()
    message = str(caught.value)
    assert "\n" not in message
    assert "sudo apt-get install" in message
    for word in ("java", "aapt2", "zipalign", "apksigner", "Kotlin compiler", "R8", "Android's API", "openjdk-17-jdk-headless", "aapt"):
        assert word in message
    with pytest.raises(CFMoEError, match="npm is missing"):
        android_tools.install_tools()


def test_signatures_that_are_none_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "api.jar"
    good = "package java.lang {\n  public class Object {\n    ctor public Object();\n  }\n}\n"
    for text, reason in (
        (good, "lacks"),
        ("package a {\n  public class B {\n    widget public int c;\n  }\n}\n", "line 3: a widget is unknown"),
        ("package a {\n  shiny class B {\n  }\n}\n", "line 2: the modifier shiny is unknown"),
        ("package a {\n  public class B {\n    method public void c(int;\n  }\n}\n", "line 3"),
        ("public int x;\n", "outside of a class"),
    ):
        signatures = tmp_path / "current.txt"
        signatures.write_text(text)
        with pytest.raises(CFMoEError, match=reason):
            write_stubs(signatures, out)
    with pytest.raises(CFMoEError, match="cannot read"):
        write_stubs(tmp_path / "none", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current.txt"]


def elf(machine: int = 183, alignment: int = PAGE, kind: int = 1) -> bytes:
    """An ELF file with one segment and no content."""
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", kind, 5, 0, 0, 0, 0, 0, alignment)


def test_native_programs_are_checked(tmp_path: Path) -> None:
    program = tmp_path / "libx.so"
    program.write_bytes(elf())
    check_native("arm64-v8a", program)
    cut = elf()[:100]
    for content, abi, reason in (
        (elf(alignment=4096), "arm64-v8a", "max-page-size=16384"),
        (elf(machine=62), "arm64-v8a", "another CPU"),
        (b"#!/bin/sh", "arm64-v8a", "no 64-bit ELF"),
        (cut, "arm64-v8a", "damaged"),
        (elf(), "mips", "ABI mips is unknown"),
    ):
        program.write_bytes(content)
        with pytest.raises(CFMoEError, match=reason):
            check_native(abi, program)


# What needs them: `make android-tools`.


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> AndroidTools:
    monkeypatch.setenv("CFMOE_ANDROID_TOOLS", os.environ.get("CFMOE_ANDROID_TOOLS", str(ROOT / "build" / "android-tools")))
    return find_tools()


WRONG = """
package wrong

import android.app.Activity
import android.os.Bundle
import android.widget.TextView

class Wrong : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView("a text") // line 11: takes a view or a layout
        val text = TextView(this)
        text.setTypo("x") // line 13: no such method
        text.text = getDisplay() // line 14: Android 11's, the app runs on 8
        println(ProcessHandle.current()) // line 15: Java has it, Android does not
        val name: String = savedInstanceState!!.getString("a") // line 16: may be null
        text.setOnClickListener { view: String -> println(view) } // line 17: gets a view
    }
}
"""


@pytest.mark.slow
def test_wrong_call_fails_the_build(tools: AndroidTools, tmp_path: Path) -> None:
    source = tmp_path / "Wrong.kt"
    source.write_text(WRONG)
    with pytest.raises(CFMoEError) as caught:
        run_kotlin(tools, [source], f"{tools.api}:{tools.kotlin_stdlib}", tmp_path / "out", ["-no-jdk"])
    wrong = {int(line) for line in re.findall(r"Wrong\.kt:(\d+):\d+: error", str(caught.value))}
    assert wrong == {number for number, line in enumerate(WRONG.splitlines(), 1) if "// line" in line}


@pytest.mark.slow
def test_engine_client_and_app_on_the_jvm(tools: AndroidTools, demo_artifact: Path, demo_model: Path, tmp_path: Path) -> None:
    """JUnit's tests in android_app/app/src/test, with the host's engine and the demo model; none may be left out."""
    classes = build_app(tools, APP).classes
    tests = tmp_path / "classes"
    libraries = [*LIBRARIES, tools.kotlin_stdlib, classes]
    class_path = ":".join(map(str, libraries))
    run_kotlin(tools, [APP / "app" / "src" / "test" / "kotlin"], class_path, tests, [f"-Xfriend-paths={classes}"])
    chat = write_chat_artifact(demo_artifact, demo_model, tmp_path / "chat")
    conversations = write_conversations(tmp_path / "conversations.json")
    facts = [f"-Dcfmoe.engine={host_engine()}", f"-Dcfmoe.artifact={demo_artifact}"]
    facts += [f"-Dcfmoe.chat={chat}", f"-Dcfmoe.conversations={conversations}"]
    command = [tools.java, "-Xmx512m", *facts, "-cp", f"{class_path}:{tests}", "org.cfmoe.app.TestMainKt"]
    # Without this machine's GPU drivers: they take seconds to start, and one puts its own signal stack in the sanitizer's place.
    (tmp_path / "drivers").mkdir()
    none = str(tmp_path / "drivers")
    environment = os.environ | {"VK_DRIVER_FILES": none, "OCL_ICD_VENDORS": none, "OCL_ICD_FILENAMES": ""}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-8000:]
    counts = json.loads(result.stdout)
    declared = sum(path.read_text().count("    @Test\n") for path in (APP / "app" / "src" / "test").rglob("*.kt"))
    assert counts == {"run": declared, "failed": 0, "left_out": 0}


@pytest.mark.slow
def test_apk_is_signed_aligned_and_reproducible(tools: AndroidTools, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_bytes(elf() + bytes(range(256)) * 200)
    assets = tmp_path / "assets" / "models" / "m"
    assets.mkdir(parents=True)
    (assets / "manifest.json").write_text("{}")
    (assets / "experts.bin").write_bytes(os.urandom(1 << 20))
    native = {"arm64-v8a/libcfmoe-engine.so": engine}
    stages: list[int] = []
    out = build_apk(APP, native, tmp_path / "assets", tmp_path / "a" / "app.apk", progress=lambda stage, done, total: stages.append(done))
    assert stages == sorted(stages)
    assert [path.name for path in out.parent.iterdir()] == ["app.apk"]

    said = subprocess.run([tools.apksigner, "verify", "-v", out], capture_output=True, text=True, check=True).stdout
    assert "v2 scheme (APK Signature Scheme v2): true" in said
    assert "v3 scheme (APK Signature Scheme v3): true" in said
    badging = subprocess.run([tools.aapt2, "dump", "badging", out], capture_output=True, text=True, check=True).stdout
    assert "package: name='org.cfmoe.app'" in badging
    assert "sdkVersion:'26'" in badging
    assert "targetSdkVersion:'36'" in badging
    assert "uses-permission" not in badging
    assert "native-code: 'arm64-v8a'" in badging
    with zipfile.ZipFile(out) as apk:
        assert apk.testzip() is None
        assert apk.read("lib/arm64-v8a/libcfmoe-engine.so") == engine.read_bytes()
        assert apk.read("assets/models/m/experts.bin") == (assets / "experts.bin").read_bytes()
        for name in ("lib/arm64-v8a/libcfmoe-engine.so", "assets/models/m/experts.bin", "resources.arsc"):
            assert apk.getinfo(name).compress_type == zipfile.ZIP_STORED
        apk.extract("classes.dex", tmp_path)
    check_alignment(out)
    dexdump = shutil.which("dexdump")
    assert dexdump is not None, "dexdump is missing: make android-tools"
    dumped = subprocess.run([dexdump, tmp_path / "classes.dex"], capture_output=True, text=True, check=True).stdout
    for name in ("MainActivity", "CfmoeApplication", "engine/EngineProcess", "panel/HeatMapView"):
        assert f"Class descriptor  : 'Lorg/cfmoe/app/{name};'" in dumped

    again = build_apk(APP, native, tmp_path / "assets", tmp_path / "b.apk")
    assert again.read_bytes() == out.read_bytes()
    # A damaged entry is found by the signature; what cannot be built leaves the APK that was there.
    damaged = bytearray(out.read_bytes())
    damaged[damaged.index((assets / "experts.bin").read_bytes()[:64])] ^= 1
    (tmp_path / "damaged.apk").write_bytes(damaged)
    assert subprocess.run([tools.apksigner, "verify", tmp_path / "damaged.apk"], capture_output=True, check=False).returncode != 0
    engine.write_bytes(elf(alignment=4096))
    with pytest.raises(CFMoEError, match="max-page-size"):
        build_apk(APP, native, tmp_path / "assets", out)
    engine.write_bytes(elf())
    with pytest.raises(CFMoEError, match="needs its password"):
        build_apk(APP, native, tmp_path / "assets", out, keystore=engine)
    assert out.read_bytes() == again.read_bytes()
