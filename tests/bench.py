"""How fast, always as a ratio: two ways of doing the same thing, in turn, in one process. Absolute times only explain.

    python tests/bench.py tokenizer --captions F     training and encoding, beside the Rust `tokenizers` library
    python tests/bench.py decode                     ViT-B/16 + GPT-2 captioning beside transformers, and uncached
    python tests/bench.py train                      one training step of the same pair
    python tests/bench.py weights                    opening safetensors files beside the public library
    python tests/bench.py lstm                       a training step beside torch.nn.LSTM, and word by word
    python tests/bench.py parity                     not speed: full-size models beside transformers, same weights

The peers (transformers, tokenizers, safetensors) are no part of this project: install them to compare, or read our side
alone. All weights are random; speed does not depend on them. Pairs alternate, and the median of the ratios is quoted,
so that a machine whose speed drifts slows both sides alike.
"""
import importlib.util
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyvlm.clip import similarities
from tinyvlm.config import UserError, option, parse_config, run_script
from tinyvlm.generate import generate
from tinyvlm.gpt import IGNORE
from tinyvlm.layouts import read_captions
from tinyvlm.lstm import LSTM, plain_loop
from tinyvlm.export import export_vit_gpt2
from tinyvlm.pretrained import load_clip, load_gpt2, load_resnet50, load_vit, load_vit_gpt2
from tinyvlm.tokenizer import BPETokenizer
from tinyvlm.vit import ViTConfig
from tinyvlm.vlm import LSTMConfig, VLMConfig, build
from tinyvlm.weights import load_safetensors, save_safetensors


@dataclass
class BenchConfig:
    """Options of a benchmark."""
    pairs: int = option(5, "how many times each side runs, after one warm-up", above=0)
    threads: int = option(2, "processor threads of torch", above=0)
    captions: str | None = option(None, "tokenizer: a caption file, such as Flickr8k's captions.txt")
    dtype: str = option("float32", "decode, train: number format on cuda", ("float32", "bfloat16"))
    device: str = option("cpu", "decode, train: cpu or cuda")
    compile: bool = option(False, "decode, train: torch.compile both sides' forward pass")


def seconds(work, device="cpu"):
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(label, ours, theirs, config, peer):
    """Run both in turn; print the median of theirs / ours (above 1: we are faster) and the medians themselves."""
    times = []
    for k in range(config.pairs + 1):
        a = seconds(ours, config.device)
        b = seconds(theirs, config.device) if theirs else float("nan")
        times += [(a, b)] if k else []                          # the first pair warms up
    a, b = (statistics.median(t) for t in zip(*times))
    ratio = statistics.median(y / x for x, y in times)
    spread = sorted(y / x for x, y in times)
    beside = f"{peer} {1000 * b:.0f} ms, ratio {ratio:.2f} ({spread[0]:.2f} to {spread[-1]:.2f})" if theirs else ""
    print(f"{label}: ours {1000 * a:.0f} ms  {beside}", flush=True)
    return a


