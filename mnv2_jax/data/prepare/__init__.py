"""Brings ImageNet into a form that is read at random and verified: `python -m mnv2_jax.data.prepare`.

originals ──► Part, a class of a split ──► writing: a shard of several classes ──► run: all of them, in parallel
"""
