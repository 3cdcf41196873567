"""Makes reference_resnet.npz: a tiny random ResNet as the transformers library computes it. Not run by the tests.

    python tests/make_reference_cnn.py          # needs transformers; made with version 4.57.1
"""
from pathlib import Path

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification

if __name__ == "__main__":
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(
        embedding_size=2, hidden_sizes=[8, 16, 32], depths=[1, 2, 2], layer_type="bottleneck", num_labels=5)).eval()
    for name, tensor in model.state_dict().items():         # random statistics: the initial 0 and 1 would hide mistakes
        if name.endswith(("running_var", "normalization.weight")):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "normalization.bias")):
            tensor.normal_(std=0.5)
    img = torch.randn(2, 3, 45, 64)                         # an odd height: padding at the border counts
    with torch.no_grad():
        body = model.resnet(img)
        answers = {"img": img, "grid": body.last_hidden_state.flatten(2).transpose(1, 2),
                   "feats": body.pooler_output.flatten(1), "logits": model(img).logits}
    weights = {f"weights/{name}": t for name, t in model.state_dict().items() if "num_batches_tracked" not in name}
    arrays = {name: tensor.numpy() for name, tensor in {**answers, **weights}.items()}
    np.savez_compressed(Path(__file__).with_name("reference_resnet.npz"), **arrays)
