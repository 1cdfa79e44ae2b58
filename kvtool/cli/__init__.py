"""The command line: every command is parse, one call, print.

stdout is data, stderr is talk. Exit 0: done; 1: a check failed; 2: the user must change something; 70: a defect of
kvtool; 130 and 143: stopped by Ctrl-C or SIGTERM. A message is one sentence; ``kvtool --debug`` adds the traceback.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvtool import __version__
from kvtool.errors import KvtoolError

# in the order of the work: command, module, function, heading in --help
COMMANDS = (
    ("capture", "kvtool.cli.capture", "capture", "The job, in order"),
    ("calibrate", "kvtool.cli.calibrate", "calibrate", "The job, in order"),
    ("verify-bound", "kvtool.cli.verify_bound", "verify_bound", "The job, in order"),
    ("generate", "kvtool.cli.generate", "generate", "The job, in order"),
    ("eval", "kvtool.cli.evaluate", "evaluate", "The job, in order"),
    ("bench", "kvtool.cli.bench", "bench", "The job, in order"),
    ("inspect", "kvtool.cli.inspect", "inspect", "Look"),
    ("methods", "kvtool.cli.methods", "methods", "Look"),
)


class Stopped(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be, so that both leave by the same door."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Ctrl-C and SIGTERM end with one sentence; a command may word it by raising the same with a message."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            _say(str(stop) or ("stopped by SIGTERM" if isinstance(stop, Stopped) else "interrupted"))
            raise typer.Exit(143 if isinstance(stop, Stopped) else 130) from None
        except BrokenPipeError:
            # typer would exit with 1, which is a failed check; main sees the pipe again when it flushes
            raise typer.Exit from None


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """``-o NAME VALUE`` is one option in two words, which typer cannot say: it becomes ``-o NAME=VALUE``."""
        joined: list[str] = []
        words = iter(args)
        for word in words:
            joined.append(word)
            name = next(words, None) if word in ("-o", "--option") else None
            if name is not None:
                value = None if "=" in name else next(words, None)
                joined.append(name if value is None else f"{name}={value}")
        return super().parse_args(ctx, joined)


app = typer.Typer(
    name="kvtool",
    cls=_Commands,
    help="Capture a model's KV cache, fit compression to it, verify what it claims, serve it compressed.",
    epilog="Start: `kvtool capture`, `kvtool calibrate --method turboquant`, `kvtool verify-bound`, `kvtool eval`.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvtool {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; stands before the command.")
    ] = False,
) -> None:
    pass


for _name, _module, _function, _panel in COMMANDS:
    app.command(_name, cls=_Command, rich_help_panel=_panel)(getattr(import_module(_module), _function))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. No exception passes, and no traceback unless asked for."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = arguments[0] == "--debug"
    try:
        with _sigterm():
            status = app(arguments, prog_name="kvtool", standalone_mode=False)
            sys.stdout.flush()
            return status if isinstance(status, int) else 0
    except KvtoolError as error:
        return _fail(str(error), debug=debug)
    except typer.TyperException as error:
        return _fail(error.format_message().replace("\n", " ").rstrip("."), debug=debug)
    except typer.Abort:
        return _fail("nothing done", debug=debug)
    except BrokenPipeError:
        # the reader of a pipe left: no one is there to tell, and flushing at exit must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(_explain(error), debug=debug)
    except MemoryError as error:
        return _fail(f"out of memory ({error}); use a shorter context, fewer samples or a smaller model", debug=debug)
    except Exception as error:
        if debug:
            traceback.print_exc()
        # torch.OutOfMemoryError without importing torch here
        if type(error).__name__ == "OutOfMemoryError":
            return _fail("the device is out of memory; use a shorter context, a smaller batch or --device cpu")
        _say(f"a defect of kvtool: {type(error).__name__}: {_one_line(error)}; 'kvtool --debug ...' shows where")
        return 70


def _fail(message: str, *, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    _say(message)
    return 2


def _say(message: str) -> None:
    print(f"kvtool: {message}", file=sys.stderr)


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no disk space left; free some, or set KVTOOL_HOME or --out to another disk"
    return f"{where}{error.strerror or _one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _sigterm() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
