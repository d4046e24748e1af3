import base64
import io
import os
from hashlib import sha256

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.decode import decode
from data_pipeline.pictures import scaled_size, stored_mask, stored_picture

SIDES = (24, 16)  # width, height


def pattern(channels=3):
    """Values of every size, no symmetry."""
    width, height = SIDES
    return (np.arange(height * width * channels) * 37 % 256).astype(np.uint8).reshape(height, width, channels)


def encoded(picture, kind, **how):
    data = io.BytesIO()
    picture.save(data, format=kind, **how)
    return data.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def palette(transparent):
    picture = Image.fromarray(pattern()[..., 0], "L").convert("P")
    picture.putpalette([value * 7 % 256 for value in range(768)])
    return encoded(picture, "PNG", **({"transparency": 3} if transparent else {}))


def sixteen(channels):
    values = (np.arange(16 * 24 * channels) * 173 % 65536).astype(np.uint16).reshape(16, 24, channels)
    return cv2.imencode(".png", values)[1].tobytes()


def floating():
    values = pattern()[..., 0].astype(np.float32) / 100 - 0.5
    values[0, :3] = np.nan, np.inf, -np.inf
    return encoded(Image.fromarray(values), "TIFF")


def frames(kind, **how):
    first, second = Image.fromarray(pattern()), Image.fromarray(255 - pattern())
    return encoded(first, kind, save_all=True, append_images=[second], **how)


RGB = Image.fromarray(pattern())
FILES = {
    "grey.png": encoded(RGB.convert("L"), "PNG"),
    "coloured.png": encoded(RGB, "PNG"),
    "black_and_white.png": encoded(RGB.convert("1", dither=Image.Dither.NONE), "PNG"),
    "palette.png": palette(False),
    "palette_transparent.png": palette(True),
    "rgba.png": encoded(Image.fromarray(pattern(4)), "PNG"),
    "grey_alpha.png": encoded(Image.fromarray(pattern(2), "LA"), "PNG"),
    "turned.png": encoded(RGB, "PNG", exif=exif(6)),
    "turned.tif": encoded(RGB, "TIFF", exif=exif(6)),
    "sixteen_bits_grey.png": sixteen(1),
    "sixteen_bits_rgb.png": sixteen(3),
    "sixteen_bits_rgba.png": sixteen(4),
    "sixteen_bits_grey.tif": encoded(Image.open(io.BytesIO(sixteen(1))), "TIFF"),
    "floating.tif": floating(),
    "cmyk.tif": encoded(Image.fromarray(pattern(4), "CMYK"), "TIFF"),
    "coloured.bmp": encoded(RGB, "BMP"),
    "coloured.ppm": encoded(RGB, "PPM"),
    "animation.png": frames("PNG"),
    "animation.webp": frames("WEBP", lossless=True),
}
# Encoded once: another libjpeg may write, but not read, other values.
JPEGS = {
    "cmyk.jpg": (
        "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwAQCwwODAoQDg0OEhEQExgoGhgWFhgxIyUdKDozPTw5Mzg3QEhcTkBEV0U3OFBtUVdf"
        "YmdoZz5NcXlwZHhcZWdj/8AAFAgACAAMBEMRAE0RAFkRAEsRAP/EABgAAAMBAQAAAAAAAAAAAAAAAAAFBgQH/8QAIhAAAQEG"
        "BwAAAAAAAAAAAAAAAAQBAhYhY6EDBQYjMTRC/9oADgRDAE0AWQBLAAA/ANcXVLj3UPoe5iv5mVgRdUuc7W9l4ncdfuNmB//Z"
    ),
    "turned.jpg": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/4QAiRXhpZgAATU0AKgAAAAgAAQESAAMAAAABAAgAAAAAAAD/2wBDABALDA4MChAODQ4S"
        "ERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhC"
        "Y2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAARCAAIAAwDASIAAhEBAxEB/8QA"
        "FgABAQEAAAAAAAAAAAAAAAAAAAUG/8QAGhAAAgIDAAAAAAAAAAAAAAAAAAQBIQUjMv/EABQBAQAAAAAAAAAAAAAAAAAAAAP/"
        "xAAZEQACAwEAAAAAAAAAAAAAAAAABAIDEjH/2gAMAwEAAhEDEQA/AI+KQ5o1iyGmKACmI+nVrh//2Q=="
    ),
    "progressive.jpg": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1R"
        "V19iZ2hnPk1xeXBkeFxlZ2P/wgALCAAIAAwBAREA/8QAFQABAQAAAAAAAAAAAAAAAAAAAAP/2gAIAQEAAAABi//EABUQAQEA"
        "AAAAAAAAAAAAAAAAAAAU/9oACAEBAAEFApEj/8QAFRABAQAAAAAAAAAAAAAAAAAAADH/2gAIAQEABj8CiP/EABQQAQAAAAAA"
        "AAAAAAAAAAAAABD/2gAIAQEAAT8hK//aAAgBAQAAABA//8QAFhAAAwAAAAAAAAAAAAAAAAAAABHw/9oACAEBAAE/EIRCP//Z"
    ),
}
FILES |= {name: base64.b64decode(text) for name, text in JPEGS.items()}

