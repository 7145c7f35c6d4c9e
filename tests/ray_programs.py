"""Programs on a local Ray, which `local_ray.run_with_ray` runs; each writes what it found as JSON.

python tests/ray_programs.py PROGRAM FILE ARGUMENT...
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet
import ray
import waiting
from local_ray import MARK, processes
from ray import serve

from marnet_sdk.commands.parts import Parts
from marnet_sdk.errors import InvalidInput, OutputExists
from marnet_sdk.serve import ray_data
from marnet_sdk.serve.ray_app import NAME, build
from marnet_sdk.serve.ray_data import Predictor, find_images, write_answers
from marnet_sdk.serve.ray_worker import reserved_threads
from marnet_sdk.server.cli import TOKEN

PATIENCE = 120.0  # seconds until a program that waits gives up
BEARER = {"Authorization": "Bearer secret"}
until = partial(waiting.until, patience=PATIENCE, look=0.05)  # for what Ray does


def workers(title: str) -> dict[int, psutil.Process]:
    """The workers of this Ray that are called so, by process id."""
    found = {}
    for process in processes(os.environ[MARK]):
        try:
            if any(title in word for word in process.cmdline()):
                found[process.pid] = process
        except psutil.Error:
            pass
    return found


# --- Ray Serve ------------------------------------------------------------------------------------


def serving(bundle: str, folder: str) -> dict[str, Any]:
    """Ask two replicas, of which one is killed; then ask for what is refused."""
    images = [path.read_bytes() for path in sorted(Path(folder).glob("*.png"))]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"model": bundle, "name": "digits", "max_images": 2, "max_body": 1, "replicas": 2}
    serve.run(build(options), name="digits")
    serve.run(build(options | {"replicas": "1"}), name="second", route_prefix="/second")
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=PATIENCE, verify=False, headers=BEARER) as client:
        found = ask_while_one_is_killed(client, images)
        found |= ask_in_every_form(client, images)
    found["reserved"] = [
        ray.get(ray.remote(num_cpus=cpus)(reserved_threads).remote()) for cpus in (0.5, 3)
    ]
    try:
        serve.run(
            build(options | {"model": Path("none.marnet"), "replicas": 1}),
            name="broken",
            route_prefix="/broken",
        )
    except RuntimeError:
        found["failure"] = serve.status().applications["broken"].deployments[NAME].message
    serve.shutdown()
    return found


def ask_while_one_is_killed(client: httpx.Client, images: list[bytes]) -> dict[str, Any]:
    """Ask for each image until it is answered, and kill a replica in the middle."""
    title = "ServeReplica:digits"
    before = until(lambda: workers(title) if len(workers(title)) == 2 else None)
    killed = min(before)

    def ask(image: bytes) -> tuple[str, int]:
        for attempt in range(1000):
            response = client.post("/predict", content=image)
            if response.status_code == 200:
                (answer,) = response.json()["answers"]
                return answer["label"], attempt
            assert response.status_code >= 500, response.text
        raise AssertionError("an image has no answer")

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, image) for image in images]
        for count, _ in enumerate(as_completed(asked)):
            if count == len(images) // 10:
                os.kill(killed, signal.SIGKILL)
    until(lambda: len(workers(title).keys() - {killed}) == 2)

    def states() -> dict[str, int]:
        found = serve.status().applications["digits"].deployments[NAME].replica_states
        return {str(getattr(state, "value", state)): n for state, n in found.items()}

    return {
        "labels": [future.result()[0] for future in asked],
        "again": sum(future.result()[1] for future in asked),
        "killed": killed not in workers(title),
        "replicas_after": until(lambda: states() if states() == {"RUNNING": 2} else None),
    }


def ask_in_every_form(client: httpx.Client, images: list[bytes]) -> dict[str, Any]:
    """Send images in their forms, and what is refused."""

    def labels(response: httpx.Response) -> list[str]:
        return [answer["label"] for answer in response.json()["answers"]]

    def parts(*contents: bytes) -> list[Any]:
        return [("images", (f"{i}.png", content)) for i, content in enumerate(contents)]

    refused = client.post("/predict", content=b"no image")
    in_json = json.dumps({"images": [b64encode(images[0]).decode()]})
    statuses = {
        "bad image": refused,
        "no body": client.post("/predict"),
        "unknown parameter": client.post("/predict?top=3", content=images[0]),
        "too many": client.post("/predict", files=parts(*images[:3])),
        "too large": client.post("/predict", content=bytes(2 * 2**20)),
        "no token": client.post("/predict", content=images[0], headers={"Authorization": ""}),
        "ready": client.get("/readyz"),
        "model": client.get("/v2/models/digits/ready"),
        "nothing there": client.get("/nothing"),
    }
    prefixed = client.post("/second/predict", content=images[0])
    unguarded = client.get("/second/readyz", headers={"Authorization": ""})
    return {
        "forms": [
            labels(client.post("/predict", content=images[0])),
            labels(client.post("/predict", files=parts(*images[:2]))),
            labels(
                client.post(
                    "/predict", content=in_json, headers={"Content-Type": "application/json"}
                )
            ),
        ],
        "statuses": {name: response.status_code for name, response in statuses.items()},
        "refusal": refused.json(),
        "prefixed": labels(prefixed),
        "prefixed probe": unguarded.status_code,
    }


# --- Ray Data -------------------------------------------------------------------------------------


def data(bundle: str, folder: str) -> dict[str, Any]:
    """Classify data sets with a worker that dies, a run that is interrupted, and odd rows."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    return {
        "killed": killed_in_the_middle(bundle, folder),
        "interrupted": interrupted(bundle, folder),
        "deadly": deadly(bundle, folder),
        "mapped": mapped(bundle, folder),
        "refused": refused(bundle, folder),
    }


