"""What holds for every transform of the table."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.batch import Pixels
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.fault import UserError
from data_pipeline.masks import IGNORED
from data_pipeline.transforms import FRAMES, TRANSFORMS, cut

# Every transform, so that it always does something; what moves pixels, with the mask.
GEOMETRIC = {
    "resize": {"size": 24},
    "resize_to": {"height": 30, "width": 50},
    "resized_center_crop": {"size": 40, "shorter": 48},
    "random_resized_crop": {"size": 60, "scale": (0.4, 1.0)},
    "center_crop": {"size": 80},
    "random_crop": {"size": 80, "padding": 8},
    "pad": {"padding": 7},
    "random_shift": {"fraction": 0.2},
    "horizontal_flip": {"probability": 1.0},
    "vertical_flip": {"probability": 1.0},
    "quarter_turn": {},
    "rotation": {"degrees": 40.0},
    "affine": {"degrees": 20.0, "translate": (0.1, 0.2), "scale": (0.8, 1.2), "shear": 10.0},
    "elastic": {"alpha": 100.0, "sigma": 4.0},
    "rand_augment": {"operations": 4, "magnitude": 20},
    "trivial_augment": {},
}
PHOTOMETRIC = {
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "random_grayscale": {"probability": 1.0},
    "gaussian_blur": {},
    "sharpness": {"factor": 1.7, "probability": 1.0},
    "posterize": {"bits": 3, "probability": 1.0},
    "solarize": {"threshold": 99.5, "probability": 1.0},
    "invert": {"probability": 1.0},
    "autocontrast": {"probability": 1.0},
    "equalize": {"probability": 1.0},
    "random_erasing": {"probability": 1.0, "fill": "noise"},
}
PARAMETERS = GEOMETRIC | PHOTOMETRIC
KEEP_SIZE = {
    *("random_shift", "horizontal_flip", "vertical_flip", "rotation", "affine", "elastic"),
    *("rand_augment", "trivial_augment", *PHOTOMETRIC),
}
SIZES = st.integers(1, 90)


def draws(number=0):
    return np.random.Generator(bit_stream(3, Purpose.AUGMENTATION, at=(number, 0)))


def random_pixels(height, width, channels=3, classes=4):
    rng = np.random.default_rng(height * 1000 + width)
    image = rng.integers(0, 256, (height, width, channels), np.uint8)
    mask = rng.integers(0, classes, (height, width)).astype(np.uint8) if classes else None
    for array in (image, mask):
        if array is not None:
            array.flags.writeable = False  # whoever writes into what it was given fails
    return Pixels(image, mask)


def same(one, other):
    masks = (one.mask is None) == (other.mask is None)
    return (
        masks
        and np.array_equal(one.image, other.image)
        and (one.mask is None or np.array_equal(one.mask, other.mask))
    )


def test_every_transform_is_tried_here():
    assert set(PARAMETERS) == set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
@settings(max_examples=25)
@given(
    size=st.tuples(SIZES, SIZES, st.sampled_from([1, 3])), masked=st.booleans(), number=st.integers(0, 1000)
)
@example(size=(1, 1, 3), masked=True, number=0)
@example(size=(1, 500, 1), masked=True, number=0)
@example(size=(500, 1, 3), masked=False, number=1)
def test_the_same_draws_give_the_same_pixels_of_a_whole_picture(name, size, masked, number):
    pixels = random_pixels(*size, classes=4 if masked else 0)
    once, again = (TRANSFORMS[name](pixels, draws(number), **PARAMETERS[name]) for _ in range(2))
    assert same(once, again)
    assert once.image.dtype == np.uint8
    assert once.image.ndim == 3
    assert once.image.shape[2] == size[2]
    assert min(once.image.shape) > 0
    if masked:
        assert once.mask.shape == once.image.shape[:2]
        assert once.mask.dtype == np.uint8
        assert set(np.unique(once.mask)) <= {*range(4), IGNORED}
    if name in KEEP_SIZE:
        assert once.image.shape == pixels.image.shape


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_how_many_numbers_are_drawn_does_not_depend_on_what_the_picture_shows(name, channels):
    noisy = random_pixels(50, 70, channels).image
    pictures = [noisy, np.zeros_like(noisy), np.full_like(noisy, 255)]
    for number in range(20):
        generators = [draws(number) for _ in pictures]
        for picture, generator in zip(pictures, generators, strict=True):
            TRANSFORMS[name](Pixels(picture), generator, **PARAMETERS[name])
        assert len({generator.random() for generator in generators}) == 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_mask_changes_nothing_in_its_image(name):
    with_mask = random_pixels(50, 70)
    for number in range(10):
        alone = TRANSFORMS[name](Pixels(with_mask.image), draws(number), **PARAMETERS[name])
        both = TRANSFORMS[name](with_mask, draws(number), **PARAMETERS[name])
        assert alone.mask is None
        assert np.array_equal(alone.image, both.image)


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_what_changes_only_colours_leaves_the_mask_as_it_is(name):
    noisy = random_pixels(50, 70)
    pixels = noisy._replace(image=noisy.image // 2)
    changed = TRANSFORMS[name](pixels, draws(1), **PARAMETERS[name])
    assert changed.mask is pixels.mask
    assert not np.array_equal(changed.image, pixels.image)


def disc(height=96, width=128):
    """A bright disc and its mask, with soft edges as a camera makes them."""
    big = np.zeros((height * 8, width * 8), np.uint8)
    cv2.circle(big, (width * 8 * 5 // 9, height * 8 * 4 // 9), 200, 255, -1)
    image = cv2.resize(big, (width, height), interpolation=cv2.INTER_AREA)
    return Pixels(np.dstack([image] * 3), (image > 127).astype(np.uint8))


def centre_of(weights):
    rows, columns = np.indices(weights.shape)
    return np.array([(rows * weights).sum(), (columns * weights).sum()]) / weights.sum()


@pytest.mark.parametrize("name", sorted(GEOMETRIC.keys() - {"rand_augment", "trivial_augment"}))
def test_image_and_mask_move_together_to_a_fraction_of_a_pixel(name):
    offsets = []
    for number in range(60):
        pixels = TRANSFORMS[name](disc(), draws(number), **PARAMETERS[name])
        inside = pixels.mask == 1
        assert inside.sum() > 20
        bright = pixels.image[..., 0] / 255.0
        assert np.abs((bright > 0.5) & (pixels.mask != IGNORED) ^ inside).sum() <= 0.03 * inside.sum() + 4
        offsets.append(centre_of(bright) - centre_of(inside))
    # The nearest pixel of a picture twice as large is half a pixel of it away, always to the same side.
    assert np.abs(np.mean(offsets, axis=0)).max() < (0.25 if name in FRAMES else 0.06)
    assert np.abs(offsets).max() < 0.4


@pytest.mark.parametrize("name", ["rotation", "affine", "elastic", "random_crop", "pad", "rand_augment"])
def test_what_comes_in_from_outside_is_ignored_in_the_mask_unless_a_class_is_named(name):
    white = Pixels(np.full((60, 60, 3), 200, np.uint8), np.ones((60, 60), np.uint8))
    strong = {**PARAMETERS[name], **({"alpha": 1000.0} if name == "elastic" else {})}
    ignored = filled = 0
    for number in range(10):
        plain = TRANSFORMS[name](white, draws(number), **strong)
        assert set(np.unique(plain.mask)) <= {1, IGNORED}
        named = TRANSFORMS[name](white, draws(number), **strong, fill=200, mask_fill=3)
        assert set(np.unique(named.mask)) <= {1, 3}
        assert np.array_equal(plain.mask == IGNORED, named.mask == 3)
        if name != "rand_augment":
            assert (named.image == 200).all()
            assert (plain.image[plain.mask == IGNORED] < 200).all()
        ignored += (plain.mask == IGNORED).sum()
        filled += (named.mask == 3).sum()
    assert ignored == filled > 0


def refusal(name, pixels, number):
    """What a transform says where it takes a picture, checked, or does not."""
    try:
        result = TRANSFORMS[name](pixels, draws(number), **PARAMETERS[name])
    except UserError as error:
        return error
    assert result.mask.shape == result.image.shape[:2]
    assert result.image.shape[2] == pixels.image.shape[2]
    return None


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_shape_pass(name, shape, channels):
    pixels = random_pixels(*shape, channels)
    assert [refusal(name, pixels, number) for number in range(3)] == [None] * 3


@pytest.mark.parametrize("name", TRANSFORMS)
def test_sides_that_cv2_cannot_count_pass_or_are_refused_in_words(name):
    pixels = random_pixels(1, 70_000)
    policies = {"rand_augment", "trivial_augment"}
    numbers = range(30) if name in policies else [0]
    refused = [error for number in numbers if (error := refusal(name, pixels, number))]
    assert bool(refused) == (name in {"rotation", "affine", "elastic"} | policies)
    assert all(error.code == "DATA" and "1 x 70000 pixels" in error.what for error in refused)


def test_threads_give_what_one_thread_gives():
    def everything(number):
        pixels = random_pixels(64, 80)
        for name in TRANSFORMS:
            pixels = TRANSFORMS[name](pixels, draws(number), **PARAMETERS[name])
        return pixels

    alone = [everything(number) for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(everything, range(12)))
    assert all(same(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_is_asked_for_first_cuts_what_the_transform_cuts(name):
    pixels = random_pixels(61, 83)
    for number in range(20):
        frame = FRAMES[name](61, 83, draws(number), **PARAMETERS[name])
        assert same(cut(pixels, frame), TRANSFORMS[name](pixels, draws(number), **PARAMETERS[name]))