# Extension, whether the bytes are kept, mode and SHA-256 (its first half of a half) of the pixels.
GOLDEN = {
    "grey.png": ("png", True, "L", "be7b73a7af5ff3cc"),
    "coloured.png": ("png", True, "RGB", "a812b122b20ee86f"),
    "black_and_white.png": ("png", True, "L", "d5179b2791e860aa"),
    "palette.png": ("png", True, "RGB", "68f1cd7961ce6f62"),
    "palette_transparent.png": ("png", True, "RGB", "68f1cd7961ce6f62"),
    "rgba.png": ("png", True, "RGB", "f559e52413b42e2d"),
    "grey_alpha.png": ("png", True, "L", "8e54d4baf85e00f9"),
    "turned.png": ("png", False, "RGB", "a9fd4b67e9e6f3e5"),
    "turned.tif": ("png", False, "RGB", "a9fd4b67e9e6f3e5"),
    "sixteen_bits_grey.png": ("png", False, "L", "7f511b360f8a51d3"),
    "sixteen_bits_rgb.png": ("png", False, "RGB", "cef3a1af062c5c1b"),
    "sixteen_bits_rgba.png": ("png", False, "RGB", "8bfd5c2ff6933567"),
    "sixteen_bits_grey.tif": ("png", False, "L", "7f511b360f8a51d3"),
    "floating.tif": ("png", False, "L", "0eb69986d8b040e1"),
    "cmyk.tif": ("png", False, "RGB", "b1ca1668442bbfc9"),
    "coloured.bmp": ("png", False, "RGB", "a812b122b20ee86f"),
    "coloured.ppm": ("png", False, "RGB", "a812b122b20ee86f"),
    "animation.png": ("png", False, "RGB", "a812b122b20ee86f"),
    "animation.webp": ("png", False, "RGB", "a812b122b20ee86f"),
    "cmyk.jpg": ("png", False, "RGB", "1bfe42b3db8ad782"),
    "turned.jpg": ("png", False, "RGB", "071f474d12213888"),
    "progressive.jpg": ("jpg", True, "L", "bb860851c46624d0"),
}


