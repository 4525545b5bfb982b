"""Pictures of the images of an evaluation that its task chose, with a caption each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mnv2_jax.report.page import Facts
from mnv2_jax.report.words import place

_TITLES = {"worst": "Worst images", "typical": "Typical images"}


def examples(
    evaluation: Facts, pictures: Mapping[int, str], note: str, caption: Callable[[Mapping[str, Any]], str]
) -> str:
    """Makes HTML of the worst and of typical images; "" without pictures.

    Args:
      evaluation: the evaluation's file, whose "examples" say why each was chosen.
      pictures: the pictures as HTML, by the index of the image.
      note: what a picture shows.
      caption: makes the HTML of an example's caption.
    """
    parts = []
    for why, title in _TITLES.items():
        cards = [
            f"<figure>{pictures[example['index']]}<figcaption>{caption(example)}"
            f"<span class=note>{_place(example)}</span></figcaption></figure>"
            for example in evaluation.get("examples", ())
            if example["why"] == why and example["index"] in pictures
        ]
        if cards:
            shown = f'<div class="pictures wide">{"".join(cards)}</div>'
            parts.append(f"<h3>{title}</h3><p class=note>{note}</p>{shown}")
    return "".join(parts)


def _place(example: Mapping[str, Any]) -> str:
    return place(example["path"]) if "path" in example else f"image {example['index']}"
