"""Charts point by point, pages as a browser reads them, and a run whose report changes no bit."""
import base64
import html
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import draw
import evaluate
import train
from data import (COCO_SIGMAS, FLIP, MOSAIC, PLAIN, CocoPose, flatten, read_json,
                  read_skeleton)
from draw import (Log, html_image, html_page, html_table, report_page, svg_chart, thin,
                  ticks)
from evaluate import best_oks, extremes, keypoint_ap, quiet_coco, score
from model import YoloNasPose
from people import draw_dataset
from schedule import EarlyStopping
from test_evaluate import coco_file, detections

ROOT, SVG = Path(__file__).parents[1], "{http://www.w3.org/2000/svg}"
HOSTILE = "</text><script>alert('1')</script>\"&\x1b\udc80<b a='"


class Page(HTMLParser):
    """Tags in order, text, tables and images of a page; fails where tags are not balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.attrs = [], [], "", []
        self.tables, self.images = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [name for name, _ in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """The places of all curves' points in a chart, px."""
    return [[tuple(map(float, place.split(","))) for place in line.get("points").split()]
            for line in ET.fromstring(svg).iter(SVG + "polyline")]


def labels_of(svg: str) -> list[str]:
    return [text.text for text in ET.fromstring(svg).iter(SVG + "text")]


def test_points_lie_where_the_axes_say():
    """By hand: the axes' corner is at (52, 194), their ends at 342 and 34."""
    chart = svg_chart({"AP": [(0, 0.0), (50, 0.5), (75, 0.75), (100, 1.0)]}, "AP")
    assert lines_of(chart) == [[(52, 194), (197, 114), (269.5, 74), (342, 34)]]
    assert labels_of(chart) == ["AP", "0", "0.2", "0.4", "0.6", "0.8", "1",
                                "0", "20", "40", "60", "80", "100"]
    rounded = svg_chart({"a": [(0, 0.1), (10, 0.43)]}, "a")  # 0 to 0.5, at 320 px a unit
    assert lines_of(rounded) == [[(52, 162), (342, 56.4)]]
    near = svg_chart({"a": [(600, 0.91), (1000, 0.95)]}, "a")  # 0 is far from both
    assert lines_of(near) == [[(52, 194), (342, 34)]] and labels_of(near)[1] == "0.91"
    level = svg_chart({"a": [(0, 0.3), (1, 0.3 + 1e-16), (2, 0.3)]}, "a")  # noise is no curve
    assert labels_of(level)[1] == "0" and [y for _, y in lines_of(level)[0]] == [34, 34, 34]
    negative = svg_chart({"a": [(0, -3.0), (10, 1.0)]}, "a")
    assert lines_of(negative) == [[(52, 194), (342, 34)]]
    doubled = svg_chart({"a": [(1, 0.0), (2, 1.0), (8, 0.0)]}, "a", log2_x=True)
    assert [round(x, 1) for x, _ in lines_of(doubled)[0]] == [52, 148.7, 342]
    assert labels_of(doubled)[-4:] == ["1", "2", "4", "8"]
    wide = svg_chart({"a": [(0, 0.0), (1, 1.0)]}, "a", width=720, height=300)
    assert lines_of(wide) == [[(52, 274), (702, 34)]]


def test_what_is_not_finite_breaks_a_curve_and_nothing_else():
    broken = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, -math.inf), (5, 2.0), (6, 1.0)]
    chart = svg_chart({"a": broken}, "a")
    assert [len(line) for line in lines_of(chart)] == [2, 1, 2]
    assert chart.count("<circle") == 5
    whole = svg_chart({"a": [(i, y if math.isfinite(y) else 1.5) for i, y in broken]}, "a")
    assert [p for line in lines_of(chart) for p in line] == [
        p for i, p in enumerate(lines_of(whole)[0]) if i not in (2, 4)]
    long = svg_chart({"a": [(i, 1.0) for i in range(30)]}, "a")
    assert long.count("<circle") == 1 and 'cx="342.0"' in long  # only its end is marked
    for nothing in ({}, {"a": []}, {"a": [(1, math.nan)]}):
        assert lines_of(svg_chart(nothing, "a")) == []
    assert lines_of(svg_chart({"a": [(7, 0.0)]}, "a")) == [[(342, 194)]]


def test_ticks_are_round_few_and_on_the_right_side():
    rng = random.Random(0)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-6, 6)
        high = low + 10 ** rng.uniform(-2, 1) * max(abs(low), 1e-6)
        inner, outer = ticks(low, high), ticks(low, high, outer=True)
        step = outer[1] - outer[0]
        digits = f"{step:.5e}"
        assert digits[:7] in ("1.00000", "2.00000", "5.00000")
        slack = 1e-5 * step
        assert 3 <= len(inner) <= 9 and len(outer) <= 10
        assert low - slack <= inner[0] < low + step and high - step < inner[-1] <= high + slack
        assert low - step < outer[0] <= low + slack and high - slack <= outer[-1] < high + step


