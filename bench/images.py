"""Draw the images of the README and docs/ that the shipped checkpoints can draw: ``make images``, some minutes."""

from __future__ import annotations

import shlex
import subprocess
import sys

from app.settings import SHIPPED
from bench.server import ROOT
from model import checkpoint, images
from model.training.run import grid

# Arguments of `unstir`. What an option leaves open has its default, so the README can print these lines.
# The number is the scale at which the page shows the image, which is 32 pixels high in itself.
COMMANDS = (
    ("sample --label lorelei --seed 7 --trajectory 16 -o docs/unstirring.png", 2),
    ("interpolate 7 11 12 13 --grid 4,6 --steps 20 --label lorelei -o docs/grid.png", 3),
    (
        "interpolate docs/garments/pullover.png docs/garments/sweater.png --label Pullover --frames 24"
        " --checkpoint weights/fashion-mnist-32 -o docs/interpolate.gif",
        1,
    ),
)


def main() -> None:
    # Ten samples of each class, as training draws them: DDIM, 50 steps, seeds 0, 1, 2…
    for folder in sorted(SHIPPED.iterdir()):
        loaded = checkpoint.load(folder)
        path = ROOT / "docs" / f"{loaded.card.name}.png"
        path.write_bytes(images.png(grid(loaded.net, loaded.card.classes), scale=2))
        print(path.relative_to(ROOT))
    for command, scale in COMMANDS:
        arguments = shlex.split(command)
        subprocess.run([sys.executable, "-m", "app", *arguments], cwd=ROOT, check=True)
        if scale > 1:
            path = ROOT / arguments[-1]
            path.write_bytes(images.png(images.read(path, channels=3), scale=scale))


if __name__ == "__main__":
    main()
