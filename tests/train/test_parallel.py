"""Several processes train one model: the same losses, weights and decisions as one process.

The processes are real ones, over gloo on loopback. The encoder is a ViT, because it has no batch
normalisation, which sees the rows of one process.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TINY, change, make_ready, write_recipe, write_small
from tolerances import FLOAT32_LAYER, FLOAT32_TWICE
from torch import nn

from marnet_train.parallel import agreed, average, gathered, own_rows
from marnet_train.phases import Training, make_target, train_alignment
from marnet_train.progress import Progress
from marnet_train.recipe import Recipe
from marnet_train.stages import encoded

VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
RECIPE = change(
    replace(TINY, vision=VIT, clip_norm=1.0),
    alignment={"epochs": 3, "batch": 16, "dropout": 0.1, "lr_backbone": 1e-2, "lr_heads": 1e-2},
)
RECIPES = {loss: change(RECIPE, alignment={"loss": loss}) for loss in ("ita", "team")}


def align(digits: Path, recipe: Recipe) -> tuple[list[float], float]:
    """The losses of phase A, by epoch, and a sum over all weights of the encoder."""
    ready, run = make_ready(digits, recipe, train=49), Progress()  # 16, 16, 16 and 1 image
    target = make_target(ready.model, ready.data, recipe, seed=0)
    source = encoded(ready.model.vision, ready.data, recipe)
    train_alignment(ready.model, ready.data, source, target, Training(recipe, 0, run))
    weights = nn.utils.parameters_to_vector(ready.model.vision.parameters())
    return [line["loss"] for line in run.record.log], float(weights.detach().abs().sum())


def free_port() -> str:
    """A port on loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def of_processes(program: str, count: int, *arguments: str) -> list[dict]:
    """What each of some processes that run a program together prints, as JSON."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * count
    return [json.loads(text.splitlines()[-1]) for text in said]


STEP = """
import torch
from torch.nn import functional as F
from marnet_train.parallel import average, gathered, own_rows

def step(count):
    torch.manual_seed(0)
    encoder, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    rows = torch.rand(count, 5, 3)
    tokens = gathered(encoder(rows[own_rows(count)]), count)  # five of each row
    x_v = gathered(encoder(rows[own_rows(count), 0]), count)
    similar = F.normalize(x_v) @ F.normalize(x_v).T  # every row with every other
    loss = F.cross_entropy(similar, torch.arange(count)) + head(x_v).square().mean()
    loss = loss + (tokens @ x_v.T).tanh().mean()  # tokens, too
    loss.backward()
    gradients = [p.grad for p in (*encoder.parameters(), *head.parameters())]
    average(gradients)
    return [loss.item(), *torch.cat([g.flatten() for g in gradients]).tolist()]
"""
GRADIENTS = f"""
import json
from marnet_train.parallel import agreed, joined, rank
{STEP}
with joined(torch.device("cpu")):
    own = own_rows(7)
    said = {{"own": [own.start, own.stop], "agreed": agreed(rank() + 0.5)}}
    print(json.dumps(said | {{"steps": [step(count) for count in (8, 7, 1)]}}))
"""
TRAINING = """
import importlib.util, json, sys
from pathlib import Path
import torch
from marnet_train.parallel import joined

spec = importlib.util.spec_from_file_location("test_parallel", sys.argv[1])
test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
with joined(torch.device("cpu")):
    print(json.dumps(test.align(Path(sys.argv[2]), test.RECIPES[sys.argv[3]])))
"""


def test_two_processes_have_loss_and_gradients_of_one() -> None:
    """Of batches that both share evenly, unevenly, and not at all."""
    here: dict[str, Any] = {}
    exec(STEP, here)
    for said in (pair := of_processes(GRADIENTS, 2)):
        for numbers, count in zip(said["steps"], (8, 7, 1), strict=True):
            alone = here["step"](count)
            assert numbers == pytest.approx(alone, rel=FLOAT32_LAYER, abs=FLOAT32_LAYER)
        assert said["agreed"] == 0.5
    assert pair[0]["steps"] == pair[1]["steps"]  # or their weights would drift apart
    assert [said["own"] for said in pair] == [[0, 3], [3, 7]]


@pytest.mark.slow
@pytest.mark.parametrize("loss", RECIPES)
def test_two_processes_train_with_the_losses_of_one(loss: str, digits: Path) -> None:
    found = of_processes(TRAINING, 2, __file__, str(digits), loss)
    losses, weights = align(digits, RECIPES[loss])
    assert losses[-1] < losses[0]
    for said in found:
        assert said[0] == pytest.approx(losses, rel=FLOAT32_TWICE)
        assert said[1] == pytest.approx(weights, rel=FLOAT32_TWICE)
    assert found[0] == found[1]


@pytest.mark.slow
def test_torchrun_trains_with_the_command_and_one_process_writes(
    digits: Path, tmp_path: Path
) -> None:
    data, out = write_small(digits, tmp_path / "data", val=20, test=0), tmp_path / "out"
    recipe = write_recipe(change(RECIPE, alignment={"epochs": 2}), tmp_path / "tiny.toml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", free_port(), "--no-python"]
    command += [str(Path(sys.executable).with_name("marnet-train")), "fit", "--device", "cpu"]
    command += ["--data", str(data), "--recipe", str(recipe), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation: 20 images") == 1
    assert json.loads((out / "training.json").read_text())["machine"]["processes"] == 2
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_one_process_alone_does_everything() -> None:
    x = torch.rand(5, 2, requires_grad=True)
    assert gathered(x, 5) is x
    assert own_rows(5) == slice(0, 5)
    assert agreed(0.25) == 0.25
    average([x])
    assert x.grad is None
