"""A tiny LLaVA whose projector keeps CLS, as DINOv2 towers are used."""

import torch

import sinkscope as ss
from sinkscope.testing import random_image, tiny_llava


def plain_keeping_cls(attn_implementation="sdpa"):
    """The model and its processor; CLS is the first of 17 image tokens."""
    model, processor = tiny_llava("clip", attn_implementation=attn_implementation)
    model.config.vision_feature_select_strategy = "full"
    processor.vision_feature_select_strategy = "full"
    return model, processor


def keeping_cls():
    return ss.LVLM(*plain_keeping_cls())


def cls_of(sample):
    """The first image token of every image, ``[batch pos]``: found in the ids alone."""
    (token,) = sample.tokens.ids[sample.tokens.image >= 0].unique().tolist()
    out = torch.zeros(sample.tokens.ids.shape, dtype=torch.bool)
    for row, ids in enumerate(sample.tokens.ids.tolist()):
        places = [at for at, one in enumerate(ids) if one == token]
        out[row, places[::17]] = True
    return out


def drawing_cls(mark=7, pull=20.0):
    """`keeping_cls` whose feeding block looks at CLS, and at little else.

    CLS is large in one channel, and one head has keys of that channel and a query that is the same
    everywhere; the other heads look around evenly.

    Returns:
        The LVLM; the least share of attention that CLS gets in its best head over some images; and
        the largest that a patch gets in any head. Both as the eager kernel gives them.
    """
    model, processor = plain_keeping_cls("eager")
    pixels = processor.image_processor(
        [random_image(64, 64, i) for i in range(24)], return_tensors="pt"
    )["pixel_values"]
    tower = model.model.vision_tower
    attention = next(m for n, m in tower.named_modules() if n.endswith("layers.1.self_attn"))
    embedding = next(p for n, p in tower.named_parameters() if n.endswith("class_embedding"))
    with torch.no_grad():
        embedding[mark] += 30.0
        attention.q_proj.weight *= 0.1
        attention.q_proj.bias.zero_()
        attention.q_proj.bias[0] = pull
        attention.k_proj.weight[:12] = 0.0
        attention.k_proj.weight[0, mark] = 1.0
        seen = tower(pixels, output_attentions=True).attentions[1].mean(dim=2)  # over queries
    share = seen[..., 0].amax(dim=1).min()
    return ss.LVLM(model, processor), float(share), float(seen[..., 1:].max())
