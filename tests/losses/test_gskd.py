import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from gskd import GSKDError
from gskd.losses import GSKDLoss, Pixels, gskd_loss
from gskd.losses._match import PointProjector
from gskd.losses.gskd import (
    class_balanced_sample,
    group_columns,
    random_row_permutation,
    read_points,
    structural_similarity_map,
)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_golden(golden, temperature):
    valid = torch.ones(1, 24, dtype=torch.bool)
    groups = group_columns(golden["gskd.row_permutation"][None], valid, 6)
    got = gskd_loss(
        golden["gskd.points_student"][None], golden["gskd.points_teacher"][None], valid, groups, temperature
    )
    expected = golden[f"expected/gskd.sid_kl_sum_mean_over_groups_T{temperature}"][0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    group_size=st.one_of(st.just("classes"), st.integers(1, 25)),
    policy=st.sampled_from(["repeat", "fill", "mask"]),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    temperature=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_agrees_with_loops(seed, shape, group_size, policy, share, temperature):
    torch.manual_seed(seed)
    batch, classes, samples = shape
    labels = torch.randint(0, classes, (batch, 5, 6))
    sample = class_balanced_sample(labels, classes, samples, eligible=torch.rand(labels.shape) < share, policy=policy)
    student = read_points(torch.randn(batch, 3, 3, 4), sample.index, (5, 6)).requires_grad_()
    teacher = read_points(torch.randn(batch, 7, 5, 6), sample.index)
    order = random_row_permutation(sample.valid)
    if group_size == "classes":
        groups = group_columns(order, sample.valid, sample.class_count, (samples, classes))
        sizes = sample.class_count
    else:
        groups = group_columns(order, sample.valid, group_size)
        sizes = [group_size] * batch
    loss = gskd_loss(student, teacher, sample.valid, groups, temperature)
    expected = oracles.gskd(student, teacher, sample.valid, order, sizes, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    loss.backward()
    assert student.grad.isfinite().all()
    assert student.grad[~sample.valid].abs().sum() == 0


def test_maps_that_would_exhaust_the_machine_are_refused_before_anything_is_allocated():
    labels, features = torch.randint(0, 11, (8, 4, 4)), torch.randn(8, 3, 4, 4)
    pixels = Pixels(labels, None, 11)
    with pytest.raises(GSKDError, match=r"10000 samples_per_class x 11 classes are 110000 points; .* 4057 GiB"):
        GSKDLoss(10_000, only_correct=False)(features, features, pixels)
    with pytest.raises(GSKDError, match="2 classes are 20000 points"):
        GSKDLoss(10_000, max_classes=2, only_correct=False)(features, features, pixels)
    assert GSKDLoss(100, max_classes=2, only_correct=False)(features, features, pixels).isfinite()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_give_no_number(broken):
    """A finite loss with a gradient of NaN would be logged as if all were well."""
    labels = torch.randint(0, 3, (2, 4, 4))
    student = torch.full((2, 3, 4, 4), broken)
    loss = GSKDLoss(4, only_correct=False)(student, torch.randn(2, 3, 4, 4), Pixels(labels, None, 3))
    assert not loss.isfinite()


def test_layer_is_the_function_at_sampled_points():
    """With every pixel taken and one group, nothing is random: widths and sizes differ, some pixels are ignored."""
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, 0] = 255
    student, teacher = torch.randn(2, 3, 8, 10), torch.randn(2, 6, 4, 5)
    loss = GSKDLoss(20, group_size=60, only_correct=False, policy="mask")(student, teacher, Pixels(labels, None, 3))
    resized = torch.nn.functional.interpolate(student, (4, 5), mode="bilinear", align_corners=False)
    valid = (labels != 255).flatten(1)
    order = (~valid).int().argsort(dim=1, stable=True)[:, None].expand(-1, 20, -1)
    expected = oracles.gskd(resized.flatten(2).mT, teacher.flatten(2).mT, valid, order, [20, 20])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("largest", [24, 400])  # the second takes the row-by-row sort
def test_rows_are_shuffled_one_by_one_and_padding_comes_last(largest):
    valid = torch.rand(50, largest) < 0.5
    order = random_row_permutation(valid)
    assert torch.equal(order.sort(dim=2).values, torch.arange(largest).expand_as(order))
    count = valid.sum(1)
    for b in range(0, 50, 7):
        assert valid[b][order[b, :, : count[b]]].all()
    assert not torch.equal(order[0, 0], order[0, 1])
    # The first place goes to every valid column equally often: rows x (1 / count) each.
    first = torch.bincount(order[0, :, 0], minlength=largest)[valid[0]].double()
    mean = largest / count[0]
    assert (first - mean).square().sum() / mean < count[0] + 6 * (2 * count[0]) ** 0.5


def test_zero_vectors_have_no_similarity_and_no_gradient():
    points = torch.randn(1, 4, 3)
    points[0, 1] = 0
    points.requires_grad_()
    similarity = structural_similarity_map(points)
    assert similarity[0, 1].abs().max() == 0
    (similarity * torch.randn(1, 4, 4)).sum().backward()
    assert points.grad[0, 1].abs().max() == 0
    assert points.grad.isfinite().all()


def test_gradient():
    student = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True, True, True], [False] * 6])
    groups = group_columns(random_row_permutation(valid), valid, 2)
    assert gradcheck(lambda s: gskd_loss(s, teacher, valid, groups, 0.5), (student,))


