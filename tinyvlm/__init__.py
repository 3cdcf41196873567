"""tinyvlm: ways to make a machine talk about pictures, hand-written in plain PyTorch. Start at README.md."""
