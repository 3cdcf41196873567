"""shapes: coloured figures on a plain ground, a world small enough to be described without a mistake.

One to three things that do not touch, the one right caption, questions with answers, labels: all a function of a seed.
A model that is wrong here is wrong in a way one can see: `score_parts` compares what two captions claim, not their
words, and says which part is wrong. Scores on it say nothing about photographs."""
import math
import random
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations

from PIL import Image, ImageDraw

from .layouts import Dataset
from .vqa import Question

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40),
          "purple": (140, 50, 170), "orange": (245, 140, 30), "cyan": (60, 200, 215), "brown": (120, 75, 40)}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": 14, "large": 25}          # radius, in pixels of a CANVAS x CANVAS picture
CANVAS = 128
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
# the corners of each shape of radius 1 about (0, 0); of a star's ten, every other one is pulled in
OUTLINES = {"square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
            "triangle": [(0, -1), (.95, .8), (-.95, .8)], "diamond": [(0, -1), (.7, 0), (0, 1), (-.7, 0)],
            "cross": [(-.33, -1), (.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33),
                      (.33, 1), (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33)],
            "star": [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5))
                     for k, r in enumerate([1.0, 0.42] * 5)]}


@dataclass(frozen=True)
class Thing:
    """One object of a scene; x, y: its centre in pixels, y downwards."""
    size: str
    color: str
    shape: str
    x: float
    y: float

    def __str__(self):
        return f"{self.size} {self.color} {self.shape}"


def relation(a, b):
    """How a stands to b: the longer of the two distances decides. A tie never happens: make_scene leaves a margin."""
    dx, dy = a.x - b.x, a.y - b.y                                                 # pixels
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def describe(scene):
    """The one right caption of a scene, its things in reading order (make_scene): what is left or above comes first.

    one thing:  "a small red circle in the top left"            (of the picture's ninths)
    three:      "a large blue square left of a small red circle and above a small green star"    (of the first, both)"""
    first, *others = scene
    if others:
        return f"a {first} " + " and ".join(f"{relation(first, other)} a {other}" for other in others)
    return f"a {first} in the {PLACES[3 * int(3 * first.y / CANVAS) + int(3 * first.x / CANVAS)]}"


def parse(caption):
    """A caption -> its things [(size, color, shape), ..] and claims {(0, "above", 1), (1, "below", 0), ..} about them.
    The place of a lone thing is a claim, too: (0, "top left", 0). ([], set()) if it is no description of a scene."""
    thing = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    other = rf"({'|'.join(OPPOSITE)}) {thing}"
    match = re.fullmatch(rf"{thing}(?: in the ({'|'.join(PLACES)})|((?:(?: and)? {other})+))", caption.strip())
    if not match:
        return [], set()
    claims = {(0, match[4], 0)} if match[4] else set()
    for k, (how, *_) in enumerate(re.findall(other, match[5] or ""), 1):
        claims |= {(0, how, k), (k, OPPOSITE[how], 0)}
    return re.findall(thing, caption), claims


def score_parts(prediction, truth):
    """Which parts of a caption are right: {"size", "color", "shape", and "place" or "relation": True or False}.

    A lone thing has a place, several have relations. A part is right if it is for all, each thing paired with the true
    one that it resembles most; so with a wrong number of things nothing is. Captions of which all parts are right mean
    the same: "a large red star left of a small red star", "a small red star right of a large red star"."""
    (things, claims), (others, theirs), scored = parse(truth), parse(prediction), []
    for pairing in permutations(range(len(things))) if len(others) == len(things) else ():
        same = [[a == b for a, b in zip(other, things[k])] for other, k in zip(others, pairing)]
        related = {(pairing[a], how, pairing[b]) for a, how, b in theirs} == claims  # in the numbers of `truth`
        scored.append((sum(map(sum, same)), related, [all(part) for part in zip(*same)]))
    _, related, attributes = max(scored, default=(0, False, [False] * 3))
    return dict(zip(("size", "color", "shape", "place" if len(things) == 1 else "relation"), [*attributes, related]))


def make_scene(rng, n_objects):
    """One to n_objects things that do not touch, every pair clearly more beside or more above each other."""
    while True:
        things = []
        for _ in range(rng.randint(1, n_objects)):
            size = rng.choice(list(SIZES))
            r = SIZES[size] + 2                                                   # a margin of two pixels
            things.append(Thing(size, rng.choice(list(COLORS)), rng.choice(SHAPES),
                                rng.uniform(r, CANVAS - r), rng.uniform(r, CANVAS - r)))
        pairs = [(abs(a.x - b.x), abs(a.y - b.y), SIZES[a.size] + SIZES[b.size]) for a, b in combinations(things, 2)]
        clear = all(max(dx, dy) > reach + 4 and abs(dx - dy) > 10 for dx, dy, reach in pairs)
        if not pairs:                   # a lone thing keeps off the lines between the ninths: its place is clear
            clear = all(abs(v - line * CANVAS / 3) > 6 for v in (things[0].x, things[0].y) for line in (1, 2))
        if clear:
            return sorted(things, key=lambda t: t.x + t.y)      # reading order: as `relation` has it, as |dx| != |dy|


