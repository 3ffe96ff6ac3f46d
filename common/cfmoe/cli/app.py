"""The typer application and `main`, which turns what the user can mend into one line on standard error and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from cfmoe.cli import (
    bench,
    compile,
    demo,
    doctor,
    evaluate,
    export,
    inspect,
    make_random,
    package,
    plan,
    profile,
    run,
    score,
    simulate,
    tune,
)
from cfmoe.errors import CFMoEError, RuntimeFault

EXIT_FAULT = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="cfmoe",
    help="Compile and run Mixture-of-Experts language models on phones inside a memory budget.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("doctor")(doctor.doctor)
app.command("profile")(profile.profile)
app.command("tune")(tune.tune)
app.command("evaluate")(evaluate.evaluate)
app.command("simulate")(simulate.simulate)
app.command("plan")(plan.plan)
app.command("compile")(compile.compile_command)
app.command("inspect")(inspect.inspect)
app.command("run")(run.run)
app.command("score")(score.score)
app.command("bench")(bench.bench)
app.add_typer(export.export, name="export")
app.command("make-random")(make_random.make_random)
app.command("package")(package.package)
app.command("demo")(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"cfmoe {version('cfmoe')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the command."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 a fault of ours, 2 the user can mend it, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Ended by SIGTERM, a command still has to remove what is half written.
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(_run(arguments or ["--help"]))


def _run(arguments: list[str]) -> int:
    try:
        result = app(arguments, prog_name="cfmoe", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CFMoEError as error:
        return _complain(str(error), EXIT_USER)
    except RuntimeFault as error:
        return _complain(str(error), EXIT_FAULT)
    except TyperException as error:
        return _complain(_usage_message(error), EXIT_USER)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAULT


def _usage_message(error: TyperException) -> str:
    """Typer's message, with the value that it leaves out where a value is not what its type wants."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    errors = getattr(error.__cause__, "errors", None)  # pydantic's, by which typer converts values
    problems = errors() if callable(errors) else []
    values = [repr(problem["input"]) for problem in problems if repr(problem["input"]) not in message]
    return f"{message}; given {', '.join(values)}" if values else message


def _complain(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"error: {line}".encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr)
    return code


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)
