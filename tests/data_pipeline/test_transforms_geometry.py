import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from data_pipeline.batch import Pixels
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.masks import IGNORED
from data_pipeline.transforms import TRANSFORMS
from data_pipeline.warps import displaced, turn, warped

SIZES = st.integers(1, 90)
LINEAR = InterpolationMode.BILINEAR


def draws(number=0):
    return np.random.Generator(bit_stream(3, Purpose.AUGMENTATION, at=(number, 0)))


def noise(height, width, channels=3):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)


def applied(name, image, number=0, **parameters):
    return TRANSFORMS[name](Pixels(image), draws(number), **parameters).image


def tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def furthest(image, reference):
    return np.abs(image.astype(int) - reference.permute(1, 2, 0).numpy().astype(int)).max()


def test_a_center_crop_takes_the_middle_and_pads_what_is_missing():
    image = noise(30, 40)
    assert np.array_equal(applied("center_crop", image, size=20), image[5:25, 10:30])
    padded = applied("center_crop", image, size=50)
    assert np.array_equal(padded[10:40, 5:45], image)
    assert padded.sum() == image.sum()


def test_a_shift_moves_whole_pixels_and_reaches_both_ways():
    image = noise(20, 20)
    moves = set()
    for number in range(200):
        shifted = applied("random_shift", image, number, fraction=0.1)
        (move,) = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if np.array_equal(shifted[4:-4, 4:-4], image[4 + y : 16 + y, 4 + x : 16 + x])
        ]
        moves.add(move)
    assert len(moves) == 25


@given(height=SIZES, width=SIZES, fraction=st.floats(0, 1), number=st.integers(0, 1000))
@example(height=5, width=7, fraction=1.0, number=2)
def test_what_a_shift_moves_in_repeats_the_border_and_is_ignored(height, width, fraction, number):
    image, mask = noise(height, width), noise(height, width, 1)[..., 0] // 2
    shifted = TRANSFORMS["random_shift"](Pixels(image, mask), draws(number), fraction=fraction)
    generator = draws(number)
    reach = int(height * fraction), int(width * fraction)
    top, left = (int(generator.random() * (2 * one + 1)) for one in reach)
    around = ((reach[0], reach[0]), (reach[1], reach[1]))
    window = np.s_[top : top + height, left : left + width]
    assert np.array_equal(shifted.image, np.pad(image, (*around, (0, 0)), mode="edge")[window])
    assert np.array_equal(shifted.mask, np.pad(mask, around, constant_values=IGNORED)[window])


@pytest.mark.parametrize(("name", "axis"), [("horizontal_flip", 1), ("vertical_flip", 0)])
def test_a_flip_happens_as_often_as_asked(name, axis):
    image = noise(8, 9)
    mirrored = np.flip(image, axis)
    flipped = [np.array_equal(applied(name, image, number), mirrored) for number in range(400)]
    assert 150 < sum(flipped) < 250
    assert np.array_equal(applied(name, image, probability=0.0), image)
    certain = applied(name, image, probability=1.0)
    assert np.array_equal(certain, mirrored)
    assert certain.flags.c_contiguous


def test_quarter_turns_are_all_four_and_equally_likely():
    image = noise(8, 9)
    turned = [np.rot90(image, turns) for turns in range(4)]
    found = []
    for number in range(400):
        result = applied("quarter_turn", image, number)
        found += [turns for turns in range(4) if np.array_equal(result, turned[turns])]
    assert len(found) == 400
    assert min(np.bincount(found, minlength=4)) > 70


@given(
    height=SIZES,
    width=SIZES,
    size=st.integers(1, 60),
    padding=st.integers(0, 20),
    number=st.integers(0, 1000),
)
def test_a_random_crop_shows_the_picture_and_the_border_around_it(height, width, size, padding, number):
    image = np.maximum(noise(height, width), 1)
    mask = np.zeros((height, width), np.uint8)
    cropped = TRANSFORMS["random_crop"](Pixels(image, mask), draws(number), size=size, padding=padding)
    assert cropped.image.shape == (size, size, 3)
    shown = cropped.mask == 0
    assert np.array_equal(shown, cropped.image[..., 0] > 0)
    rows, columns = shown.any(axis=1).sum(), shown.any(axis=0).sum()
    assert shown.sum() == rows * columns
    assert rows >= min(height, size - padding)
    assert columns >= min(width, size - padding)


def test_random_crops_are_everywhere():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    corners = {applied("random_crop", image, number, size=6)[0, 0, 0] for number in range(200)}
    assert corners == set(image[:3, :3].ravel())
    small = {
        tuple(np.argwhere(applied("random_crop", image, n, size=10)[..., 0] == 1)[0]) for n in range(200)
    }
    assert small == {(y, x) for y in range(3) for x in range(3)}


def test_a_border_is_added_on_all_sides():
    padded = TRANSFORMS["pad"](Pixels(noise(5, 6), noise(5, 6, 1)[..., 0]), draws(), padding=3, fill=9)
    assert np.array_equal(padded.image, np.pad(noise(5, 6), ((3, 3), (3, 3), (0, 0)), constant_values=9))
    assert np.array_equal(padded.mask, np.pad(noise(5, 6, 1)[..., 0], 3, constant_values=IGNORED))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("angle", [10, -37.5, 90, 135, 180])
