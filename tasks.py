"""What each task learns from, what it builds, and how it is judged. train.py's loop is the same for all of them.

A task belongs to a run and offers
    recipe, tokenizer, texts        how images and words become numbers; `texts.rows[i]` lists image i's rows (idx,
                                    targets): captions, dialogues, or whatever else the model's forward calls idx
    make_model()                    from scratch, or from public weights
    backward(fast, batches)         one step's gradients, from its micro-batches; returns its loss
    look(model, step, best)         the evaluation during training: loss, loss with images exchanged, and the number
                                    (lower is better) by which the best model is kept
    finish(model)                   the result at the end, by the best weights on the test split
    judge(model, split, ..)         --eval-only: the scores of a whole split
    about()                         what sample.py must know, for config.json
"""
import csv
import io
import json
import math
import shlex
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from data import CLEAN, Texts, eval_batches, n_targets, pad_rows
from tinyvlm import metrics
from tinyvlm.classifier import Classifier, ClassifierConfig
from tinyvlm.clip import CLIP, CLIPConfig, chance, contrastive_step, in_batch_accuracy, info_nce
from tinyvlm.cnn import BatchNorm2d, ResNet50
from tinyvlm.config import UserError
from tinyvlm.draw import caption_sheet
from tinyvlm.features import TextEmbeddings, short_names
from tinyvlm.generate import generate
from tinyvlm.gpt import IGNORE, GPTConfig
from tinyvlm.image import Recipe, normalise
from tinyvlm.lstm import LSTM
from tinyvlm.pretrained import is_run, load_clip, load_gpt2, load_pretrained, load_run, pretrained_tokenizer
from tinyvlm.search import similarity_picture, text_rows
from tinyvlm.shapes import meaning
from tinyvlm.tokenizer import BPETokenizer, WordTokenizer
from tinyvlm.vit import ViT, ViTConfig
from tinyvlm.vlm import LSTMConfig, VLMConfig, build
from tinyvlm.vqa import (SYSTEM, TAGS, encode_dialogue, rows_of, score_vqa, submission, to_sentence, to_short,
                         to_targets)
from tinyvlm.weights import atomic_write, load_safetensors, write_json

# options that are a model's or its tokenizer's own: a stage that goes on from --init cannot change them
MADE_WITH = ("image_size", "patch_size", "stem", "class_token", "n_layer", "n_head", "n_embd", "n_hidden", "shuffle",
             "wiring", "tied", "soft_attention", "tokenizer", "vocab_size", "min_count")
END = "<|endoftext|>"               # ends every caption, and starts those of the cross model, as GPT-2 was trained


def learning(model):
    """Training mode; but a frozen BatchNorm stays in eval mode: its statistics are part of what it knows."""
    model.train()
    for module in model.modules():
        if isinstance(module, BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def load_eyes(source):
    """The vision tower of a run of ours or of a public checkpoint: its sizes, weights and recipe; CLIP's image head.

    head: CLIP's linear map into the joint space, (D, C), or None. Raises UserError where no tower of ours is found.
    """
    loaded = load_run(source) if is_run(source) else load_pretrained(source)
    tower = getattr(loaded.model, "vision", loaded.model)
    if not isinstance(tower, (ViT, ResNet50)):
        raise UserError(f"--vision {source} holds no vision tower that can be trained here (a ViT or a ResNet-50)")
    weights = {name: value for name, value in tower.state_dict().items() if not name.startswith("head.")}
    head = getattr(loaded.model, "image_head", None)
    return SimpleNamespace(sizes=replace(tower.config, n_class=0), weights=weights, recipe=loaded.recipe,
                           head=head.weight.data if isinstance(head, torch.nn.Linear) else None)


def tower_sizes(c):
    """The sizes that both towers, the one that sees and the one that speaks, take from the options."""
    return dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, dropout=c.dropout)


def fresh_eyes(c):
    """A vision tower from scratch, as the options say: ViTConfig."""
    return ViTConfig(image_size=c.image_size, patch_size=c.patch_size, class_token=c.class_token, stem=c.stem,
                     **tower_sizes(c))


def make_tokenizer(c, texts):
    """The tokenizer that the options `c` ask for: trained on `texts`, or a ready one that learns END and <image>."""
    if c.tokenizer == "bpe":
        return BPETokenizer.train(texts, c.vocab_size)
    if c.tokenizer == "words":
        return WordTokenizer.train(texts, c.min_count)
    tokenizer = pretrained_tokenizer(c.tokenizer)               # BERT's WordPiece, or any other
    tokenizer.add_special_tokens([END, "<image>"])
    return tokenizer


def n_shared(rows, image):
    """How many tokens begin all `rows` of ids alike, up to the first `image` token: those of the prompt before it too.

    0 if some row begins otherwise: nothing is shared then.
    """
    n = rows[0].index(image) + 1 if rows and image in rows[0] else 0
    return n if all(row[:n] == rows[0][:n] for row in rows) else 0


def exchanged(img, before):
    """Every image for its neighbour's; a last batch of one image has none, and takes one of the batch before it."""
    return before[-1:] if len(img) == 1 and before is not None else img.roll(1, dims=0)


