"""Draws the picture of the README from the record that docs/benchmarks.md is of: `python docs/tools/picture.py`.

It needs matplotlib (extra "bench"). The PNG keeps the digest of what it shows, by which a test holds it to the record.
"""

import hashlib
import pathlib
from typing import Any

from mla_cute.bench import figures, plots, report

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = ROOT / "tune" / "measurements" / "NVIDIA_H200" / "table_2026-11-30.json"
PICTURE = ROOT / "docs" / "images" / "speed_over_peers.png"


def figure_of(record: dict[str, Any]) -> figures.Figure:
    """Speed over the fastest peer of each shape."""
    peers = sum(peer["present"] for peer in record["peers"].values())
    title = f"{figures.gpu_name(record)}, decode: speed over the fastest of {peers} public kernels"
    [figure] = figures.charts(record["rows"], figures.over_best_peer, "", title, figures.Scale.RATIO)
    return figure


def digest(figure: figures.Figure) -> str:
    return hashlib.sha256(repr(figure).encode()).hexdigest()


def main() -> None:
    figure = figure_of(report.load(RECORD))
    PICTURE.write_bytes(plots.png(figure, about=digest(figure)))
    print(f"{PICTURE.relative_to(ROOT)}: {RECORD.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
