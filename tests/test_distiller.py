import copy

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

from gskd import Distiller, GSKDError, GSKDLoss, KDLoss, MSELoss, Term
from gskd.data import IGNORE
from gskd.losses import ATLoss, CIRKDMemoryLoss, PSDLoss


class Net(nn.Module):
    """A small network with batch normalisation and dropout, the two things a careless wrapper leaves in train mode."""

    def __init__(self, width: int, classes: int = 4, stride: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(0.5)
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2, 16, 24), generator=generator)
    labels[:, :3] = IGNORE
    return torch.randn(2, 3, 16, 24, generator=generator), labels


def three_terms() -> dict[str, Term]:
    return {
        "gskd": Term(GSKDLoss(samples_per_class=3, only_correct=False), 10, "body", "body"),
        "kd": Term(KDLoss(temperature=2), 0.5, "logits", "logits"),
        "mse": Term(MSELoss(student_channels=5, teacher_channels=8), 2, "body", "body"),
    }


def test_the_total_is_the_task_loss_and_every_weighted_term(batch):
    distiller = Distiller(Net(5), Net(8), three_terms())
    result = distiller(*batch)
    assert set(result.terms) == {"task", "gskd", "kd", "mse"}
    for name, weight in {"task": 1, "gskd": 10, "kd": 0.5, "mse": 2}.items():
        torch.testing.assert_close(result.terms[name].weighted, weight * result.terms[name].raw)
        assert result.terms[name].raw > 0
        assert not result.terms[name].raw.requires_grad
    torch.testing.assert_close(result.loss.detach(), sum(value.weighted for value in result.terms.values()))
    reference = F.interpolate(result.logits, (16, 24), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(reference, batch[1], ignore_index=IGNORE)
    torch.testing.assert_close(result.terms["task"].raw, expected.detach())


@pytest.mark.parametrize("name", ["gskd", "kd", "mse"])
def test_each_term_alone_reaches_the_student_and_never_the_teacher(batch, name):
    teacher = Net(8).requires_grad_(True)
    distiller = Distiller(Net(5), teacher, {name: three_terms()[name]}, task_loss=None)
    distiller(*batch).loss.backward()
    assert distiller.student.body[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_teacher_stays_as_it_was_whatever_is_done_to_the_distiller(batch):
    teacher = Net(8)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(Net(5), teacher, three_terms())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5, weight_decay=0.1)
    for _ in range(3):
        distiller.train()
        teacher.train()  # somebody's callback: the next step must undo it
        distiller(*batch).loss.backward()
        optimizer.step()
    assert not any(module.training for module in teacher.modules())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_teacher_is_in_eval_mode_during_the_step(batch):
    teacher = Net(8)
    seen = []
    teacher.body[1].register_forward_hook(lambda module, args, output: seen.append(module.training))
    distiller = Distiller(Net(5), teacher, three_terms()).train()
    teacher.train()
    distiller(*batch)
    assert seen == [False]
    assert distiller.student.training


def test_parameters_and_state_hold_student_and_projectors_only():
    student, teacher = Net(5), Net(8)
    distiller = Distiller(student, teacher, three_terms())
    mine = {id(p) for p in student.parameters()}
    others = [p for p in distiller.parameters() if id(p) not in mine]
    assert [tuple(p.shape) for p in others] == [(8, 5, 1, 1), (8,)]
    assert all(key.startswith(("student.", "losses.mse.")) for key in distiller.state_dict())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in distiller.parameters()}
    own = {key.removeprefix("student.") for key in distiller.state_dict() if key.startswith("student.")}
    assert own == set(student.state_dict())


def test_the_teacher_moves_with_the_distiller():
    distiller = Distiller(Net(5), Net(8), three_terms()).to(torch.float64)
    assert distiller.teacher.head.weight.dtype == torch.float64


def test_terms_read_other_widths_and_resolutions(batch):
    distiller = Distiller(Net(5, stride=1), Net(8, stride=4), three_terms())
    result = distiller(*batch)
    result.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters())


