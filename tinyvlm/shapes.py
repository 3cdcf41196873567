"""shapes: coloured figures on a plain ground, a world small enough to be described without a mistake.

One to three things, each with a size, a colour and a shape, none touching another; the one right caption; questions
with answers; labels. All of it drawn from a random generator, so a scene is a function of its seed. The world exists
because a model that is wrong here is wrong in a way one can see: `meaning` compares what two captions claim, not their
words. It is no substitute for photographs; scores on it say nothing about them.
"""
import math
import re
from dataclasses import dataclass
from itertools import combinations

from PIL import Image, ImageDraw

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40),
          "purple": (140, 50, 170), "orange": (245, 140, 30), "cyan": (60, 200, 215), "brown": (120, 75, 40)}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": 14, "large": 25}          # radius, in pixels of a CANVAS x CANVAS picture
CANVAS = 128
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")


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
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def place(thing):
    """Which ninth of the picture a lone object stands in."""
    third = CANVAS / 3
    return PLACES[3 * min(2, int(thing.y // third)) + min(2, int(thing.x // third))]


def describe(scene):
    """The one right caption of a scene in its order (make_scene: large things first, then the leftmost).

    one thing:  "a small red circle in the top left"
    two:        "a large blue square right of a small red circle"
    three:      "a large blue square right of a small red circle and above a small green star"   (of the first, both)
    """
    first, *others = scene
    if not others:
        return f"a {first} in the {place(first)}"
    return f"a {first} " + " and ".join(f"{relation(first, other)} a {other}" for other in others)


def meaning(caption):
    """What a caption claims, whatever its wording: (things, relations), or None if it is no description of a scene.

    "a large red star left of a small red star" and "a small red star right of a large red star" mean the same.
    """
    thing = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    joined = "|".join(OPPOSITE)
    alone, among = rf" in the ({'|'.join(PLACES)})", rf"((?:(?: and)? (?:{joined}) {thing})+)"
    match = re.fullmatch(rf"{thing}(?:{alone}|{among})", caption.strip())
    if not match:
        return None
    first = match.groups()[:3]
    if match[4]:
        return frozenset([first]), frozenset([(first, match[4])])
    claims = re.findall(rf"({joined}) {thing}", match[5])
    facts = [(first, rel, tuple(other)) for rel, *other in claims]
    facts = sorted(min(f, (f[2], OPPOSITE[f[1]], f[0])) for f in facts)           # one of the two ways to say it
    return frozenset([first, *(tuple(other) for _, *other in claims)]), tuple(facts)


def make_scene(rng, n_objects):
    """One to n_objects things that do not touch, every pair clearly more beside or more above each other."""
    while True:
        things = []
        for _ in range(rng.randint(1, n_objects)):
            size = rng.choice(list(SIZES))
            r = SIZES[size] + 2
            things.append(Thing(size, rng.choice(list(COLORS)), rng.choice(SHAPES),
                                rng.uniform(r, CANVAS - r), rng.uniform(r, CANVAS - r)))
        things.sort(key=lambda t: (t.size != "large", t.x))
        if _centred(things[0]) if len(things) == 1 else all(_apart(a, b) for a, b in combinations(things, 2)):
            return things


def _apart(a, b):
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    return max(dx, dy) > SIZES[a.size] + SIZES[b.size] + 4 and abs(dx - dy) > 10


def _centred(thing):
    third = CANVAS / 3                      # a lone thing stands clear of the lines between the ninths
    return all(min(abs(v - third), abs(v - 2 * third)) > 6 for v in (thing.x, thing.y))


def draw_scene(scene, rng):
    """A scene as a CANVAS x CANVAS picture on a ground of random pale or dark grey."""
    level = rng.choice([rng.randint(225, 255), rng.randint(0, 40)])
    image = Image.new("RGB", (CANVAS, CANVAS), (level,) * 3)
    pen = ImageDraw.Draw(image)
    for t in scene:
        r, fill = SIZES[t.size], tuple(min(255, max(0, c + rng.randint(-15, 15))) for c in COLORS[t.color])
        if t.shape == "circle":
            pen.ellipse([t.x - r, t.y - r, t.x + r, t.y + r], fill=fill)
        else:
            pen.polygon([(t.x + r * dx, t.y + r * dy) for dx, dy in _outline(t.shape)], fill=fill)
    return image


def _outline(shape):
    """The corners of a shape of radius 1 about (0, 0)."""
    if shape == "star":                     # ten corners, every other one pulled in
        points = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
        return [(r * math.sin(a), -r * math.cos(a)) for a, r in points]
    if shape == "cross":
        a = 0.33
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
                (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    return {"square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
            "triangle": [(0, -1), (.95, .8), (-.95, .8)],
            "diamond": [(0, -1), (.7, 0), (0, 1), (-.7, 0)]}[shape]


def ask(scene, rng):
    """Questions about a scene: [{kind, question, answer (a sentence), short}], one of every kind that makes sense.

    Each is about things that its words single out. Its words alone do not tell the answer: yes and no are equally
    frequent whatever is asked, and of small and large, one thing and two, the commoner is asked about less often. Who
    knows the best guess for every question, but sees nothing, is right less than 45% of the time.
    """
    things, out = list(scene), []

    def add(kind, question, answer, short):
        out.append({"kind": kind, "question": question, "answer": answer, "short": short})

    def name(thing):
        same = [u for u in things if u.shape == thing.shape]
        text = f"the {thing.shape}" if len(same) == 1 else f"the {thing.color} {thing.shape}"
        return text if sum(u.color == thing.color for u in same) == 1 else None
    t = rng.choice(things)
    if sum(u.shape == t.shape for u in things) == 1:
        add("color", f"what color is the {t.shape}?", f"the {t.shape} is {t.color}.", t.color)
        if t.size == "large" or rng.random() < 0.72:            # small things find room more easily: 58% of all
            add("size", f"how big is the {t.shape}?", f"the {t.shape} is {t.size}.", t.size)
    if sum(u.color == t.color for u in things) == 1:
        add("shape", f"what shape is the {t.color} thing?", f"the {t.color} thing is a {t.shape}.", t.shape)
    if len(things) > 1 or rng.random() < 0.74:                  # so do single things: 57% of all scenes
        said = "there is 1." if len(things) == 1 else f"there are {len(things)} things."
        add("count", "how many things are there?", said, str(len(things)))
    if len(things) > 1:
        a, b = rng.sample(things, 2)
        if name(a) and name(b):
            rel = relation(a, b)
            add("relation", f"where is {name(a)} relative to {name(b)}?", f"{name(a)} is {rel} {name(b)}.",
                rel.removesuffix(" of"))
    yes = rng.random() < 0.5
    color = t.color if yes else rng.choice([c for c in COLORS if all(c != u.color for u in things)])
    thing = f"{'an' if color[0] in 'aeiou' else 'a'} {color} thing"
    add("yes/no", f"is there {thing}?", f"yes, there is {thing}." if yes else f"no, there is not {thing}.",
        "yes" if yes else "no")
    rng.shuffle(out)                        # in a dialogue any kind may come first, as when a stranger asks
    return out


def labels(scene):
    """Category -> label of the first thing (the large or leftmost one), for classification."""
    return {"color": scene[0].color, "shape": scene[0].shape, "size": scene[0].size}
