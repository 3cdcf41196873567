"""Of several captions for a picture, take the one most like what people have said of similar pictures.

From "Exploring nearest neighbor approaches for image captioning" (Devlin et al. 2015, arXiv:1505.04467); Mao et al.
(2015, arXiv:1412.6632) choose among a model's captions in this way. Both look for similar pictures. Here a CLIP finds
similar sentences directly:

    pool         the training captions that lie nearest to the image: "a dog runs on grass", "two dogs run", ..
    candidates   all the beams of the captioner's search
    chosen       the candidate whose mean CIDEr-D against the pool is highest

A captioner says what is likely word by word; the pool knows what whole sentences about such a picture have in common.
"""
import torch

from .captions import clean_caption
from .clip import similarities
from .config import UserError
from .features import text_embeddings
from .metrics import CiderD, tidy
from .pretrained import is_run, load_run

POOL = 120      # captions


class Consensus:
    """The training captions where a CLIP puts them, and how alike captions are. folder: a run of --task clip that has
    learned from what the captioner of `setup` sees. Raises UserError if it has not."""

    def __init__(self, folder, setup):
        run = load_run(folder) if is_run(folder) else None
        if not run or run.config["task"] != "clip" or not run.tokenizer:
            raise UserError(f"--consensus {folder} is no run of --task clip that reads texts; train one with "
                            "train.py --task clip")
        features, theirs, D = setup.prepared.features, run.config["features"], run.model.config.feat_dim
        if features:
            same = theirs and theirs["encoder"] == features.meta["encoder"] and features.data.shape[1:] == (D,)
        else:
            same = not theirs and run.recipe == setup.prepared.recipe
        if not same:
            raise UserError(f"--consensus {folder} has learned from other images or features than this run; train it "
                            "with the same --features (one vector an image), or the same --image-size")
        captions, clean = setup.dataset.captions, lambda text: clean_caption(text, run.config["clean"])
        texts = {i: [text for text in captions[i] if clean(text) and tidy(text)] for i in setup.dataset.splits["train"]}
        if sum(map(bool, texts.values())) < 2:                  # of one image alone, nothing would be left for itself
            raise UserError(f"the training split of {setup.dataset.name} has no captions for --consensus to choose by")
        flat = [text for i in texts for text in texts[i]]                                        # m captions
        self.owner = [i for i in texts for _ in texts[i]]                                        # (m)
        self.most = max(map(len, texts.values()))               # captions of one image
        self.model = run.model.to(setup.device.torch)
        self.cider = CiderD([[*map(tidy, texts[i])] for i in texts])
        self.said = [vector for vectors in self.cider.references for vector in vectors]          # (m)
        self.emb = text_embeddings(run.model, run.tokenizer, flat, clean=clean).cpu()            # (m, D)

    def choose(self, img, members, candidates):
        """img (B, 3, H, W) or features, which images they are, and B lists of captions -> the best of each list. (What
        was said of the very image is left out: a training image would find its own captions.)"""
        cosines = similarities(self.model.encode_image(img).cpu(), self.emb, 0.0)                # (B, m)
        nearest, best = cosines.topk(min(POOL + self.most, len(self.owner))).indices.tolist(), []
        for i, row, texts in zip(members, nearest, candidates):
            pool = [self.said[k] for k in row if self.owner[k] != i][:POOL]
            best.append(max(dict.fromkeys(texts), key=lambda text: self.cider.against(tidy(text), pool)))
        return best
