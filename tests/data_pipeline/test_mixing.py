import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from data_pipeline.batch import Pixels
from data_pipeline.fault import UserError
from data_pipeline.mixing import NOT_MIXED, SHARES, Box, Mix, draw_mix, mixed_image

MIXES = [draw_mix(5, epoch, step, 3, mixup=0.0, cutmix=1.0) for epoch in range(5) for step in range(60)]


def mixup(share):
    return Mix("mixup", share, NOT_MIXED.box)


def pictures(height=9, width=11, channels=3):
    rng = np.random.default_rng(height * width)
    arrays = rng.integers(0, 256, (2, height, width, channels), np.uint8)
    arrays.flags.writeable = False
    return [Pixels(array) for array in arrays]


@given(
    at=st.tuples(st.integers(0, 2**32), st.integers(0, 10**4), st.integers(0, 10**6), st.integers(0, 10**6)),
    alphas=st.tuples(st.floats(0, 4), st.floats(0, 4)),
)
@example(at=(0, 0, 0, 0), alphas=(5e-324, 0.0))
@example(at=(0, 0, 0, 0), alphas=(0.0, 1e-300))
def test_a_mix_is_a_function_of_its_place_and_within_its_limits(at, alphas):
    mix = draw_mix(*at, mixup=alphas[0], cutmix=alphas[1])
    assert mix == draw_mix(*at, mixup=alphas[0], cutmix=alphas[1])
    assert 0 <= mix.share <= 1
    assert (mix.share * SHARES).is_integer()
    assert mix.kind in {kind for kind, on in zip(("mixup", "cutmix"), alphas, strict=True) if on} or (
        mix.kind == "none" and not any(alphas)
    )
    box = mix.box
    assert min(box) >= 0
    assert max(box.top + box.height, box.left + box.width) <= 1 + 1e-12


def test_every_pair_step_epoch_and_seed_has_a_mix_of_its_own():
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1)]
    assert len({draw_mix(*place, mixup=0.0, cutmix=1.0) for place in places}) == len(places)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 2.0, 4.0])
def test_shares_are_beta_distributed(kind, alpha):
    alphas = {"mixup": 0.0, "cutmix": 0.0, kind: alpha}
    shares = np.array([draw_mix(1, 0, step, 0, **alphas).share for step in range(1500)])
    parts = np.arange(SHARES)
    found = (shares[:, None] <= parts / SHARES).mean(axis=0)
    expected = stats.beta(alpha, alpha).cdf((parts + 0.5) / SHARES)
    assert np.abs(found - expected).max() < 0.042  # Kolmogorov and Smirnov: 1% of fair samples are beyond


def test_with_both_each_is_as_likely():
    kinds = [draw_mix(2, 0, step, 1, mixup=0.2, cutmix=1.0).kind for step in range(1000)]
    assert 430 < kinds.count("mixup") < 570
    assert set(kinds) == {"mixup", "cutmix"}


@pytest.mark.parametrize("part", range(SHARES + 1))
def test_mixup_is_exact_and_rounds_halves_to_even(part):
    levels = np.arange(256)
    one, other = (np.ascontiguousarray(array, np.uint8) for array in np.meshgrid(levels, levels))
    own, partner = Pixels(one[..., None]), Pixels(other[..., None])
    mixed = mixed_image(own, partner, mixup(part / SHARES))
    doubled = one.astype(int) * part + other.astype(int) * (SHARES - part)
    whole, rest = np.divmod(doubled, SHARES)
    expected = whole + (rest > SHARES // 2) + ((rest == SHARES // 2) & (whole % 2 == 1))
    assert np.array_equal(mixed.pixels.image[..., 0], expected)
    assert mixed.share == part / SHARES
    assert mixed.pixels.image.shape == one[..., None].shape


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 3])),
    mix=st.sampled_from(MIXES),
)
def test_cutmix_pastes_one_rectangle_and_says_how_much_is_left(size, mix):
    height, width = size[:2]
    own = Pixels(np.zeros(size, np.uint8), np.zeros((height, width), np.uint8))
    partner = Pixels(np.full(size, 9, np.uint8), np.full((height, width), 3, np.uint8))
    mixed = mixed_image(own, partner, mix)
    pasted = mixed.pixels.image[..., 0] == 9
    assert np.array_equal(mixed.pixels.mask == 3, pasted)
    assert pasted.sum() == pasted.any(axis=0).sum() * pasted.any(axis=1).sum()
    assert mixed.share == pytest.approx(1 - pasted.mean(), abs=1e-12)
    assert own.image.max() == own.mask.max() == 0
    back = mixed_image(partner, own, mix)
    assert np.array_equal(back.pixels.image[..., 0] == 0, pasted)
    assert back.share == mixed.share


def test_the_share_of_cutmix_is_the_one_drawn_unless_the_box_is_cut_off():
    own, partner = pictures(224, 224)
    whole = 0
    for mix in MIXES:
        used = mixed_image(own, partner, mix).share
        inside = mix.box.height == pytest.approx(mix.box.width) and mix.box.height**2 == pytest.approx(
            1 - mix.share
        )
        whole += inside
        assert used == pytest.approx(mix.share, abs=0.01) if inside else used > mix.share - 0.01
    assert 20 < whole < len(MIXES) - 20


def test_boxes_are_everywhere():
    covered = np.zeros((32, 32))
    for mix in MIXES:
        one, other = Pixels(np.zeros((32, 32, 1), np.uint8)), Pixels(np.ones((32, 32, 1), np.uint8))
        covered += mixed_image(one, other, mix).pixels.image[..., 0]
    assert covered.min() > 0.1 * len(MIXES)
    assert covered.max() < 0.7 * len(MIXES)


def test_without_alphas_a_sample_stays_as_it_is():
    own, partner = pictures()
    mix = draw_mix(0, 0, 0, 0, mixup=0.0, cutmix=0.0)
    assert mix == NOT_MIXED
    assert mixed_image(own, partner, mix) == (own, 1.0)


def test_partners_of_different_sizes_are_refused():
    own, partner = pictures()[0], pictures(5, 6)[1]
    for mix in (mixup(0.5), Mix("cutmix", 0.5, Box(0, 0, 1, 1))):
        with pytest.raises(UserError, match="9 x 11 x 3 and 5 x 6 x 3") as refused:
            mixed_image(own, partner, mix)
        assert refused.value.code == "CONFIG"