def test_the_same_loss_twice_on_different_layers(batch):
    terms = {
        "early": Term(GSKDLoss(only_correct=False), 1, "body.0", "body.0"),
        "late": Term(GSKDLoss(only_correct=False), 1, "logits", "logits"),
    }
    result = Distiller(Net(5), Net(8), terms)(*batch)
    assert result.terms["early"].raw != result.terms["late"].raw


def test_a_batch_without_labels_is_a_differentiable_zero(batch):
    images, labels = batch
    distiller = Distiller(Net(5), Net(8), three_terms())
    result = distiller(images, torch.full_like(labels, IGNORE))
    result.loss.backward()
    assert result.loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in distiller.parameters())


def test_the_teacher_runs_in_its_own_precision(batch):
    teacher = Net(8)
    seen = []
    teacher.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    Distiller(Net(5), teacher, three_terms(), teacher_dtype=torch.bfloat16)(*batch)
    Distiller(Net(5), teacher, three_terms())(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Distiller(Net(5), teacher, three_terms())(*batch)
        Distiller(Net(5), teacher, three_terms(), teacher_dtype=torch.float32)(*batch)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]


def test_losses_are_fp32_inside_autocast(batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = Distiller(Net(5), Net(8), three_terms())(*batch)
    assert result.logits.dtype == torch.bfloat16
    assert result.loss.dtype == torch.float32
    assert all(value.raw.dtype == torch.float32 for value in result.terms.values())
    result.loss.backward()


def test_the_teacher_may_want_other_images(batch):
    teacher = Net(8)
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    images, labels = batch
    Distiller(Net(5), teacher, three_terms())(images, labels, images + 1)
    assert torch.equal(seen[0], images + 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda: (Net(5), None, three_terms()), "need a teacher"),
        (lambda: (Net(5), Net(8), {"task": Term(KDLoss())}), "'task' is taken"),
        (lambda: (Net(5), Net(8), {"kd": Term(KDLoss(), float("nan"))}), "weight is nan, expected a finite number"),
        (lambda: (Net(5), Net(8), {"kd": Term(KDLoss(), -1)}), "weight is -1, expected a finite number"),
        (lambda: (Net(5), Net(8), {"mse": Term(MSELoss())}), "layer"),
        (lambda: (Net(5), Net(8), {"mse": Term(MSELoss(), 1, "bodi", "body")}), "did you mean 'body'"),
    ],
)
def test_mistakes_are_named(arguments, words, batch):
    with pytest.raises(GSKDError, match=words):
        Distiller(*arguments())(*batch)


def test_neither_task_nor_terms_is_refused():
    with pytest.raises(GSKDError, match="task loss or at least one term"):
        Distiller(Net(5), task_loss=None)


def distil(student: nn.Module, teacher: nn.Module, student_layer: str, teacher_layer: str, classes: int) -> list[float]:
    """The README's five lines on random images; returns the losses."""
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, classes, (2, 64, 64))
    term = Term(GSKDLoss(only_correct=False), weight=1000, student=student_layer, teacher=teacher_layer)
    distiller = Distiller(student, teacher, {"gskd": term})
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        torch.manual_seed(1)  # the same points each time, so that the values can be compared
        result = distiller(images, labels)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.terms["gskd"].raw))
    return losses


def test_torchvision_teacher_to_smp_student():
    from torchvision.models.segmentation import deeplabv3_resnet50

    teacher = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5)
    student = smp.DeepLabV3Plus("tu-mobilenetv3_small_050", encoder_weights=None, classes=5, decoder_channels=32)
    losses = distil(student, teacher, "decoder", "classifier.0", 5)
    assert 0 < losses[-1] < losses[0]


