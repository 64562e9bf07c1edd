"""The paper (Choi et al., 2604.03316) on a real model, with the ViT's CLS in the place of V-sinks."""
