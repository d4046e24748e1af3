import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from data_pipeline import tones
from data_pipeline.batch import Pixels
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.policies import (
    OPERATIONS,
    RAND_AUGMENT,
    STRENGTHS,
    TRIVIAL_AUGMENT,
    Choice,
    operate,
    rand_augment,
    trivial_augment,
)
from data_pipeline.transforms import TRANSFORMS

# (ours, torchvision's, how many grey levels apart, at most): theirs cuts decimals off where cv2 rounds.
SAME = {
    "brightness": (tones.brightness, functional.adjust_brightness, 1),
    "contrast": (tones.contrast, functional.adjust_contrast, 2),
    "saturation": (tones.saturation, functional.adjust_saturation, 2),
    "sharpness": (tones.sharpness, functional.adjust_sharpness, 2),
}
PLAIN = {
    "grey": (tones.grey, lambda image: functional.rgb_to_grayscale(image, image.shape[0]), 1),
    "invert": (tones.invert, functional.invert, 0),
    "autocontrast": (tones.autocontrast, functional.autocontrast, 0),
    "equalize": (tones.equalize, functional.equalize, 0),
}


def draws(number=0):
    return np.random.Generator(bit_stream(3, Purpose.AUGMENTATION, at=(number, 0)))


def tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def furthest(image, reference):
    return np.abs(image.astype(int) - reference.permute(1, 2, 0).numpy().astype(int)).max()


@pytest.fixture(params=["photograph", "noise", "flat", "grey", "narrow"])
def image(request, photographs):
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    return {
        "photograph": photographs["coffee"][100:220, 200:360],
        "noise": noise,
        "flat": np.full((9, 7, 3), 77, np.uint8),
        "grey": photographs["cat"][:120, 100:240, 1:2],
        "narrow": noise[:1] // 3 + 40,
    }[request.param]


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("factor", [0.0, 0.3, 0.9, 1.0, 1.1, 1.99, 4.0])
def test_changes_by_a_factor_are_torchvisions(image, name, factor):
    ours, theirs, apart = SAME[name]
    apart += max(0, factor - 2)  # the mean and the grey are rounded before they are multiplied
    assert furthest(ours(image, factor), theirs(tensor(image), factor)) <= apart


@pytest.mark.parametrize("name", PLAIN)
def test_changes_without_a_factor_are_torchvisions(image, name):
    ours, theirs, apart = PLAIN[name]
    assert furthest(ours(image), theirs(tensor(image))) <= apart


@pytest.mark.parametrize("turn", [-0.5, -0.21, 0.0, 0.03, 0.4, 0.5])
def test_hues_are_torchvisions(image, turn):
    assert furthest(tones.hue(image, turn), functional.adjust_hue(tensor(image), turn)) <= 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_is_torchvisions(image, bits):
    assert furthest(tones.posterize(image, bits), functional.posterize(tensor(image), bits)) == 0


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 127.9, 128.0, 254.2, 255.0])
def test_solarize_is_torchvisions(image, threshold):
    assert furthest(tones.solarize(image, threshold), functional.solarize(tensor(image), threshold)) == 0


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 3.3])
def test_a_blur_is_torchvisions(image, sigma):
    taps = 2 * round(3 * sigma) + 1
    if min(image.shape[:2]) <= taps // 2:
        return  # torchvision refuses these
    reference = functional.gaussian_blur(tensor(image), [taps, taps], [sigma, sigma])
    assert furthest(tones.blurred(image, sigma), reference) <= 1


def test_jitter_draws_its_factors_evenly_and_its_order_at_random():
    flat = Pixels(np.full((2, 2, 3), 100, np.uint8))
    jitter = TRANSFORMS["color_jitter"]
    factors = [jitter(flat, draws(n), brightness=0.4).image[0, 0, 0] / 100 for n in range(1000)]
    assert np.abs(np.quantile(factors, [0, 0.25, 0.5, 0.75, 1]) - [0.6, 0.8, 1, 1.2, 1.4]).max() < 0.03
    ends = [jitter(flat, draws(n), brightness=(0.5, 0.7)).image[0, 0, 0] for n in range(200)]
    assert (min(ends), max(ends)) == (50, 70)
    assert min(jitter(flat, draws(n), brightness=3.0).image.min() for n in range(50)) == 0
    # Brightness before contrast, or after it: darkening halves the contrast's distance from the mean as well.
    two = Pixels(np.array([[[0], [200]]], np.uint8))
    results = {
        tuple(jitter(two, draws(n), brightness=(2.0, 2.0), contrast=(0.5, 0.5)).image.ravel())
        for n in range(50)
    }
    assert results == {(64, 191), (100, 255)}


