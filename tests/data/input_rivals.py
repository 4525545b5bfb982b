"""Times our input pipeline beside tf.data and torch's DataLoader doing the same work, turn by turn.

    python -m tests.data.input_rivals DIR [--repeats N] [--json]

The work: JPEG files -> random-resized crops of 224 px (bilinear, antialiased) -> uint8 batches of 64 in host memory, by
as many processes or threads as there are cores. DIR is a folder as `data.name=folder` takes it. Needs a Python with
torch, torchvision and tensorflow; it is no test, and no part of the package imports those.
"""

import argparse
import itertools
import json
import os
import statistics
import time

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data.sources import open_dataset
from tests.data.classified import train_batches

BATCH, SIZE = 64, 224
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DRAINED = 12 * CORES
"""Batches taken before the clock starts: three times what any of them prepares ahead of need, so that the one whose
turn is over has done so, too."""


def ours(split):
    """Worker processes, as a training run has them."""
    return (batch["image"] for batch in train_batches(DataConfig(batch_size=BATCH, resolution=SIZE), split, seed=0))


def tf_data(paths, labels):
    """tf.data as TensorFlow's performance guide has it: partial decoding, a parallel map, prefetch."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(CORES)
    tf.config.threading.set_intra_op_parallelism_threads(1)  # the map is parallel enough

    def view(path, label):
        content = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(content)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4)),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        crop = tf.io.decode_and_crop_jpeg(content, window, channels=3)
        image = tf.image.resize(crop, (SIZE, SIZE), "bilinear", antialias=True)
        return tf.cast(tf.round(image), tf.uint8), label

    options = tf.data.Options()
    options.deterministic = False  # in its favour: ours and torch's keep their order
    options.threading.private_threadpool_size = CORES
    data = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths)).repeat()
    # Not AUTOTUNE: its buffers grow while the others have their turn, and would then be measured as speed.
    data = data.map(view, num_parallel_calls=CORES).batch(BATCH).prefetch(2)
    return (image for image, _ in data.with_options(options).as_numpy_iterator())


class TorchImages:
    """As torchvision's reference training reads ImageNet: its PIL path."""

    def __init__(self, paths, labels):
        from torchvision import transforms

        self.paths, self.labels = paths, labels
        self.view = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.PILToTensor()])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from PIL import Image

        with open(self.paths[index], "rb") as file:
            return self.view(Image.open(file).convert("RGB")), self.labels[index]


def torch_loader(paths, labels):
    """Workers that stay, and read ahead."""
    import torch

    torch.set_num_threads(1)
    data = TorchImages(paths, labels)
    # Images drawn with replacement, without end: a new epoch would wait for its first batches.
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(
        data, BATCH, sampler=sampler, num_workers=CORES, prefetch_factor=2, persistent_workers=True
    )
    return (image for image, _ in loader)


def rate(batches, seconds):
    """Images a second, once what was made before is used up."""
    for _ in itertools.islice(batches, DRAINED):
        pass
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds or count % (BATCH * CORES):
        count += len(next(batches))
    return count / (time.perf_counter() - begun)


def measure(path, repeats, seconds):
    """{name: {images_per_second, images_per_second_per_core, ours_over_it}}: medians over the turns."""
    # Of any folder the training images alone are read.
    split = open_dataset(DataConfig(name="folder", path=path, eval_split="train")).train
    paths = [os.path.join(split.read.root, os.fsdecode(name)) for name in split.read.names]
    labels = np.asarray(split.labels)
    # TensorFlow comes last: its threads must not be there when the others start their processes.
    running = {"ours": ours(split)}
    next(running["ours"])
    running["torch DataLoader"] = torch_loader(paths, labels)
    next(running["torch DataLoader"])
    running["tf.data"] = tf_data(paths, labels)
    turns = [{name: rate(batches, seconds) for name, batches in running.items()} for _ in range(repeats)]
    return {
        name: {
            "images_per_second": (median := statistics.median(turn[name] for turn in turns)),
            "images_per_second_per_core": median / CORES,
            "ours_over_it": statistics.median(turn["ours"] / turn[name] for turn in turns),
        }
        for name in running
    }


def main():
    """Reads the flags, takes the turns, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="DIR", help="train/CLASS/*.jpg lie below")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="shortest time of a turn (default: 4)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.path, args.repeats, args.seconds)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{CORES} cores\n{'':<18} {'images/s':>9} {'per core':>9} {'ours / it':>10}")
    for name, row in found.items():
        rates = f"{row['images_per_second']:>9,.0f} {row['images_per_second_per_core']:>9,.0f}"
        print(f"{name:<18} {rates} {row['ours_over_it']:>10.2f}")


if __name__ == "__main__":
    main()
