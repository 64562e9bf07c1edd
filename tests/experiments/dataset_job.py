"""A trace of a data set for a process of its own, to be killed."""

import warnings

import sinkscope as ss
from sinkscope.testing import random_image, tiny_llava

warnings.filterwarnings("ignore")
V, L = ss.detectors.ZScore(1.5), ss.detectors.ZScore(1.3)


def records(many=24):
    asked = ("what is it", "how many red shapes are there , and where ?")
    for i in range(many):
        yield {"image": random_image(48 + 4 * i, 60, i), "question": asked[i % 2], "image_id": i}


def run(folder):
    lvlm = ss.LVLM(*tiny_llava())
    return ss.trace_dataset(
        lvlm, records(), folder, v_detector=V, l_detector=L, part=2, progress=False
    )