def test_jitter_is_torchvisions_in_the_same_order(photographs):
    image = photographs["flower"][:100, :120]
    amounts = {"brightness": 1.2, "contrast": 0.7, "saturation": 1.4, "hue": 0.1}
    apply = {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
        "saturation": functional.adjust_saturation,
        "hue": functional.adjust_hue,
    }
    for number in range(10):
        ours = TRANSFORMS["color_jitter"](
            Pixels(image), draws(number), **{name: (amount, amount) for name, amount in amounts.items()}
        ).image
        generator = draws(number)
        generator.random(5)  # whether, and four amounts
        reference = tensor(image)
        for at in np.argsort(generator.random(4)):
            name = list(amounts)[at]
            reference = apply[name](reference, amounts[name])
        difference = np.abs(ours.astype(int) - reference.permute(1, 2, 0).numpy())
        assert difference.mean() < 2.5
        assert difference.max() <= 8  # four times cut off against four times rounded


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("random_grayscale", {}), ("invert", {}), ("solarize", {"threshold": 10.0}), ("equalize", {})],
)
def test_changes_happen_as_often_as_asked(name, parameters, photographs):
    image = photographs["coffee"][:20, :20]
    for probability in (0.0, 0.3, 1.0):
        done = [
            not np.array_equal(
                TRANSFORMS[name](Pixels(image), draws(n), probability=probability, **parameters).image, image
            )
            for n in range(300)
        ]
        assert np.mean(done) == pytest.approx(probability, abs=0.08 if probability == 0.3 else 0)


@pytest.mark.parametrize("fill", ["zero", "mean", "noise"])
@pytest.mark.parametrize("channels", [1, 3])
def test_erasing_fills_one_rectangle(fill, channels):
    image = np.full((40, 50, channels), 7, np.uint8)
    image[:, ::2] = 9
    mask = np.ones((40, 50), np.uint8)
    erased = TRANSFORMS["random_erasing"](Pixels(image, mask), draws(4), probability=1.0, fill=fill)
    assert erased.mask is mask
    changed = (erased.image != image).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    inside = erased.image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert changed.sum() > 20
    if fill == "noise":
        assert len(np.unique(inside)) > 10
    else:
        assert (inside == {"zero": 0, "mean": 8}[fill]).all()


def test_a_rectangle_that_fits_nowhere_is_not_erased():
    white = Pixels(np.full((40, 50, 3), 255, np.uint8))
    for number in range(20):
        erase = TRANSFORMS["random_erasing"]
        tall = erase(white, draws(number), probability=1.0, scale=(0.6, 0.9), ratio=(3.0, 4.0))
        assert tall is white


def test_erased_rectangles_are_distributed_as_torchvisions():
    white = Pixels(np.full((80, 100, 1), 255, np.uint8))
    theirs = v2.RandomErasing(p=1.0, scale=(0.05, 0.3), ratio=(0.5, 2.0))
    torch.manual_seed(0)
    ours, reference = [], []
    for number in range(1000):
        erased = TRANSFORMS["random_erasing"](
            white, draws(number), probability=1.0, scale=(0.05, 0.3), ratio=(0.5, 2.0)
        ).image[..., 0]
        rows, columns = np.flatnonzero((erased == 0).any(axis=1)), np.flatnonzero((erased == 0).any(axis=0))
        ours.append([rows[0], columns[0], len(rows), len(columns)])
        drawn = theirs.make_params([torch.empty(1, 80, 100)])
        reference.append([drawn[key] for key in "ijhw"])
    for share in (0.1, 0.5, 0.9):
        difference = np.quantile(ours, share, axis=0) - np.quantile(reference, share, axis=0)
        assert np.abs(difference).max() <= 7


THEIRS = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("reach", "theirs"),
    [(RAND_AUGMENT, v2.RandAugment()), (TRIVIAL_AUGMENT, v2.TrivialAugmentWide())],
    ids=["rand", "trivial"],
)
def test_every_operation_of_a_policy_is_torchvisions_at_every_strength(name, reach, theirs, photographs):
    image = photographs["astronaut"][20:140, 150:310]
    space = theirs._AUGMENTATION_SPACE
    assert {THEIRS[one] for one in OPERATIONS} == set(space)
    magnitudes, signed = space[THEIRS[name]]
    for strength in (0, 1, 9, 17, 30):
        for sign in (1, -1):
            table = magnitudes(STRENGTHS, *image.shape[:2])
            magnitude = 0.0 if table is None else float(table[strength]) * (sign if signed else 1)
            reference = theirs._apply_image_or_video_transform(
                tensor(image),
                THEIRS[name],
                magnitude,
                InterpolationMode.BILINEAR,
                {torch.Tensor: None, "others": None},
            )
            ours = operate(Pixels(image), Choice(name, sign * strength / 30), reach).image
            assert furthest(ours, reference) <= 2, (strength, sign)


def test_policies_choose_every_operation_and_every_direction():
    ramp = Pixels(np.add.outer(np.arange(40) * 3, np.arange(40) * 2)[..., None].repeat(3, 2).astype(np.uint8))
    # Each operation alone, both ways, makes so many different pictures of this one:
    single = {
        operate(ramp, Choice(name, sign * 9 / 30), RAND_AUGMENT).image.tobytes()
        for name in OPERATIONS
        for sign in (1, -1)
    }
    found = {rand_augment(ramp, draws(n), operations=1).image.tobytes() for n in range(400)}
    assert found == single
    assert len(single) > 15
    wide = {trivial_augment(ramp, draws(n)).image.tobytes() for n in range(600)}
    assert len(wide) > 150


def test_two_operations_are_one_after_the_other(photographs):
    image = Pixels(photographs["cat"][:60, :60])
    for number in range(20):
        generator = draws(number)
        first = rand_augment(image, generator, operations=1, magnitude=12)
        second = rand_augment(first, generator, operations=1, magnitude=12)
        both = rand_augment(image, draws(number), operations=2, magnitude=12)
        assert np.array_equal(second.image, both.image)
    assert rand_augment(image, draws(), operations=0) is image
