"""Data sets: fetch, verify, show, and keep as tensors.

    python data.py --dataset shapes                     what a data set holds, and a contact sheet of it
    python data.py --dataset flickr8k                   the same, downloading it first if needed
    python data.py --dataset flickr8k --features vgg16  .. and what a frozen VGG-16 makes of every image, in one file
    python data.py --dataset capsfusion --limit 1000    images and captions from the web
    python data.py --dataset folder --data-dir photos   your own: images beside a captions.txt, .csv or .jsonl

A `Dataset` is images by number, captions by image number, and three splits. `ImageStore` turns its images into tensors,
each decoded once; tinyvlm/batches.py makes training steps of them.
"""
import random
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyvlm.classifying import write_pseudo_labels
from tinyvlm.config import UserError, option, parse_config, run_script
from tinyvlm.device import check_device
from tinyvlm.draw import caption_sheet
from tinyvlm.features import write_features, write_text_embeddings
from tinyvlm.files import list_images, write_image
from tinyvlm.image import open_batches, to_uint8
from tinyvlm.layouts import MAX_LOST, open_photos, photos, report
from tinyvlm.shapes import Shapes
from tinyvlm.vqa import export_csv, vqav2
from tinyvlm.web import ImageFolderCache, capsfusion_rows, download_images, table_rows

STREAM_CACHE = 10 * 10**9               # bytes of streamed images that are kept on disk


@dataclass
class DataConfig:
    """Options of the data, shared by data.py and train.py."""
    dataset: str = option("shapes", "which data set", ("shapes", "flickr8k", "flickr30k", "coco", "capsfusion", "vqav2",
                                                       "folder"), group="the data")
    data_dir: str | None = option(None, "folder that holds it; default data/NAME, downloaded if it is not there")
    seed: int = option(0, "decides drawn scenes, unofficial splits, and the training", least=0, below=2 ** 32)
    n_objects: int = option(2, "shapes: scenes hold one to this many objects (1, 2 or 3)", above=0, below=4)
    n_scenes: int = option(20000, "shapes: training scenes; a tenth as many, at most 1000, are held out twice", above=0)
    stream: bool = option(False, "coco: fetch only the captions, and each image when it is needed")
    allow_private: bool = option(False, "also fetch images from addresses inside this network or machine")
    allow_broken: bool = option(False, "go on although 1% or more of the images are broken or missing")


@dataclass
class PrepareConfig(DataConfig):
    """.. and of what data.py makes: a contact sheet, a feature file, labels."""
    sheet: str = option("out/sheet.png", "where to write the contact sheet", group="what to make")
    features: str | None = option(None, "encode all images once by vgg16, resnet50, vit, clip, a Hub id or a folder")
    text_embeddings: str | None = option(None, "encode all captions once by this CLIP: clip, a Hub id or a folder")
    label: str | None = option(None, "give each image its best label of every category in this json file, by CLIP")
    labeler: str = option("clip", "with --label: the CLIP that decides: a Hub id, a folder, or a run of --task clip")
    margin: float = option(0.1, "with --label: leave out labels whose probability is not this much above the next")
    export: str | None = option(None, "data sets with questions: write them as dialogues to this csv (image_id,text)")
    limit: int = option(1000, "capsfusion: how many images to fetch", above=0)
    rows: str | None = option(None, "capsfusion: csv or jsonl with image_url and capsfusion; else the Hub's first rows")
    size: int = option(128, "capsfusion: pixels a side; long thin images are padded, others cropped", above=0)
    batch_size: int = option(32, "images or captions at once, for the networks above", above=0)
    device: str = option("cpu", "for the networks above: cpu, cuda or mps")


