"""Why does a model not know what is left of what? Ask each question about drawn scenes both ways round.

    python tests/probe.py out/answers            a run of --task vqa on shapes

"Where is the star relative to the cross?" and "where is the cross relative to the star?" have opposite answers. A model
that answers alike may know how the two lie, but not which of them it was asked about: it takes them as a set.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyvlm.config import UserError, run_script                                  # noqa: E402
from tinyvlm.generate import generate                                             # noqa: E402
from tinyvlm.image import preprocess                                              # noqa: E402
from tinyvlm.pretrained import load_run                                           # noqa: E402
from tinyvlm.shapes import OPPOSITE, Shapes, relation                             # noqa: E402
from tinyvlm.vqa import encode_dialogue, to_short                                 # noqa: E402


def both_ways(run, img, a, b):
    """The short answers to "where is a relative to b?" and "where is b relative to a?" about img (3, S, S)."""
    questions = [f"where is the {x.shape} relative to the {y.shape}?" for x, y in ((a, b), (b, a))]
    prompts = [encode_dialogue(run.tokenizer, [(question, None)])[0] for question in questions]
    rows = generate(run.model, img.expand(2, -1, -1, -1), prompts, run.config["longest"], eos_id=run.config["end"])
    return [to_short(run.tokenizer.decode(row)) for row in rows]


def main():
    if len(sys.argv) != 2:
        raise UserError("usage: python tests/probe.py RUN, the folder of a vqa run on shapes")
    run, dataset = load_run(sys.argv[1]), Shapes(n_scenes=2000)
    if run.config["task"] != "vqa":
        raise UserError(f"{sys.argv[1]} answers no questions; name a run of --task vqa on shapes")
    scenes = [(i, *dataset.scenes[i]) for i in dataset.splits["val"] if len({t.shape for t in dataset.scenes[i]}) == 2]
    found = [(both_ways(run, preprocess(dataset.open(i), run.recipe), a, b), relation(a, b)) for i, a, b in scenes]
    right = sum(answers == [how.split()[0], OPPOSITE[how].split()[0]] for answers, how in found)
    alike = sum(x == y for (x, y), _ in found)
    print(f"{len(found)} pairs of things: {alike} got the same answer both ways, {right} the right ones")


if __name__ == "__main__":
    run_script(main)
