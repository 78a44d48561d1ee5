"""An evaluation as a page in Markdown, a JSON file and two plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from model.evaluation.markdown import table
from model.output import write_atomically

FEATURES = {"classifier": "features of a classifier of the data", "efficientnet": "features of EfficientNet-Lite0"}

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
    content = json.dumps(_without_nan(facts), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(out / "quality.json", content + "\n")
    text = page(facts, _plots(out, facts))
    write_atomically(out / "quality.md", text)
    return text


def _without_nan(value: Any) -> Any:
    """null for what JSON has no number for, such as the error of a round trip that left float32's range."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(facts: dict[str, Any], plots: dict[str, str]) -> str:
    """The page.

    Args:
        plots: file names by part; empty without matplotlib.
    """
    card = facts["checkpoint"]
    parts = [
        f"# Quality of {card['name']}",
        f"Measured by `{facts['command']}`; every figure is in [quality.json](quality.json). "
        f"Weights: sha256 `{card['sha256'][:12]}…`.",
    ]
    which = "that training did not see" if facts["unseen"] else "of the training set, which has no others"
    if "samplers" in facts:
        parts += _samplers(facts["samplers"], plots, which)
    if "inversion" in facts:
        parts += _inversion(facts["inversion"], plots, which)
    return "\n\n".join(parts) + "\n"


def _samplers(found: dict[str, Any], plots: dict[str, str], which: str) -> list[str]:
    budgets = sorted({row["budget"] for row in found["cells"]})
    parts = [
        "## Samples",
        f"{found['images']} images of each sampler, from the same seeds and with the same classes, are compared "
        f"with {found['reference']} real ones {which}. The Fréchet distance is between Gaussians fitted to features "
        "of a network. It depends on the features and on the number of images, so it compares rows of one table; it is "
        "not comparable to published FIDs. The floor is the distance of as many real training images of the same "
        "classes, with the spread of several draws.",
    ]
    if "samplers" in plots:
        parts.append(f"![Fréchet distance against network evaluations]({plots['samplers']})")
    for network, meaning in FEATURES.items():
        if network in found["floor"]:
            floor = found["floor"][network]
            rows = _grid(found, budgets, lambda row, n=network: _short(row["frechet"][n]))
            parts.append(
                f"**Fréchet distance, {meaning}**; floor {_short(floor['mean'])} (spread {_short(floor['spread'])})"
            )
            parts.append(table(["within … evaluations", *budgets], rows))
    if any("accuracy" in row for row in found["cells"]):
        rows = _grid(found, budgets, lambda row: f"{100 * row['accuracy']:.1f}")
        real = (
            f"; of real training images, {100 * found['training_accuracy']:.1f} %"
            if "training_accuracy" in found
            else ""
        )
        parts.append(f"**Share of images that the classifier assigns to the requested class, in %**{real}")
        parts.append(table(["within … evaluations", *budgets], rows))
    theirs = [[variant, *values] for variant, values in TABLE_1.items()]
    parts.append(
        "For comparison, table 1 of the DDIM paper: FID of another network on CIFAR-10, with ddpm as η = 1 and its "
        "fixed_large variance as σ̂. The values are not comparable with those above, their trends are."
    )
    parts.append(table(["DDIM, table 1", *TABLE_1_STEPS], theirs))
    return parts


def _inversion(rows: list[dict[str, Any]], plots: dict[str, str], which: str) -> list[str]:
    parts = [
        "## Round trips",
        f"{rows[0]['images']} images {which}, inverted to x_T and decoded with as many steps, in float32 and with "
        "their own class. PSNR is that of the unrounded reconstruction (peak 2, pixels are in -1 to 1); rounding to 8 "
        "bits alone limits it to 58.9 dB. *Exact* is the share of images that are recovered in every 8-bit pixel; "
        "*norm* is the median of ‖x_T‖²/D, which is 1 for noise; *residual* is the error of the fixed points.",
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
    variants = dict.fromkeys(row["variant"] for row in found["cells"])
    cells = {(row["variant"], row["budget"]): show(row) for row in found["cells"]}
    return [[variant, *(cells.get((variant, budget), "") for budget in budgets)] for variant in variants]


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
        networks = [network for network in FEATURES if network in found["floor"]]
        figure, axes = plt.subplots(1, len(networks), figsize=(5.5 * len(networks) + 2, 5.5), squeeze=False)
        for axis, network in zip(axes[0], networks, strict=True):
            _plot_distances(axis, found, network)
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


def _plot_distances(axis: Any, found: dict[str, Any], network: str) -> None:
    """Distances on the features of one network: a colour for each sampler, a line style for each of its variants."""
    by_sampler: dict[str, list[str]] = {}
    for row in found["cells"]:
        variants = by_sampler.setdefault(row["sampler"], [])
        if row["variant"] not in variants:
            variants.append(row["variant"])
    floor = found["floor"][network]["mean"]
    # A few distances are so large that a scale with them would squeeze all others together; the table has them.
    top = 1.5 * max(floor, *(row["frechet"][network] for row in found["cells"] if row["variant"] == "ddim"))
    bottom = 0.85 * min(floor, *(row["frechet"][network] for row in found["cells"]))
    beyond = []
    for k, variants in enumerate(by_sampler.values()):
        for i, variant in enumerate(variants):
            rows = [row for row in found["cells"] if row["variant"] == variant]
            values = [row["frechet"][network] for row in rows]
            style = {"color": f"C{k}", "marker": "osD^v<>P*Xhd"[k % 12], "linestyle": ("-", "--", ":", "-.")[i % 4]}
            axis.plot([row["nfe"] for row in rows], values, label=variant, markersize=5, **style)
            if max(values) > top:
                beyond.append(variant)
    axis.axhline(floor, color="grey", linewidth=1, label="real images")
    axis.set(xscale="log", yscale="log", ylim=(bottom, top), xlabel="network evaluations", title=FEATURES[network])
    budgets = sorted({row["budget"] for row in found["cells"]})
    axis.set_xticks(budgets, map(str, budgets))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_yticks([t for t in (0.2, 0.3, 0.5, 1, 2, 5, 10, 300, 350, 400, 500, 600, 1000) if bottom < t < top])
    axis.grid(alpha=0.3)
    if beyond:
        text = "off the scale with few evaluations:\n" + "\n".join(beyond)
        axis.text(0.98, 0.98, text, fontsize=8, ha="right", va="top", transform=axis.transAxes)