def test_a_segformer_pair():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    def segformer(width: int) -> nn.Module:
        config = SegformerConfig(
            num_labels=5,
            hidden_sizes=[width, width, 2 * width, 2 * width],
            num_attention_heads=[1, 1, 2, 2],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=2 * width,
        )
        return SegformerForSemanticSegmentation(config)

    losses = distil(segformer(8), segformer(16), "segformer[last_hidden_state]", "decode_head.activation", 5)
    assert 0 < losses[-1] < losses[0]
    assert distil(segformer(8), segformer(16), "auto", "auto", 5)[0] > 0


@pytest.mark.parametrize("name", ["", "a.b", "keys", "type", "two words"])
def test_names_that_a_module_cannot_carry_are_refused(name):
    with pytest.raises(GSKDError, match="cannot be used"):
        Distiller(Net(5), Net(8), {name: Term(KDLoss())})


@pytest.mark.parametrize("same", [lambda net: net, lambda net: nn.Sequential(net.body, nn.Conv2d(5, 4, 1))])
def test_a_student_that_is_its_own_teacher_is_refused_and_not_frozen(same):
    student = Net(5)
    with pytest.raises(GSKDError, match=r"student and teacher share .* parameters, first 'body"):
        Distiller(student, same(student), {"kd": Term(KDLoss())})
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_layer_that_does_not_exist_is_found_before_the_first_step():
    with pytest.raises(GSKDError, match="did you mean 'body'"):
        Distiller(Net(5), Net(8), {"mse": Term(MSELoss(), 1, "body", "bodi")})


@pytest.mark.parametrize("stray", [-1, -100])
def test_labels_that_are_no_class_count_nowhere(batch, stray):
    images, labels = batch
    distiller = Distiller(Net(5).eval(), Net(8), {"kd": Term(KDLoss())}).eval()
    expected = distiller(images, labels).loss
    torch.testing.assert_close(distiller(images, labels.masked_fill(labels == IGNORE, stray)).loss, expected)


def test_labels_beyond_the_classes_are_named(batch):
    images, labels = batch
    with pytest.raises(GSKDError, match=r"labels: hold \[4, 200\], the student has classes 0 to 3"):
        Distiller(Net(5))(images, labels.masked_fill(labels == 0, 4).masked_fill(labels == 1, 200))


@pytest.mark.parametrize("wrong", [lambda y: y[:, None], lambda y: y.float(), lambda y: y[:1]])
def test_labels_of_another_kind_are_named(batch, wrong):
    with pytest.raises(GSKDError, match=r"labels: expected \(2, H, W\) int64"):
        Distiller(Net(5))(batch[0], wrong(batch[1]))


@pytest.mark.parametrize("size", [(7, 100), (4, 12)])
def test_labels_of_other_images_are_refused(batch, size):
    images, _ = batch
    with pytest.raises(GSKDError, match="are no labels of images of"):
        Distiller(Net(5))(images, torch.zeros(len(images), *size, dtype=torch.int64))


def test_images_that_are_not_normalised_are_refused(batch):
    images, labels = batch
    with pytest.raises(GSKDError, match=r"images: expected normalised floating point, got torch\.uint8"):
        Distiller(Net(5))(images.byte(), labels)


def test_models_with_different_classes_are_refused(batch):
    with pytest.raises(GSKDError, match="4 and 6 classes"):
        Distiller(Net(5), Net(8, classes=6), {"gskd": Term(GSKDLoss(), 1, "body", "body")})(*batch)


def test_the_teacher_cannot_be_replaced():
    """nn.Module would take the new one for a part of the student's, and go on with the old."""
    distiller = Distiller(Net(5), Net(5), {"kd": Term(KDLoss())})
    before = list(distiller.state_dict())
    with pytest.raises(GSKDError, match="expected another Distiller"):
        distiller.teacher = Net(5)
    assert list(distiller.state_dict()) == before


