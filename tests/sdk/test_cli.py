"""marnet-classify as it is typed, and as scripts read it."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from marnet_sdk import Classifier
from marnet_sdk.bundle import read_bundle, reseal_bundle
from marnet_sdk.commands import rows as rows_module
from marnet_sdk.commands.classify import main


@pytest.fixture(scope="module")
def bundle(bundle_of) -> str:
    return str(bundle_of("torchscript", "fp16"))


@pytest.fixture(scope="module")
def images(digits: Path) -> list[str]:
    return [str(path) for path in sorted((digits / "test").glob("*.png"))[:4]]


@pytest.fixture(scope="module")
def answers(bundle, images):
    return Classifier(bundle).predict(images)


@pytest.fixture
def with_bad(images, tmp_path: Path) -> list[str]:
    """The second of five files is no image."""
    bad = tmp_path / "notes.png"
    bad.write_text("not pixels")
    return [images[0], str(bad), *images[1:]]


def classify(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_a_table_names_image_label_and_score(bundle, images, answers):
    result = classify(*images, "-m", bundle)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for image, answer in zip(images, answers, strict=True):
        (line,) = [line for line in lines if image in line]
        shown = one_line(line.replace(image, "")).split(" ")
        assert shown[:2] == [answer.label, f"{answer.score:.2%}"]
        second = answer.top[1]
        assert f"{second.label} {second.score:.1%}, " in line
    assert f"marnet-bench --batch 64 --model {bundle}" in one_line(result.stderr)


def test_json_is_for_programs(bundle, images, answers):
    result = classify(*images, "-m", bundle, "--format", "json", "--top-k", "3")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert [entry["image"] for entry in content] == images
    for entry, answer in zip(content, answers, strict=True):
        assert entry["label"] == answer.label
        assert entry["score"] == pytest.approx(answer.score, abs=1e-6)
        assert [top["label"] for top in entry["top"]] == [top.label for top in answer.top[:3]]
    assert result.stderr == ""


def test_csv_has_a_header_and_a_line_for_each_rank(bundle, images, answers):
    result = classify(*images, "-m", bundle, "--format", "csv", "--top-k", "2")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert result.stdout.startswith(
        "image,rank,label,index,score,samples,vote_share,standard_error,abstain,error\n"
    )
    assert len(rows) == 2 * len(images)
    for row, answer in zip(rows[::2], answers, strict=True):
        assert (row["rank"], row["label"], row["index"]) == ("1", answer.label, str(answer.index))
        assert float(row["score"]) == pytest.approx(answer.score, abs=1e-5)


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_a_bad_file_loses_no_answer_and_exits_with_1(form, bundle, with_bad, answers):
    result = classify(*with_bad, "-m", bundle, "--format", form, "--batch", "2", "--top-k", "1")
    assert result.exit_code == 1
    assert "1 of 5 images could not be used" in result.stderr
    if form == "table":
        lines = [line for line in result.stdout.splitlines() if ".png" in line]
        labels = [line.split()[1] for line in lines]
    elif form == "json":
        content = json.loads(result.stdout)
        assert content[1].keys() == {"image", "error"}
        labels = [entry.get("label", "error") for entry in content]
    else:
        rows = list(csv.DictReader(io.StringIO(result.stdout)))
        assert "image" in rows[1]["error"]
        labels = [row["label"] or "error" for row in rows]
    assert labels == [answers[0].label, "error", *(a.label for a in answers[1:])]


def test_a_missing_file_is_reported_like_a_bad_one(bundle, images):
    result = classify("missing.png", images[0], "-m", bundle, "--format", "json")
    assert result.exit_code == 1
    missing, present = json.loads(result.stdout)
    assert "error" in missing
    assert "label" in present


def test_without_a_bundle_the_command_that_makes_one_is_shown(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = classify(images[0])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "no bundle under" in one_line(result.stderr)
    assert "marnet-export --precision fp16" in one_line(result.stderr)


def test_the_newest_bundle_is_taken_and_named(bundle, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("newer.marnet", "older.marnet", ".unfinished")):
        shutil.copytree(bundle, tmp_path / "bundles" / name)
        os.utime(tmp_path / "bundles" / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "bundles/.unfinished", (2e9, 2e9))
    result = classify(images[0])
    assert result.exit_code == 0
    assert "model bundles/newer.marnet (the newest" in one_line(result.stderr)


def test_a_damaged_bundle_is_refused_in_one_line(bundle, images, tmp_path):
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    with (copy / "payload/refine.pt").open("ab") as file:
        file.write(b"x")
    result = classify(images[0], "-m", str(copy))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "copy or export the bundle again" in one_line(result.stderr)
    assert "Traceback" not in result.stderr


def test_several_samples_show_how_much_of_an_answer_is_owed_to_the_noise(bundle, images):
    chosen = ("-m", bundle, "--samples", "6")
    content = json.loads(classify(*images, *chosen, "--format", "json").stdout)
    expected = Classifier(bundle, samples=6).predict(images)
    table = classify(*images, *chosen).stdout
    for entry, answer in zip(content, expected, strict=True):
        assert entry["samples"] == 6
        assert entry["vote_share"] == answer.vote_share
        assert entry["standard_error"] == pytest.approx(answer.standard_error, abs=1e-6)
        assert f"{answer.vote_share:.0%} of 6" in table
        assert f"{answer.standard_error:.2%}" in table
    assert "of 6" not in classify(*images, "-m", bundle).stdout
    early = classify(*images, *chosen, "--stop", "settled", "--format", "json")
    assert {entry["samples"] for entry in json.loads(early.stdout)} == {4}


def test_operating_points_are_chosen_by_name(swept_bundle, images):
    def run(*arguments: str) -> Result:
        return classify(*images, "-m", str(swept_bundle), "--format", "json", *arguments)

    fast, exact = (json.loads(run("--operating-point", p).stdout) for p in ("fast", "exact"))
    assert [a["score"] for a in fast] != [a["score"] for a in exact]
    refused = run("--operating-point", "fastest")
    assert refused.exit_code == 2
    assert "has balanced, exact, fast, zero" in one_line(refused.stderr)


def test_an_answer_below_the_threshold_of_the_target_risk_is_marked(bundle, images, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "b")
    scores = sorted(answer.score for answer in Classifier(copy).predict(images))
    sampling = read_bundle(copy).manifest.sampling
    point = replace(sampling.point, abstain_below=scores[2])
    reseal_bundle(copy, sampling=replace(sampling, points={"default": point}))
    result = classify(*images, "-m", str(copy))
    answers = Classifier(copy).predict(images)
    declined = sum(answer.abstain for answer in answers)
    assert 0 < declined < len(images)
    assert result.stdout.count("(abstain)") == declined
    assert "below the threshold that the export found" in one_line(result.stderr)


def test_another_seed_is_another_answer_and_the_same_seed_the_same(bundle, images):
    def scores(*arguments: str) -> list[float]:
        result = classify(*images, "-m", bundle, "--format", "json", *arguments)
        return [entry["score"] for entry in json.loads(result.stdout)]

    assert scores("--seed", "0") == scores()
    assert scores("--seed", "1") == scores("--seed", "1")
    assert scores("--seed", "1") != scores()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'IMAGES...'"),
        (("x.png", "--format", "jsn"), "Did you mean 'json'?"),
        (("x.png", "--top-k", "0"), "0 is not in the range x>=1"),
        (("x.png", "--batch", "-1"), "-1 is not in the range x>=1"),
        (("x.png", "-m", "nowhere"), "nowhere is not a directory, so it is not a bundle"),
        (("x.png", "--modle", "x"), "No such option"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_is_right(arguments, message):
    result = classify(*arguments)
    assert result.exit_code == 2
    assert message in one_line(result.stderr)


def test_help_shows_an_example_and_the_exit_code():
    text = one_line(classify("-h").stdout)
    assert "marnet-classify photo.jpg" in text
    assert "the exit code is 1" in text
    assert "Default: the newest" in text


def test_version_is_the_package_s():
    from marnet_sdk import __version__

    assert classify("--version").stdout.rstrip().endswith(f"version {__version__}")


# --- folders, lists and files -------------------------------------------------------------------


@pytest.fixture
def folder(images, tmp_path: Path) -> Path:
    """Five images, one of them damaged, in two folders."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for number, image in enumerate(images):
        shutil.copy(image, root / ("more" if number > 1 else "") / f"{number}.png")
    (root / "5.jpg").write_text("not pixels")
    (root / "readme.txt").write_text("not an image")
    return root


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_is_classified_with_what_is_below_it(bundle, folder, answers):
    result = classify(str(folder), "-m", bundle, "--format", "jsonl", "-b", "2")
    assert result.exit_code == 1
    rows = rows_of(result.stdout)
    names = ("0.png", "1.png", "5.jpg", "more/2.png", "more/3.png")
    assert [row["image"] for row in rows] == [str(folder / name) for name in names]
    assert [row["label"] for row in rows if "label" in row] == [a.label for a in answers]
    said = result.stderr.splitlines()
    assert said[0] == "1 of 5 images could not be used"
    assert said[1].startswith(f"  {folder}/5.jpg: ")


