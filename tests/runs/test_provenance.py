import json

import jax

from mnv2_jax.runs.provenance import provenance

DEVICES = {"platform": "cpu", "kind": "cpu", "count": 1}


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance(DEVICES)["git"] is None


def test_settings_are_what_holds_whoever_has_set_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        settings = json.loads(json.dumps(provenance(DEVICES)))["settings"]
    expected = {
        "JAX_ENABLE_X64": True,
        "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
        "JAX_THREEFRY_PARTITIONABLE": True,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": True,  # as tests are compiled
        "XLA_FLAGS": "--xla_a=1",
        "LIBTPU_INIT_ARGS": None,
    }
    assert {name: settings[name] for name in expected} == expected
