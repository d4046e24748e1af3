import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline import framing
from data_pipeline.batch import RawSample
from data_pipeline.decode import decode_reduced
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.framing import Opener
from data_pipeline.index import DatasetIndex

RESIZED_CROP = ("random_resized_crop", {"size": 64, "scale": (0.3, 1.0)})


def dataset(task="multiclass", mask_values=()):
    return DatasetIndex(task, ("a", "b"), "RGB", (0.5,) * 3, (0.2,) * 3, {}, mask_values=mask_values)


def draws(number=0):
    return np.random.Generator(bit_stream(0, Purpose.AUGMENTATION, at=(number, 0)))


def encoded(image, kind):
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(
        content, kind, **({"quality": 95} if kind == "JPEG" else {})
    )
    return content.getvalue()


def raw(image, mask=None):
    return RawSample(0, "key", image, mask, None if mask else 0, "a.tar", 512)


@pytest.fixture
def decoded(monkeypatch):
    """The height of each picture as it was decoded."""
    heights = []

    def noted(*words, **options):
        found = decode_reduced(*words, **options)
        heights.append(found.image.shape[0])
        return found

    monkeypatch.setattr(framing, "decode_reduced", noted)
    return heights


def test_a_jpeg_that_is_cut_small_is_decoded_small_and_looks_the_same(photographs, decoded):
    image = np.tile(photographs["coffee"], (2, 2, 1))  # 800 x 1200
    whole, reduced = Opener(dataset(), RESIZED_CROP), Opener(dataset(), RESIZED_CROP)
    for number in range(20):
        same = whole(raw(encoded(image, "PNG")), draws(number)).image
        seen = reduced(raw(encoded(image, "JPEG")), draws(number)).image
        assert seen.shape == (64, 64, 3)
        # Not the same pixels (JPEG, and a rectangle in larger pixels), but the same picture.
        assert np.abs(seen.astype(int) - same.astype(int)).mean() < 12
    assert set(decoded[1::2]) <= {100, 200, 400, 800}
    assert min(decoded[1::2]) < 800
    assert set(decoded[::2]) == {800}


def test_a_jpeg_that_must_be_seen_in_full_is_decoded_in_full(photographs, decoded):
    image = encoded(photographs["coffee"], "JPEG")
    Opener(dataset(), ("random_resized_crop", {"size": 224}))(raw(image), draws())
    Opener(dataset(), ("resize", {"size": 201}))(raw(image), draws())
    Opener(dataset(), ("horizontal_flip", {}))(raw(image), draws())
    Opener(dataset(), None)(raw(image), draws())
    assert decoded == [400] * 4
    Opener(dataset(), ("resize", {"size": 200}))(raw(image), draws())
    assert decoded[-1] == 200


def test_the_draws_go_on_alike_whatever_the_decoder(photographs):
    """What comes after the first transform must not depend on who decoded, nor on a second try."""
    left = []
    cmyk = io.BytesIO()
    Image.fromarray(photographs["coffee"]).convert("CMYK").save(cmyk, "JPEG")
    for content in (
        encoded(photographs["coffee"], "JPEG"),
        encoded(photographs["coffee"], "PNG"),
        cmyk.getvalue(),
    ):
        generator = draws()
        Opener(dataset(), RESIZED_CROP)(raw(content), generator)
        left.append(generator.random())
    assert len(set(left)) == 1


def test_image_and_mask_are_cut_alike(photographs):
    image = photographs["coffee"]
    mask = np.where(image[:, :, 0] > 100, 255, 0).astype(np.uint8)
    opener = Opener(dataset("segmentation", (0, 255)), RESIZED_CROP)
    pixels = opener(raw(encoded(image, "PNG"), encoded(mask, "PNG")), draws())
    assert pixels.mask.shape == (64, 64)
    assert set(np.unique(pixels.mask)) == {0, 1}
    assert ((pixels.image[:, :, 0] > 100) == pixels.mask).mean() > 0.85


@pytest.mark.parametrize(
    ("mask", "fault"),
    [
        (np.zeros((4, 5), np.uint8), "the image has 400 x 600 pixels, its mask 4 x 5"),
        (np.full((400, 600), 7, np.uint8), "a mask with the value 7, allowed are 0, 255"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(photographs, mask, fault):
    opener = Opener(dataset("segmentation", (0, 255)), RESIZED_CROP)
    with pytest.raises(ValueError, match=fault):
        opener(raw(encoded(photographs["coffee"], "PNG"), encoded(mask, "PNG")), draws())


@pytest.mark.parametrize(
    "label", [2, -1, np.array([1, 2], np.int8), np.array([-128, 0], np.int8), np.array([1], np.int8)]
)
def test_a_label_that_is_none_is_refused_before_training_meets_it(photographs, label):
    sample = raw(encoded(photographs["coffee"], "JPEG"))._replace(label=label)
    with pytest.raises(ValueError, match=r"the label .*, allowed are"):
        Opener(dataset(), RESIZED_CROP)(sample, draws())


@pytest.mark.parametrize("label", [0, 1, np.array([1, -1], np.int8)])
def test_a_label_that_is_one_is_let_through(photographs, label):
    sample = raw(encoded(photographs["coffee"], "JPEG"))._replace(label=label)
    assert Opener(dataset(), RESIZED_CROP)(sample, draws()).image.shape == (64, 64, 3)