def load_dataset(config):
    """DataConfig (or any object with its fields) -> Dataset. Raises UserError where the files are missing or unfit."""
    folder, seed = Path(config.data_dir or f"data/{config.dataset}"), config.seed
    if config.stream and config.dataset != "coco":
        raise UserError(f"--stream fetches the images of coco one by one; leave it out for {config.dataset}")
    if config.dataset == "shapes":
        if config.data_dir and list_images(config.data_dir):
            raise UserError(f"--data-dir {config.data_dir} holds no drawn scenes; say what it holds with --dataset")
        return Shapes(config.n_objects, config.n_scenes, seed)
    if config.dataset == "vqav2":
        return vqav2(folder, seed, config.allow_broken)
    if config.dataset == "capsfusion":
        if not (folder / "captions.csv").exists():
            raise UserError(f"{folder} holds no images; first: python data.py --dataset capsfusion --limit 1000")
        return photos("capsfusion", folder, seed, config.allow_broken)
    dataset = open_photos(config)
    if dataset.urls:
        cache = ImageFolderCache(folder / "stream", STREAM_CACHE, config.allow_private)
        dataset.opener = lambda i: cache.open(dataset.urls[i])
    return dataset


class ImageStore:
    """The images of a data set by number, as tensors: pixels in memory where they fit, else decoded when needed.

    data: uint8 pixels (n, 3, S, S), or features (n, D) or (n, N, D) in their place, or None; row: {image: its place in
    data}; broken: {image: reason}. `usable(split)` is a split without what is broken or missing.
    """

    def __init__(self, dataset, recipe, data=None, row=None):
        self.dataset, self.recipe, self.data, self.row, self.is_features = dataset, recipe, data, row, data is not None
        self.broken, self.lost = {}, {}                         # lost: streamed images that could not be fetched
        self.open = lambda i: to_uint8(dataset.open(i), recipe)                   # (3, S, S)

    @classmethod
    def of_pixels(cls, dataset, splits, recipe, allow_broken=False, processes=1, say=print):
        """Decode every image of some splits once. Kept in memory if all take less than half of what is free."""
        members = sorted({i for split in splits for i in dataset.splits[split]})
        size = len(members) * 3 * recipe.size ** 2
        fits = not dataset.urls and size * processes < free_memory() / 2
        say(f"{len(members)} images of {recipe.size}x{recipe.size} pixels, {size / 1e6:.0f} MB: " +
            ("in memory" if fits else "fetched as needed" if dataset.urls else "decoded as needed"))
        store = cls(dataset, recipe)
        if dataset.urls:
            return store
        if fits:
            store.row = {i: k for k, i in enumerate(members)}
            store.data = torch.zeros(len(members), 3, recipe.size, recipe.size, dtype=torch.uint8)     # (n, 3, S, S)
        for part in open_batches(members, store.open, 256, store.broken, "decoding images"):
            for i, pixels in part if fits else ():
                store.data[store.row[i]] = pixels                                 # (3, S, S)
        report_broken(dataset, store.broken, len(members), allow_broken, say)
        return store

    def to(self, device):
        """Whether the images are on the device now: on a GPU those in memory are, if they take less than half of it."""
        if self.data is None:
            return False
        if device.type == "cuda" and self.data.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.data = self.data.to(device)
        return self.data.device.type == device.type

    def usable(self, split):
        return [i for i in self.dataset.splits[split] if i not in self.broken and (self.row is None or i in self.row)]

    def get(self, members):
        """uint8 (B, 3, S, S), or features (B, D) or (B, N, D), of the images `members`; and who stands at each place.

        Places are 0 .. B - 1, except while streaming: those that cannot be fetched leave theirs to the others, who come
        again. Raises UserError where none can be had, or one on disk is broken.
        """
        if self.data is not None:
            images = self.data[torch.tensor([self.row[i] for i in members], device=self.data.device)]
            return (images.float() if self.is_features else images), list(range(len(members)))
        broken, n, before = {}, len(members), len(self.lost)
        [found] = open_batches(range(n), lambda k: self.open(members[k]), n, broken, threads=16)
        if broken and not (found and self.dataset.urls):
            raise UserError(next(iter(broken.values())))
        self.lost.update((members[k], reason) for k, reason in broken.items())
        if before.bit_length() < len(self.lost).bit_length():   # each time that their number has doubled
            print(f"{len(self.lost)} images could not be fetched so far, the latest: {[*self.lost.values()][-1]}")
        places, images = zip(*(found[k % len(found)] for k in range(n)))          # B pairs (place, (3, S, S))
        return torch.stack(images), places                                        # (B, 3, S, S)


