"""The command `marnet-doctor`, which tells what this machine can run and what is missing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from marnet_sdk.commands.examination import examine
from marnet_sdk.console import Choice, Command, next_commands, print_json, print_table
from marnet_sdk.errors import EnvironmentMismatch

Found = Mapping[str, Any]


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=Choice(["table", "json"]), default="table", show_default=True
)
@click.version_option(package_name="marnet")
def main(bundles: tuple[Path, ...], form: str) -> None:
    """Tell what this machine can run: processor, threads, GPU, backends, and what is missing.

    \b
    marnet-doctor
    marnet-doctor bundles/digits-fp16.marnet

    Each of BUNDLES is opened as a deployed process would open it, with its self-test, in a process
    of its own. Exit code 5: one of them cannot be used here.
    """
    found = examine(bundles)
    if form == "json":
        print_json(found)
    else:
        _print(found)
    if any(not bundle["ok"] for bundle in found["bundles"]):
        sys.exit(EnvironmentMismatch.exit_code)


def _print(found: Found) -> None:
    print_table("this machine", ("", ""), list(_machine(found)))
    rows = [(name, *_state(one)) for name, one in found["backends"].items()]
    print_table("backends, to classify", ("backend", "", ""), rows)
    extras = found["extras"]
    if "problem" not in extras:
        rows = [(name, *_state(one)) for name, one in extras.items()]
        print_table("extras of marnet", ("extra", "", ""), rows)
    if bundles := found["bundles"]:
        rows = [(one.get("bundle", ""), *_state(one)) for one in bundles]
        print_table("bundles", ("bundle", "", ""), rows)
    usable = [one["bundle"] for one in found["bundles"] if one["ok"]]
    ready = any(one["ok"] for one in found["backends"].values())
    if usable:
        next_commands(*(f"marnet-classify IMAGE --model {shlex.quote(path)}" for path in usable))
    elif ready and not found["bundles"]:
        next_commands("marnet-doctor BUNDLE")
    elif not ready:
        next_commands('pip install "marnet[onnxruntime]"')


def _machine(found: Found) -> Iterator[tuple[str, str]]:
    for name, version in found["versions"].items():
        yield name, str(version)
    lines = {
        "processor": ("processor", lambda p: f"{p['name']}, {p['architecture']}"),
        "can do": ("processor", lambda p: ", ".join(p["features"]) or "nothing that matters here"),
        "CPUs": ("cpus", _cpus),
        "threads": ("cpus", _threads),
        "GPU": ("gpu", lambda g: f"{g['name']} ({g['kind']}), driver of CUDA {g['driver_cuda']}"),
        "native loop": ("native_loop", _native_loop),
    }
    for title, (key, text) in lines.items():
        part = found[key]
        yield title, part["problem"] if "problem" in part else text(part)
    if not found["native_loop"]["ok"]:
        yield "compiler", found["native_loop"].get("compiler") or "none; install g++"


def _cpus(found: Found) -> str:
    quota = "no quota" if found["quota"] is None else f"a quota of {found['quota']:.3g}"
    return f"{found['allowed']} of {found['machine']} CPUs, {found['cores']} cores, {quota}"


def _threads(found: Found) -> str:
    given = "".join(f"; {name}={value}" for name, value in found["environment"].items())
    return f"{found['threads']} by default{given}"


def _native_loop(found: Found) -> str:
    return f"is here, runs with {found['instructions']}"


def _state(one: Found) -> tuple[str, str]:
    """Say of a backend, an extra or a bundle whether it works, and the details."""
    if one["ok"]:
        packages = ", ".join(f"{name} {v}" for name, v in one.get("packages", {}).items())
        cuda = f", built with CUDA {one['cuda']}" if one.get("cuda") else ""
        return "yes", f"{packages}{cuda}" or _opened(one)
    problem = one.get("problem") or f"without {', '.join(one['missing'])}"
    return "no", f"{problem}; run: {one['install']}" if "install" in one else problem


def _opened(one: Found) -> str:
    """Say how a bundle was opened; nothing of an extra."""
    if "what" not in one:
        return ""
    threads = "" if one["threads"] is None else f"; threads: {one['threads']}"
    return f"{one['what']}; loop: {one['loop']}{threads}"