class Task:
    """What tasks share. run: train.py's Run (config, machine, dataset, store, out). Members are image numbers."""

    def __init__(self, run):
        self.run, self.config, self.machine = run, run.config, run.machine
        self.extra = {}                                         # what the model wants to know besides a batch's tensors

    def backward(self, fast, batches):
        """Add up the gradients of one step's micro-batches; returns its loss (a tensor: reading it would wait).

        Each counts by its share of the step's targets, so the sum is the mean over all of them. DDP takes the mean over
        processes where we want the sum, hence the factor `world`.
        """
        machine, losses = self.machine, []
        for k, batch in enumerate(batches):
            img, idx, targets = batch.to(machine.device, self.recipe, self.run.augment)
            more = k + 1 < len(batches)
            with fast.no_sync() if machine.world > 1 and more else nullcontext():
                with machine.autocast():
                    loss = fast(img, idx, targets, **self.extra)[1] * batch.share
                machine.scaler.scale(loss * machine.world).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def images(self, members):
        """The images `members`, ready for the model: (B, 3, S, S), or features (B, D) or (B, N, D)."""
        img = self.run.store.get(members).to(self.machine.device)                 # uint8, or features
        return normalise(img, self.recipe) if img.dtype == torch.uint8 else img

    @torch.no_grad()
    def evaluate(self, model, split, limit=None):
        """Mean loss over a split (nats per target), and the same with every image exchanged for its neighbour's.

        If the second is no larger than the first, the model is not looking. limit: only the first so many images.
        """
        model.eval()
        true = shuffled = n = 0.0
        before = None
        batches = eval_batches(self.run.store, self.texts, split, max(2, self.config.batch_size), limit)
        for k, batch in enumerate(batches):
            if k % self.machine.world != self.machine.rank:     # each process takes its share
                continue
            img, idx, targets = batch.to(self.machine.device, self.recipe)
            other = exchanged(img, before)
            with self.machine.autocast():
                true += model(img, idx, targets, **self.extra)[1].item() * batch.n_targets
                shuffled += model(other, idx, targets, **self.extra)[1].item() * batch.n_targets
            n += batch.n_targets
            before = img
        learning(model)
        true, shuffled, n = self.machine.total(true, shuffled, n)
        if not n:
            raise UserError(f"nothing of the {split} split can be had to evaluate with; the lines above say why")
        return true / n, shuffled / n


# ---------------------------------------------------------------------------------------------------------------------

