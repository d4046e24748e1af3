import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.batch import RawSample
from data_pipeline.decode import MAX_PIXELS, decode, decode_reduced, decode_sample
from data_pipeline.fault import UserError


def encoded(picture, kind, **options):
    data = io.BytesIO()
    picture.save(data, format=kind, **options)
    return data.getvalue()


@pytest.fixture(scope="module")
def photo(photographs):
    return Image.fromarray(photographs["cat"])


def huge_png():
    """70,000 x 70,000 pixels, says its header; the rest is a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 70_000, 70_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def huge_jpeg(photo):
    data = bytearray(encoded(photo, "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_has_the_pixels_that_pillow_sees(photo, options, mode):
    data = encoded(photo.convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    image = decode(data, mode=mode)
    assert image.shape == (*photo.size[::-1], 3 if mode == "RGB" else 1)
    assert image.dtype == np.uint8
    assert np.array_equal(image.squeeze(), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_pictures_come_back_as_they_were(photo, kind):
    data = encoded(photo, kind, lossless=True)
    assert np.array_equal(decode(data, mode="RGB"), np.asarray(photo))


def test_a_grey_picture_becomes_three_equal_channels_in_a_coloured_data_set(photo):
    for kind in ("JPEG", "PNG"):
        image = decode(encoded(photo.convert("L"), kind), mode="RGB")
        assert image.shape[2] == 3
        assert (image == image[:, :, :1]).all()


def test_the_content_decides_and_not_the_name(photo):
    raw = RawSample(0, "key", encoded(photo, "PNG"), None, 0, "train-000000.tar", 512)
    assert np.array_equal(decode_sample(raw, mode="RGB"), np.asarray(photo))


def test_a_cmyk_jpeg_is_decoded_as_pillow_decodes_it(photo):
    data = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data, mode="RGB"), expected)
    assert np.abs(expected.astype(int) - np.asarray(photo)).mean() < 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.98])
def test_a_picture_that_breaks_off_is_refused(photo, kind, kept):
    data = encoded(photo, kind)
    with pytest.raises(ValueError, match="cannot decode"):
        decode(data[: int(len(data) * kept)], mode="RGB")


@pytest.mark.parametrize("make", [huge_png, huge_jpeg])
def test_a_header_that_announces_gigabytes_is_refused_before_any_memory_is_taken(photo, make):
    data = make(photo) if make is huge_jpeg else make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="pixels"):
        decode(data, mode="RGB")
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    )  # KiB; the pixels would take 10 GB


def test_a_picture_just_over_the_limit_is_refused_with_its_size():
    data = encoded(Image.new("1", (MAX_PIXELS // 10_000 + 1, 10_000)), "PNG")
    with pytest.raises(ValueError, match=r"10001 x 10000 pixels, at most 100000000"):
        decode(data, mode="L")


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "BMP", "PPM", "ICO", "EPS"])
def test_formats_that_training_does_not_know_are_refused_whatever_their_name(photo, kind):
    with pytest.raises(ValueError, match="cannot decode: cannot identify image file"):
        decode(encoded(photo.resize((32, 32)), kind), mode="RGB")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html><html>404</html>",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0" + bytes(500),
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ValueError, match="cannot decode"):
        decode(data, mode="RGB")


def test_the_same_fault_is_told_in_the_same_words():
    def words(data):
        with pytest.raises(ValueError, match="cannot decode") as caught:
            decode(data, mode="RGB")
        return str(caught.value)

    assert (
        words(b"no picture")
        == words(b"no picture" + bytes(1000))
        == "cannot decode: cannot identify image file"
    )


def test_a_sample_that_cannot_be_decoded_is_named_with_its_place(photo):
    for content in (b"<html>", b""):
        raw = RawSample(0, "cat/7", content, None, 1, "train-000003.tar", 1536)
        with pytest.raises(UserError, match=r"'train-000003.tar': sample 'cat/7': cannot decode") as caught:
            decode_sample(raw, mode="RGB")
        assert caught.value.place == {"shard": "train-000003.tar", "member": "cat/7", "offset": 1536}


def test_the_fault_that_the_reader_found_is_the_one_that_is_told():
    fault = UserError("bytes are missing", mend="copy it again")
    with pytest.raises(UserError, match="bytes are missing"):
        decode_sample(RawSample(0, "key", b"", None, 0, "a.tar", 512, fault), mode="RGB")


@pytest.mark.parametrize("by", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_smaller_by_what_the_caller_allows_and_shows_the_same(photo, by):
    odd = decode_reduced(encoded(photo, "JPEG"), lambda _height, _width: by, mode="RGB")
    height, width = photo.size[::-1]
    assert (odd.height, odd.width) == (height, width)
    assert odd.image.shape == (-(-height // by), -(-width // by), 3)
    even = photo.crop((0, 0, 448, 296))  # whole blocks of 8 x 8: elsewhere the last pixels are made up
    decoded = decode_reduced(encoded(even, "JPEG", quality=95), lambda _height, _width: by, mode="RGB")
    smaller = np.asarray(even.resize(decoded.image.shape[1::-1], Image.Resampling.BOX), np.int64)
    assert np.abs(decoded.image.astype(np.int64) - smaller).mean() < 4


def test_other_formats_are_decoded_whole_and_say_their_size(photo):
    asked = []
    decoded = decode_reduced(encoded(photo, "PNG"), lambda *size: asked.append(size) or 8, mode="RGB")
    assert asked == [photo.size[::-1]]
    assert decoded.image.shape[:2] == (decoded.height, decoded.width) == photo.size[::-1]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sixteen_bits_lose_their_lower_half_instead_of_turning_white(mode):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = decode(encoded(Image.fromarray(values), "PNG"), mode=mode)
    assert np.abs(image[:, :, 0] - np.round(values / 257)).max() == 0
