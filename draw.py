"""What a person looks at: skeletons on images, many images on a sheet, a run's plan and progress.

Owns pixels that are for looking at, lines of the terminal and log.jsonl. Knows nothing about
networks, files of labels or how training works; it imports numpy and Pillow.
"""
import argparse
import json
import math
import os
import textwrap
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

LEFT, RIGHT, MIDDLE = (255, 140, 0), (0, 190, 255), (120, 230, 80)  # sides of the person
BOX, IGNORED = (255, 255, 255), (170, 170, 170)
CURVES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def side_color(name: str) -> tuple[int, int, int]:
    """Orange for left_*, blue for right_*, green for the rest."""
    return LEFT if name.startswith("left") else RIGHT if name.startswith("right") else MIDDLE


def draw_people(image: Image.Image, boxes: np.ndarray, keypoints: np.ndarray, names: list[str],
                edges: list[list[int]], scores: Sequence[float] | None = None,
                min_score: float = 0.3) -> Image.Image:
    """A copy of the image with one skeleton and box a person.

    boxes (M, 4) and keypoints (M, K, 3) in px of the image; the third number is a visibility
    (labels: 0 is not drawn, 1 is hollow) or a score in [0, 1] (predictions, when scores (M,) of
    the people are given: under min_score a keypoint is not drawn).
    """
    image = image.convert("RGB")
    pen = ImageDraw.Draw(image)
    width = max(round(max(image.size) / 320), 1)
    for i, (box, person) in enumerate(zip(boxes, keypoints)):
        seen = person[:, 2] > (0 if scores is None else min_score)
        pen.rectangle([float(v) for v in box], outline=BOX if seen.any() else IGNORED, width=width)
        for a, b in edges:
            if seen[a] and seen[b]:
                color = side_color(names[b] if side_color(names[a]) == MIDDLE else names[a])
                pen.line([*person[a, :2], *person[b, :2]], fill=color, width=width)
        for (x, y, v), name in zip(person[seen], np.array(names)[seen]):
            r = 1.5 * width
            hidden = scores is None and v == 1
            pen.ellipse([x - r, y - r, x + r, y + r], outline=side_color(name),
                        fill=None if hidden else side_color(name))
        if scores is not None:
            pen.text((float(box[0]) + 2 * width, float(box[1]) + width), f"{scores[i]:.2f}",
                     fill=BOX, stroke_width=1, stroke_fill=(0, 0, 0),
                     font_size=max(10, max(image.size) // 50))
    return image


def contact_sheet(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size side by side, in rows of `columns` (default: about a square)."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= max(m for m in (1, 2, 5) if m * step * 3 <= high - low or m == 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def line_chart(series: dict[str, list[tuple[float, float]]], title: str, log2_x: bool = False,
               width: int = 900, height: int = 380) -> Image.Image:
    """Curves of points (x, y), each with its name. A y that is not finite breaks its curve."""
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    xs, ys = zip(*(point for points in series.values() for point in points if all(
        map(math.isfinite, point))))
    scale_x = math.log2 if log2_x else float
    x0, x1, y0, y1 = scale_x(min(xs)), scale_x(max(xs)), min(0, *ys), max(ys)
    x1, y1 = max(x1, x0 + 1e-9), max(y1, y0 + 1e-9)
    left, top, right, bottom = 80, 40, width - 200, height - 40

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))
    pen.text((left, 10), title, "black", font_size=16)
    for y in ticks(y0, y1):
        pen.line([place(x0, y), place(x1, y)], (225, 225, 225))
        pen.text((left - 8, place(x0, y)[1]), f"{y:.4g}", "black", anchor="rm", font_size=12)
    for x in range(math.ceil(x0), math.floor(x1) + 1) if log2_x else ticks(x0, x1):
        pen.line([place(x, y0), place(x, y1)], (240, 240, 240))
        text = f"{2 ** x:.3g}" if log2_x else f"{x:,.6g}"
        pen.text((place(x, y0)[0], bottom + 8), text, "black", anchor="mt", font_size=12)
    for i, (name, points) in enumerate(series.items()):
        color = CURVES[i % len(CURVES)]
        run = []
        for x, y in [*points, (math.nan, math.nan)]:
            if math.isfinite(y):
                run.append(place(scale_x(x), y))
            elif run:
                pen.line(run * (1 + (len(run) == 1)), color, 2)
                pen.ellipse([run[-1][0] - 3, run[-1][1] - 3, run[-1][0] + 3, run[-1][1] + 3], color)
                run = []
        pen.line([right + 15, top + 12 + 22 * i, right + 35, top + 12 + 22 * i], color, 3)
        pen.text((right + 42, top + 12 + 22 * i), name, "black", anchor="lm", font_size=12)
    return image


