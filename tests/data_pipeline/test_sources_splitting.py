import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.splitting import held_out, held_out_groups, held_out_of_classes, held_out_of_labels

FRACTIONS = st.floats(0, 0.9)
SEEDS = st.integers(0, 2**63 - 1)
CLASSES = st.lists(st.integers(0, 6), max_size=200).map(lambda one: np.array(one, np.int64))


def many_labels(samples, seed, rates):
    """Labels that occur together as in real tables: each follows the one before it in part."""
    draws = np.random.default_rng(seed)
    labels = np.zeros((samples, len(rates)), np.int8)
    for column, rate in enumerate(rates):
        labels[:, column] = draws.random(samples) < rate
        if column:
            follows = draws.random(samples) < 0.3
            labels[follows, column] = labels[follows, column - 1]
    labels[draws.random(labels.shape) < 0.05] = -1
    return labels


@settings(max_examples=200, deadline=None)
@given(CLASSES, FRACTIONS, SEEDS)
def test_of_every_class_the_share_is_held_out_to_the_nearest_sample(labels, fraction, seed):
    chosen = held_out_of_classes(labels, val_fraction=fraction, seed=seed)
    for label in np.unique(labels):
        here = labels == label
        assert chosen[here].sum() == round(here.sum() * fraction)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([1, 0, -1]), min_size=3, max_size=3), min_size=1, max_size=120),
    FRACTIONS,
    SEEDS,
)
def test_the_rarest_label_gets_its_share_and_val_its_size(rows, fraction, seed):
    labels = np.array(rows, np.int8)
    chosen = held_out_of_labels(labels, val_fraction=fraction, seed=seed)
    carriers = (labels == 1).sum(axis=0)
    present = np.where(carriers > 0, carriers, len(rows) + 1)
    if carriers.any():
        rarest = int(present.argmin())
        assert abs((labels[chosen] == 1).sum(axis=0)[rarest] - fraction * carriers[rarest]) <= 0.5 + 1e-9
    assert abs(chosen.sum() - fraction * len(rows)) <= len(carriers)


@pytest.mark.parametrize("seed", range(5))
def test_every_label_of_a_large_table_gets_its_share_to_the_sample(seed):
    labels = many_labels(3000, seed, [0.004, 0.02, 0.05, 0.1, 0.2, 0.4])
    chosen = held_out_of_labels(labels, val_fraction=0.2, seed=seed)
    carriers, held = (labels == 1).sum(axis=0), (labels[chosen] == 1).sum(axis=0)
    assert np.abs(held - 0.2 * carriers).max() <= 1
    assert chosen.sum() == 600


def test_more_labels_than_fit_one_number_are_told_apart():
    labels = many_labels(2000, 7, [0.03] * 64)
    chosen = held_out_of_labels(labels, val_fraction=0.25, seed=0)
    carriers, held = (labels == 1).sum(axis=0), (labels[chosen] == 1).sum(axis=0)
    assert np.abs(held - 0.25 * carriers).max() <= 3


@settings(max_examples=200, deadline=None)
@given(st.data(), FRACTIONS, SEEDS, st.booleans())
def test_a_group_is_never_divided_and_no_class_leaves_training(data, fraction, seed, several):
    samples = data.draw(st.integers(1, 80))
    groups = np.array(data.draw(st.lists(st.integers(0, 20), min_size=samples, max_size=samples)), np.int64)
    groups = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    shape = (samples, 3) if several else (samples,)
    labels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2, shape).astype(np.int64)
    chosen = held_out(labels, groups, val_fraction=fraction, seed=seed)
    for group in np.unique(groups):
        assert len(set(chosen[groups == group].tolist())) == 1
    kinds = labels == 1 if several else np.eye(2, dtype=bool)[labels]
    assert (kinds[~chosen].any(axis=0) == kinds.any(axis=0)).all()


@settings(max_examples=100, deadline=None)
@given(CLASSES.filter(len), st.floats(0, 0.5), SEEDS)
def test_groups_of_one_are_stratified_like_single_samples(labels, fraction, seed):
    chosen = held_out_groups(labels, np.arange(len(labels)), val_fraction=fraction, seed=seed)
    for label in np.unique(labels):
        here = labels == label
        wanted = min(round(here.sum() * fraction), here.sum() - 1)
        assert abs(chosen[here].sum() - wanted) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_patients_of_many_pictures_are_stratified_by_class_and_by_label(seed):
    draws = np.random.default_rng(seed)
    groups = np.repeat(np.arange(400), draws.integers(1, 12, 400))
    classes = draws.choice(4, 400, p=[0.6, 0.25, 0.1, 0.05])[groups]
    chosen = held_out_groups(classes, groups, val_fraction=0.2, seed=seed)
    for label, count in enumerate(np.bincount(classes)):
        assert chosen[classes == label].mean() == pytest.approx(0.2, abs=6 / count + 1e-9)
    labels = many_labels(len(groups), seed, [0.03, 0.1, 0.3])
    chosen = held_out_groups(labels, groups, val_fraction=0.2, seed=seed)
    assert chosen.mean() == pytest.approx(0.2, abs=0.01)
    shares = (labels[chosen] == 1).sum(axis=0) / (labels == 1).sum(axis=0)
    assert shares == pytest.approx([0.2] * 3, abs=0.02)


@pytest.mark.parametrize("groups", [None, np.arange(300) // 3])
@pytest.mark.parametrize("several", [False, True])
def test_the_seed_alone_decides(groups, several):
    labels = many_labels(300, 1, [0.1, 0.2, 0.4]) if several else np.arange(300) % 7
    first, again, other = (held_out(labels, groups, val_fraction=0.3, seed=seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize("labels", [np.zeros(0, np.int64), np.zeros((0, 3), np.int8)])
@pytest.mark.parametrize("groups", [None, np.zeros(0, np.int64)])
def test_nothing_is_divided_into_nothing(labels, groups):
    assert held_out(labels, groups, val_fraction=0.5, seed=0).shape == (0,)


def test_what_is_drawn_never_changes():
    classes = held_out(np.arange(12) % 3, None, val_fraction=0.3, seed=5)
    labels = held_out(many_labels(12, 3, [0.3, 0.6]), None, val_fraction=0.3, seed=5)
    groups = held_out(np.arange(12) % 3, np.arange(12) // 2, val_fraction=0.3, seed=5)
    assert [np.flatnonzero(one).tolist() for one in (classes, labels, groups)] == [
        [2, 7, 9],
        [1, 6, 8, 9],
        [2, 3, 6, 7],
    ]
