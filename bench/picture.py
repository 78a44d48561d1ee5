"""Draw the README's images: ten samples of each class of each shipped checkpoint (DDIM, 50 steps, seeds 0, 1, 2…)."""

from __future__ import annotations

from pathlib import Path

from app.settings import SHIPPED
from model import checkpoint, images
from model.training.run import grid

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    for folder in sorted(SHIPPED.iterdir()):
        loaded = checkpoint.load(folder)
        drawn = DOCS / f"{loaded.card.name}.png"
        drawn.write_bytes(images.png(grid(loaded.net, loaded.card.classes), scale=2))
        print(f"docs/{drawn.name}")


if __name__ == "__main__":
    main()
