"""How good is a caption, a retrieval, an answer? The scores papers print, computed as the official scripts do.

    bleu, rouge_l, cider        coco-caption (Papineni 2002, Lin 2004, Vedantam 2015), its quirks included, to 1e-6
    recall_at_k, vqa_accuracy   retrieval both ways (Karpathy 2015); agreement with ten humans (Antol 2015, Goyal 2017)
    tokenize                    Stanford's Penn Treebank rules (CoreNLP 3.4.1), applied by coco-caption before scoring

BLEU and ROUGE count the words and runs of words that a caption shares with its references; CIDEr weighs them: "dog on
the" is in every caption, "catching a frisbee" is not. Left out: METEOR and SPICE (WordNet, a parser and Java).
Numbers are comparable only after the same tokenisation: it is long, and the end of this file."""
import functools
import math
from collections import Counter

import numpy as np
import regex
import torch

from .config import UserError


def _check_pairs(predictions, references):
    """zip would score the shorter of two lists, and a bare string letter by letter."""
    if any(isinstance(x, str) or not len(x) for x in [predictions, *references]) or len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions and {len(references)} references do not pair up; give one "
                        "prediction and a list of references for each image or question, and no empty list")


# ----- 1. Captions: candidates are one tokenised string per image, references a list of such strings per image -----

def _ngrams(caption):
    """Counts of all 1- to 4-grams, keyed by tuple, and the length. "a b a" -> {("a",): 2, ("a", "b"): 1, ...}, 3"""
    words = caption.split()
    return Counter(gram for n in range(4) for gram in zip(*(words[i:] for i in range(n + 1)))), len(words)


def bleu(candidates, references):
    """Corpus BLEU-1..4, each in 0..1: geometric mean of clipped n-gram precisions times a penalty for short output.

    Counts are summed over all images before dividing (no mean of sentence scores, no smoothing). Clipping: "the the
    the" against "the dog" gets credit for one "the", not three. The reference length that counts is the one closest to
    the candidate's, the shorter if two are."""
    _check_pairs(candidates, references)
    correct, guessed, words_out, words_ref = np.zeros(4), np.zeros(4), 0, 0       # by n
    for candidate, refs in zip(candidates, references):
        (counts, length), refs = _ngrams(candidate), [_ngrams(ref) for ref in refs]
        words_out += length
        words_ref += min((n for _, n in refs), key=lambda n: (abs(n - length), n))
        guessed += [max(0, length - n) for n in range(4)]                         # five words make 5, 4, 3 and 2
        allowed = functools.reduce(Counter.__or__, (ref_counts for ref_counts, _ in refs))    # | keeps the larger count
        for gram, count in (counts & allowed).items():                                      # & the smaller
            correct[len(gram) - 1] += count
    ratio = (words_out + 1e-15) / (words_ref + 1e-9)                    # coco-caption's guards against 0 / 0
    precisions = np.cumprod((correct + 1e-15) / (guessed + 1e-9)) ** (1 / np.arange(1, 5))
    return (precisions * min(1, math.exp(1 - 1 / ratio))).tolist()


def _lcs(a, b):
    """Length of the longest common subsequence. "a dog on grass", "the dog runs on grass" (as lists) -> 3"""
    row = [0] * (len(b) + 1)                        # row[j]: the answer for the words of a so far and the first j of b
    for word in a:
        corner = 0                                                                  # the row above, one column left
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidates, references):
    """Mean over images of ROUGE-L in 0..1: an F-score (beta 1.2: recall weighs more) of the longest common subsequence.
    Best precision and best recall are taken over the references separately, so they may come from two of them."""
    _check_pairs(candidates, references)
    beta2, total = 1.2 ** 2, 0.0
    for candidate, refs in zip(candidates, references):
        words, refs = candidate.split(" "), [ref.split(" ") for ref in refs]  # "" is one empty word, as in the original
        common = [_lcs(ref, words) for ref in refs]                               # by reference
        precision, recall = max(common) / len(words), max(c / len(ref) for c, ref in zip(common, refs))
        if recall:
            total += (1 + beta2) * precision * recall / (recall + beta2 * precision)  # its F-score
    return total / len(candidates)


