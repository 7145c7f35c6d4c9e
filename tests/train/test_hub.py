"""Checkpoints on a hub: what is pushed is what is loaded, refusals say what to do, no pickles."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from exports import in_one_process
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from marnet_export.cli import main as marnet_export
from marnet_sdk.errors import CheckpointError, InvalidInput, NotFound, OutputExists
from marnet_train.checkpoint import Checkpoint, checkpoint_hash, load_checkpoint
from marnet_train.cli import main as marnet_train
from marnet_train.data.imagefolder import read_split
from marnet_train.hub import HubError, is_hub_id

REPO = "lab/digits"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of our own in place of huggingface.co, an empty cache, and nobody logged in."""
    with running_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits before it tries again
        close_session()  # the client reads proxies when it is made
        yield server
        close_session()


@pytest.fixture(scope="module")
def checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 8 samples in place of hundreds, each of which is a request."""
    folder = tmp_path_factory.mktemp("hub") / "digits"
    load_checkpoint(checkpoint).save_pretrained(folder)
    lines = (folder / "samples/metadata.jsonl").read_text("utf-8").splitlines(keepends=True)[:8]
    (folder / "samples/metadata.jsonl").write_text("".join(lines), "utf-8")
    kept = {json.loads(line)["file_name"] for line in lines}
    for image in (folder / "samples").glob("*.png"):
        if image.name not in kept:
            image.unlink()
    return folder


@pytest.fixture
def tree(checkpoint: Path) -> dict[str, bytes]:
    """The checkpoint as a commit."""
    return files_of(checkpoint)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def changed(checkpoint: Path, value: float) -> Checkpoint:
    loaded = load_checkpoint(checkpoint)
    with torch.no_grad():
        loaded.model.classifier.bias.fill_(value)
    return loaded


def bias(loaded: Checkpoint) -> float:
    return float(loaded.model.classifier.bias.detach()[0])


def test_saved_and_loaded_again_it_is_the_same_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    written = loaded.save_pretrained(tmp_path / "copy")
    again = Checkpoint.from_pretrained(written)
    assert (again.sha256, again.training) == (loaded.sha256, loaded.training)
    assert (again.path, again.revision) == (written, None)
    assert files_of(written) == files_of(checkpoint)


def test_what_is_saved_is_the_model_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    written = changed(checkpoint, 0.5).save_pretrained(tmp_path / "copy")
    assert bias(load_checkpoint(written)) == 0.5
    assert checkpoint_hash(written) != checkpoint_hash(checkpoint)


def test_saving_replaces_a_checkpoint_only_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    written = load_checkpoint(checkpoint).save_pretrained(tmp_path / "copy")
    with pytest.raises(OutputExists, match="copy already exists"):
        changed(checkpoint, 2.0).save_pretrained(written)
    # In place, too: the files beside the model come from the directory that is replaced.
    again = changed(written, 2.0).save_pretrained(written, overwrite=True)
    assert bias(load_checkpoint(again)) == 2.0
    assert files_of(again).keys() == files_of(checkpoint).keys()


def test_saving_takes_no_pickle_along(checkpoint: Path, tmp_path: Path) -> None:
    source = load_checkpoint(checkpoint).save_pretrained(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "samples/0.pkl").write_bytes(b"pickle")
    written = load_checkpoint(source).save_pretrained(tmp_path / "copy")
    assert files_of(written) == files_of(checkpoint)


def test_saving_keeps_folders_among_the_samples(checkpoint: Path, tmp_path: Path) -> None:
    source = load_checkpoint(checkpoint).save_pretrained(tmp_path / "source")
    (source / "samples/a/b").mkdir(parents=True)
    (source / "samples/a/b/1.png").write_bytes(b"image")
    written = load_checkpoint(source).save_pretrained(tmp_path / "copy")
    assert files_of(written) == files_of(source)


def test_pushed_and_loaded_it_is_the_same_checkpoint(hub: Hub, checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    commit = loaded.push_to_hub(REPO, token=TOKEN)
    assert commit.commit_url == f"{hub.url}/{REPO}/commit/{commit.oid}"
    assert sum(path.endswith("/commit/main") for path in hub.written) == 1
    again = Checkpoint.from_pretrained(REPO)
    assert again.sha256 == loaded.sha256
    assert again.revision == again.path.name == commit.oid
    assert files_of(again.path) == files_of(checkpoint)
    assert len(read_split(again.samples, needs_text=True)) == 8


def test_each_revision_has_its_weights(hub: Hub, checkpoint: Path) -> None:
    first = changed(checkpoint, 1.0).push_to_hub(REPO, token=TOKEN)
    changed(checkpoint, 2.0).push_to_hub(REPO, token=TOKEN)
    changed(checkpoint, 3.0).push_to_hub(REPO, revision="trials/3", token=TOKEN)
    for revision, value in ((first.oid, 1.0), (None, 2.0), ("main", 2.0), ("trials/3", 3.0)):
        assert bias(Checkpoint.from_pretrained(REPO, revision=revision)) == value


def test_a_push_leaves_no_old_samples_and_touches_no_other_files(
    hub: Hub, checkpoint: Path, tree: dict[str, bytes]
) -> None:
    more = {"samples/999999.png": b"old", "added_tokens.json": b"{}", "notes.txt": b"mine"}
    repository = hub.make(REPO, {**tree, **more})
    commit = load_checkpoint(checkpoint).push_to_hub(REPO, token=TOKEN)
    assert repository.commits[commit.oid] == {**files_of(checkpoint), "notes.txt": b"mine"}


def test_only_files_of_a_checkpoint_are_downloaded(hub: Hub, tree: dict[str, bytes]) -> None:
    pickles = ("pytorch_model.bin", "model.pt", "a.pkl", "samples/a.pkl", "samples/model.bin",
               "optimizer.pth", "modeling.py", "old/model.safetensors")  # fmt: skip
    hub.make(REPO, {**tree, **dict.fromkeys(pickles, b"\x80\x04.")})
    loaded = Checkpoint.from_pretrained(REPO)
    assert files_of(loaded.path) == tree
    assert set(hub.sent) == set(tree)


def test_a_second_load_transfers_nothing_and_works_without_the_hub(
    hub: Hub, tree: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.make(REPO, tree)
    first = Checkpoint.from_pretrained(REPO)
    hub.sent.clear()
    assert Checkpoint.from_pretrained(REPO).path == first.path
    hub.broken = 503
    assert Checkpoint.from_pretrained(REPO).path == first.path
    hub.shutdown()
    hub.server_close()
    close_session()
    assert Checkpoint.from_pretrained(REPO).path == first.path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert Checkpoint.from_pretrained(REPO).path == first.path
    assert hub.sent == []


def test_downloads_go_where_they_are_told(hub: Hub, tree: dict[str, bytes], tmp_path: Path) -> None:
    hub.make(REPO, tree)
    loaded = Checkpoint.from_pretrained(REPO, cache_dir=tmp_path / "mine")
    assert loaded.path.is_relative_to(tmp_path / "mine")


def test_an_unknown_repository_names_both_readings(hub: Hub) -> None:
    for token in (None, TOKEN):
        with pytest.raises(
            NotFound,
            match=r"lab/digits: no such folder here, and no such repository on http://127.*; check "
            r"the spelling, or, if it is private, log in with `hf auth login`, or set HF_TOKEN",
        ):
            Checkpoint.from_pretrained(REPO, token=token)


def test_a_private_repository_is_loaded_with_a_token_only(hub: Hub, checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    loaded.push_to_hub(REPO, private=True, token=TOKEN)
    with pytest.raises(NotFound, match=r"no such repository on .* if it is private, log in"):
        Checkpoint.from_pretrained(REPO)
    assert Checkpoint.from_pretrained(REPO, token=TOKEN).sha256 == loaded.sha256


@pytest.mark.parametrize("place", ["environment", "file"])
def test_the_token_of_the_environment_or_of_the_login_is_used(
    hub: Hub, tree: dict[str, bytes], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.make(REPO, tree, private=True)
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        Path(constants.HF_TOKEN_PATH).write_text(TOKEN)  # where `hf auth login` puts it
    assert Checkpoint.from_pretrained(REPO).labels


def test_another_hub_is_named_by_the_environment(
    hub: Hub, tree: dict[str, bytes], tmp_path: Path
) -> None:
    hub.make(REPO, tree, private=True)
    code = f"from marnet_train.hub import download; print(download({REPO!r}))"
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(tmp_path / "own")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "own")
    assert files_of(Path(done.stdout.strip())) == tree


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_a_gated_repository_says_where_to_ask(
    hub: Hub, tree: dict[str, bytes], token: str | None
) -> None:
    hub.make(REPO, tree, gated=True)
    with pytest.raises(
        HubError, match=r"lab/digits is gated: ask for access at http://\S+/lab/digits, then log in"
    ):
        Checkpoint.from_pretrained(REPO, token=token)
    assert Checkpoint.from_pretrained(REPO, token=TOKEN).labels


@pytest.mark.parametrize("revision", ["nosuchbranch", "0" * 40])
def test_an_unknown_revision_is_named(hub: Hub, tree: dict[str, bytes], revision: str) -> None:
    hub.make(REPO, tree)
    with pytest.raises(
        NotFound, match=rf"lab/digits has no revision '{revision}'; expected a branch, a tag or a"
    ):
        Checkpoint.from_pretrained(REPO, revision=revision)


def test_a_hub_that_does_not_answer_is_named(hub: Hub, checkpoint: Path) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(
        HubError,
        match=r"lab/digits: no such folder here, http://127\S+ did not answer .*HF_ENDPOINT",
    ):
        Checkpoint.from_pretrained(REPO)
    with pytest.raises(HubError, match=r"lab/digits: the transfer .* failed \(.*check the network"):
        load_checkpoint(checkpoint).push_to_hub(REPO, token=TOKEN)


def test_a_hub_that_is_out_of_order_is_named(hub: Hub, checkpoint: Path) -> None:
    hub.broken = 500
    with pytest.raises(
        HubError, match=r"lab/digits: no such folder here, http\S+ did not answer .*500"
    ):
        Checkpoint.from_pretrained(REPO)
    with pytest.raises(
        HubError, match=r"lab/digits: http\S+ answered 500 \(out of order\); try again later"
    ):
        load_checkpoint(checkpoint).push_to_hub(REPO, token=TOKEN)


def test_offline_without_a_copy_the_setting_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(HubError, match=r"no complete copy is in the cache; check .*HF_HUB_OFFLINE"):
        Checkpoint.from_pretrained(REPO)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "samples/metadata.jsonl"])
def test_a_download_that_breaks_off_is_no_checkpoint_and_the_next_one_is(
    hub: Hub, tree: dict[str, bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.make(REPO, tree)
    hub.cut = {name: 100}
    with pytest.raises(HubError, match=r"lab/digits: the transfer .* failed \(.*run it again"):
        Checkpoint.from_pretrained(REPO)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()
        with pytest.raises(HubError, match="no complete copy is in the cache"):
            Checkpoint.from_pretrained(REPO)
    close_session()
    hub.cut = {}
    assert files_of(Checkpoint.from_pretrained(REPO).path) == tree


def test_a_download_of_weights_that_do_not_fit_is_refused(hub: Hub, tree: dict[str, bytes]) -> None:
    config = json.loads(tree["config.json"]) | {"hidden": 97}
    hub.make(REPO, tree | {"config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError, match=r"(?s)does not fit its config\.json.*\[97"):
        Checkpoint.from_pretrained(REPO)


def test_a_file_that_would_lie_outside_is_refused(
    hub: Hub, tree: dict[str, bytes], tmp_path: Path
) -> None:
    hub.make(REPO, tree | {"samples/../../../../../outside.png": b"image"})
    with pytest.raises(HubError, match=r"lab/digits: the transfer .*\.\./outside\.png"):
        Checkpoint.from_pretrained(REPO)
    assert list(tmp_path.rglob("outside.png")) == []


def test_another_model_on_the_hub_is_no_checkpoint(hub: Hub) -> None:
    hub.make(REPO, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(NotFound, match=r"lab/digits on the hub \(commit \w{40}\) is not a checkp"):
        Checkpoint.from_pretrained(REPO)


@pytest.mark.parametrize("source", ["nowhere", "./lab/digits", "/lab/digits", "a/b/c", "a--b/c"])
def test_what_is_neither_folder_nor_hub_id_is_looked_for_nowhere(hub: Hub, source: str) -> None:
    with pytest.raises(
        NotFound, match=f"{source} is neither a folder here nor ORG/NAME on the hub; train one"
    ):
        Checkpoint.from_pretrained(source)


def test_a_path_is_never_looked_for_on_the_hub(hub: Hub, tree: dict[str, bytes]) -> None:
    hub.make(REPO, tree)
    with pytest.raises(NotFound, match="neither a folder here"):
        Checkpoint.from_pretrained(Path(REPO))


def test_a_folder_has_no_revisions(checkpoint: Path) -> None:
    with pytest.raises(InvalidInput, match=r"revision 'main' of .*, which is a folder: expected"):
        Checkpoint.from_pretrained(str(checkpoint), revision="main")


def test_a_folder_comes_before_the_hub(
    hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_checkpoint(checkpoint).save_pretrained(REPO)
    assert Checkpoint.from_pretrained(REPO).revision is None


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_of_somebody_else", 403)])
def test_pushing_without_a_token_that_may_says_how_to_log_in(
    hub: Hub, checkpoint: Path, token: str | None, status: int
) -> None:
    with pytest.raises(
        HubError,
        match=rf"lab/digits: http\S+ refused \({status}: .*HF_TOKEN to a token that may write",
    ):
        load_checkpoint(checkpoint).push_to_hub(REPO, token=token)
    assert hub.repositories == {}


def test_what_was_to_be_private_is_not_pushed_to_a_public_repository(
    hub: Hub, checkpoint: Path
) -> None:
    repository = hub.make(REPO, {})
    with pytest.raises(HubError, match="exists and is public, private was asked for: nothing was"):
        load_checkpoint(checkpoint).push_to_hub(REPO, private=True, token=TOKEN)
    assert len(repository.commits) == 1


@pytest.mark.parametrize("name", ["digits", "a/b/c", "lab/dig its", ""])
def test_a_name_that_is_no_hub_id_is_refused(hub: Hub, checkpoint: Path, name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(InvalidInput, match=r"hub id: got .*, expected ORG/NAME"):
        load_checkpoint(checkpoint).push_to_hub(name, token=TOKEN)
    assert hub.written == []


def test_the_commands_push_evaluate_and_export(
    hub: Hub, checkpoint: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    runner = CliRunner()
    words = ["push", str(checkpoint), REPO, "--private", "--revision", "trial"]
    pushed = runner.invoke(marnet_train, words)
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stderr.startswith(f"wrote {hub.url}/{REPO}/commit/")  # no progress bars
    assert f"--checkpoint {REPO} --precision fp16 --revision trial" in pushed.stderr
    assert hub.repositories[REPO].private
    source = ["--checkpoint", REPO, "--revision", "trial"]
    found = runner.invoke(marnet_train, ["evaluate", *source, "--data", str(digits)])
    assert found.exit_code == 0, found.output
    assert "test: 270 images" in found.stdout
    chosen = ["--backend", "torchscript", "--min-agreement", "0.9", "--no-text"]
    with in_one_process():
        exported = runner.invoke(marnet_export, [*source, *chosen])
    assert exported.exit_code == 0, exported.output
    assert [path.name for path in Path("bundles").iterdir()] == ["digits-torchscript-fp32.marnet"]


def test_the_python_of_the_page_on_checkpoints_runs(
    hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_checkpoint(checkpoint).save_pretrained("runs/digits")
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["same"].revision == names["commit"].oid
    assert names["same"].sha256 == load_checkpoint("runs/copy").sha256
    assert hub.repositories["my-team/digits"].private


def test_the_commands_name_what_is_not_on_the_hub(hub: Hub, digits: Path) -> None:
    runner = CliRunner()
    found = runner.invoke(marnet_export, ["--checkpoint", REPO])
    assert (found.exit_code, "no such repository" in found.stderr) == (2, True)
    words = ["evaluate", "--checkpoint", REPO, "--data", str(digits)]
    found = runner.invoke(marnet_train, words)
    assert (found.exit_code, "no such repository" in found.stderr) == (2, True)
