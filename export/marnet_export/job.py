"""Turn a checkpoint into a verified bundle.

Everything is built in a temporary folder beside the target, which is renamed into place last: an
export that fails or is killed leaves nothing half-written.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import save_file

from marnet_export.build.builder import builder
from marnet_export.choose.loop import check_loop, choose_loop
from marnet_export.choose.risk import with_thresholds
from marnet_export.choose.steps import about_loop, asked_points, swept_points
from marnet_export.payload import check_fits, complete
from marnet_export.prove.fidelity import Fidelity
from marnet_export.prove.verify import read_receipt, verify
from marnet_export.seal import seal
from marnet_export.settings import AUTO, Say, Settings, check_types
from marnet_export.text import check_text
from marnet_export.work import Job, at_work
from marnet_sdk.bundle import PLAN
from marnet_sdk.errors import InvalidInput


def export_bundle(
    checkpoint_path: Path,
    output: Path,
    settings: Settings,
    *,
    data: Path | None = None,
    overwrite: bool = False,
    say: Say = lambda _: None,
    answers: Path | None = None,
) -> Fidelity:
    """Build, verify and write one bundle.

    Args:
        data: a data set whose `val` split (or a folder that is one split) is verified on; default:
            the checkpoint's samples. Of more than `MAX_IMAGES`, a random choice is taken.
        say: is told what happens, a line at a time.
        answers: a folder in which exports of one checkpoint share what the float32 reference gives.

    Raises:
        ExportError: it cannot be built as asked. VerificationFailed: what was built does not agree
            with the checkpoint. In both cases nothing is left at `output`.
    """
    if settings.backend == AUTO:
        raise InvalidInput("export_bundle builds one backend; for auto, call export_fastest")
    types, backend = check_types(settings), builder(settings.backend)
    with at_work(output, overwrite=overwrite) as fresh:
        job = Job.load(fresh, checkpoint_path, settings, data, say, answers)
        if settings.text:  # before anything is built, though it is built last
            check_text(job.checkpoint, job.lowered)
        check_loop(job)
        if settings.steps == AUTO:  # which builds, measures and chooses
            types, points = swept_points(job)
        else:
            points = asked_points(job)
        for line in (*about_loop(job, points), types.encoder.sentence):
            say(line)

        if not job.payload.exists():
            check_fits(job, types, points)
            order = job.order(points)
            job.payload.mkdir()
            backend.build_encoder(job.lowered, job.example, types.encoder, job.payload, order)
            backend.build_refine(job.lowered, types.loop, job.payload, order)
            complete(job, job.payload, types, points)

        save_file(points.plan, fresh / PLAN)
        built = job.opened(job.payload, types, points)
        shares = read_receipt(job, types, points)
        fidelity = verify(job, built, types, points)
        if native := choose_loop(job, built, types, points):
            built, fidelity = native
            shares = read_receipt(job, types, points)
        sampling = with_thresholds(job, built)
        seal(job, built, types, shares, sampling, fidelity)
    return fidelity
