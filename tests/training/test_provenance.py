from mnv2_jax.training.provenance import provenance


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance({"platform": "cpu", "kind": "cpu", "count": 1})["git"] is None
