"""The command `marnet-bundle`, which looks into bundles, verifies, compares and rebuilds them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marnet_export.bundle_tables import (
    print_answers,
    print_description,
    print_differences,
    print_measured,
    print_replay,
)
from marnet_export.cli import DATA, FOLDER, NEEDS
from marnet_export.inspection import (
    compare_answers,
    describe,
    differing,
    fidelity_of,
    sentence,
)
from marnet_export.prove.checks import FAILED, Check, check_here, failed, passed
from marnet_sdk.backends import BACKENDS
from marnet_sdk.bundle import SOURCE, Bundle, bundle_with, read_bundle
from marnet_sdk.console import Choice, Group, next_commands, print_json, print_table, say
from marnet_sdk.errors import (
    BundleCorrupt,
    EnvironmentMismatch,
    NotFound,
    VerificationFailed,
    requires_extra,
)
from marnet_sdk.files import sha256_file
from marnet_sdk.prediction import Prediction
from marnet_sdk.provenance import provenance_of, read_answers
from marnet_sdk.provenance import replay as derive_again

if TYPE_CHECKING:
    from marnet_export.prove.bundle import Verification

_FORMAT = click.option(
    "--format", "form", type=Choice(["table", "json"]), default="table", show_default=True
)
_CHECKPOINT = click.option(
    "--checkpoint",
    help="The checkpoint that it was made from: a folder, or ORG/NAME on the hub. Default: the one "
    "in the bundle.",
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="marnet")
def main() -> None:
    """Look into bundles, verify, compare and rebuild them, and derive their answers again.

    \b
    marnet-bundle inspect bundles/digits.marnet
    marnet-bundle verify bundles/digits.marnet
    """


# --- inspect


@main.command()
@click.argument("bundle", type=FOLDER)
@_FORMAT
def inspect(bundle: Path, form: str) -> None:
    """Say what BUNDLE is: types, operating points, fidelity, versions, sizes.

    Everything but text/ and source/ is checked against the manifest; nothing is run.
    """
    found = describe(read_bundle(bundle, lazily=True))
    if form == "json":
        print_json(found)
        return
    print_description(found)
    next_commands(f"marnet-bundle verify {shlex.quote(str(bundle))}")


# --- verify


@main.command()
@click.argument("bundle", type=FOLDER)
@_CHECKPOINT
@DATA
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Least share of images whose label equals the checkpoint's. Default: the export's.",
)
@_FORMAT
def verify(
    bundle: Path,
    checkpoint: str | None,
    data: Path | None,
    min_agreement: float | None,
    form: str,
) -> None:
    """Check every byte of BUNDLE and do the export's whole verification again on this machine.

    It is opened at every operating point, its precision is read from the payload once more, and it
    must give the labels of the float32 checkpoint on real images with the same noise.

    Exit code 3: it is not what was verified, or does not agree with the checkpoint. 5: it cannot
    run here, or answers differently here than where it was built.
    """
    try:
        found = read_bundle(bundle)
    except BundleCorrupt as error:
        _report(bundle, [failed("bytes", str(error))], None, {}, form)
        raise VerificationFailed(str(error)) from error
    count = len(found.manifest.files)
    checks = [passed("bytes", f"{count} files and the manifest are what was written")]
    try:
        checks += check_here(found)
        with requires_extra("export", *NEEDS):
            from marnet_export.prove.bundle import verify_again
            from marnet_export.rebuild import source_of
        source = source_of(found, checkpoint)
    except (NotFound, EnvironmentMismatch):
        for check in checks:
            say(f"{check.name}: {check.outcome}: {check.detail}")
        say("not held against the float32 checkpoint")
        raise
    again = verify_again(found, source, data=data, min_agreement=min_agreement, say=say)
    checks += again.checks
    _report(bundle, checks, again, fidelity_of(found), form)
    _end(found, checks, again.departure, form)


def _report(
    bundle: Path,
    checks: Sequence[Check],
    again: Verification | None,
    exported: Mapping[str, Any],
    form: str,
) -> None:
    if form == "json":
        content = {"bundle": str(bundle), "passed": not any(c.outcome == FAILED for c in checks)}
        content |= {"checks": [asdict(check) for check in checks], "exported": exported}
        if again is not None:
            measured = {name: asdict(fidelity) for name, fidelity in again.fidelity.items()}
            content |= {"here": measured, "trajectory": again.trajectory}
            content |= {"departure": again.departure}
        print_json(content)
        return
    print_table(str(bundle), ("check", "", ""), [(c.name, c.outcome, c.detail) for c in checks])
    if again is not None:
        print_measured(again, exported)


def _end(bundle: Bundle, checks: Sequence[Check], departure: str | None, form: str) -> None:
    """Raise if a check failed, else say what to run next."""
    broken, path = [c for c in checks if c.outcome == FAILED], shlex.quote(str(bundle.path))
    if not broken:
        if form == "table":
            next_commands(f"marnet-classify IMAGE --model {path}")
        return
    unlike = [c for c in broken if c.exit_code == VerificationFailed.exit_code]
    kind, worst = (VerificationFailed, unlike[0]) if unlike else (EnvironmentMismatch, broken[0])
    others = "; ".join(check.name for check in broken if check is not worst)
    also = f" Also: {others}." if others else ""
    where = f" {departure[0].upper()}{departure[1:]}." if departure else ""
    named = "" if bundle.has(SOURCE) else " --checkpoint CHECKPOINT"
    raise kind(
        f"{bundle.path} fails {len(broken)} of {len(checks)} checks: {worst.name}: {worst.detail}."
        f"{also}{where} Next: marnet-bundle rebuild {path}{named}"
    )


# --- diff


@main.command()
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--no-run", is_flag=True, help="Do not open them; compare what they hold.")
@_FORMAT
def diff(a: Path, b: Path, no_run: bool, form: str) -> None:
    """Show in what bundles A and B differ: settings, files, precision, fidelity and answers.

    Both classify the golden images of both, at their default operating points.

    Exit code 0: they give the same labels, or were not run. 1: a label differs.
    """
    bundles = [read_bundle(path, lazily=True) for path in (a, b)]
    parts = differing(*bundles)
    answers = None if no_run else compare_answers(*bundles)
    if form == "json":
        print_json({"a": str(a), "b": str(b), **parts, "answers": answers and asdict(answers)})
    else:
        print_differences(parts, a, b)
        if answers is not None:
            print_answers(answers, a, b)
        next_commands(*(f"marnet-bundle verify {shlex.quote(str(path))}" for path in (a, b)))
    if answers is not None and answers.differ:
        sys.exit(1)


# --- replay


@main.command()
@click.argument("answers", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--model",
    "-m",
    type=FOLDER,
    help="The bundle that made the answer. Default: the one under ./bundles with its digest.",
)
@_FORMAT
def replay(answers: Path, image: Path, model: Path | None, form: str) -> None:
    """Derive the answer to IMAGE in the file ANSWERS again, and compare.

    \b
    marnet-classify photo.jpg --provenance --format json > answer.json
    marnet-bundle replay answer.json photo.jpg

    ANSWERS is JSON or JSON lines of marnet-classify --provenance. Of several answers, those to an
    image with the bytes of IMAGE are taken. With the same processor, packages and threads they must
    be equal to the bit, elsewhere within what the self-test of the bundle allows.

    Exit code 0: equal. 3: not, or it is another image or bundle. 5: the bundle cannot run here.
    """
    found = _answers_to(image, answers)
    replays = [
        derive_again(one, image, model or bundle_with(provenance_of(one).bundle)) for one in found
    ]
    if form == "json":
        print_json([asdict(one) | {"equal": one.equal} for one in replays])
    else:
        for one in replays:
            print_replay(one)
    if differences := [d for one in replays for d in one.differences]:
        more = f", and {len(differences) - 1} more differences" if differences[1:] else ""
        raise VerificationFailed(f"{answers} is not what {image} gives: {differences[0]}{more}")


def _answers_to(image: Path, answers: Path) -> list[Prediction]:
    """The answers of a file to an image; its only one, whatever that is to."""
    digest, count, matching = sha256_file(image), 0, []
    for count, one in enumerate(read_answers(answers), 1):  # noqa: B007
        if provenance_of(one).image == digest:
            matching.append(one)
    if matching or count == 1:
        return matching or list(read_answers(answers))
    raise VerificationFailed(
        f"none of the {count} answers in {answers} is to an image with the SHA-256 of {image}, "
        f"{digest}"
    )


# --- rebuild


def _changes(command: Callable[..., None]) -> Callable[..., None]:
    """The options that change a setting of the export; each is named after its setting."""
    types = ["fp32", "bf16", "fp16"]
    options = [
        click.option("--backend", type=Choice(["auto", *BACKENDS]), help="What runs the bundle."),
        click.option("--precision", type=Choice([*types, "int8"]), help="Type of the weights."),
        click.option("--compute", type=Choice(types), help="Type of products that are not int8."),
        click.option("--device", type=Choice(["cpu", "cuda"]), help="What torch bundles run on."),
        click.option("--loop-precision", type=Choice([*types, "int8"]), help="Of the loop alone."),
        click.option(
            "--loop", type=Choice(["auto", "native", "graph"]), help="What runs the loop."
        ),
        click.option("--sampler", type=Choice(["ddpm", "ddim", "dpmpp"]), help="Reverse process."),
        click.option("--eta", type=click.FloatRange(0), help="Of ddim."),
        click.option("--steps", type=click.IntRange(0), help="Sampling steps; 0: no loop."),
        click.option("--samples", type=click.IntRange(1), help="Noise samples per image."),
        click.option("--noise", type=Choice(["shared", "image"]), help="One noise, or by image."),
        click.option("--seed", type=click.IntRange(0), help="Noise seed."),
        click.option("--min-agreement", type=click.FloatRange(0, 1), help="Least agreement."),
        click.option("--text/--no-text", default=None, help="With the text encoder, or without."),
        click.option("--source/--no-source", default=None, help="With the checkpoint, or without."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--output", "-o", type=FOLDER, help="Bundle to write. Default: replaces BUNDLE.")
@_CHECKPOINT
@DATA
@_changes
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="GPU[,GPU...]",
    help="GPUs to build for (sm86, sm89, ...), with --backend tensorrt. Without other changes, "
    "their engines are added to a bundle of tensorrt as it is.",
)
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists.")
def rebuild(
    bundle: Path,
    output: Path | None,
    checkpoint: str | None,
    data: Path | None,
    targets: tuple[str, ...],
    force: bool,
    **changes: Any,
) -> None:
    """Export the checkpoint that travels in BUNDLE again, on this machine.

    \b
    marnet-bundle rebuild digits.marnet
    marnet-bundle rebuild digits.marnet --backend openvino -o digits-openvino.marnet

    The settings are those of BUNDLE's export, but for those that are given here. A bundle that is
    replaced stays as it is if anything fails.
    """
    with requires_extra("export", *NEEDS):
        from marnet_export.rebuild import add_targets
        from marnet_export.rebuild import rebuild as export_again
    given = {name: value for name, value in changes.items() if value is not None}
    place = output or bundle
    replace = force or output is None
    names = tuple(name for target in targets for name in target.split(",") if name)
    if names and not (given or checkpoint or data):
        add_targets(bundle, place, names, overwrite=replace, say=say)
    else:
        given |= {"targets": names} if names else {}
        arguments = {"checkpoint": checkpoint, "data": data, "overwrite": replace, "say": say}
        export_again(bundle, place, given, **arguments)
        say(sentence(fidelity_of(read_bundle(place, lazily=True))))
    say(f"{'replaced' if output is None else 'wrote'} {place}")
    model = shlex.quote(str(place))
    compare = f"marnet-bundle diff {shlex.quote(str(bundle))} {model}"
    more = [compare] if output is not None else []
    next_commands(*more, f"marnet-classify IMAGE --model {model}")