@pytest.fixture
def file(tmp_path):
    def write(data, name="picture.bin"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def smooth(photographs, mode="RGB"):
    return Image.fromarray(np.ascontiguousarray(photographs["coffee"][:90, :160])).convert(mode)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_shown_as_it_is_documented(file, name):
    assert FILES.keys() == GOLDEN.keys()
    stored = stored_picture(file(FILES[name]))
    digest = sha256(stored.shown.tobytes()).hexdigest()[:16]
    assert (stored.extension, stored.data == FILES[name], stored.shown.mode, digest) == GOLDEN[name]
    again = stored_picture(file(FILES[name]))
    assert again.data == stored.data
    # What training decodes is what was shown when the statistics were made.
    assert decode(stored.data, mode=stored.shown.mode).tobytes() == stored.shown.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_is_stored_upright(file, photographs, kind, orientation):
    data = encoded(smooth(photographs), kind, exif=exif(orientation))
    stored = stored_picture(file(data))
    opened = Image.open(io.BytesIO(data))
    opened.load()
    expected = ImageOps.exif_transpose(opened)
    assert np.array_equal(pixels(stored.data), np.asarray(expected))
    assert stored.size == expected.size == ((90, 160) if orientation > 4 else (160, 90))
    assert stored.turn is not None
    assert Image.open(io.BytesIO(stored.data)).getexif().get(0x0112) is None


def test_a_picture_becomes_smaller_and_never_larger(file, photographs):
    path = file(encoded(smooth(photographs), "PNG"))
    assert stored_picture(path, resize_shorter=90).data == path.read_bytes()
    assert stored_picture(path, resize_shorter=500).data == path.read_bytes()
    smaller = stored_picture(path, resize_shorter=45)
    assert (smaller.extension, smaller.size, smaller.shown.size) == ("png", (160, 90), (80, 45))
    whole = np.asarray(smooth(photographs), np.float64)
    averaged = whole.reshape(45, 2, 80, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels(smaller.data) - averaged).mean() < 3  # not every second pixel: antialiased


def test_a_fine_grid_becomes_grey_and_not_stripes(file):
    grid = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (64, 64))
    values = pixels(stored_picture(file(encoded(Image.fromarray(grid), "PNG")), resize_shorter=48).data)
    assert abs(float(values.mean()) - 127.5) < 3
    assert values.std() < 30


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_smaller_jpeg_is_a_baseline_jpeg_of_the_quality_asked_for(file, photographs, mode):
    path = file(encoded(smooth(photographs, mode), "JPEG", quality=95, progressive=True, comment=b"mine"))
    sizes = []
    for quality in (50, 90):
        stored = stored_picture(path, resize_shorter=60, quality=quality)
        opened = Image.open(io.BytesIO(stored.data))
        assert (stored.extension, opened.format, opened.mode, opened.size) == ("jpg", "JPEG", mode, (107, 60))
        assert not stored.progressive
        assert "progressive" not in opened.info
        assert "comment" not in opened.info
        if mode == "RGB":
            assert [layer[1:3] for layer in opened.layer] == [(2, 2), (1, 1), (1, 1)]
        sizes.append(len(stored.data))
        assert stored_picture(path, resize_shorter=60, quality=quality).data == stored.data
    assert sizes[0] < sizes[1]


def test_a_progressive_jpeg_is_told_and_made_baseline_on_demand(file, photographs):
    path = file(encoded(smooth(photographs), "JPEG", quality=90, progressive=True))
    kept, made = stored_picture(path), stored_picture(path, reencode=True)
    assert kept.progressive
    assert kept.data == path.read_bytes()
    assert (made.extension, made.progressive) == ("jpg", False)
    assert "progressive" not in Image.open(io.BytesIO(made.data)).info
    assert np.abs(pixels(made.data).astype(int) - pixels(kept.data)).mean() < 3
    baseline = file(encoded(smooth(photographs), "JPEG"), "baseline.jpg")
    assert stored_picture(baseline, reencode=True).data == baseline.read_bytes()
    turned = file(encoded(smooth(photographs), "JPEG", exif=exif(6)), "turned.jpg")
    assert stored_picture(turned, reencode=True).extension == "jpg"


@pytest.mark.parametrize(
    ("size", "shorter", "expected"),
    [
        ((500, 375), 256, (341, 256)),
        ((375, 500), 256, (256, 341)),
        ((256, 9), 256, (256, 9)),
        ((1, 20000), 64, (1, 20000)),
        ((300, 20000), 3, (3, 200)),
        ((7, 7), None, (7, 7)),
    ],
)
def test_the_shorter_side_decides_the_size(size, shorter, expected):
    assert scaled_size(size, shorter) == expected


def test_a_photograph_with_another_behind_it_is_the_first(file, photographs):
    data = encoded(smooth(photographs), "MPO", save_all=True, append_images=[smooth(photographs).rotate(180)])
    stored = stored_picture(file(data))
    assert (stored.extension, stored.data) == ("jpg", data)
    assert np.array_equal(np.asarray(stored.shown), pixels(data))


