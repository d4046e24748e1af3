import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.transforms import (
    TRANSFORMS,
    center_crop,
    horizontal_flip,
    random_resized_crop,
    random_shift,
    resize,
)

PARAMETERS = {
    "resize": {"size": 24},
    "center_crop": {"size": 24},
    "random_shift": {"fraction": 0.2},
    "random_resized_crop": {"size": 24},
    "horizontal_flip": {},
}
SIZES = st.integers(1, 90)


def draws(number=0):
    return np.random.Generator(bit_stream(3, Purpose.AUGMENTATION, at=(number, 0)))


def noise(height, width, channels=3):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)


def test_every_transform_is_tried_here():
    assert set(PARAMETERS) == set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
@given(height=SIZES, width=SIZES, channels=st.sampled_from([1, 3]), number=st.integers(0, 1000))
@example(height=1, width=1, channels=3, number=0)
@example(height=1, width=500, channels=1, number=0)
@example(height=500, width=1, channels=3, number=1)
def test_the_same_draws_give_the_same_pixels_and_the_input_stays_as_it_was(
    name, height, width, channels, number
):
    image = noise(height, width, channels)
    before = image.copy()
    once, again = (TRANSFORMS[name](image, draws(number), **PARAMETERS[name]) for _ in range(2))
    assert np.array_equal(once, again)
    assert np.array_equal(image, before)
    assert once.dtype == np.uint8
    assert once.shape[2] == channels
    assert min(once.shape) > 0


@given(height=SIZES, width=SIZES, size=st.integers(1, 64), number=st.integers(0, 1000))
@example(height=1, width=500, size=64, number=0)
def test_crops_have_the_size_that_was_asked_for(height, width, size, number):
    image = noise(height, width)
    assert center_crop(image, draws(number), size=size).shape == (size, size, 3)
    assert random_resized_crop(image, draws(number), size=size).shape == (size, size, 3)


@given(height=SIZES, width=SIZES, size=st.integers(1, 64))
@example(height=1, width=500, size=3)
def test_resize_gives_the_shorter_side_its_size_and_keeps_the_aspect(height, width, size):
    shape = resize(noise(height, width), draws(), size=size).shape
    assert min(shape[:2]) == size
    longer = max(height, width) * size / min(height, width)
    assert abs(max(shape[:2]) - longer) <= 0.5 + 1e-9


def test_a_center_crop_takes_the_middle_and_pads_what_is_missing():
    image = noise(30, 40)
    assert np.array_equal(center_crop(image, draws(), size=20), image[5:25, 10:30])
    padded = center_crop(image, draws(), size=50)
    assert np.array_equal(padded[10:40, 5:45], image)
    assert padded.sum() == image.sum()


def test_a_shift_moves_whole_pixels_and_reaches_both_ways():
    image = noise(20, 20)
    moves = set()
    for number in range(200):
        shifted = random_shift(image, draws(number), fraction=0.1)
        (move,) = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if np.array_equal(shifted[4:-4, 4:-4], image[4 + y : 16 + y, 4 + x : 16 + x])
        ]
        moves.add(move)
    assert len(moves) == 25


def test_a_flip_happens_as_often_as_asked():
    image = noise(8, 9)
    flipped = [np.array_equal(horizontal_flip(image, draws(n)), image[:, ::-1]) for n in range(400)]
    assert 150 < sum(flipped) < 250
    assert np.array_equal(horizontal_flip(image, draws(), probability=0.0), image)
    assert np.array_equal(horizontal_flip(image, draws(), probability=1.0), image[:, ::-1])


def test_a_random_crop_stays_within_the_asked_shares_of_the_area():
    rows, columns = np.mgrid[0:64, 0:64].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=2)  # each pixel says where it came from
    sides = []
    for number in range(200):
        crop = random_resized_crop(image, draws(number), size=64, scale=(0.25, 0.5)).astype(int)
        sides.append((np.ptp(crop[..., 0]) + 1, np.ptp(crop[..., 1]) + 1))
    areas = np.prod(sides, axis=1) / 64**2
    assert 0.2 < areas.min() < areas.max() < 0.55
    assert areas.max() - areas.min() > 0.15
    aspects = np.array(sides)[:, 1] / np.array(sides)[:, 0]
    assert 0.65 < aspects.min() < 0.9
    assert 1.1 < aspects.max() < 1.5


def test_making_smaller_is_antialiased_as_pillow_does_it(photographs):
    image = photographs["coffee"]
    ours = resize(image, draws(), size=50).astype(int)
    theirs = Image.fromarray(image).resize(ours.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(ours - np.asarray(theirs)).mean() < 1
    checkers = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (64, 64))[:, :, None]
    assert np.ptp(resize(checkers, draws(), size=32)) <= 1