class CiderD:
    """CIDEr-D of one caption at a time, 0 to 10: cosine of tf-idf n-gram vectors, mean over n = 1..4 and references.

    An n-gram weighs its count times log(images / images whose references use it), so a phrase that fits every image
    weighs nothing, and a set of one image scores 0. The D: a candidate's weight is clipped at the reference, a Gaussian
    (sigma 6) punishes a different length. references: per image a list of tokenised strings."""
    def __init__(self, references):
        counts = [[_ngrams(ref)[0] for ref in refs] for refs in references]       # by image, by reference
        seen_in = Counter(gram for refs in counts for gram in set().union(*refs))  # images, not references
        self.log_images = math.log(len(references))
        self.weight = {gram: self.log_images - math.log(images) for gram, images in seen_in.items()}  # the idf
        self.references = [[self._vector(ref) for ref in refs] for refs in counts]

    def _vector(self, counts):
        weights = {gram: count * self.weight.get(gram, self.log_images) for gram, count in counts.items()}
        norm = [sum(w * w for gram, w in weights.items() if len(gram) == n) for n in (1, 2, 3, 4)]  # squared
        length = sum(count for gram, count in counts.items() if len(gram) == 2)     # the official length counts bigrams
        return weights, norm, length

    def score(self, candidate, i):
        """The tokenised string `candidate` against the references of image i."""
        return self.against(candidate, self.references[i])

    def against(self, candidate, references):
        """The same against a list of reference vectors taken from self.references, of whichever images."""
        total, (weights, norm, length) = 0.0, self._vector(_ngrams(candidate)[0])
        for ref_weights, ref_norm, ref_length in references:
            dots = [0.0] * 4
            for gram in weights.keys() & ref_weights.keys():
                dots[len(gram) - 1] += min(weights[gram], ref_weights[gram]) * ref_weights[gram]  # clipped
            cosines = sum(dot / math.sqrt(a * b) for dot, a, b in zip(dots, norm, ref_norm) if dot)
            total += 10 * cosines / 4 * math.exp(-(length - ref_length) ** 2 / (2 * 6.0 ** 2))
        return total / len(references)


def cider(candidates, references):
    """CIDEr-D, mean over images (see CiderD)."""
    _check_pairs(candidates, references)
    scorer = CiderD(references)
    return sum(scorer.score(candidate, i) for i, candidate in enumerate(candidates)) / len(candidates)


def score_captions(candidates, references):
    """All caption scores from raw text: {"BLEU-1": .., .., "ROUGE-L": .., "CIDEr-D": ..}, as fractions."""
    _check_pairs(candidates, references)
    candidates, references = [*map(tidy, candidates)], [[*map(tidy, refs)] for refs in references]
    scores = {f"BLEU-{n}": score for n, score in enumerate(bleu(candidates, references), 1)}
    return {**scores, "ROUGE-L": rouge_l(candidates, references), "CIDEr-D": cider(candidates, references)}


# ----- 2. Retrieval -----

BLOCK = 2 ** 22         # scores made at a time, whatever N x M


