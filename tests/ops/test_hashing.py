import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.ops.hashing import array_hash, batch_hash
from mnv2_jax.training import mesh as meshes


def make_batch(seed=0, size=8):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 6, 6, 3), np.uint8),
        "label": rng.integers(0, 10, size, np.int32),
        "mask": np.ones(size, bool),
        "teacher_logits": rng.normal(size=(size, 4)).astype(np.float32),
    }


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_do_not_change_it(devices):
    mesh = meshes.make_mesh(jax.devices()[:devices])
    sharded = meshes.make_feed(mesh, None)(make_batch())
    assert jax.jit(batch_hash)(sharded) == batch_hash(jax.tree.map(jnp.asarray, make_batch()))


def test_a_bit_an_order_and_a_name_change_it():
    batch = jax.tree.map(jnp.asarray, make_batch())
    hashes = {int(batch_hash(batch))}
    image = batch["image"]
    changed = [
        {**batch, "image": image.at[3, 2, 1, 0].set(image[3, 2, 1, 0] ^ 1)},
        {**batch, "image": image[::-1]},
        {**batch, "image": image[:, :, ::-1]},
        {name: array[jnp.array([1, 0, 2, 3, 4, 5, 6, 7])] for name, array in batch.items()},
        {**batch, "label": batch["label"].at[7].add(1)},
        {**batch, "mask": batch["mask"].at[0].set(False)},
        {**batch, "teacher_logits": batch["teacher_logits"].at[0, 0].mul(-1)},
        jax.tree.map(jnp.asarray, make_batch(seed=1)),
    ]
    hashes |= {int(batch_hash(other)) for other in changed}
    assert len(hashes) == len(changed) + 1


def test_devices_do_not_change_the_hash_of_an_array():
    array = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    for axes in ((), ("a",), (("a", "b"),), (None, "b"), ("b", "a")):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        assert jax.jit(array_hash)(jax.device_put(array, place)) == array_hash(jnp.asarray(array))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, jnp.bfloat16, np.float32, np.float64])
def test_a_bit_and_an_order_change_the_hash_of_an_array(dtype, x64):
    array = np.arange(1, 25).astype(dtype)
    array[::3] = 0
    changed = [array, array[::-1], np.concatenate([array, array[:1]])]
    for place in (0, 5, 23):
        bits = array.copy().view(np.uint8)
        bits[place * array.itemsize] ^= 1
        changed.append(bits.view(dtype))
    if jnp.issubdtype(dtype, jnp.floating):
        changed.append(np.where(array == 0, -array, array))  # zeros of the other sign
    assert len({int(array_hash(jnp.asarray(other))) for other in changed}) == len(changed)
