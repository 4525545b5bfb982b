"""Formats the results of `bench.gpu` as a Markdown report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def failed_checks(results: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of checks that did not pass."""
    return [row for part in results["parts"].values() for row in part["rows"] if row.get("passed") is False]


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the report: one section per part, with the rows that the part measured, even if it was cut off."""
    lines = ["# Measurements on this device", ""]
    bandwidth = _ceiling(results, "bandwidth")
    for name, part in results["parts"].items():
        seconds = f", {part['seconds']:.0f} s" if "seconds" in part else ""
        lines += [f"## {part['title']}", "", f"Part `{name}`: {part['state']}{seconds}.", ""]
        if part.get("error"):
            lines += [f"Error: `{part['error']}`", ""]
        for kind in dict.fromkeys(map(_kind, part["rows"])):
            lines += [*_TABLES[kind]([row for row in part["rows"] if _kind(row) == kind], bandwidth), ""]
    return "\n".join(lines)


def _ceiling(results: Mapping[str, Any], key: str) -> float | None:
    for row in results["parts"].get("checks", {"rows": ()})["rows"]:
        if row.get("what") == "ceilings":
            return float(row[key])
    return None


def _kind(row: Row) -> str:
    if "microseconds" in row or ("form" in row and "unavailable" in row):
        return "forms"
    return {"train": "contest", "infer": "contest", "profile": "profile", "cifar": "cifar"}.get(
        row.get("what", ""), "facts"
    )


def _facts(rows: Sequence[Row], bandwidth: float | None) -> list[str]:
    lines = []
    for row in rows:
        if row.get("what") == "form":
            continue
        text = ", ".join(f"{key} {value}" for key, value in row.items() if key != "what")
        lines.append(f"* {row.get('what')}: {text}")
    checked = [row for row in rows if row.get("what") == "form"]
    if checked:
        bad = [row for row in checked if not row["passed"]]
        lines.append(f"* checked forms of convolutions: {len(checked)}, failed: {len(bad)}")
        lines += [
            f"  * {row['form']} {row['shape']} {row['dtype']}: {row.get('errors', row.get('error'))}" for row in bad
        ]
    return lines


def _forms(rows: Sequence[Row], bandwidth: float | None) -> list[str]:
    """Formats a table for each kind of convolution.

    Rows are shapes and parts, columns are forms; a cell holds microseconds and the share of the bandwidth.
    """
    lines: list[str] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        rows_of_kind = [row for row in rows if row["kind"] == kind]
        lines += [
            f"* {row['form']}: not measured: {row['unavailable']}" for row in rows_of_kind if "unavailable" in row
        ]
        if timed := [row for row in rows_of_kind if "microseconds" in row]:
            lines += ["", *_forms_table(timed, bandwidth), ""]
    return lines


def _forms_table(timed: Sequence[Row], bandwidth: float | None) -> list[str]:
    forms = list(dict.fromkeys(row["form"] for row in timed))
    lines = ["| shape | part | " + " | ".join(forms) + " | fastest |", "| --- | --- |" + " --- |" * (len(forms) + 1)]
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in timed:
        cases.setdefault((row["shape"], row["part"]), {})[row["form"]] = row
    for (shape, part), by_form in cases.items():
        fastest = min(by_form.values(), key=lambda row: row["microseconds"])["form"]
        cells = [_microseconds(by_form[form], bandwidth) if form in by_form else "" for form in forms]
        lines.append(f"| {shape} | {part} | " + " | ".join(cells) + f" | {fastest} |")
    # A form that was timed on fewer cases gets no sum: it would look faster than it is.
    sums = [
        f"{sum(by_form[form]['microseconds'] for by_form in cases.values()):,.0f} µs"
        if all(form in by_form for by_form in cases.values())
        else ""
        for form in forms
    ]
    return [*lines, f"| sum | | {' | '.join(sums)} | |"]


def _microseconds(row: Row, bandwidth: float | None) -> str:
    share = f" ({row['bytes_moved'] / bandwidth / row['microseconds'] * 1e8:.0f} %)" if bandwidth else ""
    return f"{row['microseconds']:,.1f} µs{share}"


def _contest(rows: Sequence[Row], bandwidth: float | None) -> list[str]:
    lines = [
        "| batch | mode | name | ms/batch (min to max) | images/s | ours / rival (min to max) | of bound | peak GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = f"| {row['batch']} | {row['what']} | {row['name']} |"
        if "unavailable" in row:
            reason = row["unavailable"].replace("|", "\\|")
            lines.append(f"{head} not measured: {reason} | | | | |")
            continue
        bound = row["images_per_second"] * row["needs_bytes_an_image"] / bandwidth if bandwidth else None
        peak = row.get("peak_bytes")
        lines.append(
            f"{head} {row['ms']:.2f} ({row['ms_min']:.2f} to {row['ms_max']:.2f}) | {row['images_per_second']:,.0f} |"
            f" {row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}) |"
            f" {f'{bound:.0%}' if bound else ''} | {f'{peak / 1e9:.1f}' if peak else ''} |"
        )
    return lines


def _profile(rows: Sequence[Row], bandwidth: float | None) -> list[str]:
    return [line for row in rows for line in (row["table"], "")]


def _cifar(rows: Sequence[Row], bandwidth: float | None) -> list[str]:
    lines = []
    for row in rows:
        for key in ("train", "eval", "summary"):
            if row.get(key):
                lines.append(f"* {key}: {', '.join(f'{k} {v}' for k, v in row[key].items() if not _is_long(v))}")
        lines.append(f"* seconds in this call: {row['seconds']:.0f}")
    return lines


def _is_long(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str) and len(str(value)) > 120


_TABLES: Mapping[str, Callable[[Sequence[Row], float | None], list[str]]] = {
    "facts": _facts,
    "forms": _forms,
    "contest": _contest,
    "profile": _profile,
    "cifar": _cifar,
}
