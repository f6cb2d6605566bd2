"""The demo's page: facts in, one self-contained HTML file out."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from masked_kernels.training import EpochRecord

# Drawn in these colours, shown in the page's: light or dark, the reader's system decides.
COLORS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--dense)",
    "#040404": "var(--masked)",
}
INK, FAINT, DENSE, MASKED = COLORS


@dataclass(frozen=True)
class Digit:
    """One classified test image: a PNG as a data URI, what it is, and what the model said."""

    picture: str
    label: str
    predicted: str

    @property
    def right(self) -> bool:
        return self.label == self.predicted


def digits(
    images: npt.NDArray[np.uint8], labels: Sequence[str], predicted: Sequence[str]
) -> list[Digit]:
    """Return a Digit per image, uint8 ``(N, H, W)``."""
    return [
        Digit(png_uri(image), label, guess)
        for image, label, guess in zip(images, labels, predicted, strict=True)
    ]


def png_uri(image: npt.NDArray[np.uint8]) -> str:
    """Return a grayscale image ``(H, W)`` as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(
    dense: Sequence[EpochRecord],
    masked: Sequence[EpochRecord],
    train_key: str,
    val_key: str,
    *,
    factor: float = 1.0,
    bottom: float | None = None,
) -> str:
    """Return an SVG of both runs: validation as lines, training as thin dashes."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        ax = figure.subplots()
        for records, color in ((dense, DENSE), (masked, MASKED)):
            epochs = [record["epoch"] for record in records]
            for key, style in ((train_key, (0, (2, 2))), (val_key, "solid")):
                values = [factor * record[key] for record in records]  # type: ignore[literal-required]
                width = 1.0 if key == train_key else 2.0
                ax.plot(epochs, values, color=color, linewidth=width, linestyle=style)
        ax.set_xlabel("epoch", color=FAINT)
        ax.set_ylim(bottom=bottom)
        ax.tick_params(colors=FAINT, length=0, labelcolor=FAINT)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(FAINT)
        ax.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.7)
        ax.xaxis.get_major_locator().set_params(integer=True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, shown in COLORS.items():
        svg = svg.replace(drawn, shown)
    return svg


def write_report(path: Path, facts: dict[str, Any]) -> None:
    """Fill report.html.j2 with ``facts``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share, places=1: f"{100 * share:.{places}f} %"
    environment.filters["thousands"] = lambda number: f"{number:,}".replace(",", "\N{THIN SPACE}")
    environment.filters["duration"] = duration
    path.write_text(environment.get_template("report.html.j2").render(facts))


def duration(seconds: float) -> str:
    """Return a time with three figures and a fitting unit."""
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, size = next((pair for pair in units if seconds >= pair[1]), units[-1])
    return f"{seconds / size:.3g} {unit}"
