"""The 1000 classes of ImageNet."""

import re

import pytest

from mnv2_jax.data.imagenet import class_ids, class_names


def test_ids_are_a_thousand_sorted_wordnet_ids():
    assert len(class_ids()) == 1000
    assert list(class_ids()) == sorted(set(class_ids()))
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in class_ids())


def test_names_differ_in_more_than_case_and_are_printable():
    assert len(class_names()) == len({name.casefold() for name in class_names()}) == 1000
    assert all(name == name.strip() and name.isascii() and name.isprintable() for name in class_names())


@pytest.mark.parametrize(
    ("index", "wnid", "name"),
    [
        (0, "n01440764", "tench"),
        (24, "n01622779", "great grey owl"),
        (134, "n02012849", "crane (bird)"),
        (264, "n02113186", "Cardigan Welsh corgi"),
        (281, "n02123045", "tabby"),
        (474, "n02963159", "cardigan"),
        (517, "n03126707", "crane (machine)"),
        (638, "n03710637", "maillot"),
        (639, "n03710721", "maillot (tank suit)"),
        (999, "n15075141", "toilet tissue"),
    ],
)
def test_golden_rows(index, wnid, name):
    assert (class_ids()[index], class_names()[index]) == (wnid, name)
