"""Cost of a network and its published accuracies, in one record."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.published import published
from mnv2_jax.models.registry import create_model
from mnv2_jax.presets import native_resolution

_CLASSES = 1000
_REMARKS = ("precision", "training", "weights", "eval", "note")
_RIGHT = ("width", "depth", "px", "top-1", "top-5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Facts about a network; it prints as a table."""

    name: str
    options: Mapping[str, Any]
    """Options given to `model_info`; read-only."""
    resolution: int
    """Resolution that the network was published for, in pixels."""
    params: int
    """Number of trainable values, with 1000 classes."""
    madds: int
    """Multiply-adds of one image of that resolution, with 1000 classes."""
    published: tuple[Mapping[str, Any], ...]
    """Rows of `published.published`."""

    def __str__(self) -> str:
        """Formats the counts, then a line for each published result."""
        name = " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])
        first = f"{name}: {self.params:,} parameters, {self.madds / 1e6:,.1f} M MAdds at {self.resolution} px"
        if not self.published:
            return f"{first}\nno published results"
        rows = [_cells(row) for row in self.published]
        columns = [key for key in rows[0] if any(row[key] for row in rows)]
        widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in columns}
        lines = [
            "  ".join(row[key].rjust(widths[key]) if key in _RIGHT else row[key].ljust(widths[key]) for key in columns)
            for row in [dict(zip(columns, columns, strict=True)), *rows]
        ]
        return "\n".join([first, "", *(line.rstrip() for line in lines)])


def model_info(name: str, **options: Any) -> ModelInfo:
    """Counts a network at the resolution that it was published for, and looks up its published results.

    Args:
      name: one of `registry.list_models`.
      **options: as for `registry.create_model`. If they include a width or a depth, only results of the same width and
        depth are returned, otherwise all.

    Raises:
      UserError: for an unknown name or option, or an invalid value.
    """
    if "num_classes" in options:
        raise UserError(
            f"num_classes={options['num_classes']!r}: counts are always for {_CLASSES} classes; leave num_classes out"
        )
    model = create_model(name, _CLASSES, **options)
    resolution = native_resolution(name)
    summary = count_layers(model, resolution)
    rows = published(name)
    if "width" in options or "depth" in options:
        size = model.options.width, model.options.depth
        rows = tuple(row for row in rows if (row["width"], row.get("depth", 1.0)) == size)
    return ModelInfo(
        name=name,
        options=types.MappingProxyType(options),
        resolution=resolution,
        params=summary.params,
        madds=summary.madds,
        published=rows,
    )


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Formats a row: the text of each column."""
    return {
        "width": f"{row['width']:g}",
        "depth": f"{row['depth']:g}" if "depth" in row else "",
        "px": str(row["resolution"]),
        "top-1": f"{row['top1']:.2f}",
        "top-5": "" if row["top5"] is None else f"{row['top5']:.2f}",
        "source": row["source"],
        "remarks": "; ".join(row[key] for key in _REMARKS if key in row),
    }