def test_a_stack_of_pictures_in_one_file_is_refused_but_not_a_thumbnail(file):
    with pytest.raises(ValueError, match="2 pictures in one TIFF"):
        stored_picture(file(frames("TIFF")))
    data = io.BytesIO()
    RGB.save(data, "TIFF", save_all=True, append_images=[RGB.resize((6, 4))])
    assert stored_picture(file(data.getvalue())).shown.tobytes() == RGB.tobytes()


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="no regular file"):
        stored_picture(tmp_path / "pipe.png")
    with pytest.raises((OSError, ValueError)):
        stored_picture(tmp_path)
    with pytest.raises(FileNotFoundError):
        stored_picture(tmp_path / "nowhere.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd tags
def test_a_damaged_file_is_an_error_that_packing_expects(file):
    draws = np.random.default_rng(0)
    sound = list(FILES.values())
    refused = 0
    for number in range(800):
        data = bytearray(sound[number % len(sound)])
        for place in draws.integers(0, min(len(data), 300), 3):
            data[place] = draws.integers(256)
        path = file(bytes(data))
        try:
            stored_picture(path)
            stored_mask(path, size=SIDES, resize_shorter=None)
        except (OSError, ValueError):
            refused += 1
    assert refused > 100


MASK = (pattern()[..., 0] % 5).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_a_png_of_plain_values_is_kept_byte_for_byte(file, mode):
    values = (MASK > 2).astype(np.uint8) * 255 if mode == "1" else MASK
    picture = Image.fromarray(values).convert("1") if mode == "1" else Image.fromarray(values, mode)
    if mode == "P":
        picture.putpalette([200 - value % 190 for value in range(768)])
    data = encoded(picture, "PNG")
    stored = stored_mask(file(data), size=SIDES, resize_shorter=None)
    assert stored.data == data
    assert stored.values.tolist() == np.bincount(values.ravel(), minlength=256).tolist()
    assert stored.values.dtype == np.int64


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "RGB", "sixteen"])
def test_other_masks_become_grey_pngs_of_the_same_values(file, kind):
    pictures = {
        "RGB": (Image.fromarray(np.stack([MASK] * 3, -1)), "PNG"),
        "sixteen": (Image.fromarray(MASK.astype(np.uint16)), "PNG"),
    }
    picture, format_ = pictures.get(kind, (Image.fromarray(MASK), kind))
    stored = stored_mask(file(encoded(picture, format_)), size=SIDES, resize_shorter=None)
    assert Image.open(io.BytesIO(stored.data)).mode == "L"
    assert np.array_equal(pixels(stored.data), MASK)


def test_a_smaller_mask_has_no_value_that_was_not_there(file):
    path = file(encoded(Image.fromarray(MASK * 50), "PNG"))
    stored = stored_mask(path, size=SIDES, resize_shorter=7)
    assert pixels(stored.data).shape == (7, 10)
    assert set(np.unique(pixels(stored.data))) <= {0, 50, 100, 150, 200}
    assert stored.values.sum() == 70
    assert stored_mask(path, size=SIDES, resize_shorter=16).data == path.read_bytes()


def test_image_and_mask_shrink_alike(file):
    values = np.zeros((160, 240), np.uint8)
    values[40:90, 100:180] = 255
    path = file(encoded(Image.fromarray(values), "PNG"))
    image = stored_picture(path, resize_shorter=50)
    mask = stored_mask(path, size=image.size, resize_shorter=50)
    both = (pixels(image.data) > 127) == (pixels(mask.data) > 127)
    assert pixels(mask.data).shape == (50, 75)
    assert both.mean() > 0.98


def test_a_mask_of_another_size_is_refused_with_both_sizes(file):
    path = file(encoded(Image.fromarray(MASK), "PNG"))
    with pytest.raises(ValueError, match="a mask of 24 x 16 pixels for a picture of 25 x 16"):
        stored_mask(path, size=(25, 16), resize_shorter=None)
    with pytest.raises(ValueError, match="24 x 16 pixels for a picture of 16 x 24"):
        stored_mask(path, size=(16, 24), resize_shorter=None)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_mask_of_a_turned_picture_fits_it_whether_it_was_drawn_before_or_after(file, kind, orientation):
    values = np.zeros((16, 24), np.uint8)
    values[2:7, 3:20] = 255
    values[7:12, 3:6] = 255  # an L: every turn of it is another
    picture = file(encoded(Image.fromarray(values), kind, exif=exif(orientation)), "picture")
    image = stored_picture(picture)
    shown = np.asarray(image.shown) > 127
    before = file(encoded(Image.fromarray(values), "PNG"), "before.png")
    after = file(encoded(Image.fromarray(shown.astype(np.uint8) * 255), "PNG"), "after.png")
    noted = file(encoded(Image.fromarray(values), "PNG", exif=exif(orientation)), "noted.png")
    tiff = file(encoded(Image.fromarray(values), "TIFF", exif=exif(orientation)), "noted.tif")
    for path in (before, after, noted, tiff):
        mask = stored_mask(path, size=image.size, resize_shorter=None, turn=image.turn)
        assert np.array_equal(pixels(mask.data) > 127, shown), path.name
    assert (
        stored_mask(after, size=image.size, resize_shorter=None, turn=image.turn).data == after.read_bytes()
    )
