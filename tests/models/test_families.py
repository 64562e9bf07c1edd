"""A dozen families without a word about them: everything that is claimed is right, on several shapes of images.

`scripts/support_table.py` studies all types in this way.
"""

import pytest
from tiny_families import build, inputs_of

import sinkscope as ss

DOZEN = (
    "qwen3_vl",  # DeepStack
    "qwen3_5",  # linear attention, output gates
    "paddleocr_vl",  # raster order, merged
    "llava_next",  # tiles and newlines
    "llava_onevision",  # tiles of one grid
    "idefics3",  # tiles, pixel shuffle
    "internvl",  # CLS dropped, pixel shuffle
    "gemma4",  # several norms, soft-cap, head sizes
    "lfm2_vl",  # padded patches, convolution blocks
    "mistral3",  # several images in one sequence
    "granite_docling",  # logit scale
    "mllama",  # cross-attention
)
NO_MAP = ("mllama",)


@pytest.mark.parametrize("name", DOZEN)
def test_what_is_claimed_of_a_family_is_right(name):
    model = build(name)
    lvlm, seen = ss.LVLM(model), 0
    for shape in (0, 1, 2):
        inputs = inputs_of(name, model, shape)
        if inputs is None:
            continue
        seen += 1
        check = ss.testing.check_model(lvlm, lvlm.prepare(inputs=inputs))
        assert check.wrong == (), f"shape {shape}: {check}"
        assert check.status("mass") == "exact"
        assert check.status("generation") == "exact"
        assert check.status("map") == ("no" if name in NO_MAP else "exact")
    assert seen
    assert lvlm.anatomy.measured
