"""The built-in data set: drawn people in COCO's file format, for a first run without a download.
`python -c 'import people; people.draw_dataset("DIR", 64, 24)'` draws another one, see draw_dataset.
Points    complex numbers x + iy, y down, on a canvas OVERSAMPLE times finer than the image
Polygons  (color, points), back to front. In a mask: 0 background, i = 1, 2, ... person, OCCLUDER
"""
import json
import os
import tempfile

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

OVERSAMPLE, OCCLUDER = 3, 255
CATEGORY = {"id": 1, "name": "person", "keypoints": ["nose"] + [
    f"{side}_{joint}" for joint in "eye ear shoulder elbow wrist hip knee ankle".split()
    for side in ("left", "right")], "skeleton": [
    [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9],
    [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]}
# Upper arm and elbow, thigh and knee: radians outwards from hanging down; of 4, two for each side.
ARMS = [(0.3, 0.1), (1.5, 0), (2.6, 0.2), (0.3, 0.1, 2.6, 0.2)]
GLOVES = (250, 140, 0), (0, 150, 250)  # left, right; also the shoes' colors
LEGS = [(0.12, 0), (0.5, 0), (1.3, -1.4)]


def random_color(rng: np.random.Generator, spread: float) -> np.ndarray:
    """RGB (3,) of random brightness, each channel up to `spread` off gray."""
    return (rng.uniform(60, 210) + rng.uniform(-spread, spread, 3)).clip(0, 255)


def rounded(color: np.ndarray, corners: list, radius: list, edge: float = 0.008) -> list[tuple]:
    """Polygons of a convex shape: corners clockwise, rounded (two: a limb); darker edge behind."""
    ring, r = np.array([corners[-1], *corners, corners[0]]), np.ones(len(corners)) * radius
    side = np.angle(ring[1:] - ring[:-1]) - np.pi / 2                  # (corners + 1) their normals
    turn = (side[1:] - side[:-1]) % (2 * np.pi)
    normals = np.exp(1j * (side[:-1, None] + turn[:, None] * np.arange(8) / 7))      # (corners, 8)
    inner, outer = (ring[1:-1, None] + (r + wider)[:, None] * normals for wider in (0, edge))
    return [(np.array(color) / 4, outer.ravel()), (color, inner.ravel())]


def random_pose(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Random keypoints (17,), hips at 0; whether each faces us (17,); yaw; radius of the head."""
    yaw = np.clip(rng.normal(0, 0.25), -0.9, 0.9) + np.pi * (rng.random() < 0.07)  # 0 faces us
    joints = np.zeros(17, complex)
    head, nod, build = rng.uniform((0.115, -0.2, 1), (0.135, 0.3, 1.25))
    neck = rng.uniform(0.27, 0.33) * -1j * np.exp(1j * rng.normal(0, 0.15))
    up = neck / abs(neck) * np.exp(1j * rng.normal(0, 0.15))
    azimuth = yaw + np.array([0, 0.55, -0.55, 1.57, -1.57])  # of nose, eyes, ears
    high = (1.35, 1.67, 1.67, 1.5, 1.5) - nod * np.cos(azimuth)
    joints[:5] = neck + head * up * (high + 0.95j * np.sin(azimuth))
    shown = np.append(np.cos(azimuth) > (0.1, 0.1, 0.1, -0.3, -0.3), [True] * 12)  # ears stick out
    arms, legs = ARMS[rng.choice(4, p=[0.36, 0.27, 0.27, 0.1])], LEGS[rng.integers(3)]
    for k in rng.permutation(2):  # 0 left, 1 right, in either order: who waves or kicks varies
        left = np.cos(yaw) * (1 - 2 * k)  # > 0 if this side of the body is on the image's right
        joints[5 + k], joints[11 + k] = neck + 0.125j * build * left * up, 0.075 * build * left
        arm, fold, leg, shin = rng.normal((*arms[:2], *legs[:2]), 0.08)
        arms, legs = arms[-2:], legs[-2:]
        lengths = rng.uniform((0.16, 0.15, 0.18, 0.19), (0.18, 0.17, 0.2, 0.21))  # in the image
        for j, length, angle in zip((7, 9, 13, 15), lengths, (arm, arm + fold, leg, shin)):
            joints[j + k] = joints[j + k - 2] + length * 1j / np.exp(1j * np.sign(left) * angle)
    return joints, shown, yaw, head


def random_person(rng: np.random.Generator, height: float, width: int) -> tuple:
    """Random figure, `height` high, canvas `width` wide: (polygons, joints (17,), shown (17,))."""
    joints, shown, yaw, head = random_pose(rng)
    skin = np.array((255, 210, 175)) * rng.uniform(0.4, 1)
    shirt, trousers = random_color(rng, 130), random_color(rng, 130)
    fat, legs, arms = rng.uniform(1.2, 1.6), [], ([], [])  # arms behind and before the body
    for k in (0, 1):  # left, right
        glove, (shoulder, elbow, wrist, hip, knee, ankle) = GLOVES[k], joints[5 + k::2]
        toe = ankle + (ankle - knee) * 0.25 * np.exp(1j * rng.uniform(-1.2, 1.2))
        arms[rng.random() < 0.85].extend(
            rounded(glove, [wrist, 1.15 * wrist - 0.15 * elbow], 0.055)
            + rounded(skin, [elbow, wrist], [0.036 * fat, 0.03 * fat])
            + rounded(shirt, [shoulder, elbow], [0.046 * fat, 0.038 * fat]))
        legs += (rounded(glove, [ankle, toe], 0.052)
                 + rounded(skin, [knee, ankle], [0.047 * fat, 0.034 * fat])
                 + rounded(trousers, [hip, knee], [0.065 * fat, 0.05 * fat]))
    neck, skull = joints[5:7].mean(), joints[3:5].mean()
    up = head * (skull - neck) / abs(skull - neck)
    torso = joints[[6, 5, 11, 12] if np.cos(yaw) > 0 else [5, 6, 12, 11]]
    body = rounded(trousers, torso[2:], 0.06 * fat) + rounded(shirt, torso, 0.047 * fat)
    face = rounded(skin, [neck, skull], 0.035)
    for ear in joints[3:5][shown[3:5]]:
        face += rounded(skin, ear + [0, up / 9], 0.22 * head)
    face += rounded(0.3 * skin, [skull + 0.2 * up, skull - 0.05 * up], head)
    if np.cos(yaw) > 0:  # seen from the front
        turned = skull + 0.3j * up * np.sin(yaw)
        face += rounded(skin, turned - [0.3 * up, 0.2 * up], 0.75 * head, 0)
        for k in np.flatnonzero(shown[:3]):
            face += rounded((9, 9, 40) if k else 0.7 * skin, joints[k] + [0, up / 9], head / 6, 0)
    polygons = arms[0] + legs + body + face + arms[1]
    turn = np.exp(1j * rng.normal(0, rng.choice([0.13, 0.4, 3], p=[0.87, 0.11, 0.02])))
    points = (np.concatenate([p for _, p in polygons]) * turn).view(float).reshape(-1, 2)
    scale = min(np.array([0.9 * width, height]) / np.ptp(points, 0))  # a lying figure may be wide
    size, outside = scale * np.ptp(points, 0), 0.2 * rng.random() * (rng.random() < 0.2)
    corner = rng.uniform(-outside * size, width - (1 - outside) * size)
    shift, turn = complex(*(corner - scale * points.min(0))), turn * scale
    return [(color, p * turn + shift) for color, p in polygons], joints * turn + shift, shown


def random_thing(rng: np.random.Generator, center: complex, size: float) -> list[tuple]:
    """Polygons of a random object: a pole, or a shape with three to five round corners."""
    n = rng.integers(2, 6)
    spokes = np.exp(2j * np.pi * (rng.random() + np.arange(n) / n)) * size * (3 if n == 2 else 0.4)
    return rounded(random_color(rng, 40), center + spokes, size * rng.uniform(0.05, 0.2), size / 30)


def paint(image: Image.Image, polygons: list[tuple], value: int = 0) -> None:
    """Draw polygons in their colors, or all of them in `value`."""
    for color, points in polygons:
        corners = points.astype(np.complex64).view(np.float32)
        ImageDraw.Draw(image).polygon(corners, value or tuple(map(int, color)))


def annotate(mask: Image.Image, value: int, joints: np.ndarray, shown: np.ndarray) -> dict:
    """The COCO annotation, without ids, of the person whose pixels are `value` in the mask."""
    own = mask.point([255 * (v == value) for v in range(256)])
    box = np.array(own.getbbox() or [0] * 4) / OVERSAMPLE
    run = coco_mask.encode(np.asfortranarray(np.array(own.reduce(OVERSAMPLE)) // 128))
    keypoints = []  # pixel indices: the center of the first pixel is 0, not 0.5
    for z, towards_us in zip(joints, shown):
        inside = 0 <= z.real < mask.width and 0 <= z.imag < mask.height
        seen = inside and towards_us and mask.getpixel((int(z.real), int(z.imag))) == value
        x, y = z.real / OVERSAMPLE - 0.5, z.imag / OVERSAMPLE - 0.5
        keypoints += [x, y, 2 if seen else 1] if inside else [0, 0, 0]
    return {"category_id": 1, "iscrowd": 0, "bbox": [*box[:2], *(box[2:] - box[:2])],
            "segmentation": {"size": run["size"], "counts": run["counts"].decode()},
            "area": mask.histogram()[value] / OVERSAMPLE ** 2, "keypoints": keypoints,
            "num_keypoints": 17 - keypoints[2::3].count(0)}


def draw_image(rng: np.random.Generator, side: int) -> tuple[Image.Image, list[dict], list[tuple]]:
    """A random image, its COCO annotations without ids, and layers (mask value, polygons)."""
    width, people, whole, anns, layers = side * OVERSAMPLE, [], [], [], []
    pixels = np.linspace(random_color(rng, 35), random_color(rng, 35), 48)[:, None]   # (48, 1, 3)
    pixels = (pixels + rng.normal(0, rng.uniform(0, 20), (48, 48, 1))).clip(0, 255)   # (48, 48, 3)
    canvas = Image.fromarray(pixels.astype(np.uint8)).resize([width] * 2, Image.BILINEAR)
    for size in width * rng.uniform(0.05, 0.4, rng.integers(12)):
        paint(canvas, random_thing(rng, complex(*rng.uniform(0, width, 2)), size))
    mask, count = Image.new("L", [width] * 2), rng.choice(5, p=[0.75, 0.12, 0.06, 0.04, 0.03]) + 1
    for height in width * (0.15 + (0.87 - 0.12 * count) * rng.beta(1.8, 0.22, count)):
        for _ in range(8):  # tries, until enough of everybody is visible
            trial, value = mask.copy(), len(people) + 1
            polygons, *who = random_person(rng, height, width)
            size = height * rng.uniform(0.12, 0.3) * (rng.random() < 0.2)
            thing = random_thing(rng, who[0][rng.integers(5, 17)], size) if size else []
            paint(trial, polygons, value)
            areas = [*whole, trial.histogram()[value] / OVERSAMPLE ** 2]
            paint(trial, thing, OCCLUDER)
            found = [annotate(trial, i, *p) for i, p in enumerate([*people, who], 1)]
            if all(a["area"] > 0.75 * area and a["bbox"][3] >= 0.15 * side
                   and a["keypoints"][2::3].count(2) >= 5 for a, area in zip(found, areas)):
                mask, people, whole, anns = trial, [*people, who], areas, found
                layers += [(value, polygons), (OCCLUDER, thing)]
                paint(canvas, polygons + thing)
                break
    return canvas.reduce(OVERSAMPLE), anns, layers


def draw_dataset(root: str, train: int = 2000, val: int = 200, side: int = 128, seed: int = 0):
    """Unless root exists, write root/{train,val}2017 and root/annotations, all or nothing."""
    if os.path.exists(root):
        return
    os.makedirs(parent := os.path.dirname(os.path.abspath(root)), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        os.makedirs(f"{folder}/data/annotations")
        for split, (name, count) in enumerate((("train2017", train), ("val2017", val))):
            os.mkdir(f"{folder}/data/{name}")
            images, people = [], []
            for i in range(count):
                image, found, _ = draw_image(np.random.default_rng((seed, split, i)), side)
                image.save(f"{folder}/data/{name}/{i:06}.jpg", quality=92)
                images += [{"id": i, "file_name": f"{i:06}.jpg", "width": side, "height": side}]
                people += [{"id": 10 * i + n, "image_id": i, **a} for n, a in enumerate(found, 1)]
            with open(f"{folder}/data/annotations/person_keypoints_{name}.json", "w") as f:
                json.dump({"images": images, "annotations": people, "categories": [CATEGORY]}, f)
        try:
            os.rename(f"{folder}/data", root)
        except OSError:
            if not os.path.isdir(root):  # else another process, which draws the same, was faster
                raise
