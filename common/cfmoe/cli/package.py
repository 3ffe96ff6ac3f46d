"""cfmoe package: an artifact as an app for a phone."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cfmoe.cli._common import ForceOption, JsonOption, print_summary, with_progress


class Platform(StrEnum):
    """What the app runs on."""

    android = "android"
    ios = "ios"


def package(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)],
    platform: Annotated[Platform, typer.Option("--platform", help="android: a signed APK. ios: an Xcode project.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.", show_default=False)],
    keystore: Annotated[
        Path | None,
        typer.Option(
            "--keystore",
            help="Sign the APK with this, its password in $CFMOE_KEYSTORE_PASSWORD. [default: a debug key]",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pack an artifact, the engine and the app for a phone."""
    from cfmoe.package import packager
    from cfmoe.runtime import format_size

    made, seconds = with_progress(
        lambda progress: packager.package(artifact, platform.value, out, keystore=keystore, force=force, progress=progress)
    )
    facts = {
        "platform": made.platform,
        "product": str(made.product),
        "bytes": made.size,
        "targets": list(made.targets),
        "notes": list(made.notes),
        "seconds": seconds,
    }
    notes = "".join(f"\nnote: {note}" for note in made.notes)
    print_summary(facts, f"{made.product}: {format_size(made.size)}, {', '.join(made.targets)}, in {seconds:.1f} s{notes}", as_json)