def test_standard_input_names_images(bundle, images):
    names = "\n".join(images[:2])
    result = CliRunner().invoke(main, ["-", "-m", bundle, "--format", "jsonl"], input=names)
    assert [row["image"] for row in rows_of(result.stdout)] == images[:2]
    names = "\0".join(images[1:3])
    result = CliRunner().invoke(main, ["-", "-0", "-m", bundle, "--format", "jsonl"], input=names)
    assert [row["image"] for row in rows_of(result.stdout)] == images[1:3]


def test_nothing_to_classify_is_wrong_use(bundle, tmp_path):
    for form in ("table", "json"):
        result = classify(str(tmp_path), "-m", bundle, "--format", form)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"no image files in {tmp_path}" in one_line(result.stderr)


def test_many_failures_are_counted_and_the_first_are_named(bundle, tmp_path):
    for number in range(25):
        (tmp_path / f"{number:02}.jpg").write_text("")
    result = classify(str(tmp_path), "-m", bundle, "--format", "jsonl")
    said = result.stderr.splitlines()
    assert said[0] == "25 of 25 images could not be used"
    assert len(said) == 22
    assert said[-1] == "  and 5 more, whose answer is an error"


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet"])
def test_the_end_of_the_output_s_name_is_its_format(form, bundle, folder, answers, tmp_path):
    out = tmp_path / f"new/out.{form}"
    result = classify(str(folder), "-m", bundle, "-o", str(out), "-b", "2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"wrote {out}" in result.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    if form == "json":
        rows = json.loads(out.read_text())
    elif form == "jsonl":
        rows = rows_of(out.read_text())
    elif form == "csv":
        rows = [r for r in csv.DictReader(io.StringIO(out.read_text())) if r["rank"] in ("", "1")]
    else:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(out).to_pylist()
    assert [row["label"] for row in rows if row.get("label")] == [a.label for a in answers]
    assert sum(bool(row.get("error")) for row in rows) == 1
    again = classify(str(folder), "-m", bundle, "-o", str(out))
    assert again.exit_code == 2
    assert "pass --force to replace it" in one_line(again.stderr)


def test_what_is_printed_and_what_is_written_is_the_same(bundle, folder, tmp_path):
    for form in ("json", "csv"):
        printed = classify(str(folder), "-m", bundle, "--format", form)
        classify(
            str(folder), "-m", bundle, "--format", form, "-o", str(tmp_path / "out"), "--force"
        )
        assert (tmp_path / "out").read_text() == printed.stdout


@pytest.fixture
def stumbling(monkeypatch) -> list[int]:
    """Interrupts the classifier in the batch of a given number; has the sizes of the others."""
    when, predict = [0], Classifier.predict

    def stumble(self, images, **how):
        when[0] -= 1
        if when[0] == 0:
            raise KeyboardInterrupt
        when.append(len(images))
        return predict(self, images, **how)

    monkeypatch.setattr(Classifier, "predict", stumble)
    return when


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_an_interrupted_run_goes_on_and_ends_like_one_that_was_not(
    form, bundle, folder, tmp_path, stumbling
):
    out, whole = tmp_path / f"out.{form}", tmp_path / f"whole.{form}"
    run = (str(folder), "-m", bundle, "-b", "2", "-o")
    stumbling[0] = 2
    cut = classify(*run, str(out))
    assert cut.exit_code == 1
    assert f"2 rows are in {out}.partial; the same command with --resume" in one_line(cut.stderr)
    assert not out.exists()
    refused = classify(*run, str(out))
    assert refused.exit_code == 2
    assert "--resume goes on with them, --force begins again" in one_line(refused.stderr)
    with Path(f"{out}.partial").open("ab") as file:
        file.write(b'{"image": "/photos/th')  # as a full disk or a power cut leaves it
    del stumbling[1:]
    done = classify(*run, str(out), "--resume")
    assert done.exit_code == 1  # one image is none
    assert stumbling[1:] == [2, 1]
    assert "2 rows of an interrupted run are kept" in done.stderr
    assert "1 of 5 images could not be used" in done.stderr
    classify(*run, str(whole))
    assert out.read_bytes() == whole.read_bytes()


def test_a_run_with_other_settings_does_not_go_on(bundle, folder, tmp_path, stumbling):
    run = (str(folder), "-m", bundle, "-b", "2", "-o", str(tmp_path / "out.csv"))
    stumbling[0] = 2
    classify(*run)
    result = classify(*run, "--resume", "--seed", "7")
    assert result.exit_code == 2
    assert "begun with other settings: seed (0, now 7)" in one_line(result.stderr)
    decoded = classify(*run, "--resume", "--fast-decode")
    assert "fast_decode (False, now True)" in one_line(decoded.stderr)
    assert classify(*run, "--resume").exit_code == 1
    assert (tmp_path / "out.csv").exists()


def test_progress_has_images_a_second_and_never_meets_the_answers(bundle, images, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    result = classify(*images, "-m", bundle, "--format", "jsonl")
    assert [row["image"] for row in rows_of(result.stdout)] == images
    assert "images/s" in result.stderr
    assert "4/4" in result.stderr


def test_images_are_taken_a_batch_at_a_time(bundle, images):
    class Endless(io.BytesIO):
        lines = 0

        def __next__(self) -> bytes:
            self.lines += 1
            return f"{images[0]}\n".encode()

    class Taken(Exception):
        pass

    seen = []

    def stop(rows):
        for row in rows:
            seen.append(row)
            if len(seen) == 5:
                raise Taken
            yield ""

    endless = Endless()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows_module.LINES, "jsonl", stop)
        patch.setattr("sys.stdin", io.TextIOWrapper(endless))
        with pytest.raises(Taken):
            main.main(["-", "-m", bundle, "--format", "jsonl", "-b", "2"], standalone_mode=False)
    assert endless.lines == 6


def test_answers_say_what_made_them_where_that_is_asked(bundle, images, answers):
    result = classify(*images, "-m", bundle, "--format", "json", "--provenance")
    content = json.loads(result.stdout)
    assert [entry["label"] for entry in content] == [answer.label for answer in answers]
    made = [entry["provenance"] for entry in content]
    assert [one["row"] for one in made] == [0, 1, 2, 3]
    assert {one["backend"] for one in made} == {"torchscript"}
    plain = json.loads(classify(*images, "-m", bundle, "--format", "json").stdout)
    assert plain == [{k: v for k, v in entry.items() if k != "provenance"} for entry in content]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--provenance",), "a table has no place for it; use --format json, jsonl or parquet"),
        (("--provenance", "--format", "csv"), "a csv has no place for it"),
        (("--resume",), "name it with --output FILE"),
        (("--format", "parquet"), "name it with --output FILE"),
        (("-o", "x.docx"), "whose end tells no format; choose one with --format: json"),
        (("-o", "x", "--format", "table"), "--format table is not written to files"),
    ],
)
def test_options_that_do_not_go_together_say_which_do(arguments, message):
    result = classify("x.png", *arguments)
    assert result.exit_code == 2
    assert message in one_line(result.stderr)