class Captioning(Task):
    """--task caption: cross, prefix and lstm, from pixels or ready-made features."""

    def __init__(self, run, saved=None):
        """saved: a Loaded run to judge; else everything is made from the options."""
        super().__init__(run)
        c = self.config
        self.saved, self.eyes, self.gpt, self.init = saved, None, None, None      # .., --vision, --text, --init
        if c.init and not saved:                                # another stage of the same model
            self.init = load_run(c.init)
            if self.init.config["model"] != c.model or self.init.config["task"] not in ("caption", "vqa"):
                raise UserError(f"--init {c.init} holds a {self.init.config['task']} run of --model "
                                f"{self.init.config['model']}; a {c.model} model goes on from a {c.model} model")
            then = self.init.config["options"]
            for name in MADE_WITH:
                if name in getattr(c, "given", ()) and getattr(c, name) != then.get(name):
                    raise UserError(f"--init {c.init} was made with --{name.replace('_', '-')} {then.get(name)}, which "
                                    "stays: drop the flag, or train anew without --init")
        elif not saved:
            # public weights bring their own picture size and tokenizer; from scratch these are ours to choose
            self.eyes = load_eyes(c.vision) if c.vision else None
            if self.eyes and not isinstance(self.eyes.sizes, ViTConfig):
                raise UserError(f"--vision {c.vision} is no ViT; for a captioner on a CNN, use its --features")
            new = TAGS if c.task == "vqa" else ("<image>",) if c.model == "prefix" else ()
            self.gpt = load_gpt2(c.text, special_tokens=new) if c.text else None
        for source in filter(None, (saved, self.init)):
            has, wants = run.feats and run.feats.feat_dim, source.model.config.feat_dim
            if has != wants:
                sees = f"features of {wants} numbers: name their file with --features" if wants else "pixels"
                raise UserError(f"{c.init or c.out_dir} sees {sees}" + (f"; {c.features} holds {has} numbers an image, "
                                                                        "so drop it" if has else ""))
        start = saved or self.init or self.eyes
        self.recipe = start.recipe if start else Recipe(size=c.image_size)
        clean = CLEAN[c.clean]
        self.tokenizer = saved.tokenizer if saved else self.make_tokenizer(clean)
        self.end = self.tokenizer.token_to_id(END)
        self.first = self.tokenizer.token_to_id("<image>") if c.model == "prefix" else self.end
        if None in (self.first, self.end):
            raise UserError(f"the tokenizer of {c.text or c.init or c.out_dir} knows no {END}; name a GPT-2, or train "
                            "one")
        self.texts = self.make_texts(clean)
        if c.model == "prefix":
            alike = n_shared([idx for rows in self.texts.rows for idx, _ in rows], self.first)
            self.extra = {"n_shared": alike, "loss_only": True}

    def words(self, clean):
        """What a new tokenizer is trained on: the training captions, as strings; for a prefix model also the dialogues.

        It keeps its tokenizer through all stages, and one that has never seen "what" would ask letter by letter.
        """
        dataset = self.run.dataset
        yield from (clean(text) for i in dataset.splits["train"] for text in dataset.captions[i])
        if self.config.model == "prefix":
            yield SYSTEM
            questions = getattr(dataset, "questions", None) or [()] * len(dataset.names)
            for q in (q for i in dataset.splits["train"] for q in questions[i]):
                yield from (q.question, to_sentence(q.question, q.answer, q.question_type))

    def make_texts(self, clean):
        """The captions as rows of ids; says how many had to be cut or hold unknown words."""
        c, say = self.config, self.machine.say
        texts = Texts(self.run.dataset.captions, self.tokenizer, self.first, self.end, c.max_tokens, clean)
        if texts.cut:
            say(f"{texts.cut} captions are longer than --max-tokens {c.max_tokens} and were cut")
        if texts.empty:
            say(f"{texts.empty} captions hold no word after --clean {c.clean}: they teach to say nothing")
        if texts.unknown:
            say(f"{texts.unknown} words of the captions are not among the vocabulary's {self.tokenizer.vocab_size}")
        return texts

    def make_tokenizer(self, clean):
        """A public or earlier model's own, which its embedding fits; else a new one."""
        c = self.config
        if self.init:
            return self.init.tokenizer
        if self.gpt:
            if self.gpt.tokenizer is None:
                raise UserError(f"--text {c.text} holds no GPT-2 tokenizer (tokenizer.json or vocab.json, merges.txt)")
            return self.gpt.tokenizer
        return make_tokenizer(c, self.words(clean))

    def make_model(self):
        """The model of a run (--init, --eval-only); else each tower public, or fresh as the options say."""
        if self.saved or self.init:
            return self.grown(self.init.model) if self.init else self.saved.model
        c, feats = self.config, self.run.feats
        torch.manual_seed(c.seed)
        vision = None if feats else replace(self.eyes.sizes, dropout=c.dropout) if self.eyes else fresh_eyes(c)
        seen = vision.n_patches if vision else feats.n_tokens
        side = math.isqrt(seen)
        if c.shuffle > 1 and (side * side != seen or side % c.shuffle):
            raise UserError(f"--shuffle {c.shuffle} needs a square grid that it divides, not {seen} image tokens")
        n_image = 0 if c.model != "prefix" else seen // c.shuffle ** 2
        room = c.max_tokens + 2 + n_image                       # start and end frame the caption
        if c.model == "lstm":
            text = LSTMConfig(self.tokenizer.vocab_size, c.n_layer, c.n_embd, c.n_hidden or c.n_embd, c.dropout, c.tied,
                              c.n_head if c.soft_attention else 0, c.smoothing)
        else:
            text = replace(self.gpt.config, dropout=c.dropout, smoothing=c.smoothing) if self.gpt else GPTConfig(
                block_size=room, vocab_size=self.tokenizer.vocab_size, smoothing=c.smoothing, **tower_sizes(c))
            if text.block_size < room:
                raise UserError(f"--text {c.text} reads only {text.block_size} tokens; image and caption need {room}")
        if c.wiring == "lockstep" and vision.n_layer != text.n_layer:
            raise UserError(f"--wiring lockstep pairs the layers of both towers, but they have {vision.n_layer} and "
                            f"{text.n_layer}; use --wiring final, or give --n-layer")
        model = build(VLMConfig(model=c.model, vision=vision, text=text, wiring=c.wiring, shuffle=c.shuffle,
                                feat_dim=feats.feat_dim if feats else None,
                                image_token=self.first if c.model == "prefix" else None))
        if self.eyes:
            model.vision.load_state_dict(self.eyes.weights)
        if self.gpt:                                            # all but the new cross-attention, which starts at zero
            missing, extra = model.text.load_state_dict(self.gpt.state_dict(), strict=False)
            new = [name for name in missing if "cross" not in name]
            assert not extra and not new, f"GPT weights do not fit the decoder: missing {new}, extra {extra}"
        return model

    def grown(self, model):
        """The model of --init, with rows for tokens it did not have and positions for longer texts."""
        torch.manual_seed(self.config.seed)
        if self.config.model != "lstm":
            text = model.text
            text.grow_vocab(max(text.config.vocab_size, self.tokenizer.vocab_size))
            text.grow_context(max(text.config.block_size, self.config.max_tokens + 2 + self.n_image(model.config)))
        for module in model.modules():                          # this stage's dropout, not the last one's
            if isinstance(module, torch.nn.Dropout):
                module.p = self.config.dropout
            elif isinstance(module, LSTM):
                module.dropout = self.config.dropout
        model.config.text.smoothing = self.config.smoothing
        return model

    def n_image(self, config):
        """How many tokens an image takes among the words; config: the model's (VLMConfig)."""
        n = config.vision.n_patches if config.vision else self.run.feats.n_tokens
        return n // config.shuffle ** 2 if config.model == "prefix" else 0

    def about(self):
        c = self.config
        return {"first": self.first, "end": self.end, "max_tokens": c.max_tokens, "clean": c.clean}

    @cached_property
    def reward(self):
        """CIDEr-D against the training captions, and the place of each image among them."""
        members = self.run.store.usable("train")
        self.place = {i: k for k, i in enumerate(members)}
        captions = self.run.dataset.captions
        return metrics.CiderD([[" ".join(metrics.tokenize(text)) for text in captions[i]] for i in members])

    def backward(self, fast, batches):
        return self.reinforce(fast, batches) if self.config.reinforce else super().backward(fast, batches)

    def reinforce(self, fast, batches):
        """Self-critical training: draw K captions of each image, make the better ones likelier and the worse ones less.

        "Self-critical sequence training" (Rennie et al. 2016, arXiv:1612.00563): cross-entropy asks for the next word
        of somebody's caption, this for a high score of one's own. A caption's advantage is its CIDEr-D minus the mean
        of the others of its image; the loss is minus the advantage times the caption's log-probability. Returns minus
        the mean score.
        """
        model, machine, K, scores = getattr(fast, "module", fast), self.machine, self.config.reinforce, []
        for k, batch in enumerate(batches):
            img, B = batch.img.to(machine.device).repeat_interleave(K, dim=0), len(batch.img)
            model.eval()
            rows = generate(model, img, [[self.first]] * (B * K), self.config.max_tokens, 1.0, eos_id=self.end)
            learning(model)
            said = [" ".join(metrics.tokenize(self.tokenizer.decode(row))) for row in rows]
            score = torch.tensor([self.reward.score(text, self.place[i])
                                  for text, i in zip(said, np.repeat(batch.members, K))]).view(B, K)
            advantage = (score - score.mean(dim=1, keepdim=True)) * K / (K - 1)   # (B, K): against the other K - 1
            full = [row + [self.end] if len(row) < self.config.max_tokens else row for row in rows]
            idx, targets = pad_rows([([self.first] + row[:-1], row) for row in full])
            more = k + 1 < len(batches)
            with fast.no_sync() if machine.world > 1 and more else nullcontext():
                with machine.autocast():
                    logits = fast(img, idx.to(machine.device))[0]                 # (B * K, T, V)
                # cross_entropy wants (rows, V, T), and gives 0 where nothing was said: log_p is (B * K,)
                log_p = -F.cross_entropy(logits.float().transpose(1, 2), targets.to(machine.device),
                                         ignore_index=IGNORE, reduction="none").sum(dim=1)
                loss = -(advantage.flatten().to(machine.device) * log_p).sum() / (self.config.batch_size * K)
                machine.scaler.scale(loss * machine.world).backward()
            scores.append(score.sum() / (self.config.batch_size * K))
        return -torch.stack(scores).sum()

    def caption(self, model, members, **how):
        """What the model says of the images `members`, a string each; greedily, or as `how` (for generate) says."""
        model.eval()
        said = []
        for start in range(0, len(members), 64):
            img = self.images(members[start:start + 64])
            with self.machine.autocast():
                rows = generate(model, img, [[self.first]] * len(img), self.config.max_tokens, eos_id=self.end,
                                guidance=self.config.guidance, **how)
            said += [self.tokenizer.decode(row).strip() for row in rows]
        learning(model)
        return said

    def look(self, model, step, best):
        """Evaluate, caption a few, keep the best model so far: that of the lowest loss or, rewarded, highest score."""
        run, say = self.run, self.machine.say
        val, shuffled = self.evaluate(model, "val", self.config.eval_images)
        judged = val
        if not math.isfinite(val):
            raise UserError(f"the validation loss at step {step} is not finite; lower --lr and start again")
        if self.machine.main:
            members = run.members("val", self.config.eval_images if self.config.reinforce else 24)
            said = self.caption(model, members)
            perplexity = math.exp(min(val, 50))
            if self.config.reinforce:                           # what is trained is the score, so it also decides
                judged = -metrics.score_captions(said, [run.dataset.captions[i] for i in members])["CIDEr-D"]
                say(f"step {step}: validation CIDEr-D {-judged:.3f}")
            say(f"step {step}: validation loss {val:.3f}, perplexity {perplexity:.2f}, with images exchanged "
                f"{shuffled:.3f}; {len(set(said))} of {len(said)} sample captions are distinct")
            for i, text in list(zip(members, said))[:3]:
                say(f"    {text!r}   truth: {run.dataset.captions[i][0]!r}")
            if judged < best:
                run.save(model, {"val_loss": val, "perplexity": perplexity, "shuffled_loss": shuffled, "step": step})
        return val, shuffled, judged

    def finish(self, model):
        """Caption the test split with the best weights; print, score and draw the result, and say what to run next."""
        run, out = self.run, self.run.out
        model.load_state_dict(load_safetensors(out / "model.safetensors"))
        members = run.members("test", self.config.test_images)
        said = self.caption(model, members)
        scores = score(run.dataset, members, said)
        guided = f", with guidance {self.config.guidance:g}," if self.config.guidance else ""
        print(f"\n{len(members)} held-out images, captioned greedily{guided} by the best model:")
        for i, text in list(zip(members, said))[:8]:
            print(f"    says   {text}\n    truth  {run.dataset.captions[i][0]}\n")
        print("test split: " + show(scores))
        run.add_scores({f"test {name}": value for name, value in scores.items()})
        draw_samples(run, members, said)
        print(f"{out}/samples.png shows sixteen of them, {out}/curves.png how it learned. Now try")
        next_command(run, "")

    def judge(self, model, split, num_beams, length_penalty):
        """Caption a whole split and score it; leaves scores.json and captions.jsonl, returns the scores.

        "shuffled" are the scores when every caption is held against the next image's references: what is left of them
        is what the model knows of captions in general.
        """
        run, members = self.run, self.run.members(split)
        how = dict(num_beams=num_beams, length_penalty=length_penalty)
        said = self.caption(model, members, **how)
        scores = {"perplexity": math.exp(self.evaluate(model, split)[0]), **score(run.dataset, members, said),
                  "shuffled": score(run.dataset, members[1:] + members[:1], said)}
        rows = [{"image": run.dataset.names[i], "caption": text, "references": run.dataset.captions[i]}
                for i, text in zip(members, said)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(run.out / "captions.jsonl", lambda file: file.write(lines.encode()))
        write_json(run.out / "scores.json", {"split": split, "images": len(members), **how,
                                             "guidance": self.config.guidance, **scores})
        return scores


def score(dataset, members, said):
    """{"name": value}: how often the meaning is right (shapes) or the papers' scores; the share of distinct ones."""
    truths = [dataset.captions[i] for i in members]
    distinct = {"distinct": len(set(said)) / len(said), "distinct in truth": len({t[0] for t in truths}) / len(truths)}
    if dataset.name == "shapes":
        right = [meaning(text) == meaning(truth[0]) for text, truth in zip(said, truths)]
        return {"exact": sum(right) / len(right), **distinct}
    return {**metrics.score_captions(said, truths), **distinct}


def show(scores):
    """Scores as one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if isinstance(value, float))


def draw_samples(run, members, texts):
    """samples.png and, for the first command a newcomer tries, example.png."""
    pictures = [run.dataset.open(i) for i in members[:16]]
    sheet = caption_sheet(pictures, texts[:16])
    atomic_write(run.out / "samples.png", lambda file: sheet.save(file, "PNG"))
    atomic_write(run.out / "example.png", lambda file: pictures[0].save(file, "PNG"))


def next_command(run, options):
    """The sample.py line that uses this run."""
    place = "" if str(run.out) == "out" else f" --out-dir {shlex.quote(str(run.out))}"
    feats = f" --features {shlex.quote(str(run.config.features))}" if run.feats and not run.feats.source else ""
    image = run.dataset.names[run.dataset.splits["test"][0]] if feats else str(run.out / "example.png")
    print(f"    python sample.py --image {shlex.quote(image)}{options}{place}{feats}")


def read_table(path):
    """The rows of a comparison table, [] where there is none yet. Raises UserError for a file that is no table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if any(None in row for row in rows):                    # a line longer than the first one
            raise ValueError("its lines differ in length")
        return rows
    except FileNotFoundError:
        return []
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is no table of train.py ({error}); name another --table") from None


def add_to_table(path, row):
    """Put one result into the comparison table (a CSV), in place of an older one of the same run, split and beams.

    Returns the whole table as lines of text.
    """
    key, path = ("run", "split", "beams", "penalty", "guidance"), Path(path)
    row = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items()}
    rows = [r for r in read_table(path) if [r.get(k) for k in key] != [row[k] for k in key]] + [row]
    names = list(dict.fromkeys(name for r in rows for name in r))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))
    wide = {name: max(len(name), *(len(r.get(name) or "") for r in rows)) for name in names}
    return ["  ".join((r.get(name) or "").ljust(wide[name]) for name in names)
            for r in [dict(zip(names, names)), *rows]]


