"""TFLite Metadata: what Android Studio and MediaPipe read of a LiteRT file, with its labels as a file at its end.

The tables are those of metadata_schema.fbs (TensorFlow Lite Support, Apache 2.0), with the numbers of their slots.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

NAME = "TFLITE_METADATA"
"""Name under which a LiteRT file has the metadata."""
LABELS = "labels.txt"
"""Name of the file with the labels, one a line."""
_IMAGE, _FEATURE, _NORMALISATION, _RGB = 2, 1, 1, 1
_AXIS_LABELS, _VALUE_LABELS = 2, 3


class Byte(int):
    """A number that is stored as one byte."""


class UInt(int):
    """A number that is stored as four bytes."""


_Slots: TypeAlias = Mapping[int, Any]
"""A table: values by slot, each a text, a `Byte`, a `UInt`, a table, a list of tables or a list of floats."""


def to_bytes(
    facts: Mapping[str, str], size: tuple[int, int], image: str, outputs: Mapping[str, Sequence[int]]
) -> bytes:
    """Returns the metadata.

    Args:
      facts: those of `export.function.Exportable.facts`.
      size: height and width of the image.
      image: name of the input.
      outputs: shapes of the outputs by their names, in the order of the file.
    """
    import flatbuffers

    labels, largest = json.loads(facts["labels"]), json.loads(facts["input"])["range"][1]
    content = {0: Byte(_IMAGE), 1: {0: Byte(_RGB), 1: {0: UInt(size[1]), 1: UInt(size[0])}}}
    source: dict[int, Any] = {0: image, 1: f"RGB, 0 to {largest:g}", 3: content}
    if largest == 1:
        source[4] = [{0: Byte(_NORMALISATION), 1: {0: [0.0], 1: [255.0]}}]  # pixels of 0 to 255 become 0 to 1
    kinds = {"logits": _AXIS_LABELS, "class": _VALUE_LABELS}
    tensors = []
    for name, shape in outputs.items():
        tensor: dict[int, Any] = {0: name, 3: {0: Byte(_FEATURE), 1: {}}}
        has_labels = name in kinds and (kinds[name] == _VALUE_LABELS or shape[-1] == len(labels))
        if labels and has_labels:  # a detection's logits have one of the background too
            tensor[6] = [{0: LABELS, 2: Byte(kinds[name])}]
        tensors.append(tensor)
    text = f"{facts['task']}, {facts['source']}".strip(", ")
    model = {0: "mnv2_jax", 1: text, 3: [{2: [source], 3: tensors}], 7: "1.0.0"}
    builder = flatbuffers.Builder(1024)
    builder.Finish(_add(builder, model), b"M001")
    return bytes(builder.Output())


def with_labels(content: bytes, labels: Sequence[str]) -> bytes:
    """Returns a file with the labels at its end, in a zip archive, as the format wants it."""
    if not labels:
        return content
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
        lines = "\n".join(" ".join(label.split()) for label in labels)
        archive.writestr(zipfile.ZipInfo(LABELS), lines)  # without a time, so that the same network is the same file
    return file.getvalue()


def _add(builder: Any, table: _Slots) -> Any:
    """Adds a table after what it refers to; returns its place."""
    placed = {slot: _placed(builder, value) for slot, value in table.items()}
    builder.StartObject(max(table, default=0) + 1)
    for slot, value in placed.items():
        if isinstance(value, Byte):
            builder.PrependUint8Slot(slot, value, 0)
        elif isinstance(value, UInt):
            builder.PrependUint32Slot(slot, value, 0)
        else:
            builder.PrependUOffsetTRelativeSlot(slot, value, 0)
    return builder.EndObject()


def _placed(builder: Any, value: Any) -> Any:
    if isinstance(value, Byte | UInt):
        return value
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, Mapping):
        return _add(builder, value)
    places = [each if isinstance(each, float) else _add(builder, each) for each in value]
    builder.StartVector(4, len(places), 4)
    for place in reversed(places):
        (builder.PrependFloat32 if isinstance(place, float) else builder.PrependUOffsetTRelative)(place)
    return builder.EndVector()
