import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from data_pipeline.batch import Pixels
from data_pipeline.draws import Purpose, bit_stream
from data_pipeline.fault import UserError
from data_pipeline.transforms import FRAMES, TRANSFORMS, Frame, cut

SIZES = st.integers(1, 90)


def draws(number=0):
    return np.random.Generator(bit_stream(3, Purpose.AUGMENTATION, at=(number, 0)))


def noise(height, width, channels=3):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)


def applied(name, image, number=0, **parameters):
    return TRANSFORMS[name](Pixels(image), draws(number), **parameters).image


@given(height=SIZES, width=SIZES, size=st.integers(1, 64), number=st.integers(0, 1000))
@example(height=1, width=500, size=64, number=0)
def test_crops_have_the_size_that_was_asked_for(height, width, size, number):
    image = noise(height, width)
    shape = (size, size, 3)
    assert applied("random_resized_crop", image, number, size=size).shape == shape
    assert applied("resized_center_crop", image, number, size=size, shorter=size + 7).shape == shape
    assert applied("resize_to", image, number, height=size, width=9).shape == (size, 9, 3)


@given(height=SIZES, width=SIZES, size=st.integers(1, 64))
@example(height=1, width=500, size=3)
def test_resize_gives_the_shorter_side_its_size_and_keeps_the_aspect(height, width, size):
    shape = applied("resize", noise(height, width), size=size).shape
    assert min(shape[:2]) == size
    longer = max(height, width) * size / min(height, width)
    assert abs(max(shape[:2]) - longer) <= 0.5 + 1e-9


def test_a_resize_that_would_fill_the_memory_is_refused():
    with pytest.raises(UserError, match="224 x 4480000 pixels of a picture of 1 x 20000") as refused:
        FRAMES["resize"](1, 20_000, draws(), size=224)
    assert refused.value.code == "DATA"


@given(height=SIZES, width=SIZES, size=st.integers(1, 64), spare=st.integers(0, 30))
def test_a_resized_center_crop_is_the_centre_of_the_resized_picture(height, width, size, spare):
    shorter = size + spare
    frame = FRAMES["resized_center_crop"](height, width, draws(), size=size, shorter=shorter)
    side = size * min(height, width) / shorter
    for first, length, whole in ((frame.top, frame.height, height), (frame.left, frame.width, width)):
        assert 0 <= first < first + length <= whole
        assert abs(first - (whole - side) / 2) <= 0.5 + 1e-9 or length == 1
        assert abs(first + length - (whole + side) / 2) <= 0.5 + 1e-9 or length == 1


def test_a_resized_center_crop_looks_like_torchvisions_two_steps(photographs):
    photograph = photographs["coffee"]
    usual = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    theirs = usual(torch.from_numpy(photograph).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    ours = applied("resized_center_crop", photograph, size=224, shorter=256)
    assert np.abs(ours.astype(int) - theirs).mean() < 2.5
    assert np.abs(applied("center_crop", photograph, size=224).astype(int) - theirs).mean() > 20


def test_a_center_crop_larger_than_the_side_that_is_scaled_is_refused():
    with pytest.raises(UserError, match="resized_center_crop") as refused:
        FRAMES["resized_center_crop"](50, 50, draws(), size=30, shorter=20)
    assert refused.value.code == "CONFIG"


def test_a_random_crop_stays_within_the_asked_shares_of_the_area():
    rows, columns = np.mgrid[0:64, 0:64].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=2)  # each pixel says where it came from
    sides = []
    for number in range(200):
        crop = applied("random_resized_crop", image, number, size=64, scale=(0.25, 0.5)).astype(int)
        sides.append((np.ptp(crop[..., 0]) + 1, np.ptp(crop[..., 1]) + 1))
    areas = np.prod(sides, axis=1) / 64**2
    assert 0.2 < areas.min() < areas.max() < 0.55
    assert areas.max() - areas.min() > 0.15
    aspects = np.array(sides)[:, 1] / np.array(sides)[:, 0]
    assert 0.65 < aspects.min() < 0.9
    assert 1.1 < aspects.max() < 1.5


def test_random_crops_are_distributed_as_torchvisions():
    theirs = v2.RandomResizedCrop(224)
    torch.manual_seed(0)
    picture = torch.empty(3, 375, 500)
    ours = np.array([FRAMES["random_resized_crop"](375, 500, draws(n), size=224)[:4] for n in range(2000)])
    drawn = [theirs.make_params([picture]) for _ in range(2000)]
    reference = np.array([[one["top"], one["left"], one["height"], one["width"]] for one in drawn])
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        difference = np.quantile(ours, share, axis=0) - np.quantile(reference, share, axis=0)
        assert np.abs(difference).max() < 20, share


def test_making_smaller_is_antialiased_as_pillow_does_it(photographs):
    image = photographs["coffee"]
    ours = applied("resize", image, size=50).astype(int)
    theirs = Image.fromarray(image).resize(ours.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(ours - np.asarray(theirs)).mean() < 1
    checkers = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (64, 64))[:, :, None]
    assert np.ptp(applied("resize", checkers, size=32)) <= 1


@pytest.mark.parametrize("turned", [False, True])
def test_where_one_side_shrinks_and_the_other_grows_it_is_neither_aliased_nor_blocky(turned):
    stripes = np.zeros((64, 16, 1), np.uint8)
    stripes[::2] = 255
    ramp = np.broadcast_to(np.arange(0, 256, 16, dtype=np.uint8)[None, :, None], (64, 16, 1))
    if turned:
        stripes, ramp = stripes.transpose(1, 0, 2), ramp.transpose(1, 0, 2)
    height, width = (64, 16) if turned else (16, 64)
    grey = applied("resize_to", stripes, height=height, width=width)
    assert np.ptp(grey) <= 1
    smooth = applied("resize_to", ramp, height=height, width=width)
    steps = np.diff(smooth.astype(int), axis=0 if turned else 1)
    assert steps.min() >= 0
    assert steps.max() <= 5


@given(
    picture=st.tuples(SIZES, SIZES, st.sampled_from([1, 3])),
    start=st.tuples(st.floats(-5, 95), st.floats(-5, 95)),
    size=st.tuples(st.floats(0, 120), st.floats(0, 120)),
    out=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_a_cut_into_a_row_of_a_batch_is_the_cut_itself(picture, start, size, out):
    frame = Frame(*start, *size, *out)
    image = noise(*picture)
    batch = np.full((3, *out, picture[2]), 7, np.uint8)
    alone = cut(Pixels(image), frame).image
    into = cut(Pixels(image), frame, batch[1]).image
    assert np.shares_memory(into, batch)
    assert np.array_equal(batch[1], alone)
    assert (batch[[0, 2]] == 7).all()


def test_a_mask_takes_the_pixel_under_the_centre_of_each_new_one():
    mask = np.random.default_rng(0).integers(0, 200, (75, 100)).astype(np.uint8)
    found = cut(Pixels(noise(75, 100), mask), Frame(5, 10, 50, 77, 31, 90)).mask
    rows = 5 + np.floor((np.arange(31) + 0.5) * 50 / 31).astype(int)
    columns = 10 + np.floor((np.arange(90) + 0.5) * 77 / 90).astype(int)
    assert np.array_equal(found, mask[rows[:, None], columns])