def recall_at_k(image_emb, text_emb, owner, ks=(1, 5, 10)):
    """Retrieval both ways: {"image_to_text": {"R@1": .., .., "median_rank": ..}, "text_to_image": {..}}, R@K in 0..1.

    image_emb (N, D), text_emb (M, D): arrays or tensors, scored by dot product; owner (M,): index of each text's image.
    image_to_text is a hit if any caption of the image is in the top K; text_to_image, if its one image is. Equal scores
    count against us: a model that answers the same to everything comes last."""
    # float64, then rounded: equal vectors must tie although their products may be summed up in another order
    image_emb, text_emb = (torch.as_tensor(x).detach().cpu().double().numpy() for x in (image_emb, text_emb))
    N, M, owner = len(image_emb), len(text_emb), np.asarray(owner)
    if len(owner) != M or set(owner.tolist()) != {*range(N)}:
        raise UserError(f"{len(owner)} owners of {M} texts must name each of {N} images, and no other; give one each")
    if not np.isfinite(image_emb).all() or not np.isfinite(text_emb).all():         # NaN would come first: nothing is
        raise UserError("some embeddings are not finite and cannot be ranked; find the step that made them")
    mine = np.einsum("md,md->m", image_emb[owner], text_emb).astype(np.float32)     # (M,) each text with its image
    best = np.full(N, -np.inf, np.float32)
    np.maximum.at(best, owner, mine)                                                # (N,) the best of each image's own
    ranks = {"image_to_text": np.ones(N), "text_to_image": np.ones(M)}
    for rows in np.array_split(np.arange(N), math.ceil(N * M / BLOCK)):             # a table of N x M may not fit
        scores = (image_emb[rows] @ text_emb.T).astype(np.float32)                  # (b, M)
        scores[owner == rows[:, None]] = -np.inf                                    # what is left is the others'
        ranks["image_to_text"][rows] += (scores >= best[rows, None]).sum(axis=1)  # (b,) how many are ahead
        ranks["text_to_image"] += (scores >= mine).sum(axis=0)                    # (M,)
    return {way: {**{f"R@{k}": float((r <= k).mean()) for k in ks}, "median_rank": float(np.median(r))}
            for way, r in ranks.items()}


# ----- 3. Visual question answering -----
# The official script mends missing apostrophes from a table. Every entry of it is a word below with one apostrophe
# taken out: "couldnt've" and "couldn'tve" both become "couldn't've". (Its I'm and I've cannot match lower case.)

_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
_MENDED = {word[:i] + word[i + 1:]: word for word in _APOSTROPHES.split() for i, c in enumerate(word) if c == "'"}
_MENDED["somebody'd"] = "somebodyd"                     # sic: the official entry is backwards
_MENDED |= {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_MENDED["none"] = "0"


def _normalize_answer(text):
    """The official clean-up: "The two dogs." -> "2 dogs"."""
    glue = regex.search(r"\d,\d", text)                 # "1,000": then every mark is deleted
    cleaned = text
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        near_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if near_space or glue else " ")
    # The original hands its flag to the wrong argument, so only the first 32 periods go; "1.5" keeps its own
    cleaned = regex.sub(r"\.(?!\d)", "", cleaned, count=32)
    return " ".join(_MENDED.get(word, word) for word in cleaned.lower().split() if word not in ("a", "an", "the"))


def _answer_score(prediction, humans):
    """Agreement with the humans, each compared with the others: m matches of ten give 0, .3, .6, .9, then 1."""
    prediction, *humans = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *humans))
    if len(set(humans)) > 1 or len(humans) == 1:          # official: ten equal answers are compared as they are typed
        prediction, *humans = map(_normalize_answer, (prediction, *humans))
    matches, others = humans.count(prediction), min(3, len(humans) - 1)           # three suffice
    if not others:
        return float(matches)
    total = matches * min(1, (matches - 1) / others) + (len(humans) - matches) * min(1, matches / others)
    return total / len(humans)


def vqa_accuracy(predictions, answers):
    """Official VQA accuracy in 0..1. predictions: one string per question; answers: its human answers, usually ten. For
    each human, min(1, matches among the other nine / 3), averaged: three people suffice. With fewer than four humans
    "three" becomes all the others; a single answer must be equal after clean-up."""
    _check_pairs(predictions, answers)
    return sum(map(_answer_score, predictions, answers)) / len(answers)


# ----- 4. Tokens: Penn Treebank rules for captions -----
# A lexer stands at one place of the text, tries every rule and keeps the longest match; Python's `|` keeps the first
# that fits, so the rules below go from the greedy to the plain. What no rule claims (spaces, commas, quotes, emoji) is
# skipped: coco-caption drops it anyway. <NAME> stands for a piece of the table. Left out: file and phone numbers, HTML.