# ---------------------------------------------------------------------------------------------------------------------

class Contrastive(Task):
    """--task clip: pictures and sentences into one space."""

    def __init__(self, run, saved=None):
        """saved: a Loaded run to judge; else everything is made from the options."""
        super().__init__(run)
        c, self.saved = self.config, saved
        self.eyes, self.reader = None, None                     # the tower of --vision, the CLIP of --text
        if not saved:
            self.eyes = load_eyes(c.vision) if c.vision else None
            self.reader = load_clip(c.text) if c.text else None
        self.recipe = saved.recipe if saved else self.eyes.recipe if self.eyes else Recipe(size=c.image_size)
        self.ready = TextEmbeddings(c.text_embeddings, run.dataset) if c.text_embeddings else None
        clean, captions = CLEAN[c.clean], run.dataset.captions
        self.tokenizer = saved.tokenizer if saved else self.reader.tokenizer if self.reader else \
            None if self.ready else make_tokenizer(
                c, (clean(text) for i in run.dataset.splits["train"] for text in captions[i]))
        if not saved and not self.ready and self.tokenizer is None:
            raise UserError(f"--text {c.text} came without its tokenizer; name a checkpoint that has one")
        # what the text tower reads, cut to fit, the end always there; or the number of a ready-made embedding
        self.sizes = saved.model.config if saved else self.make_sizes()
        self.texts = SimpleNamespace(rows=self.ready.rows if self.ready else [
            [(row, [0]) for row in text_rows(self.tokenizer, map(clean, texts), self.sizes).tolist()]
            for texts in captions])

    def make_sizes(self):
        """The options (and public towers) -> CLIPConfig."""
        c, feats = self.config, self.run.feats
        vision = None if feats else self.eyes.sizes if self.eyes else fresh_eyes(c)
        text, end = None, None
        if self.reader:
            text, end = self.reader.config.text, self.reader.config.end_token
        elif not self.ready:
            text = GPTConfig(block_size=c.max_tokens + 1, vocab_size=self.tokenizer.vocab_size, **tower_sizes(c))
            end = self.tokenizer.token_to_id(END)
        n_joint = self.reader.config.n_joint if self.reader else self.ready.dim if self.ready else c.n_joint
        return CLIPConfig(vision=vision, text=text, n_joint=n_joint, head=c.head, end_token=end, n_hidden=c.n_hidden,
                          feat_dim=feats.feat_dim if feats else None, dropout=c.dropout)

    def make_model(self):
        """A CLIP whose towers are public where --vision and --text name some, and fresh elsewhere."""
        if self.saved:
            return self.saved.model
        torch.manual_seed(self.config.seed)
        model = CLIP(self.sizes)
        if self.eyes:
            model.vision.load_state_dict(self.eyes.weights)
            if self.eyes.head is not None and self.sizes.head == "linear" and self.eyes.head.shape == \
                    model.image_head.weight.shape:              # a CLIP's tower comes with its way into the space
                model.image_head.weight.data.copy_(self.eyes.head)
        if self.reader:
            model.text.load_state_dict(self.reader.text.state_dict())
            model.text_head.load_state_dict(self.reader.text_head.state_dict())
            model.logit_scale.data.copy_(self.reader.logit_scale.data)
        return model

    def about(self):
        return {"clean": self.config.clean, "text_embeddings": self.ready and self.ready.source}

    def pairs(self, batch, augment=None):
        """A Batch as the model takes it: img (or features), and idx (B, T) or ready-made embeddings (B, D)."""
        img, idx, _ = batch.to(self.machine.device, self.recipe, augment)
        return img, self.ready.emb[batch.idx[:, 0]].to(self.machine.device) if self.ready else idx

    def backward(self, fast, batches):
        """All micro-batches are one batch to the loss: their pairs are each other's wrong answers."""
        chunks = [lambda batch=batch: self.pairs(batch, self.run.augment) for batch in batches]
        loss = contrastive_step(fast, chunks, self.machine.autocast, self.machine.scaler.scale)
        return loss / self.machine.world                        # each process has the loss of all, and they are summed

    def members(self, split, limit=None):
        """The images to search among. Of drawn scenes with one caption only the first: no words tell them apart."""
        if self.run.dataset.name != "shapes":
            return self.run.members(split, limit)
        first = {self.run.dataset.captions[i][0]: i for i in reversed(self.run.members(split))}
        return sorted(first.values())[:limit]

    @torch.no_grad()
    def embed(self, model, split, limit=None):
        """All images (n, D) and all their captions (m, D) of a split, with the owner (m,) of each caption."""
        model.eval()
        members, image_emb, text_emb, owner = self.members(split, limit), [], [], []
        for start in range(0, len(members), 64):
            part = members[start:start + 64]
            with self.machine.autocast():
                image_emb.append(model.encode_image(self.images(part)).cpu())     # (b, D)
                rows = [row for i in part for row in self.texts.rows[i]]
                if self.ready:
                    text_emb.append(model.encode_text(self.ready.emb[[idx[0] for idx, _ in rows]]))
                else:
                    text_emb.append(model.encode_text(pad_rows(rows)[0].to(self.machine.device)).cpu())
            owner += [start + k for k, i in enumerate(part) for _ in self.texts.rows[i]]
        learning(model)
        return torch.cat(image_emb), torch.cat(text_emb), torch.tensor(owner)

    def losses(self, model, image_emb, text_emb, owner):
        """As in training: batches of one size, the first caption of each image. image_emb (n, D), text_emb (m, D),
        owner (m,) -> the loss, the same with images exchanged, the share right, and the size of these batches.
        """
        first = torch.tensor([int((owner == k).nonzero()[0]) for k in range(len(image_emb))])        # (n,)
        size, scale = min(self.config.batch_size, len(image_emb)), model.logit_scale.detach().cpu()
        true, shuffled, right, starts = 0.0, 0.0, 0.0, range(0, len(image_emb) - size + 1, size)
        for start in starts:
            img, txt = image_emb[start:start + size], text_emb[first[start:start + size]]            # (size, D) both
            true += info_nce(img, txt, scale).item() / len(starts)
            shuffled += info_nce(img.roll(1, 0), txt, scale).item() / len(starts)
            right += in_batch_accuracy(img @ txt.t()) / len(starts)
        return true, shuffled, right, size

    def look(self, model, step, best):
        """Recall on the validation split; keeps the best model. Returns (loss, exchanged, 1 - the mean recall)."""
        image_emb, text_emb, owner = self.embed(model, "val", self.config.eval_images)
        recall = metrics.recall_at_k(image_emb, text_emb, owner)
        loss, exchanged, right, size = self.losses(model, image_emb, text_emb, owner)
        mean = sum(way[f"R@{k}"] for way in recall.values() for k in (1, 5, 10)) / 6
        say = self.machine.say
        say(f"step {step}: validation loss {loss:.3f} (chance {chance(size):.3f}), right in a batch of {size} "
            f"{right:.1%}; {show_recall(recall)} among {len(image_emb)} images; temperature "
            f"{1 / model.logit_scale.exp().item():.4f}")
        if abs(loss - chance(size)) < 0.02 * chance(size):
            say(f"    the loss is still that of guessing, ln {size}; if it stays, try another --lr or longer --warmup")
        if self.machine.main and 1 - mean < best:
            self.run.save(model, {"val_loss": loss, "step": step, **flat_recall(recall)})
        return loss, exchanged, 1 - mean

    def finish(self, model):
        """Recall on the test split by the best weights; samples.png and similarity.png, and what to run next."""
        run, out = self.run, self.run.out
        model.load_state_dict(load_safetensors(out / "model.safetensors"))
        members = self.members("test", self.config.test_images)
        image_emb, text_emb, owner = self.embed(model, "test", self.config.test_images)
        recall = metrics.recall_at_k(image_emb, text_emb, owner)
        sim = image_emb @ text_emb.t()                                            # (n, m)
        print(f"\n{len(members)} held-out images and their {len(owner)} captions:\n  {show_recall(recall)}")
        captions = [caption for i in members for caption in run.dataset.captions[i]]
        best = [captions[k] for k in sim[:16].argmax(dim=1).tolist()]
        draw_samples(run, members, [f"{text} ({value:.2f})" for text, value in zip(best, sim[:16].amax(1).tolist())])
        first = [int((owner == k).nonzero()[0]) for k in range(min(12, len(members)))]
        picture = similarity_picture(sim[:12][:, first], [captions[k] for k in first])
        atomic_write(out / "similarity.png", lambda file: picture.save(file, "PNG"))
        run.add_scores({f"test {name}": value for name, value in flat_recall(recall).items()})
        print(f"{out}/samples.png shows sixteen images with the caption found for each, {out}/similarity.png the table "
              "of a dozen. Now try")
        next_command(run, " --labels 'a dog' 'a child' 'a boat'")

    def judge(self, model, split, **_):
        """Recall over a whole split, all captions; scores.json. "shuffled": every image exchanged for the next."""
        image_emb, text_emb, owner = self.embed(model, split)
        scores = flat_recall(metrics.recall_at_k(image_emb, text_emb, owner))
        scores["shuffled"] = flat_recall(metrics.recall_at_k(image_emb.roll(1, 0), text_emb, owner))
        write_json(self.run.out / "scores.json", {"split": split, "images": len(image_emb), **scores})
        return scores


