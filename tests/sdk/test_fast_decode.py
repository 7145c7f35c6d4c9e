"""JPEG files decoded at a smaller scale: where it is done, by which rule, and who says so."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, make_picture, to_array
from PIL import Image
from tolerances import FAST_DECODE_LARGEST, FAST_DECODE_MEAN

from marnet_sdk import Classifier
from marnet_sdk.commands.classify import main
from marnet_sdk.errors import ImageError, ImageTooLarge, InvalidInput
from marnet_sdk.inputs.images import Limits, decode
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.provenance import predict_with_provenance, provenance_of, replay
from marnet_sdk.server import network
from marnet_sdk.server.cli import main as server_main

SQUARE = Preprocess(size=(32, 32))
FAST = Preprocess(size=(32, 32), fast_decode=True)


def jpeg(width: int, height: int, **options) -> bytes:
    return encode(make_picture(width, height), "JPEG", quality=95, **options)


def orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(63, 63, 1), (127, 500, 1), (128, 128, 2), (255, 999, 2), (256, 256, 4), (512, 4000, 8)],
)
def test_the_smallest_scale_that_is_twice_as_large_is_taken(width, height, scale):
    decoded = FAST.decode(jpeg(width, height))
    assert decoded.size == (-(-width // scale), -(-height // scale))
    assert decoded.mode == "RGB"


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_decoded_picture_is_whole_or_twice_as_large_as_asked_for(width, height, h, w, data):
    turned = data.draw(st.sampled_from([1, 3, 6, 8]))
    upright = (height, width) if turned in (6, 8) else (width, height)
    file = jpeg(width, height, exif=orientation(turned))
    size = Preprocess(size=(h, w), fast_decode=True).decode(file).size
    assert size == upright or (size[0] >= 2 * w and size[1] >= 2 * h)
    edge = Preprocess(shortest_edge=h, crop_size=(h, h), fast_decode=True).decode(file).size
    assert edge == upright or min(edge) >= 2 * h


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": orientation(6)}]
)
def test_pixels_differ_little(photographs, options):
    for path in photographs:
        with Image.open(path) as photograph:
            file = encode(photograph.convert("RGB"), "JPEG", quality=90, **options)
        exact, fast = (p.resized_uint8(p.decode(file)).astype(int) for p in (SQUARE, FAST))
        difference = np.abs(exact - fast)
        assert 0 < difference.mean() < FAST_DECODE_MEAN
        assert difference.max() < FAST_DECODE_LARGEST


@pytest.mark.parametrize("space", ["L", "CMYK"])
def test_other_colour_spaces_are_decoded_fast_too(photographs, space):
    with Image.open(photographs[0]) as photograph:
        file = encode(photograph.convert(space), "JPEG", quality=90)
    fast = FAST.decode(file)
    assert (fast.mode, fast.size) == ("RGB", (160, 107))
    difference = np.abs(SQUARE.pixels([file]) - FAST.pixels([file]))
    assert difference.mean() < FAST_DECODE_MEAN * 2 / 255


def test_every_other_way_of_decoding_is_as_ever():
    picture, large = make_picture(400, 300), jpeg(400, 300)
    with Image.open(io.BytesIO(large)) as wanted:
        np.testing.assert_array_equal(to_array(decode(large)), to_array(wanted))
        np.testing.assert_array_equal(to_array(SQUARE.decode(large)), to_array(wanted))
    for other in (encode(picture, "PNG"), encode(picture, "WEBP"), picture, to_array(picture)):
        np.testing.assert_array_equal(to_array(FAST.decode(other)), to_array(decode(other)))
    assert FAST.to_dict() == SQUARE.to_dict()  # no configuration holds it
    assert not Preprocess.from_dict(FAST.to_dict()).fast_decode


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_whose_rows_are_missing_is_refused_too(photographs, progressive):
    with Image.open(photographs[0]) as photograph:
        file = encode(photograph, "JPEG", progressive=progressive)
    for share in (0.3, 0.9, 0.99):
        with pytest.raises(ImageError, match="ends before its image"):
            FAST.decode(file[: int(share * len(file))])
    assert FAST.decode(file[:-2]).size == (160, 107)  # without its end marker it is whole
    grey = encode(Image.new("RGB", (400, 400), (128, 128, 128)), "JPEG")  # as rows that are missing
    assert FAST.decode(grey).size == (100, 100)


def test_limits_are_of_the_file_and_not_of_what_is_decoded():
    with pytest.raises(ImageTooLarge, match="400 x 300 pixels"):
        FAST.decode(jpeg(400, 300), limits=Limits(max_pixels=100_000))


# --- a classifier


@pytest.fixture(scope="module")
def path(bundle_of) -> Path:
    return bundle_of("onnxruntime", "fp32")


@pytest.fixture(scope="module")
def fast(path):
    with Classifier(path, threads=1, fast_decode=True) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def files(photographs) -> list[bytes]:
    return [photograph.read_bytes() for photograph in photographs]


def test_every_way_to_ask_decodes_the_same(fast, path, files):
    wanted = fast.predict_pixels(fast.preprocess.pixels(files))
    assert fast.predict(files) == wanted
    assert list(fast.predict_stream(files)) == wanted
    one = fast.predict_pixels(fast.preprocess.pixels(files[:1]))
    assert fast.predict(files[0]) == fast.submit(files[0]).result() == one[0]
    with Classifier(path, threads=1) as exact:
        assert exact.predict(files) != wanted
        assert not np.array_equal(exact.embed(files), fast.embed(files))


def test_another_word_than_true_or_false_is_refused(path):
    with pytest.raises(InvalidInput, match="fast_decode: got 'yes', expected True or False"):
        Classifier(path, fast_decode="yes")  # pyright: ignore[reportArgumentType]


def test_golden_images_are_decoded_as_ever(path, monkeypatch):
    from marnet_sdk import classifier as module

    given, tests = [], module.self_test

    def self_test(bundle, preprocess, run):
        given.append(preprocess.fast_decode)
        return tests(bundle, preprocess, run)

    monkeypatch.setattr(module, "self_test", self_test)
    with Classifier(path, threads=1, fast_decode=True) as classifier:
        assert classifier.preprocess.fast_decode
    assert given == [False]


def test_provenance_says_it_and_the_answer_is_derived_again(fast, path, photographs):
    (answer,) = predict_with_provenance(fast, photographs[:1])
    assert provenance_of(answer).fast_decode
    again = replay(answer, photographs[0], path)
    assert (again.differences, again.surroundings) == ((), ())
    with Classifier(path, threads=1) as exact:
        (other,) = predict_with_provenance(exact, photographs[:1])
    assert not provenance_of(other).fast_decode
    assert provenance_of(other).pixels != provenance_of(answer).pixels


def test_marnet_classify_passes_it_on(path, photographs):
    chosen = [str(photographs[0]), "-m", str(path), "--threads", "1", "--format", "json"]
    result = CliRunner().invoke(main, [*chosen, "--fast-decode", "--provenance"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["provenance"]["fast_decode"] is True


@pytest.mark.parametrize("more", [[], ["--fast-decode"]])
def test_marnet_serve_passes_it_on(path, monkeypatch, more):
    opened = []

    async def open_once(service):
        await service.open()
        with service.using() as classifier:
            opened.append(classifier.preprocess.fast_decode)
        await service.close()

    def serve(service, listeners, log):
        asyncio.run(open_once(service))
        listeners[0].close()
        log.close()

    monkeypatch.setattr(network, "serve", serve)
    words = ["--model", str(path), "--port", "0", "--threads", "1", *more]
    server_main.main(words, standalone_mode=False)
    assert opened == [bool(more)]
