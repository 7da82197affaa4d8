"""Output for people: skeletons on images, charts and pages, a run's plan, progress and log.

    python draw.py runs/a runs/b --out runs.html      # several runs in the same charts

It imports none of the other files, only numpy and Pillow.
"""
import argparse
import base64
import errno
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

LEFT, RIGHT, MIDDLE = (255, 140, 0), (0, 190, 255), (120, 230, 80)  # sides of the person
BOX, IGNORED, BLACK = (255, 255, 255), (100, 100, 100), (0, 0, 0)
# Of curves; dashes are for those beyond eight. Contrast with white and near black: at least 3.8:1.
COLORS = ("#2f7fd1", "#d4600f", "#149070", "#c2589b", "#a07c0a", "#7f72d6", "#d0454c", "#78818a")
DASHES = ("none", "6 3", "2 3")
CHART_STYLE = """.chart rect,.chart circle{fill:#fff}.chart polyline{fill:none}
.chart text{fill:#57606a;font:11px system-ui,sans-serif}.chart .title{font:600 13px system-ui}
.chart line,.chart polyline{stroke-width:1.8;stroke-linejoin:round}
.chart .grid{stroke:#888;stroke-width:1;stroke-opacity:.25}@media(prefers-color-scheme:dark){
.chart rect,.chart circle{fill:#16191d}.chart text{fill:#9aa4ae}}"""
PAGE_STYLE = """:root{color-scheme:light dark}h1,h2{font-size:20px;margin-top:28px}
body{margin:auto;max-width:1200px;padding:0 16px;font:15px/1.5 system-ui;overflow-wrap:anywhere}
p,figure{margin:4px 0}.chart,img{display:block;width:100%;height:auto}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:16px}
.table{overflow:auto}details .table{max-height:420px}table{border-collapse:collapse;font-size:13px}
th,td{padding:3px 12px 3px 0;text-align:right;white-space:nowrap;border-bottom:1px solid #8885}
th:first-child,td:first-child{text-align:left}pre{font-size:12px;white-space:pre-wrap}
@media(max-width:600px){th,td{font-size:10px;padding-right:2px}
td:first-child{white-space:normal;overflow-wrap:normal}}
@media(prefers-color-scheme:dark){body{background:#16191d}}"""
# Numbers of log.jsonl that the report plots; others, but step, epoch and loss, are loss terms.
EVALUATED = ("AP", "AP50", "AP75", "AR", "OKS", "mask_IoU")
PACE = {"lr": "learning rate", "grad_norm": "gradient norm", "scores": "assigned scores an image",
        "img_s": "images a second", "data_wait": "share of the time spent waiting for data",
        "memory_gb": "largest memory, GB"}
NOTES = {"Loss": "Rises while the keypoint tolerance narrows (--sigma-epochs): watch AP and OKS.",
         "Validation images": "Left labels, right predictions of the averaged weights with a score "
         "of 0.3 or more. OKS: mean of labeled people's best detections, whatever their scores."}


