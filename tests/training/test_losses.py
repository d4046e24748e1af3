"""Each loss against its formula, written out in float64 over the elements that count and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import segmentation_models_pytorch.losses as smp
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from data_pipeline.fault import UserError
from training.config.loss import LossTerms
from training.inputs import Inputs
from training.losses import LOSSES, Labels, build_objective, outputs_of

MISSING, IGNORED = -1, 255
GARBAGE = {"multiclass": 10**9, "multilabel": 100, "segmentation": 254}


@dataclass(frozen=True)
class Case:
    labels: Labels
    outputs: torch.Tensor  # float32, a leaf
    inputs: Inputs
    known: torch.Tensor  # bool, the shape of the targets
    partners_known: torch.Tensor | None


def labels_of(task, classes, outputs=None):
    positives = tuple(range(10, 10 + classes))
    return Labels(task, classes, outputs or classes, positives, tuple(3 * count for count in positives))


def make(task, *, seed, weights=(1.0,) * 5, classes=3, outputs=None, size=(3, 4), unknown=0.3, mixed=False):
    """Random outputs and targets; whatever counts nowhere holds garbage, in the outputs too."""
    draw = torch.Generator().manual_seed(seed)
    labels = labels_of(task, classes, outputs)
    channels = labels.outputs
    shape = {"multiclass": (), "multilabel": (classes,), "segmentation": size}[task]
    answers = 2 if task == "multilabel" else classes
    kind = {"multiclass": torch.int64, "multilabel": torch.int8, "segmentation": torch.uint8}[task]
    weights = torch.tensor(weights)
    samples = len(weights)
    valid = weights > 0

    def targets():
        given = torch.randint(0, answers, (samples, *shape), generator=draw).to(kind)
        known = torch.rand(given.shape, generator=draw) >= (0.0 if task == "multiclass" else unknown)
        if task != "multiclass":
            given[~known] = MISSING if task == "multilabel" else IGNORED
        given[~valid] = GARBAGE[task]
        known[~valid] = False
        return given, known

    own, known = targets()
    partners, partners_known = targets() if mixed else (None, None)
    share = torch.rand(samples, generator=draw) if mixed else torch.ones(samples)
    logits = 4 * torch.randn((samples, channels, *(size if task == "segmentation" else ())), generator=draw)
    unseen = ~(known | partners_known if mixed else known)
    logits[unseen if task == "multilabel" else unseen.unsqueeze(1).expand_as(logits)] = math.inf
    inputs = Inputs(torch.zeros(samples), own, valid, weights, share, partners)
    return Case(labels, logits.requires_grad_(), inputs, known, partners_known)


def found(case, spec):
    """Value and gradient, as a training step takes them."""
    objective = build_objective(spec, case.labels)
    sums = objective.sums(case.outputs, case.inputs)
    assert (sums.dtype, sums.shape) == (torch.float32, (objective.size,))
    total = sums.detach().double()
    counts = objective.counts(case.inputs)
    torch.testing.assert_close(torch.where(counts > 0, total, 0.0), counts, rtol=1e-6, atol=0)
    slopes = objective.slopes(total).float()
    (gradient,) = torch.autograd.grad((sums * slopes).sum(), case.outputs)
    return objective.value(total), gradient


def elements(case):
    """Float64 logits [N, C] or [N], truth [N], share [N] and label [N] of all that counts."""
    logits = case.outputs.detach().double().requires_grad_()
    by_element = logits if case.labels.task == "multilabel" else logits.movedim(1, -1)
    if case.labels.yes_or_no and case.labels.task == "segmentation":
        by_element = by_element[..., 0]
    both = [(case.inputs.targets, case.known, case.inputs.share)]
    if case.inputs.partner_targets is not None:
        both.append((case.inputs.partner_targets, case.partners_known, 1 - case.inputs.share))
    rows = []
    for targets, known, share in both:
        place = known.nonzero()
        shares = (case.inputs.weights.double() * share.double())[place[:, 0]]
        rows.append((by_element[known], targets[known].long(), shares, place[:, -1]))
    return logits, *(torch.cat(pieces) for pieces in zip(*rows, strict=True))


def expected(case, formula):
    """Value and gradient of a formula of `elements`."""
    logits, *rest = elements(case)
    value = formula(*rest)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def agree(mine, reference, tolerance=3e-6):
    value, gradient = mine
    # float32 logits of about 10 are exact to a few 1e-7, and so is the loss, however small.
    assert value.item() == pytest.approx(reference[0].item(), rel=tolerance, abs=5e-6)
    assert gradient.isfinite().all()
    worst = (gradient.double() - reference[1]).abs().max().item()
    assert worst <= tolerance * reference[1].abs().max().item() + 1e-6


def softmax(logits):
    powers = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return powers / powers.sum(dim=1, keepdim=True)


def one_hot(truth, classes):
    return (truth[:, None] == torch.arange(classes)).double()


def cross_entropy_formula(classes, smoothing=0.0, weights=None):
    weights = torch.ones(classes).double() if weights is None else torch.tensor(weights).double()

    def formula(logits, truth, share, _):
        wanted = (1 - smoothing) * one_hot(truth, classes) + smoothing / classes
        each = -(weights * wanted * softmax(logits).log()).sum(dim=1)
        return (share * each).sum() / (share * weights[truth]).sum()

    return formula


def bce_formula(smoothing=0.0, weights=None):
    def formula(logits, truth, share, label):
        probability = 1 / (1 + (-logits).exp())
        wanted = torch.tensor([smoothing / 2, 1 - smoothing / 2], dtype=torch.float64)[truth]
        weight = 1.0 if weights is None else torch.tensor(weights).double()[label % len(weights)]
        each = -weight * wanted * probability.log() - (1 - wanted) * (1 - probability).log()
        return (share * each).sum() / share.sum()

    return formula


def focal_formula(gamma, alpha=None):
    def formula(logits, truth, share, _):
        if logits.ndim == 2:
            right = (softmax(logits) * one_hot(truth, logits.shape[1])).sum(dim=1)
            weight = 1.0
        else:
            yes = 1 / (1 + (-logits).exp())
            right = torch.where(truth == 1, yes, 1 - yes)
            weight = 1.0 if alpha is None else torch.tensor([1 - alpha, alpha], dtype=torch.float64)[truth]
        return (share * -weight * (1 - right) ** gamma * right.log()).sum() / share.sum()

    return formula


def overlap_formula(loss_of_areas, taken):
    def formula(logits, truth, share, _):
        losses = []
        for number in taken:
            probability = softmax(logits)[:, number] if logits.ndim == 2 else 1 / (1 + (-logits).exp())
            true = (truth == number).double()
            both = (share * probability * true).sum()
            wrong, missed = (share * probability * (1 - true)).sum(), (share * (1 - probability) * true).sum()
            losses.append(loss_of_areas(both, wrong, missed))
        return sum(losses) / len(losses)

    return formula


SEED = st.integers(0, 10**6)
BATCH = st.fixed_dictionaries(
    {
        "seed": SEED,
        "weights": st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=1, max_size=6).filter(any),
        "mixed": st.booleans(),
        "unknown": st.sampled_from([0.0, 0.4]),
        "size": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    }
)
SMOOTHING = st.sampled_from([0.0, 0.1, 1.0])
SMOOTH = st.sampled_from([0.0, 0.01, 1.0, 100.0])
swept = settings(deadline=None, max_examples=100)


def drawn(task, batch, **shape):
    """A case in which something counts."""
    case = make(task, **batch, **shape)
    assume(case.known.any() and (not batch["mixed"] or case.partners_known.any()))
    return case


@swept
@given(st.sampled_from(["multiclass", "segmentation"]), BATCH, SMOOTHING, st.data())
def test_cross_entropy_is_its_formula(task, batch, smoothing, data):
    classes = data.draw(st.integers(2, 5))
    numbers = st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=classes, max_size=classes)
    weights = data.draw(st.none() | numbers)
    case = drawn(task, batch, classes=classes)
    spec = LossTerms(cross_entropy={"label_smoothing": smoothing, "class_weights": weights})
    agree(found(case, spec), expected(case, cross_entropy_formula(classes, smoothing, weights)))


@swept
@given(st.sampled_from([("multilabel", 3, 3), ("segmentation", 2, 1)]), BATCH, SMOOTHING, st.data())
def test_bce_is_its_formula(kind, batch, smoothing, data):
    task, classes, outputs = kind
    numbers = st.lists(st.sampled_from([0.5, 1.0, 10.0]), min_size=outputs, max_size=outputs)
    weights = data.draw(st.none() | numbers)
    case = drawn(task, batch, classes=classes, outputs=outputs)
    spec = LossTerms(bce={"label_smoothing": smoothing, "pos_weight": weights})
    agree(found(case, spec), expected(case, bce_formula(smoothing, weights)))


KINDS = [("multiclass", 4, 4), ("multilabel", 3, 3), ("segmentation", 3, 3), ("segmentation", 2, 1)]


@swept
@given(
    st.sampled_from(KINDS),
    BATCH,
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]),
    st.sampled_from([None, 0.0, 0.25, 1.0]),
)
def test_focal_is_its_formula(kind, batch, gamma, alpha):
    task, classes, outputs = kind
    case = drawn(task, batch, classes=classes, outputs=outputs)
    alpha = alpha if case.labels.yes_or_no else None
    spec = LossTerms(focal={"gamma": gamma, "alpha": alpha})
    # In float32 1 - p holds few digits where p is near 1, and the loss all but nothing.
    agree(found(case, spec), expected(case, focal_formula(gamma, alpha)), tolerance=2e-5)


AREAS = {
    "dice": lambda s, _: lambda tp, fp, fn: 1 - (2 * tp + s) / (2 * tp + fp + fn + s),
    "iou": lambda s, _: lambda tp, fp, fn: 1 - (tp + s) / (tp + fp + fn + s),
    "tversky": lambda s, power: lambda tp, fp, fn: (1 - (tp + s) / (tp + 0.3 * fp + 0.9 * fn + s)) ** power,
}


@swept
@given(st.sampled_from(sorted(AREAS)), BATCH, SMOOTH, st.booleans(), st.data())
def test_losses_of_overlap_are_their_formulas(name, batch, smooth, foreground, data):
    outputs, power = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1.0, 0.75, 2.0]))
    classes = max(2, outputs)
    case = drawn("segmentation", batch, classes=classes, outputs=outputs)
    more = {"alpha": 0.3, "beta": 0.9, "gamma": power} if name == "tversky" else {}
    spec = LossTerms(**{name: {"smooth": smooth, "foreground": foreground, **more}})
    taken = range(1 if foreground or outputs == 1 else 0, classes)
    reference = expected(case, overlap_formula(AREAS[name](smooth, power), taken))
    agree(found(case, spec), reference, tolerance=1e-5)


@settings(deadline=None, max_examples=20)
@given(SEED, st.sampled_from([0.0, 0.3]))
def test_a_sum_of_losses_is_weighted(seed, unknown):
    case = make("segmentation", seed=seed, classes=2, outputs=1, unknown=unknown)
    parts = [(0.5, "bce"), (2.0, "dice"), (0.0, "focal")]
    whole = found(case, LossTerms.model_validate({name: factor for factor, name in parts}))
    alone = [(factor, found(case, LossTerms.model_validate(name))) for factor, name in parts]
    agree(whole, tuple(sum(factor * one[part].double() for factor, one in alone) for part in (0, 1)))


def test_torchs_means_are_the_same():
    pictures = make("multiclass", seed=1, weights=[1.0] * 9, classes=4)
    weights = [0.5, 1.0, 2.0, 0.0]
    spec = LossTerms(cross_entropy={"class_weights": weights, "label_smoothing": 0.2})
    torchs = functional.cross_entropy(
        pictures.outputs, pictures.inputs.targets, weight=torch.tensor(weights), label_smoothing=0.2
    )
    assert found(pictures, spec)[0].item() == pytest.approx(torchs.item(), rel=1e-6)
    pixels = make("segmentation", seed=1, classes=4)
    spec = LossTerms(cross_entropy={"class_weights": weights})
    torchs = functional.cross_entropy(
        pixels.outputs.nan_to_num(posinf=0.0),
        pixels.inputs.targets.long(),
        weight=torch.tensor(weights),
        ignore_index=255,
    )
    assert found(pixels, spec)[0].item() == pytest.approx(torchs.item(), rel=1e-6)
    findings = make("multilabel", seed=1, unknown=0.0)
    torchs = functional.binary_cross_entropy_with_logits(
        findings.outputs, findings.inputs.targets.float(), pos_weight=torch.tensor([1.0, 2.0, 3.0])
    )
    spec = LossTerms(bce={"pos_weight": [1.0, 2.0, 3.0]})
    assert found(findings, spec)[0].item() == pytest.approx(torchs.item(), rel=1e-6)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("name", ["dice", "iou", "tversky"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_segmentation_models_pytorch_finds_the_same_overlap(name, outputs, smooth):
    case = make("segmentation", seed=2, classes=max(2, outputs), outputs=outputs, size=(8, 8))
    more = {"alpha": 0.3, "beta": 0.7} if name == "tversky" else {}
    half = (
        {"smooth": smooth / 2} if name == "dice" else {"smooth": smooth}
    )  # theirs halves the fraction first
    theirs = {"dice": smp.DiceLoss, "iou": smp.JaccardLoss, "tversky": smp.TverskyLoss}[name]
    ignoring = {} if name == "iou" else {"ignore_index": 255}
    loss = theirs("binary" if outputs == 1 else "multiclass", **half, **ignoring, **more)
    logits = case.outputs.detach().nan_to_num(posinf=0.0).requires_grad_()
    targets = case.inputs.targets
    if name == "iou":  # theirs knows no ignored pixels
        targets = torch.where(targets == 255, 0, targets)
    value = loss(logits, targets.long())
    (gradient,) = torch.autograd.grad(value, logits)
    mine = Case(case.labels, logits, case.inputs._replace(targets=targets), case.known, None)
    agree(found(mine, LossTerms(**{name: {"smooth": smooth, **more}})), (value, gradient.double()))


def test_segmentation_models_pytorch_finds_the_same_focal_loss():
    case = make("multilabel", seed=3, unknown=0.0)
    value = smp.FocalLoss("multilabel", alpha=0.25, gamma=2.0)(case.outputs, case.inputs.targets.float())
    mine, _ = found(case, LossTerms(focal={"alpha": 0.25}))
    assert mine.item() == pytest.approx(value.item(), rel=1e-5)


EVERY = [
    ("multiclass", 3, "cross_entropy", {}),
    ("multiclass", 3, "cross_entropy", {"class_weights": [1.0, 0.0, 2.0], "label_smoothing": 0.1}),
    ("multiclass", 3, "focal", {"gamma": 0.5}),
    ("multilabel", 3, "bce", {"pos_weight": "auto", "label_smoothing": 0.1}),
    ("multilabel", 3, "focal", {"gamma": 0.5, "alpha": 0.25}),
    ("segmentation", 1, "bce", {"pos_weight": "auto"}),
    ("segmentation", 3, "cross_entropy", {"class_weights": "auto"}),
    ("segmentation", 3, "focal", {"gamma": 0.5}),
    ("segmentation", 1, "focal", {"gamma": 0.5, "alpha": 0.75}),
    *(("segmentation", outputs, "dice", {"smooth": 0.0}) for outputs in (1, 3)),
    *(("segmentation", outputs, "iou", {"smooth": 0.0}) for outputs in (1, 3)),
    *(("segmentation", outputs, "tversky", {"smooth": 0.0, "gamma": 0.5}) for outputs in (1, 3)),
]
each_loss = pytest.mark.parametrize(("task", "outputs", "name", "options"), EVERY)


@each_loss
@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_in_which_nothing_counts_has_a_zero_loss_and_a_zero_gradient(
    task, outputs, name, options, mixed
):
    spec = LossTerms(**{name: options})
    shape = {"classes": max(2, outputs), "outputs": outputs, "mixed": mixed}
    batches = [make(task, seed=0, weights=[0.0] * 5, **shape)]
    if task != "multiclass":
        batches.append(make(task, seed=0, unknown=1.0, **shape))
    for case in batches:
        value, gradient = found(case, spec)
        assert value == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


@each_loss
def test_certainty_leaves_value_and_gradient_finite(task, outputs, name, options):
    spec = LossTerms(**{name: options})
    case = make(task, seed=4, classes=max(2, outputs), outputs=outputs, unknown=0.0)
    truth = case.inputs.targets.long()
    if task == "multilabel" or outputs == 1:
        signs = (2.0 * truth - 1).reshape(case.outputs.shape)
    else:
        signs = 2.0 * functional.one_hot(truth, outputs).movedim(-1, 1) - 1
    for size in (15.0, 17.0, 40.0, 1e4):
        values = []
        for certain in (signs, -signs):
            sure = Case(case.labels, (certain * size).requires_grad_(), case.inputs, case.known, None)
            value, gradient = found(sure, spec)
            assert value.isfinite()
            assert gradient.isfinite().all()
            values.append(value)
        assert values[0] < values[1] / 2


@each_loss
def test_a_loss_asked_for_by_an_evaluation_first_can_still_be_trained_with(task, outputs, name, options):
    case = make(task, seed=5, classes=max(2, outputs), outputs=outputs)
    objective = build_objective(LossTerms(**{name: options}), case.labels)
    with torch.inference_mode():
        seen = objective.sums(case.outputs.detach(), case.inputs)
    sums = objective.sums(case.outputs, case.inputs)
    assert torch.equal(sums.detach(), seen.clone())
    (gradient,) = torch.autograd.grad(sums.sum(), case.outputs)
    assert gradient.abs().sum() > 0


@each_loss
def test_half_precision_outputs_are_summed_in_float32(task, outputs, name, options):
    case = make(task, seed=6, classes=max(2, outputs), outputs=outputs, size=(64, 64), unknown=0.0)
    objective = build_objective(LossTerms(**{name: options}), case.labels)
    half = case.outputs.detach().bfloat16()
    assert torch.equal(objective.sums(half, case.inputs), objective.sums(half.float(), case.inputs))


def test_the_loss_of_plain_classes_is_that_of_torch_to_the_last_bit():
    case = make("multiclass", seed=7, weights=[1.0] * 12, classes=5)
    objective = build_objective(LossTerms.model_validate("cross_entropy"), case.labels)
    total, count = objective.sums(case.outputs, case.inputs)
    each = functional.cross_entropy(case.outputs, case.inputs.targets, reduction="none")
    assert torch.equal(total, each.sum())
    assert count == 12
    mine, theirs = (torch.autograd.grad(one, case.outputs)[0] for one in (total, each.sum()))
    assert torch.equal(mine, theirs)


def test_what_must_be_known_of_the_global_batch_is_as_little_as_can_be():
    def needs(task, spec, outputs=None):
        return build_objective(LossTerms.model_validate(spec), labels_of(task, 2, outputs)).needs

    assert needs("multiclass", "cross_entropy") == needs("multiclass", "focal") == "nothing"
    assert needs("multiclass", {"cross_entropy": {"class_weights": [1, 2]}}) == "targets"
    assert needs("multilabel", "bce") == needs("segmentation", "cross_entropy") == "targets"
    assert needs("segmentation", "dice") == needs("segmentation", {"bce": 1, "iou": 1}, 1) == "outputs"


def test_an_absent_class_that_is_not_predicted_costs_nothing():
    case = make("segmentation", seed=8, unknown=0.0)
    logits = torch.full_like(case.outputs, -200.0)
    logits[:, 0] = 200.0
    inputs = case.inputs._replace(targets=torch.zeros_like(case.inputs.targets))
    sure = Case(case.labels, logits.requires_grad_(), inputs, case.known, None)
    for name in ("dice", "iou", "tversky"):
        value, gradient = found(sure, LossTerms(**{name: {"smooth": 0.0}}))
        assert value == 0
        assert gradient.isfinite().all()


def test_weights_are_taken_from_the_training_split():
    def sums(spec, labels, outputs, targets):
        inputs = Inputs(targets, targets, torch.ones(2).bool(), torch.ones(2), torch.ones(2), None)
        return build_objective(LossTerms(**spec), labels).sums(outputs, inputs).tolist()

    flat = math.log(2)
    labels = Labels("multiclass", 2, 2, (30, 10), (10, 30))
    auto = sums({"cross_entropy": {"class_weights": "auto"}}, labels, torch.zeros(2, 2), torch.tensor([0, 1]))
    assert auto == pytest.approx([flat * (40 / 60 + 40 / 20), 40 / 60 + 40 / 20])
    labels = Labels("multilabel", 2, 2, (30, 10), (10, 20))
    ones = torch.ones(2, 2, dtype=torch.int8)
    auto = sums({"bce": {"pos_weight": "auto"}}, labels, torch.zeros(2, 2), ones)
    assert auto == pytest.approx([flat * 2 * (10 / 30 + 20 / 10), 4])
    labels = Labels("segmentation", 2, 1, (300, 100), (100, 300))
    pixels = torch.ones(2, 1, 1, dtype=torch.uint8)
    auto = sums({"bce": {"pos_weight": "auto"}}, labels, torch.zeros(2, 1, 1, 1), pixels)
    assert auto == pytest.approx([flat * 2 * 3, 2])


def test_the_losses_that_can_be_configured_are_those_that_exist():
    assert LOSSES.keys() | {"own"} == LossTerms.model_fields.keys()


def test_a_network_has_one_output_only_where_bce_tells_two_classes_of_pixels_apart():
    both = LossTerms.model_validate({"bce": 1, "dice": 1})
    assert outputs_of("segmentation", 2, both) == 1
    assert outputs_of("segmentation", 2, LossTerms.model_validate("dice")) == 2
    assert outputs_of("segmentation", 3, both) == 3
    assert outputs_of("multilabel", 2, both) == 2


REFUSED = [
    (("multilabel", 3, 3), {"cross_entropy": 1}, "several labels", "bce"),
    (("segmentation", 2, 1), {"cross_entropy": 1, "bce": 1}, "one output", "bce"),
    (("multiclass", 3, 3), {"bce": 1}, "one of several classes", "cross_entropy"),
    (("segmentation", 3, 3), {"bce": 1}, "each of 3 classes", "cross_entropy"),
    (("multiclass", 3, 3), {"dice": 1}, "multiclass has no masks", "cross_entropy"),
    (("multilabel", 3, 3), {"iou": 1}, "multilabel has no masks", "bce"),
    (("multilabel", 3, 3), {"tversky": 1}, "multilabel has no masks", "bce"),
    (("multiclass", 3, 3), {"focal": {"alpha": 0.5}}, "loss.focal.alpha: 0.5", "leave loss.focal.alpha out"),
    (
        ("multiclass", 3, 3),
        {"cross_entropy": {"class_weights": [1, 2]}},
        "2 numbers, there must be 3",
        "0, 1, 2",
    ),
    (("segmentation", 2, 1), {"bce": {"pos_weight": [1, 2]}}, "2 numbers, there must be 1", "the classes 1,"),
    (("multilabel", 3, 3), {"bce": {"pos_weight": [1]}}, "1 numbers, there must be 3", "0, 1, 2"),
]


@pytest.mark.parametrize(("labels", "terms", "what", "mend"), REFUSED)
def test_a_loss_that_does_not_fit_the_task_is_refused_with_what_would(labels, terms, what, mend):
    with pytest.raises(UserError) as refusal:
        build_objective(LossTerms.model_validate(terms), labels_of(*labels))
    assert refusal.value.code == "CONFIG"
    assert what in refusal.value.what
    assert mend in refusal.value.mend


@pytest.mark.parametrize(
    ("lacking", "named"), [([2], "2"), ([0, 3], "0, 3"), (range(30), "0, 1, 2, 3, ..., 29")]
)
def test_classes_without_examples_cannot_be_weighed_by_their_number(lacking, named):
    counts = tuple(0 if number in lacking else 5 for number in range(31))
    labels = Labels("multiclass", 31, 31, counts, (9,) * 31)
    with pytest.raises(UserError, match=f"class {named} by") as refusal:
        build_objective(LossTerms(cross_entropy={"class_weights": "auto"}), labels)
    assert (refusal.value.code, "as 31 numbers" in refusal.value.mend) == ("CONFIG", True)
    labels = Labels("multilabel", 31, 31, (9,) * 31, counts)
    with pytest.raises(UserError, match=f"class {named} by"):
        build_objective(LossTerms(bce={"pos_weight": "auto"}), labels)