_PIECES = {
    "L": r"[\p{L}\p{M}]",                                      # a letter of any script
    "A": r"[\p{L}\p{M}\p{Nd}]",                                # a letter or a digit
    "Q": "['’]",                                               # the apostrophe, straight or curly
    "Q2": "['’`‘‛]",                                           # ... or a quote mark mistyped for one inside a word
    "CLITIC": "(?:[msdMSD]|(?i:re|ve|ll))",                    # what hangs on an apostrophe: 's 'd 'm 're 've 'll
    "STOP": r"(?:\.(?=[,;:]))?",                               # "dog.," a period before a comma stays with its word
    "END": r"(?![\p{L}\p{M}\p{Nd}]|[-_/]\w|[.!?]\p{L}|\.[,;:])",    # no longer word begins here
    "ACRONYM": r"[A-Za-z](?:\.[A-Za-z])*\.",                   # U.S., p.m., and any single letter: "plan b."
    # These keep their period: titles, firms, months, states. Those that are also words need their capital.
    "ABBREVIATION": r"""(?:(?i:mr|mrs|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt
        |capt|ste?|ave|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc
        |jr|sr|bros|(?:ed|ph)\.d|ph|esq|blvd|rd|bldg|dept|inc|cos?|corp|ltd|plc|rt|pp?t[ye]s?|bancorp|bhd|assn|univ|intl
        |sys|invt|elec|natl|m[ft]g|wm|jos|cie|alex|treas|tel|est|ext|sq|etc|al|seq|vs|cf|jan|feb|mar|apr|jun|jul|aug
        |sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn
        |mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo)
        |A(?i:z|rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash))\.""",
    # These begin a sentence, so a single letter before them gives up its period: "Plan B. The", but "U. Miami".
    "OPENER": r"""(?:About|According|Additionally|After|An?|As|At|But|Earlier|Her?|Here|However|If|In|It|Last|Many|More
        |M[rs]\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|When|While
        |What|Yet|You)""",
}