def killed_in_the_middle(bundle: str, folder: str) -> dict[str, Any]:
    """Classify bytes in Parquet with two workers, one of which is killed behind its third block."""
    mark = Path("died").absolute()

    class Dying(Predictor):
        blocks = 0

        def __call__(self, batch: Any) -> Any:
            answers = super().__call__(batch)
            self.blocks += 1
            if self.blocks == 3 and not mark.exists():
                mark.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return answers

    paths = sorted(Path(folder).glob("*.png"))
    contents = [path.read_bytes() for path in paths] + [b"no image", b"", None]
    names = list(range(len(contents)))
    pyarrow.parquet.write_table(pa.table({"id": names, "content": contents}), "images.parquet")
    ray_data.Predictor = Dying
    try:
        written = write_answers(
            ray.data.read_parquet("images.parquet"), "killed",
            model=bundle, workers=2, block=16, image="content", name="id", top_k=2,
        )  # fmt: skip
    finally:
        ray_data.Predictor = Predictor
    return {"written": written._asdict(), "died": mark.exists(), "rows": rows_of("killed")}


def interrupted(bundle: str, folder: str) -> dict[str, Any]:
    """Classify files, end in the middle as Ctrl-C does, and go on."""
    Path("odd").mkdir()
    Path("odd/broken.png").write_bytes(b"\x89PNG")
    images, write, way = find_images(folder, "odd"), Parts.write, {"image": "path", "block": 16}

    def write_three(parts: Parts, table: pa.Table) -> None:
        if len(rows_of("interrupted")) >= 3 * 16:
            raise KeyboardInterrupt
        write(parts, table)

    Parts.write = write_three
    try:
        write_answers(images, "interrupted", model=bundle, **way)
        raise AssertionError("it was not interrupted")
    except KeyboardInterrupt:
        kept = rows_of("interrupted")
    finally:
        Parts.write = write
    runs = [
        write_answers(images, "interrupted", model=bundle, resume=True, **way)._asdict()
        for _ in range(2)
    ]
    return {"kept": len(kept), "runs": runs, "rows": rows_of("interrupted")}


def deadly(bundle: str, folder: str) -> dict[str, Any]:
    """Classify files, of which one kills whoever opens it."""
    deaths = Path("deaths").absolute()
    images = find_images(folder)
    image = min(Path(folder).glob("*.png")).name

    class Killed(Predictor):
        def __call__(self, batch: Any) -> Any:
            if any(path.endswith(image) for path in batch["path"]):
                with deaths.open("a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    ray_data.Predictor = Killed
    try:
        write_answers(images, "deadly", model=bundle, workers=2, block=16, image="path")
        raise AssertionError("it ended well")
    except ray.exceptions.RayError as error:
        reason = type(error).__name__
    finally:
        ray_data.Predictor = Predictor
    return {"reason": reason, "deaths": len(deaths.read_text()), "rows": rows_of("deadly")}


def mapped(bundle: str, folder: str) -> list[dict[str, Any]]:
    """Use `Predictor` as the page says."""
    answers = ray.data.read_binary_files(folder, include_paths=True).map_batches(
        Predictor,
        fn_constructor_kwargs={"model": bundle},
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    return answers.take_all()


def refused(bundle: str, folder: str) -> dict[str, str]:
    """Say why jobs that cannot be are none."""
    images, reasons = find_images(folder), {}
    wrong: dict[str, dict[str, Any]] = {
        "setting": {"top": 3},
        "folder": {"image": "path"},
        "column": {"output": "new", "image": "pixels"},
    }
    for name, settings in wrong.items():
        try:
            write_answers(images, model=bundle, **{"output": "interrupted"} | settings)
        except (InvalidInput, OutputExists) as error:
            reasons[name] = str(error)
    return reasons


def rows_of(folder: str) -> list[dict[str, Any]]:
    """The rows of a folder of answers."""
    paths = sorted(Path(folder).glob("*.parquet"))
    return [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]


if __name__ == "__main__":
    os.environ[TOKEN] = "secret"
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=2 * 10**8)
    try:
        found = {"serving": serving, "data": data}[sys.argv[1]](*sys.argv[3:])
    finally:
        ray.shutdown()
    Path(sys.argv[2]).write_text(json.dumps(found), "utf-8")
