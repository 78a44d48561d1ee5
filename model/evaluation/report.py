"""An evaluation as a page, a JSON file and two plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.evaluation.markdown import table
from model.files import write_atomically

OPINIONS = {"classifier": "features of a classifier of the data", "efficientnet": "features of EfficientNet-Lite0"}

# DDIM (Song et al. 2021), table 1 (CIFAR-10) and table 2 (encode and decode, error per dimension, pixels in 0..1).
TABLE_1 = {
    "ddim": (13.36, 6.84, 4.67, 4.16, 4.04),
    "ddim, eta 0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
    "ddpm": (41.07, 18.36, 8.01, 5.78, 4.73),
    "ddpm, fixed_large": (367.43, 133.37, 32.72, 9.99, 3.17),
}
TABLE_1_STEPS = (10, 20, 50, 100, 1000)
TABLE_2 = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


def write(out: Path, facts: dict[str, Any]) -> str:
    """Write ``quality.md``, ``quality.json`` and the plots to ``out``; returns the page.

    Args:
        facts: ``checkpoint``, ``command``, ``unseen``, and whatever was measured: ``samplers`` and ``inversion``.
    """
    write_atomically(out / "quality.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    text = page(facts, _plots(out, facts))
    write_atomically(out / "quality.md", text)
    return text


def page(facts: dict[str, Any], plots: dict[str, str]) -> str:
    """The page in Markdown.

    Args:
        plots: file names by part, as far as they could be drawn.
    """
    card = facts["checkpoint"]
    parts = [
        f"# How good are the images of {card['name']}?",
        f"Measured by `{facts['command']}`; every figure is in [quality.json](quality.json). "
        f"Weights: sha256 `{card['sha256'][:12]}…`.",
    ]
    seen = "that training never saw" if facts["unseen"] else "of the training set, which has no others"
    if "samplers" in facts:
        parts += _samplers(facts["samplers"], plots, seen)
    if "inversion" in facts:
        parts += _inversion(facts["inversion"], plots, seen)
    return "\n\n".join(parts) + "\n"


def _samplers(found: dict[str, Any], plots: dict[str, str], seen: str) -> list[str]:
    budgets = sorted({row["budget"] for row in found["walks"]})
    parts = [
        "## One network, many walks",
        f"{found['images']} images of each walk, from the same seeds and with all classes in turn, are compared "
        f"with {found['reference']} real ones {seen}. The distance is Fréchet's, between Gaussians "
        "fitted to features; it depends on the features and on the number of images, so it compares rows of one "
        "table and nothing else, least of all a published FID. The floor is the same distance for as many real "
        "training images of the same classes; its spread is that of several such draws.",
    ]
    if "samplers" in plots:
        parts.append(f"![Fréchet distance against network evaluations]({plots['samplers']})")
    for opinion, meaning in OPINIONS.items():
        if opinion in found["floor"]:
            floor = found["floor"][opinion]
            rows = _grid(found, budgets, lambda row, o=opinion: _short(row["frechet"][o]))
            parts.append(
                f"**Fréchet distance, {meaning}**; floor {_short(floor['mean'])} (spread {_short(floor['spread'])})"
            )
            parts.append(table(["within … evaluations", *budgets], rows))
    if any("accuracy" in row for row in found["walks"]):
        rows = _grid(found, budgets, lambda row: f"{100 * row['accuracy']:.1f}")
        real = f"; it gets {100 * found['training_accuracy']:.1f} % of real training images right" * (
            "training_accuracy" in found
        )
        parts.append(f"**Share of images that the classifier takes for the class asked for, in %**{real}")
        parts.append(table(["within … evaluations", *budgets], rows))
    theirs = [[walk, *values] for walk, values in TABLE_1.items()]
    parts.append(
        "For comparison, the FID of another network on CIFAR-10 in table 1 of the DDIM paper, which calls ddpm η = 1 "
        "and its fixed_large variance σ̂. The figures cannot be compared across the two tables; their shape can."
    )
    parts.append(table(["DDIM, table 1", *TABLE_1_STEPS], theirs))
    return parts


def _inversion(rows: list[dict[str, Any]], plots: dict[str, str], seen: str) -> list[str]:
    parts = [
        "## There and back",
        f"{rows[0]['images']} images {seen}, encoded into x_T and decoded again with as many "
        "steps, in float32 and with their own class. PSNR is that of the unrounded reconstruction (peak 2, pixels span "
        "-1 to 1); rounding to 8 bits alone would cap it at 58.9 dB. *Exact* is the share of images of which every "
        "8-bit pixel comes back; *norm* is the median of ‖x_T‖²/D, which is 1 for noise; *residual* says by how much "
        "the fixed points were missed.",
    ]
    if "inversion" in plots:
        parts.append(f"![PSNR of the round trip against evaluations]({plots['inversion']})")
    header = [
        "method",
        "steps",
        "evaluations to encode",
        "to decode",
        "median PSNR, dB",
        "5th percentile",
        "exact",
        "norm",
    ]
    body = [
        [
            row["method"],
            row["steps"],
            row["nfe"],
            row["decode_nfe"],
            f"{row['psnr']['median']:.1f}",
            f"{row['psnr']['low']:.1f}",
            f"{100 * row['exact']:.1f} %",
            f"{row['norm']:.2f}",
            f"{row['residual']:.1g}" if "residual" in row else "",
        ]
        for row in rows
    ]
    parts.append(table([*header, "residual"], body))
    parts.append(
        "For comparison, plain ddim in table 2 of the DDIM paper (CIFAR-10, squared error per dimension with pixels in "
        "0..1; 0.0023 is 26.4 dB)."
    )
    parts.append(table(["steps", "error"], TABLE_2.items()))
    return parts


def _grid(found: dict[str, Any], budgets: list[int], show: Any) -> list[list[str]]:
    walks = list(dict.fromkeys(row["walk"] for row in found["walks"]))
    cells = {(row["walk"], row["budget"]): show(row) for row in found["walks"]}
    return [[walk, *(cells.get((walk, budget), "") for budget in budgets)] for walk in walks]


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _plots(out: Path, facts: dict[str, Any]) -> dict[str, str]:
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        return {}
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    drawn = {}
    if "samplers" in facts:
        found = facts["samplers"]
        opinions = [opinion for opinion in OPINIONS if opinion in found["floor"]]
        figure, axes = plt.subplots(1, len(opinions), figsize=(5.5 * len(opinions) + 2, 5.5), squeeze=False)
        for axis, opinion in zip(axes[0], opinions, strict=True):
            _distances(axis, found, opinion)
        axes[0][0].set_ylabel("Fréchet distance")
        axes[0][-1].legend(fontsize=8, handlelength=4, loc="upper left", bbox_to_anchor=(1.01, 1))
        figure.tight_layout()
        figure.savefig(out / "quality-samplers.png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        drawn["samplers"] = "quality-samplers.png"
    if "inversion" in facts:
        figure, axis = plt.subplots(figsize=(7, 5))
        for k, method in enumerate(dict.fromkeys(row["method"] for row in facts["inversion"])):
            rows = [row for row in facts["inversion"] if row["method"] == method]
            values = [row["psnr"]["median"] for row in rows]
            style: dict[str, Any] = {"markersize": 5} if len(rows) > 1 else {"markersize": 9, "fillstyle": "none"}
            axis.plot([r["nfe"] for r in rows], values, label=method, marker="osD^v<>P"[k % 8], **style)
        axis.axhline(58.9, color="grey", linestyle=":", label="rounding to 8 bits")
        axis.set(xscale="log", xlabel="network evaluations to encode", ylabel="median PSNR of the round trip, dB")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(out / "quality-inversion.png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        drawn["inversion"] = "quality-inversion.png"
    return drawn


def _distances(axis: Any, found: dict[str, Any], opinion: str) -> None:
    """One opinion's plot: a colour for each sampler, another line for each of its variants."""
    variants: dict[str, list[str]] = {}
    for row in found["walks"]:
        walks = variants.setdefault(row["sampler"], [])
        if row["walk"] not in walks:
            walks.append(row["walk"])
    floor = found["floor"][opinion]["mean"]
    # Few are so bad that, shown whole, they would press all others into one line; the table has them.
    top = 1.5 * max(floor, *(row["frechet"][opinion] for row in found["walks"] if row["walk"] == "ddim"))
    bottom = 0.85 * min(floor, *(row["frechet"][opinion] for row in found["walks"]))
    beyond = []
    for k, walks in enumerate(variants.values()):
        for i, walk in enumerate(walks):
            rows = [row for row in found["walks"] if row["walk"] == walk]
            values = [row["frechet"][opinion] for row in rows]
            style = {"color": f"C{k}", "marker": "osD^v<>P*Xhd"[k % 12], "linestyle": ("-", "--", ":", "-.")[i % 4]}
            axis.plot([row["nfe"] for row in rows], values, label=walk, markersize=5, **style)
            if max(values) > top:
                beyond.append(walk)
    axis.axhline(floor, color="grey", linewidth=1, label="real images")
    axis.set(xscale="log", yscale="log", ylim=(bottom, top), xlabel="network evaluations", title=OPINIONS[opinion])
    budgets = sorted({row["budget"] for row in found["walks"]})
    axis.set_xticks(budgets, map(str, budgets))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_yticks([t for t in (0.2, 0.3, 0.5, 1, 2, 5, 10, 300, 350, 400, 500, 600, 1000) if bottom < t < top])
    axis.grid(alpha=0.3)
    if beyond:
        beginning = "they begin above the scale:\n" + "\n".join(beyond)
        axis.text(0.98, 0.98, beginning, fontsize=8, ha="right", va="top", transform=axis.transAxes)