def test_a_long_curve_becomes_means_and_still_breaks():
    points = [(float(i), float(i * i)) for i in range(1000)]
    points[700] = (700.0, math.nan)
    few = thin(points)  # 250 of 4: 0 + 1 + 4 + 9, ..., 996 ** 2 + ... + 999 ** 2
    assert len(few) == 250 and few[0] == (1.5, 3.5) and few[-1] == (997.5, 995007.5)
    assert [x for x, y in few if math.isnan(y)] == [701.5]
    assert thin(points[:300]) == points[:300] and thin([]) == []
    assert len(thin(points[:301])) == 151


def test_legends_name_curves_fit_and_grow_downwards():
    names = [f"runs/number-{i}" for i in range(20)] + ["x" * 500 + "end"]
    chart = svg_chart({name: [(0, i), (1, i)] for i, name in enumerate(names)}, "loss")
    root = ET.fromstring(chart)
    height = float(root.get("viewBox").split()[3])
    assert labels_of(chart)[-21:-1] == names[:-1] and labels_of(chart)[-1].endswith("end")
    for text in root.iter(SVG + "text"):
        assert 0 < float(text.get("y")) < height
        if text.text in names or text.text.endswith("end"):
            assert float(text.get("x")) + 6 * len(text.text) < 360
    looks = {(line.get("stroke"), line.get("stroke-dasharray"))
             for line in root.iter(SVG + "polyline")}
    assert len(looks) == 21
    assert len(labels_of(svg_chart({"a": [(0, 0), (1, 5)]}, "a"))) < len(
        labels_of(svg_chart({"a": [(0, 0), (1, 5)]}, "b")))


def test_a_hostile_name_stays_text():
    chart = svg_chart({HOSTILE: [(0, 1.0)], "b": [(1, 2.0)]}, HOSTILE)
    shown = HOSTILE.replace("\x1b", "□").replace("\udc80", "□")
    assert labels_of(chart)[0] == shown  # a legend shows the end of it
    assert {e.tag.removeprefix(SVG) for e in ET.fromstring(chart).iter()} == {
        "svg", "style", "rect", "text", "line", "polyline", "circle", "title"}
    lines = [{"step": 1, "loss": 1.0, HOSTILE: 2.0},
             {"step": 1, "skipped": 1, "not_finite": [HOSTILE]}]
    page = Page(report_page(HOSTILE, {HOSTILE: lines, "b": lines}, [HOSTILE],
                            [html_image(Image.new("RGB", (9, 9)), HOSTILE)]))
    assert page.text.count(shown) >= 6 and page.images[0]["alt"] == shown
    assert "script" not in page.tags and "b" not in page.tags
    assert not any(name.startswith("on") or name == "a" for name in page.attrs)


def test_pages_need_no_other_file_and_images_come_back():
    pixels = np.linspace(0, 255, 30 * 40 * 3).reshape(30, 40, 3).astype(np.uint8)
    page = Page(html_page("t", [html_image(Image.fromarray(pixels), "small"),
                                html_image(Image.new("RGB", (2000, 1000), "red"), "large")]))
    assert not {"script", "link", "iframe"} & set(page.tags)
    small, large = (Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
                    for image in page.images)
    assert np.abs(np.asarray(small).astype(int) - pixels).mean() < 5
    assert large.size == (720, 360) == (int(page.images[1]["width"]), int(page.images[1]["height"]))
    text = html_table([dict(zip(["a", "b<"], row)) for row in (
        ["x&", 1], [0.12345, math.nan], [-1234567.0, 20_000.0])])
    assert Page(text).tables == [[["a", "b<"], ["x&", "1"], ["0.1235", "nan"], ["-1.235M", "20k"]]]
    for source in re.findall(r'(?:src|href|url)\W+(\S{9})', html_page("t", [])):
        assert source.startswith("data:")