def have(package):
    """Is the peer installed? If not, say so once."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"({package} is not installed: our side only)")
    return found


def tokenizer(config):
    """Training 8,192 entries, and one encode() call per caption, on one core."""
    if not config.captions:
        raise UserError("tests/bench.py tokenizer needs --captions FILE, for example Flickr8k's captions.txt")
    texts = [c for group in read_captions(Path(config.captions))[0].values() for c in group]
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    ours, peer = BPETokenizer.train(texts, 8192), None
    if have("tokenizers"):
        import tokenizers
        with tempfile.TemporaryDirectory() as folder:
            ours.save(Path(folder) / "tokenizer.json")
            peer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    def fresh():
        ours._cached_ids.cache_clear()                          # every run pays for filling its cache of words
        return [ours.encode(t) for t in texts]

    def peer_train():
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
            vocab_size=8192, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    compare("train 8,192 entries", lambda: BPETokenizer.train(texts, 8192), peer and peer_train, config, "tokenizers")
    a = compare("encode, a call per caption", fresh, peer and (lambda: [peer.encode(t).ids for t in texts]), config,
                "tokenizers")
    print(f"    {len(texts)} captions, {megabytes:.2f} MB: {megabytes / a:.1f} MB/s")


def captioner(config):
    """ViT-B/16 + GPT-2 small with random weights, ours and (if installed) the same weights in transformers."""
    torch.manual_seed(0)
    model = build(VLMConfig(vision=ViTConfig(eps=1e-12))).eval()
    torch.nn.init.normal_(model.text.wte.weight, std=0.2)       # distinct words, so that greedy does not repeat one
    peer = None
    if have("transformers"):
        import transformers
        with tempfile.TemporaryDirectory() as folder:
            export_vit_gpt2(model, folder)
            peer = transformers.VisionEncoderDecoderModel.from_pretrained(folder).eval().to(config.device)
    return model.to(config.device), peer


def decode(config):
    """Greedy 24 tokens for one image; beam 3 over 8 images; and what the key/value cache is worth."""
    model, peer = captioner(config)
    img = torch.randn(8, 3, 224, 224, device=config.device)
    start, end = 50256, -1                                      # an end that never comes: always the full length

    def ours(n, beams):
        return lambda: generate(model, img[:n], [[start]] * n, 24, num_beams=beams, eos_id=end)

    def theirs(n, beams):
        return lambda: peer.generate(img[:n], max_new_tokens=24, min_new_tokens=24, num_beams=beams, do_sample=False,
                                     decoder_start_token_id=start, pad_token_id=start)
    for label, n, beams in (("greedy, 1 image, 24 tokens", 1, 1), ("3 beams, 8 images, 24 tokens", 8, 3)):
        compare(label, ours(n, beams), peer and theirs(n, beams), config, "transformers")

    @torch.inference_mode()
    def uncached():
        idx = torch.full((1, 1), start, device=config.device)
        for _ in range(24):
            idx = torch.cat([idx, model(img[:1], idx)[0][:, -1:].argmax(-1)], dim=1)
    compare("greedy, 1 image, cached / uncached", ours(1, 1), uncached, config, "uncached")


def train(config):
    """A training step, batch 4, 32 tokens: forward, backward, no optimizer on either side."""
    model, peer = captioner(config)
    img = torch.randn(4, 3, 224, 224, device=config.device)
    row = torch.randint(0, 50256, (4, 33), device=config.device)
    autocast = torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")
    fast, quick = (torch.compile(m) if config.compile else m for m in (model, peer))

    def ours():
        with autocast:
            loss = fast(img, row[:, :-1], row[:, 1:])[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    def theirs():
        with autocast:
            loss = quick(pixel_values=img, decoder_input_ids=row[:, :-1], labels=row[:, 1:]).loss
        loss.backward()
        peer.zero_grad(set_to_none=True)
    compare("training step, batch 4, 32 tokens", ours, peer and theirs, config, "transformers")


PROBE = """
import re, sys, time
def peak():
    try:
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    except OSError:                 # not Linux
        return 0
sys.path.insert(0, {root!r})
if {ours}:
    from tinyvlm.weights import load_safetensors as load
else:
    from safetensors.torch import load_file as load
import torch
before, start = peak(), time.perf_counter()
tensors = load({path!r})
opened = time.perf_counter() - start
total = sum(float(t.sum()) for t in tensors.values())
print(opened, time.perf_counter() - start, peak() - before)
"""


def weights(config):
    """Open files of gpt2's and of ViT + GPT-2's size and read every number, each time in a new process."""
    public = have("safetensors")
    for tensors in (137, 239):
        weights_of(tensors, public, config)


def weights_of(n_tensors, public, config):
    """One file of n_tensors tensors of 4 MB: seconds and memory, ours and the public library's."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_safetensors({f"t{k}": torch.randn(1_000_000 + k) for k in range(n_tensors)}, path)
        rows = {True: [], False: []}
        for _ in range(config.pairs):
            for ours in (True, False)[:1 + public]:
                code = PROBE.format(root=str(Path(__file__).resolve().parent.parent), path=path, ours=ours)
                out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
                rows[ours].append([float(x) for x in out.split()])
        assert len(load_safetensors(path)) == n_tensors
    for ours, name in ((True, "ours"), (False, "safetensors"))[:1 + public]:
        opened, read, memory = (statistics.median(column) for column in zip(*rows[ours]))
        print(f"{4 * n_tensors} MB, {name}: opened in {1000 * opened:.1f} ms, all read after {1000 * read:.0f} ms, "
              f"peak memory + {memory / 1000:.0f} MB")
    if public:
        for k, what in enumerate(("open", "open and read all")):
            ratio = statistics.median(b[k] / a[k] for a, b in zip(rows[True], rows[False]))
            print(f"{what}: safetensors / ours {ratio:.2f}")


