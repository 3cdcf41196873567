"""Why does a model not know what is left of what? Two questions to a run of --task vqa on shapes.

    python tests/probe.py out/answers

1. Does it know which thing is meant? "Where is the star relative to the cross?" and "where is the cross relative to the
   star?" have opposite answers. A model that answers alike takes the two names as a set.
2. What do its image tokens hold? Of the token at a thing's centre, a linear map (fitted on four fifths of the scenes,
   tested on the rest) reads where that thing is, its shape, and the shape of the OTHER thing. A name finds a place only
   where the second is easy to read and the third is not. (Linear probes: Alain & Bengio 2016, arXiv:1610.01644.)
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch                                                                      # noqa: E402
import torch.nn.functional as F                                                   # noqa: E402

from tinyvlm.config import UserError, run_script                                  # noqa: E402
from tinyvlm.generate import generate                                             # noqa: E402
from tinyvlm.image import preprocess                                              # noqa: E402
from tinyvlm.pretrained import load_run                                           # noqa: E402
from tinyvlm.shapes import CANVAS, OPPOSITE, SHAPES, Shapes, relation             # noqa: E402
from tinyvlm.vqa import encode_dialogue, to_short                                 # noqa: E402


def both_ways(run, img, a, b):
    """The short answers to "where is a relative to b?" and "where is b relative to a?" about img (3, S, S)."""
    questions = [f"where is the {x.shape} relative to the {y.shape}?" for x, y in ((a, b), (b, a))]
    prompts = [encode_dialogue(run.tokenizer, [(question, None)])[0] for question in questions]
    rows = generate(run.model, img.expand(2, -1, -1, -1), prompts, run.config["longest"], eos_id=run.config["end"])
    return [to_short(run.tokenizer.decode(row)) for row in rows]


def readable(x, labels):
    """How well a linear map reads labels (n,) from vectors x (n, C): the share right of the last fifth of them."""
    x, n = F.pad((x - x.mean(dim=0)) / (x.std(dim=0) + 1e-6), (0, 1), value=1.0), len(x) * 4 // 5
    goal = F.one_hot(labels[:n], labels.max() + 1).float()                                    # (n, classes)
    w = torch.linalg.solve(x[:n].t() @ x[:n] + 10 * torch.eye(x.size(1)), x[:n].t() @ goal)   # ridge regression
    return ((x[n:] @ w).argmax(dim=1) == labels[n:]).float().mean().item()


@torch.no_grad()
def main():
    if len(sys.argv) != 2:
        raise UserError("usage: python tests/probe.py RUN, the folder of a vqa run on shapes")
    run, dataset = load_run(sys.argv[1]), Shapes()
    if run.config["task"] != "vqa":
        raise UserError(f"{sys.argv[1]} answers no questions; name a run of --task vqa on shapes")
    scenes = {i: dataset.scenes[i] for split in ("val", "test") for i in dataset.splits[split]}
    scenes = {i: scene for i, scene in scenes.items() if len({t.shape for t in scene}) == 2}
    img = torch.stack([preprocess(dataset.open(i), run.recipe) for i in scenes])  # (n, 3, S, S)
    found = [(both_ways(run, x, a, b), relation(a, b)) for x, (a, b) in zip(img[:200], scenes.values())]
    right = sum(answers == [how.split()[0], OPPOSITE[how].split()[0]] for answers, how in found)
    alike = sum(x == y for (x, y), _ in found)
    print(f"{len(found)} pairs of things: {alike} got the same answer both ways, {right} the right ones")

    tokens = run.model.encode(img)                                                # (n, N, C)
    side = int(tokens.size(1) ** 0.5)
    x, own, other, left = [], [], [], []
    for of_scene, (a, b) in zip(tokens, scenes.values()):
        for t, u in ((a, b), (b, a)):
            x.append(of_scene[int(side * t.y / CANVAS) * side + int(side * t.x / CANVAS)])
            own.append(SHAPES.index(t.shape))
            other.append(SHAPES.index(u.shape))
            left.append(int(t.x < CANVAS / 2))
    scores = [readable(torch.stack(x), torch.tensor(labels)) for labels in (left, own, other)]
    print("the image token at a thing's centre tells whether it is in the left half: {:.0%}, its shape: {:.0%}, the "
          "shape of the other thing: {:.0%}".format(*scores))


if __name__ == "__main__":
    run_script(main)
