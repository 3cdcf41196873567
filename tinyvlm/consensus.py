"""Of several captions for a picture, take the one most like what people have said of similar pictures.

From "Exploring nearest neighbor approaches for image captioning" (Devlin et al. 2015, arXiv:1505.04467); Mao et al.
(2015, arXiv:1412.6632) choose among a model's captions so. Both look for similar pictures. Here a CLIP trained on the
same captions is asked, which finds sentences:

    pool         the training captions that lie nearest to the image: "a dog runs on grass", "two dogs run", ..
    candidates   all the beams of the captioner's search
    chosen       the candidate whose mean CIDEr-D against the pool is highest

A captioner says what is likely word by word; the pool knows what whole sentences about such a picture have in common.
"""
import torch

from .captions import clean_caption
from .config import UserError
from .features import text_embeddings
from .metrics import CiderD, tidy
from .pretrained import load_run

POOL = 120      # captions


class Consensus:
    """The training captions where a CLIP puts them, and how alike captions are. folder: a run of --task clip that has
    learned from what the captioner of `setup` sees. Raises UserError if it is not."""

    def __init__(self, folder, setup):
        run, dataset, features = load_run(folder), setup.dataset, setup.prepared.features
        if run.config["task"] != "clip" or run.tokenizer is None:
            raise UserError(f"--consensus {folder} is no run of --task clip that reads texts; name one")
        if run.model.config.feat_dim != (features and features.feat_dim) or \
                not features and run.recipe != setup.prepared.recipe:
            raise UserError(f"--consensus {folder} has learned from other images or features than this run; train it "
                            "with the same --features, or the same --image-size")
        train, self.model = dataset.splits["train"], run.model.to(setup.device.torch)
        texts = [dataset.captions[i] for i in train]
        self.cider = CiderD([[tidy(text) for text in captions] for captions in texts])
        self.said = [vector for captions in self.cider.references for vector in captions]        # m of them
        self.owner = torch.tensor([i for i, captions in zip(train, texts) for _ in captions])    # (m,)
        self.emb = text_embeddings(run.model, run.tokenizer, [text for captions in texts for text in captions],
                                   clean=lambda text: clean_caption(text, run.config["clean"])).cpu()       # (m, D)

    def choose(self, img, members, candidates):
        """img (B, 3, H, W) or features, which images they are, and B lists of captions -> the best of each list.
        (What people have said of the very image does not count: for training images it is in the pool.)"""
        cosines = self.model.encode_image(img).cpu() @ self.emb.t()                              # (B, m)
        cosines[torch.tensor(members)[:, None] == self.owner] = -1
        pools = cosines.topk(min(POOL, len(self.owner))).indices.tolist()                        # (B, POOL)
        return [max(dict.fromkeys(texts), key=lambda text: self.cider.against(tidy(text), [self.said[k] for k in pool]))
                for pool, texts in zip(pools, candidates)]
