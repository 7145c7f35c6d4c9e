"""What every command has in common."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import click
import pytest
from click.testing import CliRunner

from marnet_sdk import errors
from marnet_sdk.console import (
    Choice,
    Command,
    Group,
    nearest,
    next_commands,
    print_json,
    print_table,
    say,
    track,
)


@click.group(cls=Group)
def tool() -> None:
    pass


@tool.command()
@click.option("--name", required=True)
def fail(name: str) -> None:
    raise getattr(errors, name)("what was got, what was expected")


@tool.command("export")
@click.option("--kind", type=Choice(["torchscript", "onnxruntime"]))
def export_(kind: str) -> None:
    click.echo(kind)


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("MarnetError", 1),
        ("ExportError", 1),
        ("BundleCorrupt", 1),
        ("NotFound", 2),
        ("InvalidInput", 2),
        ("OutputExists", 2),
        ("VerificationFailed", 3),
        ("UnstableMeasurement", 4),
        ("MissingExtra", 5),
        ("BackendUnavailable", 5),
        ("SelfTestFailed", 5),
    ],
)
def test_an_error_becomes_one_line_and_its_exit_code(name, exit_code):
    result = CliRunner().invoke(tool, ["fail", "--name", name])
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr == "Error: what was got, what was expected\n"


def test_a_bug_is_not_dressed_up_as_a_message():
    @click.command(cls=Command)
    def broken() -> None:
        raise ZeroDivisionError

    result = CliRunner().invoke(broken)
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_terminated_command_cleans_up_and_exits_with_143():
    script = """
import os, signal, click
from marnet_sdk.console import Command

@click.command(cls=Command)
def command():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        print("went on")
    finally:
        print("cleaned up")

command()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (143, "cleaned up\n", "")


def test_the_signal_handling_of_a_host_is_as_it_was_before():
    @click.command(cls=Command)
    def command() -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    def of_the_host(number: int, frame: object) -> None: ...

    seen = []
    command.main([], standalone_mode=False)
    assert seen.pop() is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with ThreadPoolExecutor(1) as pool:  # only the main thread may set handlers
        pool.submit(command.main, [], standalone_mode=False).result()
    assert seen.pop() is signal.SIG_DFL
    before = signal.signal(signal.SIGTERM, of_the_host)
    try:
        command.main([], standalone_mode=False)
        assert seen.pop() is signal.getsignal(signal.SIGTERM) is of_the_host
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprot"], "No such command 'exprot'. Did you mean 'export'?"),
        (["zzz"], "No such command 'zzz'.\n"),
        (["export", "--kind", "torchscrip"], "Did you mean 'torchscript'?"),
        (["export", "--kind", "onnx-runtime"], "Did you mean 'onnxruntime'?"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest_right_one(arguments, message):
    result = CliRunner().invoke(tool, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_right_word_passes():
    assert CliRunner().invoke(tool, ["export", "--kind", "torchscript"]).stdout == "torchscript\n"


def test_nothing_is_suggested_when_nothing_is_near():
    assert nearest("fp61", ["fp32", "bf16", "fp16"]) == " Did you mean 'fp16'?"
    assert nearest("zzz", ["fp32", "bf16", "fp16"]) == ""
    assert nearest("x", []) == ""


def test_messages_go_to_standard_error_unchanged(capsys):
    path = "bundles/[red]a[/red]-" + "long-" * 60
    say(path)
    next_commands("marnet-bench --batch 64")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{path}\n\nNext:\n  marnet-bench --batch 64\n"


def test_a_piped_table_is_not_folded_to_a_terminal_s_width(capsys):
    image = "folder/" * 15 + "[1].png"
    print_table("title", ("image", "label"), [(image, "7"), ("x", "12345")])
    out, err = capsys.readouterr()
    assert out.splitlines()[0].rstrip() == "title"
    (line,) = [line for line in out.splitlines() if image in line]
    assert line.split() == [image, "7"]
    assert err == ""
    assert "\x1b" not in out


def test_json_output_is_json(capsys):
    print_json([{"image": "a", "score": 0.5}])
    assert json.loads(capsys.readouterr().out) == [{"image": "a", "score": 0.5}]


def test_progress_is_silent_when_piped_and_passes_everything_on(capsys):
    assert list(track(range(5), "reference")) == [0, 1, 2, 3, 4]
    assert list(track((x for x in "ab"), "bundle", total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
