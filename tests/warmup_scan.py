"""How much warmup widens the range of learning rates that work, and the README's picture of it.

    python tests/warmup_scan.py docs/warmup.svg          # about 25 minutes on one core

Each run is one epoch of the drawn people at 64 px, 125 steps of 16 images, with and without 40
steps of warmup, at rates that double. A rate is stable if its run reaches at least half the mean
OKS of the optimizer's best run.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from draw import svg_chart

FLAGS = ["--image-size", "64", "--epochs", "1", "--batch-size", "16", "--lr-scale", "none",
         "--augment", "flip", "--ema-decay", "0.95", "--sigma-epochs", "1", "--eval-every", "1"]
RATES = {"adamw": [0.0005 * 2 ** k for k in range(10)], "sgd": [0.005 * 2 ** k for k in range(11)]}


def mean_oks(optimizer: str, lr: float, warmup: int, folder: str) -> float:
    """Train once, and return the OKS of the evaluation; nan if the run gave up."""
    out = Path(folder) / f"{optimizer} {lr} {warmup}"
    subprocess.run([sys.executable, str(ROOT / "train.py"), *FLAGS, "--optimizer", optimizer,
                    "--lr", str(lr), "--warmup", str(warmup), "--out", str(out)],
                   capture_output=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return next((line["OKS"] for line in lines if "OKS" in line), float("nan"))


def svg_column(charts: list[str]) -> str:
    """Stack charts of one width into one SVG."""
    out, y = "", 0
    for chart in charts:
        width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', chart).groups())
        out += chart.replace("<svg ", f'<svg y="{y}" ', 1)
        y += height
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" '
            f'viewBox="0 0 {width} {y}">{out}</svg>\n')


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("picture", type=Path, metavar="FILE.svg")
    args, charts = p.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        for optimizer, rates in RATES.items():
            curves = {f"{name} warmup": [(lr, mean_oks(optimizer, lr, steps, folder))
                                         for lr in rates]
                      for name, steps in (("40 steps of", 40), ("no", 0))}
            best = max(oks for points in curves.values() for _, oks in points if oks == oks)
            stable = {name: max(lr for lr, oks in points if oks >= best / 2)
                      for name, points in curves.items()}
            with_it, without = stable.values()
            print(optimizer, json.dumps(curves), f"largest stable rate {with_it:g} with, "
                  f"{without:g} without: ratio {with_it / without:g}", sep="\n", flush=True)
            charts.append(svg_chart(curves, f"{optimizer}: mean OKS by learning rate", log2_x=True,
                                    width=720, height=300))
    args.picture.write_text(svg_column(charts), encoding="utf-8")


if __name__ == "__main__":
    main()
