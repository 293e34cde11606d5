import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from gskd import GSKDError
from gskd.data.loading import _readable, batches, moved


class Numbers(Dataset):
    def __init__(self, at_three=None) -> None:
        self.at_three = at_three

    def __len__(self) -> int:
        return 8

    def __getitem__(self, item: int) -> int:
        if item == 3 and self.at_three is not None:
            self.at_three()
        return item


def refuse() -> None:
    raise GSKDError("3.png: not a readable image")


def fault() -> None:
    raise RuntimeError("mine")


def missing() -> None:
    raise FileNotFoundError("3.png")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_dataset_and_no_process_is_left(workers):
    before = torch.random.get_rng_state()
    with batches(Numbers(), workers, batch_size=4) as found:
        assert [batch.tolist() for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_user_is_one_line_also_from_a_worker(workers):
    with pytest.raises(GSKDError, match=r"^3.png: not a readable image$"), batches(Numbers(refuse), workers) as found:
        list(found)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_any_other_error_is_not_hidden(workers):
    with pytest.raises(RuntimeError, match="mine"), batches(Numbers(fault), workers) as found:
        list(found)


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(GSKDError, match=r"^data.workers: a process that loads"), batches(Numbers(die), 1) as found:
        list(found)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "socket")])
def test_a_worker_that_is_killed_while_its_batch_is_fetched(error):
    def lost():
        yield 1
        raise error

    with pytest.raises(GSKDError, match=r"^data.workers: a process that loads"):
        list(_readable(lost(), workers=1))
    with pytest.raises(type(error)):
        list(_readable(lost(), workers=0))


KILLED = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")
"""What torch raises from its signal handler: wherever the main process is at that moment."""


def use_one(do) -> None:
    with batches(Numbers(), 2) as found:
        next(found)
        do()


def test_a_worker_that_is_killed_while_its_batch_is_used():
    def use():
        raise KILLED

    with pytest.raises(GSKDError, match=r"^data.workers: a process that loads"):
        use_one(use)
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_while_all_are_ended(monkeypatch):
    def killed(self):
        raise KILLED

    with pytest.raises(GSKDError, match=r"^data.workers: a process that loads"):
        use_one(lambda: monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", killed))
    assert multiprocessing.active_children() == []


def test_a_missing_file_of_the_dataset_is_no_killed_worker():
    with pytest.raises(FileNotFoundError, match=r"3\.png"), batches(Numbers(missing), 1) as found:
        list(found)


def test_leaving_early_ends_the_workers():
    with batches(Numbers(), 2) as found:
        next(found)
    assert multiprocessing.active_children() == []


def test_moved_keeps_lists_and_dictionaries():
    batch = [torch.ones(2), {"a": {"b": torch.zeros(1)}}]
    assert moved(batch, torch.device("meta"))[1]["a"]["b"].device.type == "meta"