def draw_people(image: Image.Image, boxes: np.ndarray, keypoints: np.ndarray, names: list[str],
                edges: list[list[int]], flip: list[int], scores: Sequence[float] | None = None,
                least: int = 480) -> Image.Image:
    """Copy the image and draw a skeleton and box per person: left orange, right blue, else green.

    The copy is enlarged if its longer side is under `least` px, or details would be lost. In a
    pair of flip (Skeleton.flip) that is not named left and right, the first counts as left.
    boxes (M, 4) and keypoints (M, K, 3) in px. A keypoint's third number is its visibility (labels:
    0 is not drawn, 1 is hollow) or, if scores (M,) are given, its score: shown above 0.3.
    """
    zoom = max(1, least / max(image.size))
    image = image.convert("RGB").resize([max(round(zoom * side), 1) for side in image.size])
    boxes, keypoints = zoom * np.asarray(boxes), np.asarray(keypoints) * (zoom, zoom, 1)
    pen, side = ImageDraw.Draw(image), max(image.size)
    width, font = max(round(side / 240), 1), max(11, side // 34)
    rim = width + 2 * math.ceil(width / 2) if side >= 160 else width  # black, to show on any image
    colors = []
    for i, j in enumerate(flip):
        left = "left" in names[i].lower() or i < j and "left" not in names[j].lower()
        colors.append(MIDDLE if i == j else LEFT if left else RIGHT)
    for i, ((x1, y1, x2, y2), person) in enumerate(zip(boxes.tolist(), keypoints)):
        seen = person[:, 2] > (0 if scores is None else 0.3)
        lines = [([x1, y1, x2, y1, x2, y2, x1, y2, x1, y1], BOX if seen.any() else IGNORED)]
        lines += [([*person[a, :2], *person[b, :2]], colors[b if colors[a] == MIDDLE else a])
                  for a, b in edges if seen[a] and seen[b]]
        for points, _ in lines:
            pen.line(points, BLACK, rim, joint="curve")
        for points, color in lines:
            pen.line(points, color, width, joint="curve")
        for k in np.flatnonzero(seen):
            (x, y, v), color, r = person[k], colors[k], 1.5 * width
            hollow = scores is None and v == 1
            pen.ellipse([x - r, y - r, x + r, y + r], None if hollow else color,
                        color if hollow or rim == width else BLACK, max(width // 2, 1))
        if scores is not None:
            place = np.clip((x1, y1 - 1.3 * font), (2 * width, width),
                            (image.width - 2.5 * font, image.height - 1.5 * font))
            pen.text(tuple(place), f"{scores[i]:.2f}", BOX, font_size=font,
                     stroke_width=max(width // 2, 1), stroke_fill=BLACK)
    return image


def contact_sheet(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size side by side, in rows of `columns` (default: about a square)."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def ticks(low: float, high: float, outer: bool = False) -> list[float]:
    """Three to ten round numbers between low < high; with outer they enclose low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= max(m for m in (1, 2, 5) if m == 1 or m * step * 3 <= high - low)
    first, last = round(low / step, 6), round(high / step, 6)  # 0.3 / 0.1 is not quite 3
    down, up = (math.floor, math.ceil) if outer else (math.ceil, math.floor)
    return [i * step for i in range(down(first), up(last) + 1)]


def with_zero(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis. It includes 0 unless the curves would then fill less than half of it."""
    level = high - low < 0.01 * high  # so flat that ticks would differ in a fifth digit
    if level or not 0 < high / 2 < low:
        low, high = min(low, 0), max(high, 0)
    return low, high if high > low else low + 1


def short(value: float) -> str:
    """A number in few characters: 0.025, 2500, 12.5k, 2M."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if least <= abs(value) < math.inf:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def escape(text: str) -> str:
    """Escape text for HTML and XML. Unprintable characters (a lone surrogate) become squares."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "\u25a1" for c in text))


def svg_curve(name: str, points: list[tuple[float, float]], place: Callable, look: str) -> str:
    """One curve: a line per finite stretch; dots at its end, or at all points if at most 25."""
    out = ""
    for finite, piece in itertools.groupby(points, lambda point: all(map(math.isfinite, point))):
        if finite:
            dots = [(*place(x, y), f"{escape(name)}: {y:.6g} at {x:.6g}") for x, y in piece]
            path = " ".join(f"{px},{py}" for px, py, _ in dots)
            out += f'<polyline points="{path}" {look}/>'
            for px, py, text in dots if len(points) <= 25 else dots[-1:]:
                out += f'<circle cx="{px}" cy="{py}" r="2.5" {look}><title>{text}</title></circle>'
    return out


def svg_chart(series: dict[str, list[tuple[float, float]]], title: str, log2_x: bool = False,
              width: int = 360, height: int = 220) -> str:
    """One SVG, for a page or for a file of its own, with the named curves of points (x, y).

    A point that is not finite breaks its curve; log2_x needs x > 0; hovering over a dot shows its
    numbers. The legend adds to height (px); a single curve named like the title has none.
    """
    left, right, top, bottom = 52, width - 18, 34, height - 26
    bend = math.log2 if log2_x else float
    xs, ys = zip(*[(bend(x), y) for points in series.values()
                   for x, y in points if math.isfinite(x) and math.isfinite(y)] or [(1, 0)])
    start, end = (min(xs), max(*xs, min(xs) + 1)) if log2_x else with_zero(min(xs), max(xs))
    y_ticks = ticks(*with_zero(min(ys), max(ys)), outer=True)
    x_ticks = [2 ** x for x in ticks(start, end) if x % 1 == 0] if log2_x else ticks(start, end)

    def place(x: float, y: float) -> tuple[str, str]:
        across = (bend(x) - start) / (end - start)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{left + across * (right - left):.1f}", f"{bottom - up * (bottom - top):.1f}"

    parts = []
    for y in y_ticks:
        _, at = place(1, y)
        parts.append(f'<line class="grid" x1="{left}" y1="{at}" x2="{right}" y2="{at}"/>'
                     f'<text x="{left - 7}" y="{at}" dy="4" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        at, _ = place(x, 0)
        parts.append(f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{short(x)}</text>')
    most = width // 7 - 8  # letters of a name
    names = ["\u2026" + name[1 - most:] if len(name) > most else name for name in series]
    columns = max(width // (40 + 7 * max(map(len, names), default=0)), 1)
    for i, (name, points) in enumerate(series.items()):
        look = (f'stroke="{COLORS[i % len(COLORS)]}" '
                f'stroke-dasharray="{DASHES[i // len(COLORS) % len(DASHES)]}"')
        parts.append(svg_curve(name, points, place, look))
        if list(series) != [title]:
            x, y = 12 + i % columns * (width // columns), bottom + 34 + i // columns * 17
            height = y + 12
            parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 18}" y2="{y}" {look}/>'
                         f'<text x="{x + 24}" y="{y + 4}">{escape(names[i])}</text>')
    return (f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" width="{width}" '
            f'height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}"><style>{CHART_STYLE}</style><rect width="100%" '
            f'height="100%"/><text class="title" x="12" y="20">{escape(title)}</text>'
            + "".join(parts) + "</svg>")


def html_table(rows: list[dict]) -> str:
    """A table that scrolls inside its box, columns in the longest row's order; floats get four
    digits. Missing values and -1 (no people) are empty."""
    def line(tag: str, row: dict) -> str:
        values = ["" if row.get(name, -1) == -1 else row[name] for name in names]
        cells = [short(value) if isinstance(value, float) else str(value) for value in values]
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
    longest_first = sorted(reversed(rows), key=len, reverse=True)
    names = {name: name for row in longest_first for name in row}
    lines = [line("th", names)] + [line("td", row) for row in rows]
    return f'<div class="table" tabindex="0"><table>{"".join(lines)}</table></div>'


def html_image(image: Image.Image, alt: str) -> str:
    """An image embedded in the page, at most 720 px a side, with alt as its caption."""
    image, file, alt = image.convert("RGB"), io.BytesIO(), escape(alt)
    image.thumbnail((720, 720))
    image.save(file, "JPEG", quality=85)
    return (f'<figure><img alt="{alt}" width="{image.width}" height="{image.height}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
            f"<figcaption>{alt}</figcaption></figure>")


def html_page(title: str, parts: list[str]) -> str:
    """A self-contained HTML page. parts are HTML or SVG from the functions above."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
            f"<style>{PAGE_STYLE}</style></head><body><h1>{escape(title)}</h1>\n"
            + "\n".join(parts) + "</body></html>\n")


def say(text: str, stream=None) -> None:
    """Print a line to stdout or stream, in one piece: other processes write there too. If nobody
    can read it any more (a closed terminal, a tee that Ctrl-C ended), the run goes on, and all
    later output is discarded."""
    stream = stream or sys.stdout
    kind = getattr(stream, "encoding", None) or "utf-8"  # not every terminal knows every letter
    try:
        stream.write(f"{text}\n".encode(kind, "backslashreplace").decode(kind))
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def save_picture(path: str, picture: Image.Image, quality: int = 90) -> None:
    """Save a JPEG as write_file does; Pillow's own writing may not notice a full disk."""
    whole = io.BytesIO()
    picture.save(whole, "JPEG", quality=quality)
    write_file(path, whole.getvalue())


def write_file(path: str, content: bytes | str) -> None:
    """Write a file atomically: readers find either the old file or the complete new one."""
    path = os.path.realpath(path)  # a link stays one
    temporary = f"{path}.{os.getpid()}.tmp"  # several processes may write the same file
    try:
        with open(temporary, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        error.filename = path
        raise


def read_log(folder: str) -> list[dict]:
    """The lines of a run's log.jsonl; damaged ones are named and left out, as by a copy that was
    made while the run wrote. Raises ValueError if none is left, and OSError."""
    path, lines = os.path.join(folder, "log.jsonl"), []
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found; expected a folder that train.py wrote")
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, text in enumerate(f, 1):
            try:
                line = dict(json.loads(text))
                sum(0.0 * x for name, x in line.items() if name != "not_finite")  # numbers?
                line["step"], "skipped" in line and ", ".join(line["not_finite"])
                lines.append(line)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                say(f"{path}: line {number} is {text[:40].strip()!r}, expected json with a step; "
                    f"left out", sys.stderr)
    if not lines:
        raise ValueError(f"{path} has no line yet; wait for the run's first one, at step 5")
    return lines


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 300 points: a longer curve becomes means of equal stretches. Breaks are kept."""
    size = math.ceil(len(points) / 300) or 1
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    return [tuple(sum(values) / len(part) for values in zip(*part)) for part in parts]


def number_chart(runs: dict[str, list[dict]], name: str) -> str:
    """A chart of one logged number by step, or "" if no run has it. Runs keep their colors."""
    title, series = PACE.get(name, name), {}
    for run, lines in runs.items():
        points = [(line["step"], math.nan if line[name] == -1 else line[name])  # -1: no people
                  for line in lines if name in line and "average of" not in line]
        series[run if len(runs) > 1 else title] = thin(points)
    return svg_chart(series, title) if any(series.values()) else ""


def log_tables(run: str, lines: list[dict]) -> str:
    """The numbers of a log as collapsed tables, the newest on top."""
    evaluated, skipped, trained = ([line for line in reversed(lines) if name in line]
                                   for name in ("AP", "skipped", "loss"))
    tables = {"evaluations": evaluated, "the last 100 skipped steps": [
        {**line, "not_finite": ", ".join(line["not_finite"])} for line in skipped[:100]],
        "up to 200 lines of the log": trained[::math.ceil(len(trained) / 200) or 1]}
    return "".join(f"<details><summary>{escape(run)}: {name}</summary>{html_table(rows)}</details>"
                   for name, rows in tables.items() if rows)


def report_page(title: str, runs: dict[str, list[dict]], starts: Sequence[str] = (),
                figures: Sequence[str] = ()) -> str:
    """An HTML page about one run, or about several runs in the same charts.

    starts are the printed plans of a run, one per start; figures are the results of html_image.
    """
    rows, terms = [], {}
    for run, lines in runs.items():
        best = next((line for line in reversed(lines) if "best" in line), {})
        last = next((line for line in reversed(lines) if "loss" in line), {})
        terms |= dict.fromkeys(name for name in last if name not in ("step", "epoch", *PACE))
        rows.append({"run": run, "best AP": best.get("AP", ""), "its OKS": best.get("OKS", ""),
                     "after epoch": best.get("epoch", ""), "steps": lines[-1]["step"],
                     "epochs": last.get("epoch", ""), "last loss": last.get("loss", ""),
                     "skipped steps": max(line.get("skipped", 0) for line in lines)})
    parts = [html_table(rows),
             "<p>Curves over optimizer steps; a long one shows means of neighbors.</p>"]
    names = {"Evaluation": EVALUATED, "Loss": terms, "Optimizer and machine": PACE}
    charts = {heading: [number_chart(runs, name) for name in names[heading]] for heading in names}
    for heading, pictures in {**charts, "Validation images": figures}.items():
        if any(pictures):
            parts.append(f"<h2>{heading}</h2><p>{NOTES.get(heading, '')}</p>"
                         f'<div class="charts">{"".join(pictures)}</div>')
    parts += ["<h2>Numbers</h2>", *(log_tables(run, lines) for run, lines in runs.items())]
    for i, start in enumerate(reversed(starts)):
        heading = "An earlier start" if i else "Command and plan"
        parts.append(f"<h2>{heading}</h2><pre>{escape(start)}</pre>")
    return html_page(title, parts)


CARD = """<p>AP would rise most if these were put right, each alone: {worst}.</p>
<h2>Average precision</h2><p>AP is 1 if all labeled people are found, nobody else is, and keypoints
lie on their labels: the mean over ten tolerances; AP50 is the widest, AP75 a narrow one. AR is the
share of people who are met, the mean over the same tolerances. Crowding counts other people's
keypoints in a person's box, as a share of the person's own, the mean of an image: easy to 0.1, hard
above 0.8, as in CrowdPose. Size: medium is 32 x 32 to 96 x 96 px of the file, large is above; COCO
has no row for the rest.</p>
{scores}<h2>What goes wrong</h2><p>AP if this one kind of error were put right and all else stayed;
gain is what that adds. Gains overlap. Keypoints: good is as near to the label as people who label
agree (similarity 0.85 or more), jitter a little off, inversion on the person's other side, swap on
another person, miss on none of these (all under 0.5). Detections: best is nearest to its person,
score farther but of a higher score, duplicate of a lower one, background on nobody (many are of low
scores and cost little). Put right means: keypoints move onto their labels, wrong detections go,
missed people are found; with scores, each best gets its OKS and all others 0, which takes
duplicates and background away, too. Detections on crowds and on people without keypoints do not
count. Found: somebody whom a detection fits at least roughly (OKS 0.1).</p>{errors}
<h2>Keypoints</h2><p>Of found people alone. OKS is 1 on the label and falls to 0 with distance, by
the person's size and what is usual for the keypoint. PCK is the share within a tenth of the box's
longer side. Good to miss are shares, and add up to 1.</p>{keypoints}
<h2>Worst images</h2><p>By the mean OKS of the best detection of each labeled person.</p>{poor}
<h2>Speed</h2><p>{latency_ms:.1f} ms for one image; {img_s:.1f} images a second in batches of
{batch}, from pixels in memory to people. The whole evaluation took {evaluation_s:.0f} s.</p>
<h2>How it was measured</h2><p>{images} images, {empty} of them without labeled people</p>"""


def card_page(card: dict) -> str:
    """The HTML page of evaluate.py --card, from the card's numbers."""
    def table(rows: list[dict], name: str, group: str = "", digits: int = 3) -> str:
        return html_table([{"": f"{row[group]}: {row[name]}" if group else row[name]} | {
            key: f"{value:.{digits}f}" if isinstance(value, float) and value != -1 else value
            for key, value in row.items() if key not in (name, group)} for row in rows])

    gains = sorted((row for row in card["errors"] if row.get("gain", 0) >= 0.0005),
                   key=lambda row: -row["gain"])
    images, labeled = (row["images"] for row in card["scores"][:2])
    text = CARD.format(
        worst=", ".join(f"{row['kind']} ({row['of']}) by {row['gain']:.3f}" for row in gains[:3])
        or "nothing alone",
        scores=table(card["scores"], "which", "group"), errors=table(card["errors"], "kind", "of"),
        keypoints=table(card["keypoints"], "keypoint", digits=2),
        poor=table(card["worst images"], "file"),
        images=images, empty=images - labeled, **card["speed"])
    protocol, ap = {"scored by": "pycocotools", **card["protocol"]}, card["metrics"]["AP"]
    title = "nobody labeled" if ap == -1 else f"AP {ap:.3f}"
    return html_page(f"{title}: {protocol['weights']}", [
        text, *(f"<p>{escape(f'{name}: {value}')}</p>" for name, value in protocol.items())])


class Log:
    """Prints progress and writes log.jsonl, one line every --log-every steps; only on rank 0."""

    def __init__(self, args: argparse.Namespace, rank: int, total_steps: int, global_batch: int,
                 images: int, terms: tuple[str, ...]):
        self.speaks, self.every, self.terms = rank == 0, args.log_every, terms
        self.path = os.path.join(args.out, "log.jsonl") if rank == 0 and not args.dry_run else None
        self.total_steps, self.global_batch, self.images = total_steps, global_batch, images
        self.last = total_steps if args.dry_run else min(total_steps, args.max_steps or total_steps)
        self.marks = (5, args.max_steps if args.dry_run else total_steps)  # report these steps, too
        # Sums since the last line: scores, terms, and each step's divisor (its scores, at least 1).
        self.sums, self.steps = [0.0] * (2 + len(terms)), 0
        self.taken, self.waited = 0, 0.0  # not resumed, like all times
        self.interval = self.ended = time.monotonic()  # times of the last line, last step
        self.starts, self.figures = [], []  # of the report: print_plan's texts, validation images

    def state_dict(self) -> dict:
        size = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        return {"sums": self.sums, "steps": self.steps, "bytes": size, "starts": self.starts}

    def load_state_dict(self, state: dict) -> None:
        """Restore it, and cut log.jsonl back to the checkpoint: later steps are done again."""
        self.sums, self.steps = state["sums"], state["steps"]
        self.starts = state.get("starts", [])  # older checkpoints have none
        if self.path and os.path.exists(self.path):
            os.truncate(self.path, min(state["bytes"], os.path.getsize(self.path)))

    def write(self, values: dict) -> None:
        """Append one json line."""
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")

    def evaluation(self, step: int, of: str, number: int, metrics: dict[str, float],
                   best: bool = False) -> None:
        """Report metrics of e.g. `epoch` 3, `average of` 10 epochs. -1 (no people) is not shown."""
        self.write({"step": step, of: number, **metrics, **({"best": 1} if best else {})})
        known = [f"{name} {value:.3f}" for name, value in metrics.items() if value != -1]
        say(f"{of} {number}  " + "  ".join(known))

    def report(self, pictures: list[tuple[str, Image.Image]]) -> None:
        """Rewrite report.html from log.jsonl and pictures, validation images with captions."""
        folder = os.path.dirname(self.path)
        self.figures = [html_image(image, caption) for caption, image in pictures] or self.figures
        page = report_page(folder, {folder: read_log(folder)}, self.starts, self.figures)
        write_file(os.path.join(folder, "report.html"), page)
        now = time.monotonic()
        self.interval, self.ended = self.interval + now - self.ended, now  # excludes evaluation

    def end(self, step: int, evaluated: int, last: int, stopper, out: str) -> None:
        """Print how the run ended, and update the report if this process has evaluated. The last
        evaluation was after epoch `evaluated` of `last`; stopper is a schedule.EarlyStopping."""
        if self.figures:
            self.report([])
        best, epoch = stopper.best, stopper.best_epoch
        done, early = step >= self.total_steps and evaluated >= last, stopper.over(evaluated)
        state = "done" if done else "stopped early (--patience)" if early else "stopped"
        longer = f" --patience {2 * max(stopper.patience, evaluated - epoch)}" if early else ""
        ap = f"best AP {best:.4f}" if best > 0 else f"AP 0.001 or less, best OKS {best + 1:.3f}"
        ap = f"{ap} after epoch {epoch}" if epoch else "not evaluated yet"
        more = f"--resume --out {shlex.quote(out)}{longer}{' --epochs N' * done}"
        more = f"; {'longer:' if done else 'go on with'} {more}" if self.path else ""
        say(f"{state} at step {step} of {self.total_steps}; {ap}; see {out}{more}")

    def skip(self, step: int, skipped: int, result) -> str:
        """Report a skipped train.Step. Return the names of its values that are not finite."""
        bad = [name for name, value in zip(("scores", *self.terms), result.sums)
               if not math.isfinite(value)] or ["gradient"]
        self.write({"step": step, "skipped": skipped, "not_finite": bad})
        if self.speaks:
            say(f"step {step + 1} skipped: not finite: {', '.join(bad)}; {skipped} so far")
        return ", ".join(bad)

    def step(self, step: int, result, lr: float, memory: float) -> None:
        """Add a train.Step; report every --log-every steps and at self.marks. memory is in GB."""
        new = [*result.sums, max(result.sums[0], 1.0)]
        self.sums = [a + b for a, b in zip(self.sums, new)]
        self.steps, self.taken = self.steps + 1, self.taken + 1
        self.waited, self.ended = self.waited + result.waited, time.monotonic()
        if not self.speaks or (step % self.every and step not in self.marks):
            return
        seconds = self.ended - self.interval
        score_sum, *sums, divisor = self.sums
        terms = {name: term / divisor for name, term in zip(self.terms, sums)}
        epoch, loss = round(step * self.global_batch / self.images, 3), sum(terms.values())
        rate, waited = self.taken * self.global_batch / seconds, self.waited / seconds
        self.write({"step": step, "epoch": epoch, "loss": loss, **terms,
                    "scores": score_sum / self.steps / self.global_batch, "lr": lr,
                    "grad_norm": result.norm, "img_s": rate, "data_wait": waited,
                    "memory_gb": memory})
        minutes = (self.last - step) * self.global_batch / rate / 60
        eta = f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
        named = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
        say(f"epoch {epoch:.2f}  step {step}/{self.total_steps}  loss {loss:.3f} ({named})  "
            f"lr {lr:.2e}  norm {result.norm:.1f}  {rate:.1f} img/s  data {waited:.0%}  "
            f"{memory:.1f} GB  ETA {eta}")
        self.sums, self.steps, self.waited, self.taken = [0.0] * len(self.sums), 0, 0.0, 0
        self.interval = self.ended


def doubts(report: dict[str, list], skeleton, args: argparse.Namespace, images: int,
           global_batch: int, steps: tuple[int, ...], device: str = "") -> Iterator[str]:
    """Warnings about likely mistakes in the arguments of print_plan."""
    scaled = args.lr_scale != "none" and 4 * global_batch < args.lr_batch
    if images < 5000 and scaled and not args.resume:
        yield (f"with few images, a rate that is scaled down learns next to nothing: try --lr "
               f"{args.lr:g} --lr-scale none, see README, Your own data")
    if report and len(report["loaded"]) < 2 * len(report["skipped"]):
        yield "few tensors of --weights fit: has it another size? Then give that as --model"
    total, *_, narrowing = steps
    if narrowing > total and args.sigma_start != 1:
        yield "the keypoint tolerance stays wide to the end: lower --sigma-epochs"
    if args.patience < min(args.sigma_epochs, args.epochs) and args.sigma_start != 1:
        yield "AP and OKS may fall while the tolerance narrows (--sigma-epochs): raise --patience"
    pair = [i != j for i, j in enumerate(skeleton.flip)]
    alone = [name for name, paired in zip(skeleton.names, pair)
             if not paired and re.search("left|right|(^|_)[lr](_|$)", name.lower())]
    if alone or args.flip_pairs is None and not any(pair) and len(pair) > 1:
        some = ", ".join(alone[:3]) + " ..." * (len(alone) > 3)
        what = f"{some}: in no pair." if alone else "is there no left and right?"
        yield (f"{what} Name all pairs in --flip-pairs A:B,C:D, or, where one has no twin, give "
               f"--flip 0: mirrored images teach wrong sides")
    if args.amp == "fp16" and device.startswith("cpu"):
        yield "fp16 is for GPUs: on a CPU it is slow, and skips its first steps; use bf16 or no"
    if {*skeleton.sigmas} == {0.05}:
        yield "sigma 0.05 for all keypoints, a guess: README, Your own data, says how to measure it"


def print_plan(args: argparse.Namespace, source: dict[str, str], report: dict[str, list],
               train_set, images: tuple[int, int], batch: tuple[int, int], steps: tuple[int, ...],
               peak_lr: float, device: str) -> str:
    """Print and return the command, every value with its source, and what these amount to.

    images: to train on, to evaluate; batch: processes, images per step; steps: of all epochs, done,
    to do now, of the warmup, and until the keypoint tolerance has narrowed. report: load_weights'.
    """
    processes, skeleton = os.environ.get("LOCAL_WORLD_SIZE"), train_set.skeleton
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    where = f"--nnodes {nodes} ..." if nodes > 1 else "--standalone"
    launcher = f"torchrun {where} --nproc-per-node {processes}" if processes else "python"
    total, done, now, warmup, narrowing = steps
    lines = [f"goes on from  {args.out}, step {done}"] if done else []
    lines.append(f"command       {launcher} {shlex.join(sys.argv)}")
    groups = {origin: [(name, getattr(args, name)) for name in source if source[name] == origin]
              for origin in dict.fromkeys(source.values())}
    groups["augmentation"] = train_set.augment._asdict().items()
    for origin, values in groups.items():
        text = ", ".join(f"{name.replace('_', '-')} {x}" for name, x in values if x is not None)
        lines += textwrap.wrap(f"{origin:13} {text}" * bool(text), 100, break_on_hyphens=False,
                               subsequent_indent=14 * " ")
    for name, tensors in report.items():
        some = f": {', '.join(tensors[:12])}{' ...' * (len(tensors) > 12)}" * (name != "loaded")
        kept = " (the person, and the names that both share)" * (name == "in part")
        lines += [f"weights {name}{kept} {len(tensors)}{some}"] if tensors else []
    pairs = [f"{skeleton.names[i]}-{skeleton.names[j]}"
             for i, j in enumerate(skeleton.flip) if i < j]
    shown = ", ".join(pairs if len(pairs) < 5 else [pairs[0], "...", pairs[-1]])
    scaled = "" if args.lr_scale == "none" else (
        f" from {args.lr:.2e} for {args.lr_batch} images a step, scaling {args.lr_scale}")
    lines.append(
        f"keypoints     {len(skeleton.names)}, sigmas {min(skeleton.sigmas)} to "
        f"{max(skeleton.sigmas)} of sqrt(area); a mirror exchanges {shown or 'nothing'}\n"
        f"images        {images[0]} to train on, {images[1]} to evaluate, {args.image_size} px\n"
        f"global batch  {args.batch_size} images x {batch[0]} processes x {args.accumulate} "
        f"micro-batches = {batch[1]}\n"
        f"steps         {total} for {args.epochs} epochs, {done} done, {now} now\n"
        f"peak lr       {peak_lr:.2e}{scaled}\n"
        f"warmup        {warmup} steps; keypoint tolerance narrows for {narrowing} steps\n"
        f"device        {device}, amp {args.amp}, {args.workers} loader processes")
    for part, n in args.freeze.items():
        when = f"in the {'first' if n > 0 else 'last'} {abs(n)} epoch(s)" if n else "in all epochs"
        lines.append(f"frozen        {part}, {when}")
    lines += [f"check         {doubt}" for doubt in doubts(report, skeleton, args, images[0],
                                                           batch[1], steps, device)]
    text = "\n".join(lines)
    say(text + "\nETA           measured on the first steps, in the lines below")
    return text


def main() -> None:
    p = argparse.ArgumentParser(description="Show runs of train.py in the same charts.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, with a log.jsonl")
    p.add_argument("--out", default="runs.html", metavar="FILE", help="page; default: runs.html")
    args = p.parse_args()
    if not args.out.endswith(".html"):
        p.error(f"--out {args.out} must end in .html")
    logs = [run for run in args.runs if os.path.isfile(os.path.join(run, "log.jsonl"))]
    begun = logs or args.runs  # without any log, read_log says what is missing
    for run in [run for run in args.runs if run not in begun]:
        print(f"{run} has no log.jsonl; left out", file=sys.stderr)
    try:
        runs = {run: read_log(run) for run in begun}
        write_file(args.out, report_page("Runs" if len(runs) > 1 else begun[0], runs))
    except (ValueError, OSError) as error:
        sys.exit(f"draw.py: {error}")
    say(f"{args.out}: {sum(map(len, runs.values()))} log lines of {len(runs)} runs")


if __name__ == "__main__":
    main()