def test_every_image_counts():
    """Trap 3: a loss reset inside the batch loop keeps only the last image."""
    student, teacher = torch.randn(3, 4, 6, 6, requires_grad=True), torch.randn(3, 4, 6, 6)
    pixels = Pixels(torch.randint(0, 3, (3, 6, 6)), num_classes=3)
    GSKDLoss(only_correct=False)(student, teacher, pixels).backward()
    assert (student.grad.flatten(1).abs().sum(1) > 0).all()


def test_divergence_is_summed_over_entries():
    """Trap 4: divided by its length it would be smaller by M x S; and tau^2 (trap 6) keeps it level as tau grows."""
    student, teacher = torch.randn(1, 32, 8), torch.randn(1, 32, 8)
    valid = torch.ones(1, 32, dtype=torch.bool)
    groups = group_columns(random_row_permutation(valid), valid, 32)
    gap = structural_similarity_map(teacher, valid) - structural_similarity_map(student, valid)
    # For large tau, tau^2 KL -> half the variance of the entries' differences.
    expected = gap.var(correction=0) / 2
    assert gskd_loss(student, teacher, valid, groups, 50.0).item() == pytest.approx(expected.item(), rel=0.03)


def test_only_correct_pixels_are_read():
    labels = torch.randint(0, 3, (1, 6, 6))
    wrong = torch.rand(1, 6, 6) < 0.5
    logits = torch.nn.functional.one_hot(torch.where(wrong, (labels + 1) % 3, labels), 3).permute(0, 3, 1, 2).float()
    student = torch.randn(1, 4, 6, 6, requires_grad=True)
    GSKDLoss(40)(student, torch.randn(1, 4, 6, 6), Pixels(labels, logits)).backward()
    touched = student.grad.abs().sum(1) > 0
    assert torch.equal(touched, ~wrong)


def test_projector_sees_valid_points_alone():
    projector = PointProjector(4, 6)
    convolution = torch.nn.BatchNorm1d(6)
    points, valid = torch.randn(2, 5, 4), torch.rand(2, 5) < 0.6
    expected = projector.leave(convolution(projector.enter(points[valid])).relu())
    torch.testing.assert_close(projector(points, valid)[valid], expected)
    torch.testing.assert_close(projector.running_var, convolution.running_var)
    before = projector.running_mean.clone()
    assert projector(points, torch.zeros_like(valid)).isfinite().all()
    assert torch.equal(projector.running_mean, before)
    convolution.eval(), projector.eval()
    torch.testing.assert_close(
        projector(points, valid), projector.leave(convolution(projector.enter(points).mT).mT.relu())
    )


@pytest.mark.parametrize(
    ("projector", "policy"),
    [
        (True, "fill"),
        pytest.param(False, "fill", marks=pytest.mark.slow),  # ten seconds each
        pytest.param(True, "repeat", marks=pytest.mark.slow),
        pytest.param(False, "repeat", marks=pytest.mark.slow),
    ],
)
def test_compiles_into_one_graph(projector, policy):
    torch.compiler.reset()
    term = GSKDLoss(50, 400, policy=policy, projector=projector, student_channels=4, teacher_channels=6, max_classes=2)
    student, teacher = torch.randn(2, 4, 3, 4, requires_grad=True), torch.randn(2, 6, 6, 8)
    labels, logits = torch.randint(0, 3, (2, 12, 16)), torch.randn(2, 3, 3, 4)
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager")
    loss = compiled(student, teacher, Pixels(labels, logits))
    loss.backward()
    assert loss.item() > 0
    assert student.grad.isfinite().all()


def test_one_descriptor_of_the_whole_map():
    """Without groups, a permutation makes no difference: KL of two softmaxes over all pairs of cosines."""
    student, teacher = torch.randn(1, 4, 5, 6), torch.randn(1, 3, 5, 6)
    labels = torch.randint(0, 2, (1, 5, 6))
    torch.manual_seed(1)
    got = GSKDLoss(3, group_size="all", only_correct=False)(student, teacher, Pixels(labels, num_classes=2))
    torch.manual_seed(1)
    sample = class_balanced_sample(labels, 2, 3)
    s, t = (structural_similarity_map(read_points(maps, sample.index)).flatten() for maps in (student, teacher))
    expected = (t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).sum()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_uniform_sampling_reads_classes_by_their_share():
    term = GSKDLoss(sampling="uniform", only_correct=False)
    student, teacher = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randn(2, 3, 5, 6)
    labels = torch.zeros(2, 5, 6, dtype=torch.int64)
    labels[:, 0, 0] = 1
    labels[:, 3:] = 255
    term(student, teacher, Pixels(labels, num_classes=4)).backward()
    read = student.grad.abs().sum(1) > 0
    assert read.flatten(1).sum(1).tolist() == [16, 16]  # 8 x 2 classes of the 18 labelled pixels, none twice
    assert not read[:, 3:].any()


def test_errors_say_what_is_missing():
    features, labels = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    with pytest.raises(GSKDError, match="no teacher logits"):
        GSKDLoss()(features, features, Pixels(labels, num_classes=2))
    with pytest.raises(GSKDError, match="number of classes"):
        GSKDLoss(only_correct=False)(features, features, Pixels(labels))
    with pytest.raises(GSKDError, match="student_channels"):
        GSKDLoss(projector=True)
    wrongs = [
        {"group_size": 0},
        {"group_size": "class"},
        {"group_size": True},
        {"max_classes": 2.0},
        {"only_correct": "flase"},
    ]
    wrongs += [{"samples_per_class": 0}, {"samples_per_class": 4.0}, {"temperature": 0.0}]
    for wrong in wrongs:
        with pytest.raises(GSKDError, match=next(iter(wrong))):
            GSKDLoss(**wrong)
