"""Draw the README's picture: ten samples of each class from the shipped checkpoint (DDIM, 50 steps, seeds 0, 1, 2…)."""

from __future__ import annotations

import argparse
from pathlib import Path

from app.settings import SHIPPED
from model import checkpoint, pictures
from model.training import grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED / "fashion-mnist-32")
    parser.add_argument("--out", type=Path, default=Path("docs/fashion-mnist-32.png"))
    arguments = parser.parse_args()
    loaded = checkpoint.load(arguments.checkpoint)
    arguments.out.write_bytes(pictures.png(grid(loaded.net, loaded.card.classes), scale=2))
    print(arguments.out)


if __name__ == "__main__":
    main()