def draw_scene(scene, rng):
    """A scene as a CANVAS x CANVAS picture on a ground of random pale or dark grey."""
    level = rng.choice([rng.randint(225, 255), rng.randint(0, 40)])               # of grey
    image = Image.new("RGB", (CANVAS, CANVAS), (level,) * 3)
    pen = ImageDraw.Draw(image)
    for t in scene:
        r, fill = SIZES[t.size], tuple(min(255, max(0, c + rng.randint(-15, 15))) for c in COLORS[t.color])
        if t.shape == "circle":
            pen.ellipse([t.x - r, t.y - r, t.x + r, t.y + r], fill=fill)
        else:
            pen.polygon([(t.x + r * dx, t.y + r * dy) for dx, dy in OUTLINES[t.shape]], fill=fill)
    return image


def ask(scene, rng, i=0):
    """Questions about scene i -> list of vqa.Question in random order, one of every kind that makes sense. Each is
    about things that its words single out, and its words alone do not tell the answer: whoever knows the best guess for
    every question, but sees nothing, is right less than 45% of the time."""
    found, t = [], rng.choice(list(scene))

    def name(thing):
        same = [u.color for u in scene if u.shape == thing.shape]                 # of all things of its shape
        text = f"the {thing.shape}" if len(same) == 1 else f"the {thing.color} {thing.shape}"
        return text if same.count(thing.color) == 1 else None
    if name(t) == f"the {t.shape}":
        found.append(("color", f"what color is the {t.shape}?", t.color))
        if t.size == "large" or rng.random() < 0.72:        # even out: 58% are small, as these find room more easily
            found.append(("size", f"how big is the {t.shape}?", t.size))
    if sum(u.color == t.color for u in scene) == 1:
        found.append(("shape", f"what shape is the {t.color} thing?", t.shape))
    if len(scene) > 1 or rng.random() < 0.74:                   # so do single things: 57% of scenes
        found.append(("count", "how many things are there?", str(len(scene))))
    if len(scene) > 1:
        a, b = rng.sample(scene, 2)
        if name(a) and name(b):
            found.append(("relation", f"where is {name(a)} relative to {name(b)}?", relation(a, b).removesuffix(" of")))
    yes = rng.random() < 0.5                                                      # as often as no
    color = t.color if yes else rng.choice([c for c in COLORS if all(c != u.color for u in scene)])
    found.append(("yes/no", f"is there a{'n' * (color[0] in 'aeiou')} {color} thing?", "yes" if yes else "no"))
    rng.shuffle(found)                      # in a dialogue any kind may come first
    types = {"yes/no": "yes/no", "count": "number"}
    return [Question(1000 * i + k, i, question, [answer], answer, kind, types.get(kind, "other"))
            for k, (kind, question, answer) in enumerate(found)]


class Shapes(Dataset):
    """Scenes made from (seed, split, index), drawn anew at each open(); `questions` and `labels` by image number. A
    scene belongs to the split that the hash of its caption names, so no caption of val or test is ever a training
    caption, by construction and whatever the seed."""
    def __init__(self, n_objects=2, n_scenes=20000, seed=0):
        self.seed, self.scenes, splits, held_out = seed, [], {}, max(1, min(1000, n_scenes // 10))
        for split, size in {"train": n_scenes, "val": held_out, "test": held_out}.items():
            splits[split] = list(range(len(self.scenes), len(self.scenes) + size))  # image numbers
            for index in range(size):
                rng, home = random.Random(f"{seed}/{split}/{index}"), None
                while home != split:
                    scene = make_scene(rng, n_objects)
                    home = {0: "val", 1: "test"}.get(zlib.crc32(describe(scene).encode()) % 10, "train")
                self.scenes.append(scene)
        # features and labels are found by name, so names tell all that the pictures depend on
        names = [f"scene-{seed}-{n_objects}-{n_scenes}-{i:05d}" for i in range(len(self.scenes))]
        super().__init__("shapes", names, [[describe(scene)] for scene in self.scenes], splits)
        # labels of the first thing, in reading order
        self.labels = {i: dict(color=s[0].color, shape=s[0].shape, size=s[0].size) for i, s in enumerate(self.scenes)}

    @cached_property
    def questions(self):
        return [ask(scene, random.Random(f"{self.seed}/ask/{i}"), i) for i, scene in enumerate(self.scenes)]

    def open(self, i):
        return draw_scene(self.scenes[i], random.Random(f"{self.seed}/paint/{i}"))

    def may_flip(self, i):
        """Not three things: mirrored, two of them that stand side by side would be named the other way round."""
        return len(self.scenes[i]) < 3 and super().may_flip(i)