def free_memory():
    """Bytes of memory this machine could still give, or 4 GB where it does not tell."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 4 << 30


def report_broken(dataset, broken, n, allow_broken, say=print):
    """Report the broken images; raise UserError if they are more than 1% of n and nobody has allowed it."""
    for reason in list(broken.values())[:10]:
        say(f"left out: {reason}")
    say(f"{len(broken)} of {n} images are broken")
    if len(broken) > MAX_LOST * n and not allow_broken:
        raise UserError(f"{len(broken)} of {n} images are broken, first {dataset.names[min(broken)]}; mend the data "
                        "set, or go on without them with --allow-broken")


def fetch_capsfusion(config):
    """Images and their captions from the web into the data folder; goes on where an earlier call was cut off."""
    folder = Path(config.data_dir or "data/capsfusion")
    if any(folder.glob("*.jpg")) and not {"rows", "limit"} & config.given:
        return                                                  # what is there is shown, labelled, encoded
    rows = table_rows(config.rows) if config.rows else capsfusion_rows(folder / "rows")
    counts = download_images(rows, folder, config.size, config.limit, config.allow_private)
    if not counts["ok"]:
        raise UserError(f"none of the addresses gave an image; {folder / 'captions.csv'} says why for each of them")


def main():
    """Load, report, check every image, draw the sheet, make what the options name."""
    config = parse_config(PrepareConfig, description="Prepare, verify and show a data set.")
    check_device(config.device)
    if config.dataset == "capsfusion":
        fetch_capsfusion(config)
    dataset = load_dataset(config)
    print(report(dataset))
    n, broken = len(dataset.names), {}
    if config.dataset != "shapes" and not dataset.urls:         # else nothing is on disk that could be broken
        for _ in open_batches(range(n), lambda i: dataset.open(i) and None, 256, broken, "checking images"):
            pass
        report_broken(dataset, broken, n, config.allow_broken)
    some = [i for i in random.Random(config.seed).sample(range(n), min(12, n)) if i not in broken]
    drawn = [pair for part in open_batches(some, dataset.open, 12, broken) for pair in part]
    if not drawn:
        raise UserError(f"none of the images of {dataset.name} can be opened: {[*broken.values()][:1]}")
    texts = ["\n".join(dataset.captions[i][:2]) for i, _ in drawn]
    write_image(config.sheet, caption_sheet([image for _, image in drawn], texts))
    print(f"wrote {config.sheet}")
    folder, made = Path(config.data_dir or f"data/{config.dataset}"), []
    if config.features:
        path = folder / f"features-{Path(config.features).name}.safetensors"
        write_features(config.features, dataset, path, config.batch_size, config.device)
        made.append([f"--features={path}"])
    if config.text_embeddings:
        path = folder / f"text-embeddings-{Path(config.text_embeddings).name}.safetensors"
        write_text_embeddings(config.text_embeddings, dataset, path, config.device)
        made.append(["--task", "clip", f"--text-embeddings={path}"])
    if config.label:
        write_pseudo_labels(config, dataset, folder / "labels.csv")
        made.append(["--task", "classify", f"--labels={folder}/labels.csv"])
    where = [f"--data-dir={config.data_dir}"] if config.data_dir else []
    for *task, flag in made:
        print("now train on it: python train.py " + shlex.join([*task, "--dataset", config.dataset, *where, flag]))
    if config.export:
        if not hasattr(dataset, "questions"):
            raise UserError(f"{dataset.name} holds no questions to export; --export is for shapes and vqav2")
        export_csv([q for questions in dataset.questions for q in questions], config.export)
        print(f"wrote {config.export}")


if __name__ == "__main__":
    run_script(main)
