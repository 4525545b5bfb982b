"""Converts ImageNet to a form that can be read at random and verified: `python -m mnv2_jax.data.prepare`.

originals ──► Part, a class of a split ──► writing: a shard of several classes ──► run: all shards, in parallel
"""