def test_a_rotation_is_torchvisions(photographs, angle, channels):
    image = photographs["cat"][:150, :201, :channels]
    ours = TRANSFORMS["rotation"](Pixels(image), draws(), degrees=(angle, angle)).image
    assert furthest(ours, functional.rotate(tensor(image), angle, LINEAR)) <= 1


@pytest.mark.parametrize(
    ("angle", "translate", "scale", "shear"),
    [
        (0, (0, 0), 1.0, 0),
        (20, (0, 0), 1.0, 0),
        (0, (13, -7), 1.0, 0),
        (-33, (5, 9), 1.3, 17),
        (8, (0, 3), 0.7, -9),
    ],
)
def test_an_affine_change_is_torchvisions(photographs, angle, translate, scale, shear):
    image = photographs["cat"][:150, :201]

    def exactly(*numbers):
        """Draws that make `between` give these."""
        fixed = iter(numbers)
        return type("Fixed", (), {"random": lambda _self: next(fixed)})()

    shares = tuple(abs(move) / side for move, side in zip(translate, (201, 150), strict=True))
    ends = [1.0 if move > 0 else 0.0 for move in translate]
    ours = TRANSFORMS["affine"](
        Pixels(image),
        exactly(0.0, 0.5, *ends, 0.5, 0.5),
        degrees=(angle, angle),
        translate=shares,
        scale=(scale, scale),
        shear=(shear, shear),
    ).image
    theirs = functional.affine(tensor(image), angle, list(translate), scale, [shear, 0.0], LINEAR)
    assert furthest(ours, theirs) <= 1


def test_angles_are_drawn_evenly_from_the_range(photographs):
    ramp = np.zeros((101, 101, 1), np.uint8)
    ramp[:50, 50] = 255  # a hand that points up
    angles = []
    for number in range(300):
        turned = applied("rotation", ramp, number, degrees=60.0)
        rows, columns = np.nonzero(turned[..., 0] > 60)
        angles.append(np.degrees(np.arctan2(50 - columns.mean(), 50 - rows.mean())))
    assert np.abs(np.quantile(angles, [0.0, 0.25, 0.5, 0.75, 1.0]) - [-60, -30, 0, 30, 60]).max() < 8


def test_displaced_pixels_are_torchvisions_elastic(photographs):
    image = photographs["cat"][:120, :160]
    moves = np.random.default_rng(0).normal(0, 4, (120, 160, 2)).astype(np.float32)
    rows, columns = np.indices((120, 160), np.float32)
    ours = displaced(Pixels(image), moves + np.dstack([columns, rows])).image
    shares = torch.from_numpy(moves / np.array([80, 60], np.float32))[None]
    found = np.abs(
        ours.astype(int) - functional.elastic(tensor(image), shares, LINEAR).permute(1, 2, 0).numpy()
    )
    assert np.quantile(found, 0.99) <= 2
    assert found.max() <= 6  # cv2 reads at multiples of 1/32 pixel


def elastic_moves(number, **parameters):
    """How far to the right the pixels of the middle were read, float [R, 55]."""
    columns = np.broadcast_to(np.arange(255, dtype=np.uint8)[None, :, None], (400, 255, 1))
    moved = applied("elastic", columns, number, **parameters)[..., 0].astype(float) - np.arange(255)
    return moved[60:340, 100:155]  # so far from the edges that none of them is reached


@pytest.mark.parametrize("sigma", [1.0, 3.0, 4.0, 5.0, 10.0, 23.0])
def test_an_elastic_field_is_noise_under_a_gaussian(sigma):
    alpha = 40 * sigma
    # White noise of variance 1/3 keeps 1 / (4 pi sigma^2) of it, and neighbours are so much alike:
    variance = (alpha / 2) ** 2 / 3 / (4 * np.pi * sigma**2)
    alike = np.exp(-1 / (4 * sigma**2))
    ours = np.array([elastic_moves(number, alpha=alpha, sigma=sigma) for number in range(16)])
    assert ours.var() == pytest.approx(variance, rel=0.25)
    rounding = 1 / 12
    apart = np.diff(ours, axis=2).var()
    if sigma <= 10:  # beyond, neighbours are mostly rounded to the same
        assert apart == pytest.approx(2 * variance * (1 - alike) + 2 * rounding, rel=0.2)
    assert abs(ours.mean()) < 0.3 * variance**0.5


def test_an_elastic_field_is_as_strong_as_torchvisions():
    torch.manual_seed(0)
    theirs = v2.ElasticTransform(alpha=200.0, sigma=5.0)
    drawn = [theirs.make_params([torch.empty(1, 100, 255)])["displacement"] for _ in range(4)]
    expected = np.array([one[0, ..., 0].numpy() for one in drawn]) * 255 / 2
    ours = np.array([elastic_moves(number, alpha=200.0, sigma=5.0) for number in range(8)])
    assert ours.std() == pytest.approx(expected.std(), rel=0.1)


def test_turning_there_and_back_gives_the_picture_again(photographs):
    smooth = Pixels(TRANSFORMS["gaussian_blur"](Pixels(photographs["cat"]), draws(), sigma=(3.0, 3.0)).image)
    back = warped(warped(smooth, turn(25)), turn(-25)).image
    middle = np.s_[120:180, 190:260]
    assert np.abs(back[middle].astype(int) - smooth.image[middle]).max() <= 3