def made_up_log(folder: Path, seed: int) -> list[dict]:
    """A log of 12 lines, 3 evaluations, one of nobody that is large, 2 skipped steps."""
    rng, lines = random.Random(seed), []

    def number() -> float:
        return rng.randint(1, 9999) / 1000
    for step in range(5, 65, 5):
        lines.append({"step": step, "epoch": step / 20, **{name: number() for name in (
            "loss", "cls", "pose_reg", "scores", "lr", "grad_norm", "img_s", "data_wait",
            "memory_gb")}})
        if step in (10, 35):
            lines.append({"step": step, "skipped": 1 + step // 30, "not_finite": ["pose_reg"]})
        if step % 20 == 0:
            lines.append({"step": step, "epoch": step // 20, "AP": number(), "AP50": number(),
                          "AP75": number(), "AP_large": -1.0, "AR": number(), "OKS": number(),
                          **({"best": 1} if step < 60 else {})})
    lines.append({**lines[-1], "average of": 2, "AP": 0.1234})
    del lines[-1]["epoch"]
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def run_main(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["draw.py", *map(str, args)])
    draw.main()


@pytest.mark.parametrize("count", [1, 3])
def test_every_number_of_the_logs_is_in_a_table_and_in_a_curve(tmp_path, monkeypatch, count):
    logs = {str(tmp_path / f"run {i}"): made_up_log(tmp_path / f"run {i}", i) for i in range(count)}
    run_main(monkeypatch, *logs, "--out", tmp_path / "all.html")
    page = Page((tmp_path / "all.html").read_text())
    charts = re.findall(r"<svg.*?</svg>", (tmp_path / "all.html").read_text(), re.S)
    assert len(charts) == 5 + 3 + 6
    summary, *tables = page.tables
    assert len(tables) == 3 * count
    for i, (run, lines) in enumerate(logs.items()):
        kinds = [[line for line in lines if key in line] for key in ("AP", "skipped", "loss")]
        for (header, *rows), kind in zip(tables[3 * i:3 * i + 3], kinds):
            assert len(rows) == len(kind)
            for row, line in zip(rows, reversed(kind)):
                found = {name: cell for name, cell in zip(header, row) if cell}
                assert found.pop("not_finite", None) == line.get("not_finite", [None])[0]
                assert {name: float(cell) for name, cell in found.items()} == {
                    name: value for name, value in line.items()
                    if value != -1 and name != "not_finite"}
        best = kinds[0][1]
        assert summary[i + 1] == [run, f"{best['AP']:.4g}", f"{best['OKS']:.4g}",
                                  str(best["epoch"]), "60", "3", f"{kinds[2][-1]['loss']:.4g}", "2"]
        titles = draw.PACE
        for line in kinds[0][:-1] + kinds[2]:
            for name in line.keys() - {"step", "epoch", "AP_large", "best"}:
                chart, = (c for c in charts if labels_of(c)[0] == titles.get(name, name))
                curve = run if count > 1 else titles.get(name, name)
                assert re.search(f"{draw.COLORS[i]}[^>]*><title>{re.escape(html.escape(curve))}: "
                                 f"{line[name]:.6g} at {line['step']}<", chart)
    for chart in charts:  # a curve a run, of 3 evaluations or 12 lines: "average of" is none
        assert [len(line) for line in lines_of(chart)] in ([3] * count, [12] * count)


def test_runs_that_cannot_be_shown_get_one_line(tmp_path, monkeypatch, capsys):
    made_up_log(tmp_path / "good", 0)
    for name, text in (("empty", ""), ("noise", "\0\0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(text)
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, tmp_path / "good", tmp_path / name, "--out", tmp_path / "x.html")
        assert end.value.code == (f"draw.py: {tmp_path / name / 'log.jsonl'} has no line yet; wait "
                                  f"for the run's first one, at step 5")
        assert not list(tmp_path.glob("x.html*"))
    with pytest.raises(SystemExit, match="draw.py: .*nowhere/x.html"):
        run_main(monkeypatch, tmp_path / "good", "--out", tmp_path / "nowhere" / "x.html")
    with pytest.raises(SystemExit, match="draw.py: .*nowhere/log.jsonl not found; expected a"):
        run_main(monkeypatch, tmp_path / "nowhere", "--out", tmp_path / "x.html")
    (tmp_path / "f.html").mkdir()
    for out in ("best.pt", "f.html"):  # weights would be lost; a folder is no file
        with pytest.raises(SystemExit):
            run_main(monkeypatch, tmp_path / "good", "--out", tmp_path / out)
    assert not list(tmp_path.glob("*tmp"))
    run_main(monkeypatch, tmp_path / "good", tmp_path / "nowhere", "--out", tmp_path / "x.html")
    assert capsys.readouterr().err.endswith("nowhere has no log.jsonl; left out\n")


@pytest.mark.parametrize("damage", [b'{"step": 1', b"5", b'{"AP": 0.3}', b"\0\0\xff\xfe", b"",
                                    b'{"step": 5, "loss": null}', b'{"step": "5", "loss": "1"}',
                                    b'{"step": 5, "AP": null}', b'{"step": 5, "lr": "x"}',
                                    b'{"step": 5, "skipped": 1}', b'{"step": 1' + 400 * b"0" + b"}",
                                    b'{"step": 5, "skipped": 2, "not_finite": [1]}'])
def test_a_damaged_line_of_a_log_is_named_and_left_out(tmp_path, capsys, damage):
    """A report must not end a run whose log was copied while it was written."""
    folder = tmp_path / "run"
    made_up_log(folder, 0)
    path = folder / "log.jsonl"
    whole, first, rest = draw.read_log(str(folder)), *path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + damage + b"\n" + rest)
    assert not capsys.readouterr().err
    assert draw.read_log(str(folder)) == whole
    assert f"{path}: line 2 is " in capsys.readouterr().err


def test_a_terminal_without_a_letter_shows_its_number():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    draw.say("n\u00f6se \ud83d", stream)
    assert stream.buffer.getvalue() == b"n\\xf6se \\ud83d\n"


def test_a_line_is_one_write_as_other_processes_write_to_the_same_pipe():
    class Pipe(io.RawIOBase):
        def writable(self):
            return True

        def write(self, piece):
            pieces.append(bytes(piece))
            return len(piece)

    pieces = []
    draw.say("a line", io.TextIOWrapper(Pipe(), write_through=True))  # as python -u has it
    assert pieces == [b"a line\n"]


@pytest.mark.parametrize("evaluated", [(), (12,), (3, 12, 19, 20)])
def test_img_s_is_that_of_the_steps_whenever_one_evaluates(tmp_path, monkeypatch, capsys,
                                                           evaluated):
    """Steps of 2 s with 4 images, half of the time waiting; an evaluation takes 100 s. After step
    12 another process goes on. The ETA is that of the steps to do now."""
    clock = [1000.0]
    monkeypatch.setattr(draw.time, "monotonic", lambda: clock[0])
    args = Namespace(out=str(tmp_path), dry_run=False, log_every=10, max_steps=60)
    log = Log(args, 0, 90, 4, 40, ("cls",))
    for step in range(1, 31):
        clock[0] += 2
        log.step(step, Namespace(sums=[1.0, 1.0], waited=1.0, norm=1.0), 0.1, 1.0)
        if step == 12:
            state, log = log.state_dict(), Log(args, 0, 90, 4, 40, ("cls",))
            log.load_state_dict(state)
        if step in evaluated:
            clock[0] += 100
            log.evaluation(step, "epoch", step, {"AP": 0.1})
            log.report([])
    lines = [line for line in draw.read_log(str(tmp_path)) if "loss" in line]
    assert [line["step"] for line in lines] == [5, 10, 20, 30]
    assert {line["img_s"] for line in lines} == {2.0}
    assert {line["data_wait"] for line in lines} == {0.5}
    assert capsys.readouterr().out.splitlines()[-1 - (30 in evaluated)].endswith("ETA 1.0 min")


def test_the_logged_loss_is_the_steps_own_however_few_scores_and_lines(tmp_path):
    """A step divides by its assigned scores, at least 1: 0.25 and 2 in turn, the terms' sum 3."""
    for every in (1, 4):
        (tmp_path / str(every)).mkdir()
        log = Log(Namespace(out=str(tmp_path / str(every)), dry_run=False, log_every=every,
                            max_steps=None), 0, 12, 4, 40, ("cls", "iou"))
        for step in range(1, 13):
            scores = 2.0 if step % 2 else 0.25
            log.step(step, Namespace(sums=[scores, 1.0, 2.0], waited=0, norm=1.0), 0.1, 1.0)
        lines = draw.read_log(str(tmp_path / str(every)))
        if every == 1:
            assert [line["loss"] for line in lines[:2]] == [1.5, 3]
        else:  # 6 / (2 + 1); steps 1 to 4, 5, 6 to 8, 9 to 12
            assert [line["loss"] for line in lines] == [2, 1.5, 9 / 4, 2]
            assert lines[0]["scores"] == 4.5 / 4 / 4


def test_a_line_that_nobody_reads_any_more_ends_no_run(monkeypatch):
    """As a tee that Ctrl-C ended; but a file on a full disk must be known."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        draw.say("lost", stream)
        draw.say("lost, too", stream)
    with pytest.raises(OSError, match="No space"), open("/dev/full", "w") as stream:
        draw.say("full", stream)


PATIENT = {"patience": 9, "sigma_epochs": 5.0, "epochs": 9}


@pytest.mark.parametrize("name, flip, color", [
    ("left eye", [0, 1], draw.MIDDLE), ("left eye", [1, 0], draw.LEFT),
    ("eyeRight", [1, 0], draw.RIGHT),
    ("a", [1, 0], draw.RIGHT)])
def test_a_keypoint_of_no_pair_is_green_whatever_its_name(name, flip, color):
    picture = draw.draw_people(Image.new("RGB", (480, 480)), np.array([[9, 9, 400, 400]]),
                               np.array([[[200, 200, 2], [0, 0, 0]]]), [name, "eyeLeft"], [],
                               flip)
    assert picture.getpixel((200, 200)) == color


def test_lines_have_the_color_of_the_side_and_unlikely_keypoints_have_none():
    """On 480 px, where nothing is enlarged; the third keypoint's score is 0.25, or 0.35."""
    person = np.array([[[40, 40, 0.9], [40, 240, 0.9], [240, 240, 0.25]]])
    pair = [[0, 1], [1, 2]]
    for score, end in ((0.25, (0, 0, 0)), (0.35, draw.LEFT)):
        person[0, 2, 2] = score
        picture = draw.draw_people(Image.new("RGB", (480, 480)), np.array([[9, 9, 470, 470]]),
                                   person, ["nose", "left_hip", "right_hip"], pair, [0, 2, 1], [1])
        assert picture.getpixel((40, 140)) == draw.LEFT  # a green end takes the other one's color
        assert picture.getpixel((140, 240)) == end       # of two sides, the first one's
        assert (picture.getpixel((240, 240)) == draw.RIGHT) == (score > 0.3)


def test_a_sheet_is_read_like_a_text():
    colors = [(40 * i, 0, 0) for i in range(1, 6)]
    sheet = draw.contact_sheet([Image.new("RGB", (10, 20), color) for color in colors])
    assert sheet.size == (30, 40)  # 5 pictures, in rows of 3
    shown = [sheet.getpixel((5 + 10 * x, 10 + 20 * y)) for y in (0, 1) for x in (0, 1, 2)]
    assert shown == [*colors, (0, 0, 0)]


def test_a_log_keeps_the_plans_of_earlier_starts():
    log = Log(train.parse_args([]), 1, 4, 2, 2, ("cls",))
    log.load_state_dict({"sums": [1.0, 2.0, 3.0], "steps": 1, "bytes": 0, "starts": ["a plan"]})
    assert log.starts == ["a plan"]


def test_the_score_stands_above_its_box_and_hides_no_keypoint():
    boxes, points = np.array([[99, 99, 300, 300.0]]), np.array([[[108.0, 106, 1], [250, 250, 1]]])
    first, second = (np.array(draw.draw_people(Image.new("RGB", (480, 480)), boxes, points,
                                               ["a", "b"], [[0, 1]], [0, 1], [score]))
                     for score in (0.44, 0.99))
    assert (first[98:] == second[98:]).all() and (first[80:98] != second[80:98]).any()


@pytest.mark.parametrize("names, flip, said", [
    (["nose"], [0], ""), (["a", "b"], [1, 0], ""), (["left_a", "right_a"], [1, 0], ""),
    (["a", "b"], [0, 1], "is there no left and right?"),
    (["left_eye", "right_eye", "mouth_left", "mouth_right"], [1, 0, 2, 3], "mouth_left, mouth_r"),
    (["left_eye", "right_eye", "l_fin", "fin_R"], [1, 0, 2, 3], "l_fin, fin_R: in no pair."),
    (["left_eye", "right_eye", "collar", "upper_lip"], [1, 0, 2, 3], ""),
    (["left_a", "right_a", "finL", "finR"], [0, 1, 3, 2], "left_a, right_a: in no pair.")])
def test_a_plan_doubts_sides_without_a_twin(names, flip, said):
    skeleton = Namespace(names=names, flip=flip, sigmas=[0.05, 0.06])
    args = Namespace(sigma_start=8.0, lr_scale="none", flip_pairs=None, amp="fp16", **PATIENT)
    found = list(draw.doubts({}, skeleton, args, 9, 9, (9, 0, 9, 0, 9)))
    assert len(found) == bool(said) and "".join(found).startswith(said)


def test_a_plan_doubts_weights_that_do_not_fit_and_a_tolerance_that_stays_wide():
    skeleton = Namespace(names=["nose"], flip=[0], sigmas=[0.06])
    args = Namespace(sigma_start=8.0, lr_scale="none", flip_pairs=None, amp="fp16", **PATIENT)
    fits = {"loaded": 874 * ["a"], "skipped": 12 * ["b"]}
    of_s = {"loaded": 215 * ["a"], "skipped": 671 * ["b"]}
    of_l = {"loaded": 576 * ["a"], "skipped": 377 * ["b"]}  # into M
    assert not list(draw.doubts(fits, skeleton, args, 9, 9, (9, 0, 9, 0, 9)))
    for report in (of_s, of_l):
        assert "another size" in "".join(draw.doubts(report, skeleton, args, 9, 9, (9, 0, 9, 0, 9)))
    assert "--sigma-epochs" in "".join(draw.doubts({}, skeleton, args, 9, 9, (9, 0, 9, 0, 10)))
    for device, fine in (("cpu, torch 2.6", False), ("cuda:0, torch 2.6", True)):
        found = list(draw.doubts({}, skeleton, args, 9, 9, (9, 0, 9, 0, 9), device))
        assert fine and not found or "fp16 is for GPUs" in found[0]
    skeleton.sigmas = [0.05]
    assert "measure" in "".join(draw.doubts({}, skeleton, args, 9, 9, (9, 0, 9, 0, 9)))
    args.patience = 4
    assert "raise --patience" in "".join(draw.doubts({}, skeleton, args, 9, 9, (9, 0, 9, 0, 9)))


@pytest.mark.parametrize("images, batch, scale, doubts", [
    (300, 60, "linear", True), (300, 60, "sqrt", True), (300, 60, "none", False),
    (300, 120, "linear", False), (118287, 60, "linear", False)])
def test_a_plan_doubts_a_rate_scaled_down_for_few_images(images, batch, scale, doubts):
    skeleton = Namespace(names=["nose"], flip=[0], sigmas=[0.06])
    args = Namespace(sigma_start=1.0, lr_scale=scale, lr=1e-4, lr_batch=480, flip_pairs=None,
                     resume=None, amp="no", **PATIENT)
    said = "".join(draw.doubts({}, skeleton, args, images, batch, (9, 0, 9, 0, 9)))
    assert ("try --lr 0.0001 --lr-scale none" in said) == doubts
    args.resume = True  # too late
    assert "--lr-scale" not in "".join(draw.doubts({}, skeleton, args, images, batch,
                                                   (9, 0, 9, 0, 9)))


def test_somebody_who_says_that_there_are_no_pairs_is_believed():
    skeleton = Namespace(names=["a", "b"], flip=[0, 1], sigmas=[0.06] * 2)
    for given, n in ((None, 1), ("", 0)):
        args = Namespace(sigma_start=1.0, lr_scale="none", flip_pairs=given, amp="no", **PATIENT)
        assert len(list(draw.doubts({}, skeleton, args, 9, 9, (9, 0, 9, 0, 9)))) == n


def test_a_run_with_one_evaluation_and_one_with_skipped_steps_alone(tmp_path):
    args = Namespace(out=str(tmp_path), dry_run=False, log_every=9, max_steps=None)
    log = Log(args, 0, 20, 4, 40, ("cls",))
    log.skip(0, 1, Namespace(sums=[1.0, math.inf]))
    log.report([])
    page = Page((tmp_path / "report.html").read_text())
    assert "Evaluation" not in page.text and not page.images and "svg" not in page.tags
    assert page.tables[1] == [["step", "skipped", "not_finite"], ["0", "1", "cls"]]
    log.starts = ["first plan", "plan <2>"]
    log.evaluation(3, "epoch", 1, {"AP": 0.25, "AR": -1.0, "OKS": 0.5}, best=True)
    log.report([("worst: OKS 0.10", Image.new("RGB", (20, 10), "red"))])
    page = Page((tmp_path / "report.html").read_text())
    assert page.text.index("plan <2>") < page.text.index("An earlier start") < page.text.index(
        "first plan") and page.images[0]["width"] == "20"
    assert page.tables[0][1] == [str(tmp_path), "0.25", "0.5", "1", "3", "", "", "1"]
    assert page.tables[1] == [["step", "epoch", "AP", "AR", "OKS", "best"],
                              ["3", "1", "0.25", "", "0.5", "1"]]
    charts = re.findall("<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.S)
    assert [[len(line) for line in lines_of(chart)] for chart in charts] == [[1], [], [1]]
    log.skip(3, 2, Namespace(sums=[1.0, math.inf]))
    log.end(3, 1, 2, EarlyStopping(9), str(tmp_path))
    last = Page((tmp_path / "report.html").read_text())
    assert last.images == page.images and last.tables[0][1][-1] == "2"
    assert {p.name for p in tmp_path.iterdir()} >= {"log.jsonl", "report.html"}


def test_a_finished_run_that_is_given_fewer_epochs_is_done(tmp_path, capsys):
    args = Namespace(out=str(tmp_path), dry_run=False, log_every=9, max_steps=None)
    for evaluated, state in ((1, "stopped at step 9 of 5"), (2, "done"), (3, "done")):
        Log(args, 0, 5, 4, 40, ("cls",)).end(9, evaluated, 2, EarlyStopping(9), str(tmp_path))
        assert capsys.readouterr().out.startswith(state)


def test_a_run_that_stopped_early_says_how_to_go_on(tmp_path, capsys):
    """Best after epoch 5; at 10, a patience of 2 would end it again at once."""
    args = Namespace(out=str(tmp_path), dry_run=False, log_every=9, max_steps=None)
    for patience, evaluated, said in ((1, 10, "--patience 10"), (20, 25, "--patience 40"),
                                      (9, 30, "done at step 30")):
        stopper = EarlyStopping(patience)
        stopper.update(0.5, 5)
        log = Log(args, 0, 30, 4, 40, ("cls",))
        log.end(evaluated, evaluated, 30, stopper, "a b")
        out = capsys.readouterr().out
        assert said in out and ("go on with --resume --out 'a b'" in out) == ("done" not in said)
        assert ("longer: --resume --out 'a b' --patience 50 --epochs N" in out) == ("done" in said)


def test_a_run_that_finds_nobody_says_its_oks(tmp_path, capsys):
    args = Namespace(out=str(tmp_path), dry_run=False, log_every=9, max_steps=None)
    stopper = EarlyStopping(9)
    stopper.update(0.25 - 1, 1)
    Log(args, 0, 10, 4, 40, ("cls",)).end(10, 1, 1, stopper, "x")
    assert "AP 0.001 or less, best OKS 0.250 after epoch 1" in capsys.readouterr().out


def test_what_gains_most_is_named_first():
    errors = [{"kind": kind, "of": "people", "count": 1, "share": 1.0, "AP": 0.5, "gain": gain}
              for kind, gain in (("a", 0.1), ("b", 0.3), ("c", 0.0001), ("d", 0.2))]
    page = draw.card_page({
        "errors": errors, "scores": [{"group": "images", "which": which, "images": n, "people": 1,
                                      "AP": 0.5} for which, n in (("all", 5), ("labeled", 3))],
        "keypoints": [{"keypoint": "a"}], "worst images": [{"file": "a"}], "metrics": {"AP": 0.5},
        "protocol": {"weights": "w"},
        "speed": {"latency_ms": 1, "batch": 8, "img_s": 2, "evaluation_s": 3}})
    assert "b (people) by 0.300, d (people) by 0.200, a (people) by 0.100." in page
    assert "5 images, 2 of them without labeled people" in page


def test_a_plan_says_how_it_was_started_and_all_that_was_set(monkeypatch, tmp_path):
    args = train.parse_args(["--out", str(tmp_path), "--freeze", "neck,backbone:2,bn:-3"])
    skeleton = Namespace(names=["nose"], flip=[0], sigmas=[0.05])
    report = {"loaded": 9 * ["b"], "in part": ["a"], "skipped": []}
    for env, augment, want in (
            ({}, FLIP, "python train.py"),
            ({"LOCAL_WORLD_SIZE": "2"}, MOSAIC,
             "torchrun --standalone --nproc-per-node 2 train.py"),
            ({"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3"}, PLAIN._replace(degrees=9.0),
             "torchrun --nnodes 3 ... --nproc-per-node 2 train.py")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py"])
            for name, value in env.items():
                patch.setenv(name, value)
            source = train.fill_recipe(args)
            plan = draw.print_plan(args, source, report, Namespace(
                skeleton=skeleton, augment=augment), (9, 9), (1, 16), (9, 0, 9, 0, 9), 0.1, "cpu")
        assert f"command       {want}\n" in plan
        for name, value in augment._asdict().items():
            assert f"{name.replace('_', '-')} {value}" in " ".join(plan.split())
        assert "in part (the person, and the names that both share) 1: a" in plan
        for part, when in ("neck", "all epochs"), ("backbone", "the first 2 epoch(s)"), (
                "bn", "the last 3 epoch(s)"):
            assert f"\nfrozen        {part}, in {when}\n" in plan


def test_the_oks_that_ranks_images_is_the_metrics():
    """Image by image, on the reference's detections: their mean is keypoint_ap's OKS."""
    dump = np.load(Path(__file__).parent / "metric.npz")
    labels = coco_file(dump["gt"])
    by_image = detections(dump["dt"], [image["id"] for image in labels["images"]])
    truth = quiet_coco(labels)
    by_image[0] = []
    best = best_oks(score(truth, by_image, COCO_SIGMAS))
    labeled = {n: [p for p in truth.imgToAnns[n] if p["num_keypoints"] and not p["iscrowd"]]
               for n in by_image}
    assert {n: len(values) for n, values in best.items() if values} == {
        n: len(people) for n, people in labeled.items() if people}
    assert labeled[0] and not any(best[0])
    for n, values in best.items():
        alone = keypoint_ap(truth, {n: by_image[n]}, COCO_SIGMAS)["OKS"]
        assert alone == pytest.approx(np.mean(values or [-1]), abs=1e-12)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("draw") / "people"
    draw_dataset(str(root), train=10, val=14, side=64)
    return root


def test_the_worst_median_and_best_images_are_found_and_few_are_opened(people, monkeypatch):
    """Detections are labels moved by more px the higher the image's number."""
    labels = read_json(f"{people}/annotations/person_keypoints_val2017.json")
    dataset = CocoPose(flatten(labels), f"{people}/val2017", read_skeleton(labels), 64, "center")
    truth, moved = quiet_coco(labels), {}
    for n, image in enumerate(sorted(image["id"] for image in labels["images"])):
        xyv = [np.reshape(a["keypoints"], (-1, 3)) + [n, 0, 0] for a in truth.imgToAnns[image]]
        moved[image] = [{"image_id": image, "category_id": 1, "keypoints": p.ravel().tolist(),
                         "score": 1.0} for p in xyv]
    shown = [i for i, n in enumerate(dataset.annotations.ids.tolist()) if truth.imgToAnns[n]]
    assert len(shown) >= 10
    opened, ranked = [], []
    real, real_score = CocoPose.__getitem__, evaluate.score
    monkeypatch.setattr(CocoPose, "__getitem__",
                        lambda self, key: opened.append(key) or real(self, key))
    monkeypatch.setattr(evaluate, "score", lambda truth, by_image, sigmas: ranked.extend(by_image)
                        or real_score(truth, by_image, sigmas))
    model = YoloNasPose("n").eval()

    def state() -> list[str]:  # of all that a report might disturb
        modes = [module.training for module in model.modules()]
        return [str(value) for value in (torch.get_rng_state().tolist(), np.random.get_state(
            legacy=False), random.getstate(), modes, torch.is_grad_enabled())]
    before = state()
    pictures = extremes(model, dataset, truth, moved)
    assert state() == before
    assert len(ranked) == len(shown) and len(opened) == 18
    kinds, values, files = zip(*(re.match(r"(\w+): OKS (\S+), (.*)", text).groups()
                                 for text, _ in pictures))
    assert kinds == ("worst",) * 3 + ("median",) * 3 + ("best",) * 3
    assert sorted(values) == list(values) and float(values[-1]) == 1
    assert set(files[-3:]) == {str(dataset.annotations.files[i]) for i in shown[:3]}
    index = dataset.annotations.files.tolist().index(files[0])
    picture, = (np.asarray(p) for text, p in pictures if text.endswith(files[0]))
    assert picture.shape == (480, 960, 3)  # enlarged
    label = np.asarray(evaluate.draw_samples(dataset, [(0, index)])[0])
    assert np.array_equal(picture[:, :479], label[:, :479])
    found = np.asarray(evaluate.draw_samples(dataset, [(0, index)], model)[0])
    assert np.array_equal(picture[:, 481:], found[:, 1:]) and not np.array_equal(found, label)
    ranked.clear()
    assert len(extremes(model, dataset, truth, moved, most=4)) == len(ranked) <= 4


@pytest.mark.long
def test_a_report_changes_no_bit_and_goes_on_after_a_stop(people, tmp_path):
    """A run that stops and goes on, with reports, against an unbroken one without."""
    silent = ("import draw, train; draw.Log.report = lambda self, pictures: None; "
              "train.extremes = lambda *a: []; train.main()")
    flags = ["--data", people, *("--image-size 64 --batch-size 5 --epochs 2 --eval-every 1 "
                                 "--warmup 1 --workers 0 --log-every 1").split()]
    for command in ([str(ROOT / "train.py"), *flags, "--out", tmp_path / "with", "--max-steps", 3],
                    [str(ROOT / "train.py"), "--resume", "--out", tmp_path / "with"],
                    ["-c", silent, *flags, "--out", tmp_path / "without"]):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                              timeout=250, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "without" / "report.html").exists()
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True)
                for name in ("with", "without"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    page = Page((tmp_path / "with" / "report.html").read_text())
    assert [row[0] for row in page.tables[2][1:]] == ["4", "3", "2", "1"]
    assert [row[0] for row in page.tables[1][1:]] == ["4", "2"]
    assert "--max-steps 3" in page.text and "4 for 2 epochs, 3 done, 1 now" in page.text
    assert 3 <= len(page.images) <= 9