def flat_recall(recall):
    """{"image_to_text": {"R@1": ..}} -> {"image to text R@1": ..}."""
    return {f"{way.replace('_', ' ')} {name}": value
            for way, scores in recall.items() for name, value in scores.items()}


def show_recall(recall):
    """Both ways as one line."""
    return "; ".join(f"{way.replace('_', ' ')} R@1/5/10 " +
                     "/".join(f"{100 * scores[f'R@{k}']:.1f}" for k in (1, 5, 10)) +
                     f", median rank {scores['median_rank']:.0f}" for way, scores in recall.items())


# ---------------------------------------------------------------------------------------------------------------------

class Classifying(Task):
    """--task classify: a vision tower learns labels, several categories at once.

    An image has one row: for idx the number of its label in each category (IGNORE where it has none), for targets [0],
    which is not read and makes each image count once. Raises UserError where the data set has no labels.
    """

    def __init__(self, run, saved=None):
        """saved: a Loaded run to judge."""
        super().__init__(run)
        c, self.saved = self.config, saved
        self.eyes = load_eyes(c.vision) if c.vision and not saved else None
        self.recipe = saved.recipe if saved else self.eyes.recipe if self.eyes else Recipe(size=c.image_size)
        self.tokenizer = None
        given = read_labels(c.labels, run.dataset) if c.labels else getattr(run.dataset, "labels", None)
        if given is None:
            raise UserError(f"{run.dataset.name} has no labels of its own; make some with data.py --label, and give "
                            "the file with --labels")
        train = set(run.dataset.splits["train"])
        self.labels = saved.model.config.labels if saved else {
            kind: sorted({labels[kind] for i, labels in given.items() if kind in labels and i in train})
            for kind in dict.fromkeys(kind for i, labels in given.items() for kind in labels if i in train)}
        # a label that the training split lacks has no number: nothing could learn it
        number = {kind: {name: k for k, name in enumerate(names)} for kind, names in self.labels.items()}
        rows = {i: [number[kind].get(labels.get(kind), IGNORE) for kind in self.labels] for i, labels in given.items()}
        none = [IGNORE] * len(self.labels)
        self.texts = SimpleNamespace(rows=[[(rows.get(i, none), [0])] for i in range(len(run.dataset.names))])
        for split, members in run.dataset.splits.items():
            known = [i for i in members if rows.get(i, none) != none]
            if not known:
                raise UserError(f"no image of the {split} split has a label that is learned; label more images, or "
                                "with a lower --margin")
            if len(known) < len(members):
                self.machine.say(f"{len(members) - len(known)} of {len(members)} images of the {split} split have no "
                                 "label that is learned and are left out")
            run.dataset.splits[split] = known

    def make_model(self):
        if self.saved:
            return self.saved.model
        c = self.config
        torch.manual_seed(c.seed)
        vision = self.eyes.sizes if self.eyes else fresh_eyes(c)
        model = Classifier(ClassifierConfig(vision, self.labels))
        if self.eyes:
            model.vision.load_state_dict(self.eyes.weights)
        return model

    def about(self):
        return {"labels": self.labels}

    @torch.no_grad()
    def guesses(self, model, split, limit=None):
        """What the model takes each image for: members, guesses (n, categories), truths (n, categories) or IGNORE."""
        model.eval()
        members, said = self.run.members(split, limit), []
        for start in range(0, len(members), 64):
            part = members[start:start + 64]
            truths = torch.tensor([self.texts.rows[i][0][0] for i in part]).to(self.machine.device)  # (b, categories)
            with self.machine.autocast():
                logits, _ = model(self.images(part), truths)
            said.append(torch.stack([scores.argmax(dim=1) for scores in logits], dim=1).cpu())        # (b, categories)
        learning(model)
        return members, torch.cat(said), torch.tensor([self.texts.rows[i][0][0] for i in members])

    def accuracy(self, guesses, truths):
        """{category: share right}, of the images that have a label there; no entry where none has."""
        return {kind: ((guesses[:, k] == truths[:, k])[truths[:, k] != IGNORE]).float().mean().item()
                for k, kind in enumerate(self.labels) if (truths[:, k] != IGNORE).any()}

    def look(self, model, step, best):
        """Loss and share right on the validation split; keeps the model whose loss is lowest."""
        loss, exchanged = self.evaluate(model, "val", self.config.eval_images)
        _, guesses, truths = self.guesses(model, "val", self.config.eval_images)
        right = self.accuracy(guesses, truths)
        self.machine.say(f"step {step}: validation loss {loss:.3f}, with images exchanged {exchanged:.3f}; right: " +
                         ", ".join(f"{kind} {value:.1%}" for kind, value in right.items()))
        if self.machine.main and loss < best:
            self.run.save(model, {"val_loss": loss, "step": step, **right})
        return loss, exchanged, loss

    def finish(self, model):
        run, out = self.run, self.run.out
        model.load_state_dict(load_safetensors(out / "model.safetensors"))
        members, guesses, truths = self.guesses(model, "test", self.config.test_images)
        right = self.accuracy(guesses, truths)
        print(f"\n{len(members)} held-out images: " +
              ", ".join(f"{kind} {value:.1%} right" for kind, value in right.items()))
        names = list(self.labels.values())
        draw_samples(run, members, [", ".join(names[k][g] for k, g in enumerate(row)) for row in guesses[:16].tolist()])
        for k, (kind, labels) in enumerate(self.labels.items()):
            table = torch.zeros(len(labels), len(labels))                         # [truth, guess]: how often
            known = truths[:, k] != IGNORE
            table.index_put_((truths[known, k], guesses[known, k]), torch.ones(int(known.sum())), accumulate=True)
            picture = similarity_picture(table / table.sum(dim=1, keepdim=True).clamp(min=1), labels)
            atomic_write(out / f"confusion-{kind}.png", lambda file, picture=picture: picture.save(file, "PNG"))
        run.add_scores({f"test {kind}": value for kind, value in right.items()})
        where = run.dataset.name + (f" --data-dir {shlex.quote(run.config.data_dir)}" if run.config.data_dir else "")
        print(f"{out}/confusion-*.png show what is taken for what. The tower can now learn to speak:\n"
              f"    python train.py --dataset {where} --vision {shlex.quote(str(out))} --out-dir out/speaks")

    def judge(self, model, split, **_):
        """Accuracy by category over a whole split; scores.json. "shuffled": images against the next one's labels."""
        members, guesses, truths = self.guesses(model, split)
        scores = {**self.accuracy(guesses, truths), "shuffled": self.accuracy(guesses, truths.roll(-1, 0))}
        write_json(self.run.out / "scores.json", {"split": split, "images": len(members), **scores})
        return scores


