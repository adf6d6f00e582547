"""The log of a training: log.jsonl, one line per interval, and its curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nestgen.files import atomic_write, writing


def append(log: Path, record: dict[str, Any]) -> None:
    """Adds a line."""
    with writing(log), log.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(log: Path, key: str = "step") -> list[dict[str, Any]]:
    """All whole lines that have a key, in order; a line that a killed process or a power cut damaged ends them."""
    records = []
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        try:
            record = json.loads(line)
            _ = int(record["step"]), record[key]
        except (ValueError, KeyError, TypeError):
            break
        records.append(record)
    return records


def truncate(log: Path, step: int) -> None:
    """Removes the lines after `step`: a resumed training writes them again."""
    if log.is_file():
        lines = [json.dumps(record) + "\n" for record in read(log) if record["step"] <= step]
        with atomic_write(log) as draft:
            draft.write_text("".join(lines))


def training_seconds(log: Path, batch: int) -> float:
    """Seconds that the steps of a log took, by its rates; `batch` is the samples of a step."""
    seconds, previous_step = 0.0, 0
    for record in read(log, "samples_per_second"):
        seconds += (record["step"] - previous_step) * batch / record["samples_per_second"]
        previous_step = record["step"]
    return seconds


def draw_curve(log: Path, image: Path, title: str, predicted: str) -> None:
    """Draws the loss over the steps, with a running mean over a twentieth of them, as a PNG. `predicted` names the target."""
    from matplotlib.figure import Figure  # slow to import, and needed at the end only

    records = [
        record for record in read(log, "loss") if record["loss"] is not None
    ]  # none where all steps were skipped
    steps, values = [r["step"] for r in records], [r["loss"] for r in records]
    width = max(1, len(values) // 20)
    means = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(steps, means, color="tab:blue", label=f"mean of {width}")
    axes.set(xlabel="step", ylabel=f"mean squared error on {predicted}", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    with atomic_write(image) as draft:
        figure.savefig(draft, dpi=120, format="png")
