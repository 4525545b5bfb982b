"""Reproduction studies: several seeds of one setting, held against what is published of it."""
