"""Compares optimisers and schedules with those of PyTorch, timm, Keras and TensorFlow, over 200 steps.

The optimisers train a network with a norm on the digits, in float64, while the learning rate falls: what stands inside
the momentum and what outside makes no difference otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from sklearn.datasets import load_digits

from mnv2_jax.config import OptimConfig
from mnv2_jax.training.optim import make_transformation
from mnv2_jax.training.schedules import make_schedule

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the variables of Keras
]

STEPS, BATCH, PEAK = 200, 64, 0.02
KERNELS = {"hidden/kernel", "classifier/kernel"}
BIASES = {"hidden/bias", "classifier/bias"}
NORMS = {"norm/hidden_norm/scale", "norm/hidden_norm/bias"}
DECAYED = {"all": KERNELS | BIASES | NORMS, "no_norm": KERNELS | BIASES, "no_norm_bias": KERNELS}


def rate(step):
    return PEAK * 0.5 * (1 + np.cos(np.pi * step / STEPS))


def loss(flat, step, l2, decayed):
    """Computes the cross-entropy of one batch, with the L2 that Keras and TF-slim put into the loss."""
    images, labels = load_digits(return_X_y=True)
    chosen = (jnp.arange(BATCH) + BATCH * step) % len(labels)
    x = jnp.asarray(images / 16)[chosen] @ flat["hidden/kernel"] + flat["hidden/bias"][None]
    # Not the mean: the bias would have no effect on it, and Adam would turn the rounding of its gradient into steps.
    x = x / jnp.sqrt(jnp.square(x).mean(0, keepdims=True) + 1e-3)
    x = jnp.tanh(x * flat["norm/hidden_norm/scale"][None] + flat["norm/hidden_norm/bias"][None])
    logits = x @ flat["classifier/kernel"] + flat["classifier/bias"][None]
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[chosen][:, None], 1).mean()
    return entropy + l2 / 2 * sum(jnp.square(flat[name]).sum() for name in sorted(decayed))


gradient = jax.jit(jax.grad(loss), static_argnames=("l2", "decayed"))


def begin():
    rng = np.random.default_rng(0)
    shapes = {"hidden/kernel": (64, 24), "hidden/bias": (24,), "classifier/kernel": (24, 10), "classifier/bias": (10,)}
    params = {name: rng.normal(size=shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
    return params | {"norm/hidden_norm/scale": np.ones(24), "norm/hidden_norm/bias": rng.normal(size=24) * 0.1}


def our_optimizer(**options):
    optim = OptimConfig(schedule="cosine", **options)
    transformation = make_transformation(optim, make_schedule(optim, PEAK, 10.0, STEPS))
    params = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(begin(), sep="/"))
    state = transformation.init(params)
    update = jax.jit(transformation.update)

    def step(grads, k):
        nonlocal params, state
        updates, state = update(traverse_util.unflatten_dict(grads, sep="/"), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return traverse_util.flatten_dict(params, sep="/")

    return step


def of_torch(make, decayed, **groups):
    """Wraps the optimiser ``make(parameter groups)``; the parameters ``decayed`` have their own group."""
    torch = pytest.importorskip("torch")
    weights = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in begin().items()}
    optimizer = make(
        [
            {"params": [w for name, w in weights.items() if name in decayed], **groups},
            {"params": [w for name, w in weights.items() if name not in decayed], **groups, "weight_decay": 0.0},
        ]
    )

    def step(grads, k):
        for name, weight in weights.items():
            weight.grad = torch.tensor(np.asarray(grads[name]))
        for group in optimizer.param_groups:
            group["lr"] = rate(k)
        optimizer.step()
        return {name: weight.detach().numpy().copy() for name, weight in weights.items()}

    return step


def of_keras(make, decayed):
    keras = import_keras()
    weights = {name: keras.Variable(value, name=name.replace("/", "_")) for name, value in begin().items()}
    optimizer = make(keras.optimizers)
    optimizer.exclude_from_weight_decay(var_list=[w for name, w in weights.items() if name not in decayed])
    optimizer.build(list(weights.values()))

    def step(grads, k):
        optimizer.learning_rate = rate(k)
        optimizer.apply([grads[name] for name in weights], list(weights.values()))
        return {name: np.array(weight) for name, weight in weights.items()}

    return step


def import_keras():
    """Over JAX (see conftest.py), in float64."""
    return pytest.importorskip("keras", reason="pip install .[parity]")


@pytest.fixture
def keras_x64(x64):
    keras = import_keras()
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def of_tf1(**options):
    tf = pytest.importorskip("tensorflow", reason="TF1's optimiser is compared where TensorFlow is installed")
    wide = {name: tf.constant(value, tf.float64) for name, value in options.items()}
    now = tf.Variable(0.0, dtype=tf.float64)
    optimizer = tf.compat.v1.train.RMSPropOptimizer(learning_rate=lambda: now.value(), **wide)
    weights = {name: tf.Variable(value) for name, value in begin().items()}

    def step(grads, k):
        now.assign(rate(k))
        optimizer.apply_gradients([(tf.constant(np.asarray(grads[name])), weights[name]) for name in weights])
        return {name: weight.numpy() for name, weight in weights.items()}

    return step


def largest_difference(our_step, their_step, l2=0.0, decayed=frozenset()):
    """Takes 200 steps; returns the largest difference of a parameter relative to its array's largest.

    Args:
      our_step: our step.
      their_step: the library's step; its loss includes ``l2`` of the parameters ``decayed``.
    """
    a, b, largest = begin(), begin(), 0.0
    for k in range(STEPS):
        a = our_step(gradient(a, k, 0.0, frozenset()), k)
        b = their_step(gradient(b, k, l2, frozenset(decayed)), k)
        if k % 20 == 19:
            largest = max(largest, *(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max() for name in b))
    moved = max(np.abs(b[name] - value).max() for name, value in begin().items())
    assert moved > 0.05
    print(f"largest relative difference: {largest:.1e}")
    return largest


@pytest.mark.parametrize("decayed", DECAYED)
@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)], ids=["plain", "momentum", "nesterov"]
)
def test_sgd_is_pytorchs(x64, momentum, nesterov, decayed):
    torch = pytest.importorskip("torch")
    our_step = our_optimizer(
        name="sgd", momentum=momentum, nesterov=nesterov, weight_decay=0.01, weight_decay_on=decayed
    )
    their_step = of_torch(
        lambda groups: torch.optim.SGD(groups, lr=PEAK, momentum=momentum, nesterov=nesterov, weight_decay=0.01),
        DECAYED[decayed],
    )
    assert largest_difference(our_step, their_step) < 1e-9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_is_pytorchs(x64, momentum):
    torch = pytest.importorskip("torch")
    our_step = our_optimizer(
        name="rmsprop",
        momentum=momentum,
        epsilon=0.0316,
        rms_init=0.0,
        epsilon_in_sqrt=False,
        lr_in_momentum=False,
        weight_decay=0.01,
        weight_decay_on="all",
    )
    make = torch.optim.RMSprop
    their_step = of_torch(
        lambda groups: make(groups, lr=PEAK, alpha=0.9, momentum=momentum, eps=0.0316, weight_decay=0.01),
        DECAYED["all"],
    )
    assert largest_difference(our_step, their_step) < 1e-9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_is_timms_rmsprop_tf(x64, operators, momentum):
    timm = pytest.importorskip("timm.optim")
    our_step = our_optimizer(
        name="rmsprop", momentum=momentum, epsilon=1e-3, weight_decay=0.01, weight_decay_on="no_norm_bias"
    )
    make = timm.RMSpropTF
    their_step = of_torch(
        lambda groups: make(groups, lr=PEAK, alpha=0.9, momentum=momentum, eps=1e-3, weight_decay=0.01), KERNELS
    )
    assert largest_difference(our_step, their_step) < 1e-9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_is_keras(keras_x64, momentum):
    our_step = our_optimizer(name="rmsprop", momentum=momentum, epsilon=2e-3, rms_init=0.0, weight_decay=0.01)
    their_step = of_keras(lambda optimizers: optimizers.RMSprop(PEAK, rho=0.9, momentum=momentum, epsilon=2e-3), ())
    assert largest_difference(our_step, their_step, l2=0.01, decayed=KERNELS) < 1e-9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_is_tf1s(x64, momentum):
    our_step = our_optimizer(name="rmsprop", momentum=momentum, epsilon=1.0, weight_decay=0.01)
    their_step = of_tf1(decay=0.9, momentum=momentum, epsilon=1.0)
    assert largest_difference(our_step, their_step, l2=0.01, decayed=KERNELS) < 1e-9


def test_adamw_is_pytorchs(x64):
    torch = pytest.importorskip("torch")
    our_step = our_optimizer(name="adamw", weight_decay=0.1, weight_decay_on="no_norm", b1=0.6, epsilon=1e-6)
    make = torch.optim.AdamW
    their_step = of_torch(
        lambda groups: make(groups, lr=PEAK, betas=(0.6, 0.999), eps=1e-6, weight_decay=0.1), DECAYED["no_norm"]
    )
    assert largest_difference(our_step, their_step) < 1e-9


def test_adamw_is_keras(keras_x64):
    # Keras adds epsilon before the bias correction; we add it after, like PyTorch. They agree for a small epsilon.
    options = dict(weight_decay=0.1, epsilon=1e-30)
    our_step = our_optimizer(name="adamw", weight_decay_on="no_norm", l2=1e-3, b1=0.6, **options)
    their_step = of_keras(lambda optimizers: optimizers.AdamW(PEAK, beta_1=0.6, **options), DECAYED["no_norm"])
    assert largest_difference(our_step, their_step, l2=1e-3, decayed=DECAYED["no_norm"]) < 1e-9


EPOCHS, PER_EPOCH = 20, 10


def our_rates(**options):
    epochs, per_epoch = options.pop("epochs", EPOCHS), options.pop("per_epoch", PER_EPOCH)
    schedule = make_schedule(OptimConfig(**options), PEAK, per_epoch, epochs * per_epoch)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(epochs * per_epoch)))


def torch_optimizer():
    torch = pytest.importorskip("torch")
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def torch_rates(make, every, steps=STEPS):
    """Returns the learning rate of each step of a scheduler that is called after every ``every`` steps."""
    optimizer = torch_optimizer()
    scheduler, rates = make(optimizer), []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return rates


def timm_rates(make, epochs=EPOCHS, per_epoch=PER_EPOCH):
    optimizer = torch_optimizer()
    scheduler, rates = make(optimizer), []
    for epoch in range(epochs):
        rates += per_epoch * [optimizer.param_groups[0]["lr"]]
        scheduler.step(epoch + 1)
    return rates


def close(actual, expected, of=None):
    """Asserts that rates agree within a millionth of each rate, or of the rate ``of``."""
    difference = np.abs((actual - np.asarray(expected)) / (expected if of is None else of)).max()
    print(f"largest relative difference: {difference:.1e}")
    assert difference < 1e-6


@pytest.mark.parametrize("update_every", ["epoch", "step"])
def test_pytorchs_step_schedules(x64, update_every):
    torch = pytest.importorskip("torch")
    schedulers = torch.optim.lr_scheduler
    stairs = our_rates(schedule="exponential", decay_factor=0.973, decay_every_epochs=2, update_every=update_every)
    close(stairs, torch_rates(lambda o: schedulers.StepLR(o, 2, 0.973), PER_EPOCH))
    steps = our_rates(schedule="step", decay_factor=0.1, milestones_epochs=(5, 12), update_every=update_every)
    close(steps, torch_rates(lambda o: schedulers.MultiStepLR(o, [5, 12], 0.1), PER_EPOCH))


def test_pytorchs_cosine(x64):
    torch = pytest.importorskip("torch")
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    by_epoch = our_rates(schedule="cosine", update_every="epoch", final_lr=0.001)
    close(by_epoch, torch_rates(lambda o: cosine(o, EPOCHS, 0.001), PER_EPOCH))
    close(our_rates(schedule="cosine"), torch_rates(lambda o: cosine(o, STEPS), 1))


def test_torchvisions_warmup_and_cosine(x64):
    torch = pytest.importorskip("torch")
    schedulers = torch.optim.lr_scheduler

    def make(optimizer):
        warming = schedulers.LinearLR(optimizer, start_factor=0.01, total_iters=5)
        return schedulers.SequentialLR(
            optimizer, [warming, schedulers.CosineAnnealingLR(optimizer, EPOCHS - 5)], milestones=[5]
        )

    actual = our_rates(schedule="cosine", update_every="epoch", warmup_epochs=5, warmup_init_lr=0.01 * PEAK)
    close(actual, torch_rates(make, PER_EPOCH))


@pytest.mark.parametrize(("epochs", "per_epoch"), [(EPOCHS, PER_EPOCH), (600, 3)])
def test_timms_step_schedule(x64, operators, epochs, per_epoch):
    schedulers = pytest.importorskip("timm.scheduler")
    actual = our_rates(
        epochs=epochs,
        per_epoch=per_epoch,
        schedule="exponential",
        decay_factor=0.973,
        decay_every_epochs=2.4,
        update_every="epoch",
        warmup_epochs=3,
        warmup_init_lr=1e-6,
    )
    options = dict(decay_t=2.4, decay_rate=0.973, warmup_t=3, warmup_lr_init=1e-6, warmup_prefix=False)
    close(actual, timm_rates(lambda o: schedulers.StepLRScheduler(o, **options), epochs, per_epoch))


def test_timms_cosine(x64, operators):
    schedulers = pytest.importorskip("timm.scheduler")
    plain = our_rates(schedule="cosine", update_every="epoch", final_lr=1e-5)
    close(plain, timm_rates(lambda o: schedulers.CosineLRScheduler(o, t_initial=EPOCHS, lr_min=1e-5)))
    warmed = our_rates(schedule="cosine", update_every="epoch", warmup_epochs=4, warmup_init_lr=1e-5)
    options = dict(t_initial=EPOCHS - 4, warmup_t=4, warmup_lr_init=1e-5, warmup_prefix=True)
    close(warmed, timm_rates(lambda o: schedulers.CosineLRScheduler(o, **options)))
    over = our_rates(schedule="cosine", cosine_from="start", update_every="epoch", warmup_epochs=4, warmup_init_lr=1e-5)
    options |= dict(t_initial=EPOCHS, warmup_prefix=False)
    close(over, timm_rates(lambda o: schedulers.CosineLRScheduler(o, **options)))


def test_noise_is_where_timms_is(x64, operators):
    factory = pytest.importorskip("timm.scheduler.scheduler_factory")
    options = dict(schedule="exponential", decay_factor=0.973, decay_every_epochs=2.4, update_every="epoch")
    noise = our_rates(**options, lr_noise=(0.42, 0.9)) / our_rates(**options) - 1

    def make(optimizer, **noise):
        return factory.create_scheduler_v2(
            optimizer, "step", EPOCHS, decay_epochs=2.4, decay_rate=0.973, warmup_epochs=0, **noise
        )[0]

    their_step = np.array(timm_rates(lambda o: make(o, noise=[0.42, 0.9]))) / timm_rates(make) - 1
    np.testing.assert_array_equal(np.abs(noise) > 1e-9, np.abs(their_step) > 1e-9)
    assert 0.1 < np.abs(noise).max() < 0.67
    assert 0.1 < np.abs(their_step).max() < 0.67


def test_keras_schedules(keras_x64):
    schedules = import_keras().optimizers.schedules

    def rates(schedule):
        return [float(schedule(step)) for step in range(STEPS)]

    # Its cosine is rounded to float32, which shows where the rate gets small.
    close(our_rates(schedule="cosine"), rates(schedules.CosineDecay(PEAK, STEPS)), of=PEAK)
    warmed = schedules.CosineDecay(0.001, STEPS - 25, alpha=0.1, warmup_target=PEAK, warmup_steps=25)
    close(
        our_rates(schedule="cosine", warmup_steps=25, warmup_init_lr=0.001, final_lr=0.1 * PEAK), rates(warmed), of=PEAK
    )
    for staircase in (True, False):
        actual = our_rates(schedule="exponential", decay_factor=0.96, decay_every_steps=30, staircase=staircase)
        close(actual, rates(schedules.ExponentialDecay(PEAK, 30, 0.96, staircase)))


def test_slims_schedule(x64):
    tf = pytest.importorskip("tensorflow", reason="TF1's schedule is compared where TensorFlow is installed")
    decay = tf.compat.v1.train.exponential_decay
    peak = tf.constant(PEAK, tf.float64)
    expected = [float(decay(peak, step, 25, 0.98, staircase=True)()) for step in range(STEPS)]
    close(our_rates(schedule="exponential", decay_factor=0.98, decay_every_epochs=2.5), expected)
