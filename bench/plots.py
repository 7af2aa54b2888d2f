"""Plots of what a benchmark has found, as SVG files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH_INCHES, HEIGHT_INCHES = 9.0, 5.0
MARKERS = "osD^vPX<>*ph"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """Points of several series over one pair of axes, of which those named in `log` ("x", "y" or "xy") are logarithmic."""

    title: str
    x: str
    y: str
    series: Mapping[str, Points]
    log: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        series = {name: [list(point) for point in points] for name, points in self.series.items()}
        return {"title": self.title, "x": self.x, "y": self.y, "log": self.log, "series": series}

    def draw(self, path: Path) -> None:
        """Write it to a file, whose ending says how: .svg, .png or .pdf. Raises `ImportError` without matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.subplots()
        for index, (name, points) in enumerate(self.series.items()):
            ordered = sorted(points)
            marker = MARKERS[index // 10 % len(MARKERS)]
            axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker=marker, label=name)
        if "x" in self.log:
            axes.set_xscale("log")
        if "y" in self.log:
            axes.set_yscale("log")
        axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
        figure.savefig(path)


def draw_all(plots: Sequence[Plot], folder: Path, prefix: str) -> list[Path]:
    """Draw each into the folder, which is made if need be; the files, named after the titles."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}-{re.sub('[^a-z0-9]+', '-', plot.title.lower()).strip('-')}.svg" for plot in plots]
    for plot, path in zip(plots, paths, strict=True):
        plot.draw(path)
    return paths
