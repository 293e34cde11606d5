"""Two gloo processes against one: started once for the module, each test looks at its share of the results."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gskd.distributed import gather_with_grad, mean_over_processes, rank, sum_over_processes, world_size
from gskd.losses import LOSSES, Pixels

WIDTHS = {"student_channels": 3, "teacher_channels": 3}
OPTIONS = {  # with nothing drawn at random, as processes draw for themselves
    "gskd": {"samples_per_class": 30, "group_size": 90, "policy": "mask", "projector": True, **WIDTHS},
    "gskd_logits": {"samples_per_class": 30, "group_size": 90, "policy": "mask"},
    "mgd": {**WIDTHS, "mask_ratio": 0.0},
    "afdcd": {**WIDTHS, "mask_ratio": 0.0, "groups": 3, "pool": 1, "patch": 2},
    "cirkd_memory": {**WIDTHS, "num_classes": 3, "samples_per_class": 30, "pixel_contrast": 6000},
    "adversarial": {"num_classes": 3, "width": 4, "penalty": 0.0},
}


def examples(seed=3):
    """Four images in all, two per process; the second process has far fewer valid pixels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, 1, 1, generator=generator)
    inputs, teacher = torch.randn(4, 4, 5, 6, generator=generator), torch.randn(4, 3, 5, 6, generator=generator)
    labels = teacher.argmax(1)
    labels[2, :, 2:] = 255
    labels[3] = 255  # an image without points: counts in no mean
    return weight, inputs, teacher, labels


def gradient(name, part):
    weight, inputs, teacher, labels = examples()
    layer = torch.nn.Conv2d(4, 3, 1, bias=False)
    layer.weight.data.copy_(weight)
    model = torch.nn.parallel.DistributedDataParallel(layer) if world_size() > 1 else layer
    torch.manual_seed(0)  # for layers of the term's own
    term = LOSSES[name](**OPTIONS.get(name, {}))
    student, target = model(inputs[part]), teacher[part]
    levels = ([student, student**2], [target, target**2]) if term.inputs == "levels" else (student, target)
    term(*levels, Pixels(labels[part], teacher[part])).backward()
    return layer.weight.grad


def gathered_gradient(rows):
    """A loss over all pairs of rows, which no process can compute from its own."""
    rows = rows.clone().requires_grad_()
    everyone = gather_with_grad(rows)
    (everyone @ everyone.T).tanh().sum().backward()
    return rows.grad


def _work(place, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=place, world_size=2)
    part = slice(2 * place, 2 * place + 2)
    own = torch.tensor([1.0 + place])
    results = {name: gradient(name, part) for name in LOSSES}
    results["gather"] = gathered_gradient(torch.arange(8.0).view(4, 2)[2 * place : 2 * place + 2] / 9)
    results["sum"], results["own"] = sum_over_processes(own), own
    results["none"] = mean_over_processes(torch.zeros(()), torch.zeros((), dtype=torch.int64))
    results["rank"] = torch.tensor([rank(), world_size()])
    torch.save(results, f"{folder}/{place}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("gloo"))
    mp.spawn(_work, (folder,), nprocs=2)
    return [torch.load(f"{folder}/{place}.pt") for place in range(2)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_have_the_gradient_of_one(results, name):
    expected = gradient(name, slice(None))
    assert expected.abs().max() > 1e-4
    for result in results:
        torch.testing.assert_close(result[name], expected, rtol=1e-4, atol=1e-7)


def test_gathered_rows_carry_their_gradient_home(results):
    """Trap 1: gathered without autograd, the loss changes and the gradient is missing."""
    expected = 2 * gathered_gradient(torch.arange(8.0).view(4, 2) / 9)  # both processes compute the whole loss
    torch.testing.assert_close(torch.cat([r["gather"] for r in results]), expected)


def test_sums_leave_their_argument_alone(results):
    assert [r["sum"].item() for r in results] == [3, 3]
    assert [r["own"].item() for r in results] == [1, 2]
    assert [r["rank"].tolist() for r in results] == [[0, 2], [1, 2]]
    assert [r["none"].item() for r in results] == [0, 0]


def test_one_process_needs_nothing():
    tensor = torch.randn(3, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert sum_over_processes(tensor) is tensor
    assert gather_with_grad(tensor) is tensor
    assert mean_over_processes(torch.tensor(6.0), torch.tensor(4)) == 1.5