class Answering(Captioning):
    """--task vqa: the prefix model answers questions, in sentences; the loss is on its own words only."""

    def __init__(self, run, saved=None):
        if not hasattr(run.dataset, "questions"):
            raise UserError(f"{run.dataset.name} holds no questions; --task vqa needs --dataset shapes or vqav2")
        super().__init__(run, saved)

    def make_texts(self, clean):
        """Each image's dialogues as rows. Also sets `longest`, the room to speak: most trained tokens of a row."""
        c, dataset, cut = self.config, self.run.dataset, Counter()
        self.tokenizer.add_special_tokens(TAGS)
        rows = [[to_targets(*row) for row in rows_of(questions, self.tokenizer, c.max_tokens, c.turns, cut=cut)]
                for questions in dataset.questions]
        for what, n in cut.items():
            self.machine.say(f"{n} {what} do not fit into --max-tokens {c.max_tokens} and were cut")
        self.longest = max((len(t) - t.count(IGNORE) for of_image in rows for _, t in of_image), default=1)
        if not self.longest:
            raise UserError(f"--max-tokens {c.max_tokens} leaves no room for any answer; raise it")
        return SimpleNamespace(rows=[[row for row in of_image if n_targets([row])] for of_image in rows])

    def about(self):
        return {**super().about(), "longest": self.longest}

    def answer(self, model, members, seen="true", **how):
        """{question id: sentence} for all questions about `members`; seen: "true", "exchanged" or "blank" images.

        Blank is 0 after normalisation, the mean colour. how: for generate.
        """
        model.eval()
        said, before = {}, None
        most = model.config.text.block_size + 2 - model.n_image_tokens            # room for question and answer
        for start in range(0, len(members), 64):
            part = members[start:start + 64]
            img = self.images(part)
            before, img = img, {"true": img, "exchanged": exchanged(img, before), "blank": torch.zeros_like(img)}[seen]
            with torch.no_grad(), self.machine.autocast():
                feats = model.eyes(img)                                           # (b, N, C): once for all questions
            asked = [(k, q, encode_dialogue(self.tokenizer, [(q.question, None)])[0])
                     for k, i in enumerate(part) for q in self.run.dataset.questions[i]]
            said.update((q.question_id, "") for _, q, _ in asked)
            asked = [row for row in asked if len(row[2]) < most]                  # the rest is unanswered, so wrong
            for first in range(0, len(asked), 256):
                places, some, prompts = zip(*asked[first:first + 256])
                room = min(self.longest, most - max(map(len, prompts)))
                with self.machine.autocast():
                    rows = generate(model, feats[list(places)], prompts, room, eos_id=self.end, **how)
                said.update((q.question_id, self.tokenizer.decode(row).strip()) for q, row in zip(some, rows))
        learning(model)
        return said

    def accuracy(self, model, members, seen="true", **how):
        """{id: sentence}, {id: short answer}, and the official accuracy (0..1) with all its parts: score_vqa's dict."""
        questions = [q for i in members for q in self.run.dataset.questions[i]]
        said = self.answer(model, members, seen, **how)
        short = {q.question_id: to_short(said[q.question_id], q.question) for q in questions}
        return said, short, score_vqa(questions, short) if any(q.answers for q in questions) else {}

    def look(self, model, step, best):
        run, say = self.run, self.machine.say
        val, shuffled = self.evaluate(model, "val", self.config.eval_images)
        if not math.isfinite(val):
            raise UserError(f"the validation loss at step {step} is not finite; lower --lr and start again")
        if self.machine.main:
            members = run.members("val", 100)
            said, _, scores = self.accuracy(model, members)
            say(f"step {step}: validation loss {val:.3f}, with images exchanged {shuffled:.3f}; accuracy "
                f"{scores['overall']:.1%} on the questions of {len(members)} images")
            for q in [q for i in members[:3] for q in run.dataset.questions[i][:1]]:
                say(f"    {q.question!r} {said[q.question_id]!r}   truth: {q.answer!r}")
            if val < best:
                run.save(model, {"val_loss": val, "shuffled_loss": shuffled, "step": step,
                                 "val accuracy": scores["overall"]})
        return val, shuffled, val

    def finish(self, model):
        run, out = self.run, self.run.out
        model.load_state_dict(load_safetensors(out / "model.safetensors"))
        members = run.members("test", self.config.test_images)
        said, scores = self.report(model, members)
        print("Now try")
        run.add_scores({f"test {name}": value for name, value in scores.items() if isinstance(value, float)})
        members = [i for i in members if run.dataset.questions[i]][:16]
        asked = [run.dataset.questions[i][0] for i in members]
        draw_samples(run, members, [f"{q.question} {said[q.question_id]}" for q in asked])
        next_command(run, f" --prompt {shlex.quote(asked[0].question)}")

    def report(self, model, members, **how):
        """Print, and write to results.json and scores.json, what is right: with the true image, another, and none.

        Returns the sentences, and score_vqa's dict with "accuracy", "exchanged" and "blank" beside.
        """
        said, short, scores = self.accuracy(model, members, **how)
        results = self.run.out / "results.json"
        atomic_write(results, lambda file: file.write(json.dumps(submission(short)).encode()))
        if not scores:                                          # the official test split: its answers are kept secret
            print(f"{len(short)} questions about {len(members)} images, without answers: {results} is to be submitted")
            return said, {}
        for i in members[:6]:
            for q in self.run.dataset.questions[i][:2]:
                print(f"    {q.question}  {said[q.question_id]}   truth: {q.answer}")
        others = {seen: self.accuracy(model, members, seen, **how)[2]["overall"] for seen in ("exchanged", "blank")}
        print(f"{len(short)} questions about {len(members)} held-out images: accuracy {scores['overall']:.1%}; with "
              f"images exchanged {others['exchanged']:.1%}, blanked {others['blank']:.1%}")
        for part in ("answer_type", "question_type"):
            print(f"  by {part}: " +
                  ", ".join(f"{kind} {value:.1%}" for kind, value in sorted(scores[part].items())[:12]))
        scores = {"accuracy": scores["overall"], "exchanged": others["exchanged"], "blank": others["blank"], **scores}
        write_json(self.run.out / "scores.json", {"images": len(members), **how, **scores})
        return said, scores

    def judge(self, model, split, num_beams, length_penalty):
        how = dict(num_beams=num_beams, length_penalty=length_penalty)
        _, scores = self.report(model, self.run.members(split), **how)
        return scores and {"accuracy": scores["accuracy"], "shuffled": {"accuracy": scores["exchanged"]}}


def read_labels(path, dataset):
    """A csv image,category,label[,..] (data.py --label) -> {image number: {category: label}}. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:                # Excel's mark at the beginning
            rows = list(csv.DictReader(file))
        number = {name: i for i, name in enumerate(short_names(dataset.names))}
        found = {}
        for row in rows:
            i = number.get(row["image"], number.get(Path(row["image"] or "").name))
            if i is not None and row["label"] and row["category"]:
                found.setdefault(i, {})[row["category"]] = row["label"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the labels in {path}: {error}") from None
    except KeyError:
        raise UserError(f"{path} should begin with the line image,category,label") from None
    if not found:
        raise UserError(f"{path} holds no label for any image of {dataset.name}; make it with data.py --label, perhaps "
                        "with a lower --margin")
    return found


TASKS = {"caption": Captioning, "clip": Contrastive, "classify": Classifying, "vqa": Answering}