def test_without_a_teacher_there_is_none_to_ask(batch):
    images, labels = batch
    alone = Distiller(Net(5))
    for ask in (alone.fold_teacher, alone.probe_teacher, lambda images: alone.teacher_targets(images, labels)):
        with pytest.raises(GSKDError, match="has no teacher"):
            ask(images)


def test_targets_of_every_term_are_needed(batch):
    distiller = Distiller(
        Net(5), Net(5), {"kd": Term(KDLoss()), "mse": Term(MSELoss(), student="body", teacher="body")}
    )
    with pytest.raises(GSKDError, match="targets: lack 'mse'"):
        distiller(*batch, targets={"kd": distiller.teacher_targets(*batch)["kd"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": [Term(KDLoss())]}, "terms: expected Term by name"),
        ({"terms": {"kd": Term(KDLoss)}}, "term 'kd': loss is .*KDLoss.*; expected an nn.Module"),
        ({"terms": {"kd": Term(lambda *_: 0)}}, "term 'kd': loss is .*; expected an nn.Module"),
    ],
)
def test_terms_that_are_none_are_named(arguments, message):
    with pytest.raises(GSKDError, match=message):
        Distiller(Net(5), Net(5), **arguments)


@pytest.mark.parametrize("weight", ["much", None, True, float("nan"), -1])
def test_weights_that_are_no_number_are_named(weight):
    with pytest.raises(GSKDError, match=r"weight is .*, expected a finite number"):
        Term(KDLoss(), weight)


class Unreduced(nn.Module):
    inputs = "logits"

    def forward(self, student, teacher, pixels):
        return (student - teacher).square().mean(dim=(1, 2, 3))


def test_losses_that_are_no_scalar_are_named(batch):
    """Summed, as they were, they would be as many times too large as there are images or pixels."""
    with pytest.raises(GSKDError, match=r"task loss: gave \(2, .*expected a scalar"):
        Distiller(Net(5), task_loss=lambda logits, _: logits.square().mean(dim=1))(*batch)
    with pytest.raises(GSKDError, match=r"term 'mine': gave \(2,\); expected a scalar"):
        Distiller(Net(5), Net(5), {"mine": Term(Unreduced())})(*batch)


class Halved(nn.Module):
    inputs = "logits"

    def forward(self, student, teacher, pixels):
        return (0 * student).half().mean()


def test_a_silent_term_in_half_precision_is_heard_to_be_silent(batch):
    distiller = Distiller(Net(5), Net(5), {"mine": Term(Halved())})
    for _ in range(19):
        distiller(*batch)
    with pytest.raises(GSKDError, match="term 'mine': its gradient"):
        distiller(*batch)


def test_data_parallel_is_refused():
    with pytest.raises(GSKDError, match="DistributedDataParallel"):
        Distiller(Net(5), Net(5), {"kd": Term(KDLoss())})._replicate_for_data_parallel()


def test_more_classes_than_labels_can_tell_from_what_is_ignored_are_refused():
    wide = nn.Conv2d(3, 256, 1)
    with pytest.raises(GSKDError, match="gives 256 classes; expected at most 255"):
        Distiller(wide)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))


def test_a_bare_loss_is_refused():
    with pytest.raises(GSKDError, match=r"'kd' is a KDLoss; expected Term"):
        Distiller(Net(5), Net(8), {"kd": KDLoss()})


