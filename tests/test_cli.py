"""The command line as a user meets it: help, one-sentence errors, exit statuses, streams."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer

from kvtool import cli
from kvtool.errors import InputError


@pytest.fixture
def failing(monkeypatch):
    """A command that raises what the test asks for, run through ``main``."""

    def run(error, *arguments):
        app = typer.Typer(cls=cli._Commands, pretty_exceptions_enable=False)

        @app.callback()
        def options(debug: bool = typer.Option(False, "--debug")):
            pass

        @app.command("fail")
        def fail():
            raise error

        monkeypatch.setattr(cli, "app", app)
        return cli.main([*arguments, "fail"])

    return run


def test_bare_kvtool_shows_help_and_succeeds(capsys):
    assert cli.main([]) == 0
    out, err = capsys.readouterr()
    assert all(name in out for name, *_ in cli.COMMANDS)
    assert err == ""


@pytest.mark.parametrize("command", [name for name, *_ in cli.COMMANDS])
def test_every_command_has_help_with_an_example(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"kvtool {command}" in capsys.readouterr().out.split("Example", 1)[1]


@pytest.mark.alone
def test_help_needs_no_torch_and_is_quick():
    code = "import sys; from kvtool.cli import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
    # about 0.3 s alone; the limit leaves room for a loaded machine
    assert time.perf_counter() - begin < 5


def test_version(capsys):
    from kvtool import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvtool {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mehods"], "No such command 'mehods'. Did you mean 'methods'?"),
        (["methods", "--jsn"], "--json"),
        (["methods", "exac"], "no method 'exac'; did you mean 'exact'?"),
        (["methods", "exact", "more"], "more"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_exit_2(arguments, sentence, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.startswith("kvtool: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (InputError("here: expected a, found b; do c"), 2, "kvtool: here: expected a, found b; do c\n"),
        (OSError(28, "No space left on device", "/x/y"), 2, "no disk space left"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "kvtool: /x/y: Permission denied\n"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("size mismatch\nat layer 3"), 70, "a defect of kvtool: RuntimeError: size mismatch at layer 3"),
        (KeyboardInterrupt(), 130, "kvtool: interrupted\n"),
        (KeyboardInterrupt("go on with --resume"), 130, "kvtool: go on with --resume\n"),
        (cli.Stopped(), 143, "kvtool: stopped by SIGTERM\n"),
        (typer.Exit(1), 1, ""),
    ],
)
def test_no_exception_becomes_a_traceback(failing, error, status, sentence, capsys):
    assert failing(error) == status
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == (1 if sentence else 0)


def test_debug_adds_the_traceback(failing, capsys):
    assert failing(InputError("why"), "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("kvtool: why\n")


def test_a_reader_that_leaves_early_is_no_error():
    program = "import sys; from kvtool.cli import main; sys.exit(main(['methods', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_sigterm_leaves_by_the_same_door_as_ctrl_c():
    program = (
        "import sys, time, typer\n"
        "from kvtool import cli\n"
        "def wait():\n"
        "    '''Wait.'''\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "cli.app.command('wait')(wait)\n"
        "sys.exit(cli.main(['wait']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.stderr.read() == b"kvtool: stopped by SIGTERM\n"
    assert process.wait() == 143


def test_methods_lists_the_registry_with_its_options(capsys):
    from dataclasses import fields

    from kvtool.methods import METHODS

    assert cli.main(["methods", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        assert [option["name"] for option in row["options"]] == [field.name for field in fields(METHODS[row["name"]])]
        assert row["summary"]
        assert all(option["description"] for option in row["options"])


def test_one_method_is_shown_with_types_defaults_and_ranges(capsys):
    assert cli.main(["methods", "turboquant"]) == 0
    out = capsys.readouterr().out
    assert "k_bits" in out
    assert "hadamard" in out
