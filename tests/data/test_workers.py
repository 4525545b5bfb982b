"""Worker processes: the same bytes as without, errors that surface, and nothing left behind."""

import contextlib
import dataclasses
import errno
import gc
import itertools
import os
import pathlib
import pickle
import resource
import select
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import psutil
import pytest

from mnv2_jax.config import DataConfig
from mnv2_jax.data import shared
from mnv2_jax.data.sources import open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from tests import cli
from tests.data.classified import eval_batches, train_batches

DATA = DataConfig(name="folder", resolution=16, batch_size=4, eval_batch_size=5, num_workers=2)
DAMAGE = "photos/13.jpg: the file is empty; restore or remove it"


@pytest.fixture(scope="module")
def split(photos_tar) -> Split:
    return open_dataset(DataConfig(name="folder", path=str(photos_tar))).train


def workers() -> list[psutil.Process]:
    """Python's resource tracker is a child too, but it stays for good."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def assert_no_workers():
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers() == []


@dataclasses.dataclass(frozen=True)
class Spoilt:
    """Reads as the split does, except for one image."""

    split: Split
    index: int
    die: bool

    def __call__(self, index):
        if index != self.index:
            return self.split.read(index)
        if self.die:
            os._exit(9)
        raise UserError(DAMAGE)


@dataclasses.dataclass(frozen=True)
class Backends:
    """An image that says how many accelerator backends its process has initialised; never read once a file is there."""

    dead: str = ""

    def __call__(self, index):
        if os.path.exists(self.dead):
            time.sleep(3600)
        from jax._src import xla_bridge

        return np.full((16, 16, 3), 100 * xla_bridge.backends_are_initialized() + index, np.uint8)


def test_workers_give_the_same_bytes_in_the_same_order(split):
    alone = dataclasses.replace(DATA, num_workers=0)
    pairs = [
        (itertools.islice(train_batches(DATA, split, 1, start_step=2), 7), train_batches(alone, split, 1, 2)),
        (eval_batches(DATA, split), eval_batches(alone, split)),
    ]
    for many, one in pairs:
        count = 0
        for a, b in zip(many, one, strict=False):
            count += 1
            assert a.keys() == b.keys()
            for key in a:
                assert type(a[key]) is np.ndarray
                assert a[key].dtype == b[key].dtype
                np.testing.assert_array_equal(a[key], b[key])
        assert count in (7, 4)
    del pairs, many, one
    gc.collect()
    assert_no_workers()


def test_a_batch_is_its_holders_until_the_last_view_or_device_array_of_it_is_gone(split):
    held, alone = [], []
    one = train_batches(dataclasses.replace(DATA, num_workers=0), split, seed=3)
    with contextlib.closing(train_batches(DATA, split, seed=3)) as many:
        for number in range(24):
            image = next(many)["image"]
            held.append([image, image[1:, ::2], jax.device_put(image)][number % 3])
            del image
            alone.append(next(one)["image"])
    assert_no_workers()
    for number, (mine, true) in enumerate(zip(held, alone, strict=True)):
        np.testing.assert_array_equal(mine, true[1:, ::2] if number % 3 == 1 else true)


def test_segments_are_filled_again_and_none_is_left():
    def segments() -> int:
        gc.collect()  # JAX lets go of what other tests' arrays alias
        return sum("mnv2_jax" in entry.path for entry in psutil.Process().memory_maps(grouped=False))

    split = Split("train", np.zeros(17, np.int32), Backends())
    before = segments()
    batches = train_batches(dataclasses.replace(DATA, crop="none"), split, seed=0)
    first = next(batches)["image"]
    for _ in range(80):
        next(batches)
    # A worker has one in hand, three on the way, and ours, each with its message; the first is held.
    assert 3 <= segments() - before <= 2 * 2 * 5 + 1
    del batches
    assert segments() - before == 1
    assert first.shape == (4, 16, 16, 3)


@pytest.fixture
def receiver(monkeypatch):
    """A receiver whose worker is this process itself."""
    monkeypatch.setattr(shared, "_segments", None)
    shared.share_from(3)
    return shared.Receiver()


def sent(batch):
    """A parcel as it comes out of the queue between two processes."""
    return pickle.loads(pickle.dumps(shared.parcel(batch)))


def mapped():
    """How many segments this process has open, as worker and as receiver, by what the system says of its memory."""
    return pathlib.Path("/proc/self/maps").read_text().count("/memfd:mnv2_jax")


def test_a_segment_grows_with_what_it_must_hold(receiver):
    before = mapped()
    for number in (1, 5, 2, 9, 9, 3):
        filled = shared.empty((number, 2, 2, 3))
        filled[...] = number
        batch = receiver.open(sent({"image": filled, "index": np.arange(number)}))
        assert (batch["image"] == number).all()
        assert batch["image"].shape == (number, 2, 2, 3)
        np.testing.assert_array_equal(batch["index"], np.arange(number))
        del batch, filled
    assert mapped() == before + 4  # and those of the messages


def test_messages_do_not_take_the_segments_of_pictures(receiver):
    """Whatever is on the way and held, no more segments become large than pictures are there together."""
    rng, on_the_way, held = np.random.default_rng(0), [], []
    for _ in range(200):
        while len(on_the_way) + len(held) < 4 and rng.random() < 0.7:
            on_the_way.append(sent({"image": shared.empty((200, 200, 3)), "index": np.arange(4)}))
        while on_the_way and rng.random() < 0.6:
            held.append(receiver.open(on_the_way.pop(0)))
        while held and rng.random() < 0.6:
            held.pop(int(rng.integers(len(held))))
    large = [segment for segment in shared._segments._segments if len(segment) > 200 * 200 * 3]
    assert len(large) == 4


def test_messages_are_so_short_that_they_are_written_whole(receiver):
    """Or a worker that ends could leave a part of one in the pipe."""
    arrays = {f"array_{number}": np.full((64, 100, 4), number, np.float32) for number in range(40)}
    pictures = {f"image_{number}": shared.empty((8, 8, 3)) for number in range(40)}
    message = pickle.dumps(shared.parcel(arrays | pictures))
    assert len(message) < select.PIPE_BUF / 2
    batch = receiver.open(pickle.loads(message))
    np.testing.assert_array_equal(batch["array_39"], arrays["array_39"])
    message = pickle.dumps(shared.parcel(UserError("x" * 10_000)))
    assert len(message) < select.PIPE_BUF / 2
    with pytest.raises(UserError, match="xxx"):
        receiver.open(pickle.loads(message))


CLOSED_EARLY = """
import numpy as np, time
from mnv2_jax.data.workers import in_order
batches = in_order(lambda step: {"boxes": np.full((64, 400, 4), step, np.float32)}, 0, 1000, 2)
next(batches)
time.sleep(2)  # the workers fill the pipe
batches.close()
"""


def test_a_stream_of_large_arrays_is_closed_while_its_pipe_is_full():
    subprocess.run([sys.executable, "-c", CLOSED_EARLY], cwd=cli.ROOT, timeout=120, check=True)


def test_arrays_that_are_there_together_have_segments_of_their_own(receiver):
    first, second = shared.empty((4, 1, 1, 3)), shared.empty((5, 1, 1, 3))
    first[...], second[...] = 7, 8
    both = receiver.open(sent({"image": first, "mask": second}))
    third = shared.empty((4, 1, 1, 3))
    third[...] = 9
    assert (both["image"].max(), both["mask"].max()) == (7, 8)
    (segment,) = {id(both["image"].base)}
    del both
    again = receiver.open(sent({"image": third}))
    assert id(again["image"].base) != segment


def test_an_array_that_would_be_lost_or_sent_in_part_is_refused(receiver):
    for batch in ({}, {"image": shared.empty((4, 1, 1, 3))[:2][1:]}):
        shared.empty((2, 1, 1, 3))
        with pytest.raises(AssertionError, match="whole and once"):
            shared.parcel(batch)


def test_a_fork_does_not_give_back_what_its_parent_holds(receiver):
    filled = shared.empty((4, 1, 1, 3))
    image = receiver.open(sent({"image": filled}))["image"]
    shared._give_back(image.base, os.getpid() + 1)
    assert image.base[0] == 1
    shared._give_back(image.base, os.getpid())
    assert image.base[0] == 0


def test_without_memory_the_error_says_what_to_do(receiver, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"18 MB .*data\.num_workers"):
        shared.empty((128, 224, 224, 3))


@pytest.mark.parametrize("spoilt", [None, 9])
def test_what_was_made_ahead_of_need_outlives_the_end_and_an_error(split, spoilt):
    """The consumer may be compiling for minutes when the workers are through."""
    read = split if spoilt is None else dataclasses.replace(split, read=Spoilt(split, spoilt, die=False))
    batches, alone = eval_batches(DATA, read), eval_batches(dataclasses.replace(DATA, num_workers=0), split)
    found = [next(batches)]
    time.sleep(2)
    with contextlib.suppress(UserError) if spoilt else contextlib.nullcontext():
        found += batches
    assert len(found) == (4 if spoilt is None else 1)  # the image 9 is of the second
    for mine, true in zip(found, alone, strict=False):
        np.testing.assert_array_equal(mine["image"], true["image"])
    assert_no_workers()


def test_an_unreadable_image_is_the_same_line_as_without_workers(split):
    spoilt = dataclasses.replace(split, read=Spoilt(split, 9, die=False))
    batches = train_batches(DATA, spoilt, seed=0)
    with pytest.raises(UserError) as caught:
        for _ in itertools.islice(batches, 10):
            pass
    assert str(caught.value) == DAMAGE
    assert_no_workers()


def test_a_worker_that_dies_is_reported(split):
    spoilt = dataclasses.replace(split, read=Spoilt(split, 9, die=True))
    with pytest.raises(UserError, match=r"exit code 9\).*data\.num_workers"):
        list(eval_batches(DATA, spoilt))
    assert_no_workers()


def test_workers_outlive_signals_to_the_group_initialise_no_accelerator_and_end_on_close(tmp_path):
    dead = tmp_path / "dead"
    split = Split("train", np.zeros(17, np.int32), Backends(str(dead)))
    batches = train_batches(dataclasses.replace(DATA, crop="none"), split, seed=0)
    for _ in range(2):  # one of each worker: from then on they know what to do with a signal
        assert next(batches)["image"].max() < 100
    assert len(workers()) == 2
    for worker in workers():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            worker.send_signal(number)
    for _ in range(8):  # more than may have been read ahead
        next(batches)
    assert len(workers()) == 2
    dead.touch()  # from now on what they read never comes
    time.sleep(0.5)
    begun = time.monotonic()
    batches.close()
    assert_no_workers()
    assert time.monotonic() - begun < 15


def test_the_end_of_the_main_process_is_quiet_and_takes_its_workers_along(photos_tar, tmp_path):
    """Once with the stream left open at the end, and once killed; a script without a main guard, and standard input.

    Workers are sent more than the pipe holds by which they are started.
    """
    code = textwrap.dedent(
        f"""
        import dataclasses, os, signal, sys
        import psutil
        from mnv2_jax.config import DataConfig
        from mnv2_jax.data.sources import open_dataset
        from mnv2_jax.data.streams import train_batches
        from mnv2_jax.data.views.classification import TrainView

        data = DataConfig(name="folder", path={str(photos_tar)!r}, resolution=16, batch_size=4, num_workers=1)
        split = dataclasses.replace(open_dataset(data).train, name="x" * 200_000)
        batches = train_batches(data, TrainView(data), split, seed=0)
        next(batches)
        children = psutil.Process().children(recursive=True)
        print(*(child.pid for child in children), flush=True)
        for child in children:
            child.send_signal(signal.SIGHUP)  # as a terminal that is gone sends it to all
        for _ in range(4):
            next(batches)
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    for source, how, returncode in ((str(script), "end", 0), ("-", "kill", -signal.SIGKILL)):
        process = subprocess.Popen(
            [sys.executable, source, how],
            env=os.environ | {"PYTHONPATH": str(cli.ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output, errors = process.communicate(code if source == "-" else None, timeout=60)
        assert process.returncode == returncode
        pids = [int(pid) for pid in output.split()]
        assert len(pids) == 2
        deadline = time.monotonic() + 10
        while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(psutil.pid_exists, pids))
        if how == "end":
            assert errors == ""


def test_many_workers_may_have_their_file_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        next(iter(eval_batches(DATA, Split("val", np.zeros(17, np.int32), Backends()))))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard if hard >= 0 else 2**14, 2**14)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    gc.collect()
    assert_no_workers()