def lstm(config):
    """A training step of one layer at batch 64, 20 steps: ours by hand beside torch.nn.LSTM and our plain loop."""
    for size in (256, 512):
        ours, theirs = LSTM(size, size), torch.nn.LSTM(size, size, batch_first=True)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(64, 20, size, requires_grad=True)
        for name, other in (("torch.nn.LSTM", theirs), ("plain loop", lambda x: ours(x, None, plain_loop))):
            compare(f"LSTM {size}", lambda: ours(x)[0].sum().backward(), lambda: other(x)[0].sum().backward(), config,
                    name)
    prefixes(config)


def prefixes(config):
    """All words of a caption in one pass, beside the tutorials' way: each of its beginnings is a sample of its own."""
    model = build(VLMConfig("lstm", None, LSTMConfig(2500, n_embd=256, n_hidden=512), feat_dim=1280))
    img, idx = torch.randn(64, 1280), torch.randint(0, 2500, (64, 14))
    idx, targets = idx[:, :-1], idx[:, 1:]                                        # (64, 13)

    def one_pass():
        model(img, idx, targets)[1].backward()

    def word_by_word():
        for t in range(1, idx.size(1) + 1):
            last = torch.full_like(targets[:, :t], IGNORE)
            last[:, -1] = targets[:, t - 1]
            (model(img, idx[:, :t], last)[1] / idx.size(1)).backward()
    a = compare("64 captions of 13 words, a training step", one_pass, word_by_word, config, "word by word")
    print(f"    {targets.numel() / a:.0f} words a second in one pass")


def parity(config):
    """Full-size models with random weights, written by transformers, read by us: the worst difference of any output."""
    if not have("transformers"):
        raise UserError("tests/bench.py parity needs a peer to be equal to: pip install transformers")
    import transformers as hf
    torch.manual_seed(0)
    img, idx = torch.randn(2, 3, 224, 224), torch.randint(0, 40000, (2, 32))
    idx[:, -1] = 49407                                          # CLIP's end token, where a text is read
    clip = hf.CLIPConfig()
    vision_encoder_decoder = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(), hf.GPT2Config(
        is_decoder=True, add_cross_attention=True, decoder_start_token_id=50256))
    for name, make, load, theirs, ours in (
            ("GPT-2", lambda: hf.GPT2LMHeadModel(hf.GPT2Config()), load_gpt2,
             lambda m: m(idx).logits, lambda m: m(idx)[0]),
            ("ViT-B/16", lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)), load_vit,
             lambda m: m(img).logits, lambda m: m.classify(img)),
            ("CLIP ViT-B/32", lambda: hf.CLIPModel(clip), load_clip,
             lambda m: m(input_ids=idx, pixel_values=img).logits_per_image,
             lambda m: similarities(m.encode_image(img), m.encode_text(idx), m.logit_scale)),
            ("ResNet-50", lambda: hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)), load_resnet50,
             lambda m: m(img).logits, lambda m: m.classify(img)),
            ("ViT + GPT-2", lambda: hf.VisionEncoderDecoderModel(vision_encoder_decoder), load_vit_gpt2,
             lambda m: m(pixel_values=img, decoder_input_ids=idx).logits, lambda m: m(img, idx)[0])):
        peer = make().eval()
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            peer.save_pretrained(folder)
            start = time.perf_counter()
            model = load(folder)
            opened = time.perf_counter() - start
            a, b = theirs(peer), ours(model)
        n = sum(p.numel() for p in model.parameters())
        print(f"{name}: {n:,} parameters, worst difference {(a - b).abs().max().item():.1e} of outputs up to "
              f"{a.abs().max().item():.2f}; opened in {opened:.1f} s", flush=True)


BENCHES = {f.__name__: f for f in (tokenizer, decode, train, weights, lstm, parity)}


def main():
    """bench.py NAME [options]"""
    name = sys.argv[1] if len(sys.argv) > 1 else "-h"
    if name not in BENCHES and name not in ("-h", "--help"):
        raise UserError(f"there is no benchmark {name!r}; choose one of {', '.join(BENCHES)}")
    about = f"python tests/bench.py NAME [options], NAME one of {', '.join(BENCHES)}. " + __doc__.split("\n")[0]
    config = parse_config(BenchConfig, sys.argv[2:] if name in BENCHES else ["-h"], description=about)
    torch.set_num_threads(config.threads)
    print(f"{name}: {config.pairs} pairs, torch {torch.__version__}, {config.threads} threads, {config.device}")
    BENCHES[name](config)
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    run_script(main)