class Levels(Net):
    """A network with two layers to compare."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.more = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Conv2d(2 * width, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.more(self.body(images)).relu())


def test_a_loss_that_compares_layers_gets_them_in_order(batch):
    seen = []

    class Spy(PSDLoss):
        def forward(self, student, teacher, pixels):
            seen.extend([[maps.shape[1] for maps in student], [maps.shape[1] for maps in teacher]])
            return super().forward(student, teacher, pixels)

    terms = {
        "psd": Term(Spy(), 1, ["body", "more"], ("body", "more")),
        "again": Term(Spy(), 1, ["more", "body"], ["more", "body"]),
        "mse": Term(MSELoss(3, 4), 1, "body", "body"),  # the same tap alone
    }
    result = Distiller(Levels(3), Levels(4), terms)(*batch)
    assert seen == [[3, 6], [4, 8], [6, 3], [8, 4]]
    result.loss.backward()


def test_layers_of_a_wrong_kind_are_named():
    with pytest.raises(GSKDError, match=r"layers: expected a name or a list of names, got \['body', 3\]"):
        Distiller(Net(3), Net(4), {"at": Term(ATLoss(), 1, ["body", 3], "body")})
    with pytest.raises(GSKDError, match="Net: no automatic levels layer is known"):
        Distiller(Net(3), Net(4), {"psd": Term(PSDLoss())})


class Deaf(nn.Module):
    """A loss that has lost its gradient, as losses on detached or re-gathered features do."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until, self.calls = until, 0

    def forward(self, student, teacher, pixels):
        self.calls += 1
        difference = (student.mean() - teacher.mean()) ** 2
        return difference if self.calls > self.until else difference.detach()


@pytest.mark.parametrize("weight", [1, 0])
def test_a_term_that_never_reaches_the_student_stops_the_run(batch, weight):
    distiller = Distiller(
        Net(3), Net(4), {"at": Term(ATLoss(), 1, "body", "body"), "x": Term(Deaf(99), weight, "body", "body")}
    )
    for _ in range(19):
        distiller(*batch)
    if weight:
        with pytest.raises(
            GSKDError, match="term 'x': its gradient to the student's 'body' was zero in all of the first 20 passes"
        ):
            distiller(*batch)
    else:
        distiller(*batch)  # what is only to be watched may be silent


def test_a_term_that_is_heard_once_is_left_alone(batch):
    distiller = Distiller(Net(3), Net(4), {"x": Term(Deaf(18), 1, "body", "body")})
    for _ in range(19):
        distiller(*batch)
    distiller.losses["x"].until = 999
    for _ in range(25):
        distiller(*batch)


def test_data_without_a_label_stops_the_run(batch):
    images, labels = batch
    distiller = Distiller(Net(3))
    for _ in range(19):
        distiller(images, torch.full_like(labels, 255))
    with pytest.raises(GSKDError, match="no gradient in all of the first 20 passes: is a pixel labelled"):
        distiller(images, torch.full_like(labels, 255))
    labelled = Distiller(Net(3))
    labelled(images, labels)
    for _ in range(25):
        labelled(images, torch.full_like(labels, 255))


def test_a_gradient_too_small_for_half_precision_is_heard(batch):
    """The mean over a large map: each entry's gradient is below what fp16 holds, though a loss scaler would save it."""

    class Half(nn.Module):
        def forward(self, student, teacher, pixels):
            return (student.half().square().float().mean() * 1e-6).float()

    distiller = Distiller(Net(3), Net(4), {"x": Term(Half(), 1, "body", "body")})
    for _ in range(25):
        distiller(*batch)


def test_one_map_losses_refuse_several_layers():
    with pytest.raises(GSKDError, match=r"layers: MSELoss compares one layer of each network, got \['body'\]"):
        Distiller(Net(3), Net(4), {"mse": Term(MSELoss(3, 4), 1, ["body"], ["body"])})


def test_banks_are_not_sent_between_processes():
    distiller = Distiller(Net(3), Net(4), {"memory": Term(CIRKDMemoryLoss(3, 4, 4), 1, "body", "body")})
    named = dict(distiller.named_buffers())
    assert distiller._ddp_params_and_buffers_to_ignore
    for name in distiller._ddp_params_and_buffers_to_ignore:
        assert torch.equal(named[name], torch.zeros_like(named[name]))  # the same everywhere before the first step


def test_evaluation_without_gradient_is_no_silence(batch):
    distiller = Distiller(Net(3), Net(4), {"at": Term(ATLoss(), 1, "body", "body")})
    with torch.no_grad():
        for _ in range(25):
            distiller(*batch)