_RULES = r"""
  (?i: can(?=not<END>) | (?:gon|wan)(?=na<END>) | got(?=ta<END>) | (?:lem|gim)(?=me<END>) | 't(?=is|was) )    # can|not
| [A-Za-z]+ (?=\s)                                              # nearly every token: letters up to a space
| (?i:https?)://[^\s"<>|(){}]+[^\s"<>|.!?(){},-]                # links: https://..., www.name.tld, name.com
| (?: (?i:www)\.(?:[^\s"<>|.!?(){},]+\.)+[A-Za-z]{2,4} | (?:[^\s"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu)(?!<A>) )
  (?:/[^\s"<>|()]+[^\s"<>|.!?(){},-])?
| [A-Za-z0-9][^\s"<>|(){}]*@[^\s"<>|(){}.]+(?:\.[^\s"<>|(){}.]+)*   # anything@anything is mail
| </?[A-Za-z][\w:.-]*[ ]*/?> | @[A-Za-z_]\w* | \#<L>+ | [cC]\+\+ | [cCfF]\#     # <unk> @name #tag C++ C#
| \d{1,4}[- ]\d{1,4}/\d{1,4}                                    # "1 1/2" is one token, with a no-break space inside
| [A-Za-z0-9]+(?:-[A-Za-z]+){0,2} (?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}     # and/or, w/o, 1/2, 10/11/2008
| (?: [A-Za-z0-9][A-Za-z0-9.,]*(?=-) | (?:[dDlLoO]<Q2>(?=<A>{2}))?<A>+ )        # t-shirt, 1.5-liter, U.S.-made,
  (?: [-_‐‑] (?: <ACRONYM>(?<=\..\.) | (?:[dDlLoO]<Q2>(?=<A>{2}))?<A>+ ) )+ <STOP>      # non-U.S., cat-o'nine, a_b
| (?i:pro|anti)- | -(?i:[lr][rcs]b)- | [A-Z]*\$                 # "pro- and"; -LRB- from earlier tokenising; US$
| [A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+ <STOP>                        # AT&T stays whole, at&t does not
| [A-Za-z] (?=\.\s+<OPENER>\s)                                  # Plan B|. The
| (?: <ACRONYM> | <ABBREVIATION> | (?i:ca|figs?|prop|nos?|art|pp|op)\.(?=\s?\d) ) (?!<L>)       # p.m. st. no.|7
| [dDlLoO]<Q2><A>{2,}                                           # o'clock, O'Malley
| (?i: (?:dunkin|somethin|ol)<Q> | cont'd\.? | nor'easter | c'mon | e'er | s'mores | ev'ry | li'l | nat'l | cap<Q>n )
| [A-HJ-XZn]<Q2>(?!<CLITIC>(?!<L>))<L>{2,} | <L>+(?<=<L>[aeiouyAEIOUY])<Q2>(?!<CLITIC>(?!<L>))[aeiouA-Z]<L>*    # ma'am
| [A-Za-z]*[A-MO-Za-mo-z] (?=[nN]<Q2>[tT])                      # does|n't, ca|n't
| [nN]<Q2>[tT] | <Q><CLITIC>(?![A-Za-z]) | ’<CLITIC>          # the other half: n't, 's
| <Q>[2-9]0[sS] | <Q>\d\d(?=\s) | <Q>(?i:em|till?|cause) | <Q>[nN](?:<Q>|(?!\S))        # '90s '08 'em rock 'n' roll
| [yYlLdDjJ]<Q>(?!<CLITIC>)                                     # y'|all
| <L><A>*(?:[.!?]<L><A>*)* <STOP>                               # a word; a forgotten space glues two: "people.They"
| [-+]?\d*(?:[.:,]\d+)+ | [-+]\d+ | \d<A>* <STOP>               # 3,000 5:30 .5 -5; 4x4, 3rd, 1950s
| [<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]] (?![A-Za-z0-9])           # a smiley :-)
| -+ | [?!]+ | \.{3,5} | '' | &(?i:amp|lt|gt|quot|nbsp|\#\d+);  # "-" and "!" are dropped below, "!!" is not
| @+ | \#+ | _+ | \*+ | << | >>
| [=/(){}\[\]<>+%&~^|\\¡-©¬®-º¼-¿„×÷†-‣‰-‸⁄€℀-⯿]                # symbols that stand alone
"""
_SPELLED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "¢": "cents", "£": "#",
            "¤": "$", "€": "$", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", " ": "\u00a0",
            "&amp;": "&", "&lt;": "<", "&gt;": ">"}
# Brackets survive: the official list says -LRB- but is compared with lower-cased text. "---" is "--" to Stanford.
_DROPPED = frozenset("'' ? ! - -- --- ---- ... .... ..... &quot; &nbsp;".split())
_LEXER = regex.compile(regex.sub("<([A-Z]+[0-9]?)>", lambda name: _PIECES[name[1]], _RULES), regex.VERBOSE)


def tokenize(caption):
    """Words of one caption: Stanford PTB, lower case, punctuation dropped.

    tokenize('The man\'s dog can\'t catch "it" (yet).')  ->  the man 's dog ca n't catch it -lrb- yet -rrb-"""
    tokens = []
    caption = regex.sub("[\ufe00-\ufe0f\u20dd-\u20e4]", " ", caption)     # how an emoji or a keycap is drawn: ❤️, 1️⃣
    caption = caption.replace("\u00ad", "").replace("&apos;", "'")       # U+00AD: the soft hyphen
    for token in _LEXER.findall(caption + "\n"):
        if token.isalpha():
            tokens.append(token.lower())                                          # nearly always
        elif token.lower() not in _DROPPED:
            for mark, spelled in () if token.isascii() and token.isalnum() else _SPELLED.items():
                token = token.replace(mark, spelled)
            curly = len(token) <= 3 and not token[-1].isdigit()  # ’s n’t become 's n't; o’clock stays
            tokens.append((regex.sub("[’`‘‛]", "'", token) if curly else token).lower())
    return tokens


def tidy(caption):
    """A caption as the scores above take it: its words, joined by single spaces."""
    return " ".join(tokenize(caption))