class Log:
    """Progress lines and log.jsonl, one line an interval, from rank 0."""

    def __init__(self, args: argparse.Namespace, rank: int, total_steps: int, global_batch: int,
                 images: int, terms: tuple[str, ...]):
        self.speaks, self.terms = rank == 0, terms
        self.path = os.path.join(args.out, "log.jsonl") if rank == 0 and not args.dry_run else None
        self.every, self.total_steps = args.log_every, total_steps
        self.global_batch, self.images = global_batch, images
        self.sums, self.steps = [0.0] * (1 + len(terms)), 0  # since the last line
        self.taken, self.waited, self.interval = 0, 0.0, time.time()  # by this process alone

    def state_dict(self) -> dict:
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        return {"sums": self.sums, "steps": self.steps, "bytes": size}

    def load_state_dict(self, state: dict) -> None:
        """Forget what was written after the checkpoint: those steps are done again."""
        self.sums, self.steps = state["sums"], state["steps"]
        if self.path and os.path.exists(self.path):
            os.truncate(self.path, min(state["bytes"], os.path.getsize(self.path)))

    def write(self, values: dict) -> None:
        """Append one json line."""
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")

    def evaluation(self, step: int, of: str, number: int, metrics: dict[str, float]) -> None:
        """Report the numbers of `epoch` 3, or of the `average of` 10 epochs.

        -1 means that nobody labeled is of that size.
        """
        self.write({"step": step, of: number, **metrics})
        known = [f"{name} {value:.3f}" for name, value in metrics.items() if value != -1]
        print(f"{of} {number}  " + "  ".join(known), flush=True)
        self.interval = time.time()

    def end(self, step: int, early: bool, best: float, best_epoch: int, out: str) -> None:
        """Say how the run ended."""
        state = "stopped early" if early else "done" if step >= self.total_steps else "stopped"
        ap = f"best AP {best:.4f} after epoch {best_epoch}" if best_epoch else "not evaluated yet"
        print(f"{state} at step {step} of {self.total_steps}; {ap}; see {out}")

    def skip(self, step: int, skipped: int, result) -> str:
        """Report a train.Step that changed nothing. Return what was not finite."""
        bad = [name for name, value in zip(("scores", *self.terms), result.sums)
               if not math.isfinite(value)] or ["gradient"]
        self.write({"step": step, "skipped": skipped, "not_finite": bad})
        if self.speaks:
            print(f"step {step + 1} skipped: not finite: {', '.join(bad)}; {skipped} so far",
                  flush=True)
        return ", ".join(bad)

    def step(self, step: int, result, lr: float, memory: float) -> None:
        """Take in a train.Step; every --log-every steps, and first at step 5, report.

        memory in GB.
        """
        self.sums = [a + b for a, b in zip(self.sums, result.sums)]
        self.steps, self.taken = self.steps + 1, self.taken + 1
        self.waited += result.waited
        if not self.speaks or (step % self.every and step not in (5, self.total_steps)):
            return
        score_sum, *terms = self.sums
        seconds = time.time() - self.interval
        terms = {name: term / max(score_sum, 1.0) for name, term in zip(self.terms, terms)}
        rate = self.taken * self.global_batch / seconds
        values = {"step": step, "epoch": round(step * self.global_batch / self.images, 3),
                  "loss": sum(terms.values()), **terms,
                  "scores": score_sum / self.steps / self.global_batch, "lr": lr,
                  "grad_norm": result.norm, "img_s": rate, "data_wait": self.waited / seconds,
                  "memory_gb": memory}
        self.write(values)
        eta = (self.total_steps - step) * self.global_batch / rate
        print(f"epoch {values['epoch']:.2f}  step {step}/{self.total_steps}  "
              f"loss {values['loss']:.3f} (" + " ".join(f"{n} {v:.3f}" for n, v in terms.items())
              + f")  lr {lr:.2e}  norm {result.norm:.1f}  {rate:.1f} img/s  "
              f"data {values['data_wait']:.0%}  {memory:.1f} GB  ETA {eta / 60:.1f} min",
              flush=True)
        self.sums, self.steps, self.waited, self.taken = [0.0] * len(self.sums), 0, 0.0, 0
        self.interval = time.time()


def print_plan(args: argparse.Namespace, source: dict[str, str], report: dict[str, list],
               images: tuple[int, int], batch: tuple[int, int], steps: tuple[int, ...],
               peak_lr: float, device: str) -> None:
    """Every resolved value and where it came from, and what they turn into on this machine.

    images to train on and to evaluate; batch is processes and images a step; steps are those of
    all epochs, done, to do now, of the warmup, and while the keypoint tolerance narrows.
    """
    groups = {}
    for name, origin in source.items():
        if getattr(args, name) is not None:
            groups.setdefault(origin, []).append(f"{name.replace('_', '-')} {getattr(args, name)}")
    for origin, values in groups.items():
        print(textwrap.fill(", ".join(values), 100, initial_indent=f"{origin:13} ",
                            subsequent_indent=14 * " ", break_on_hyphens=False))
    for name, tensors in report.items():
        print(f"weights {name} {len(tensors)}" + (
            f": {', '.join(tensors[:6])}{' ...' * (len(tensors) > 6)}" * (name != "loaded")))
    print(f"images        {images[0]} to train on, {images[1]} to evaluate, {args.image_size} px\n"
          f"global batch  {args.batch_size} images x {batch[0]} processes x {args.accumulate} "
          f"micro-batches = {batch[1]}\n"
          f"steps         {steps[0]} for {args.epochs} epochs, {steps[1]} done, {steps[2]} now\n"
          f"peak lr       {peak_lr:.2e} from {args.lr:.2e} for {args.lr_batch} images a step, "
          f"scaling {args.lr_scale}\n"
          f"warmup        {steps[3]} steps; keypoint tolerance narrows for {steps[4]}\n"
          f"device        {device}, amp {args.amp}, {args.workers} loader processes\n"
          f"ETA           measured on the first steps, see below", flush=True)
