"""A sweep for a process of its own, which imports nothing else, to be killed."""

import warnings

import sinkscope as ss
from sinkscope.testing import random_image, tiny_llava

warnings.filterwarnings("ignore")


def questions():
    texts = [("what is it", "red", "what"), ("how many shapes are there ?", "3", "count")]
    return [
        {"image": random_image(seed=i), "question": q, "answer": a, "task": t, "image_id": i}
        for i in range(24)
        for q, a, t in texts
    ]


def run(folder):
    lvlm = ss.LVLM(*tiny_llava())
    detector = ss.detectors.Norm("3sigma")
    return ss.sweep(lvlm, questions(), v_detector=detector, out=folder, progress=False)
