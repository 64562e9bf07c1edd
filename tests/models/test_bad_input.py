"""Every wrong use is refused before the model runs: what came, what was expected, what to write."""

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import sinkscope as ss
from sinkscope.errors import (
    CheckpointError,
    InputError,
    LayerError,
    ModelError,
    NonFiniteError,
    ProbeError,
    SelectionError,
    SinkscopeError,
)
from sinkscope.models.patch_map import MEASURING
from sinkscope.testing import random_image, tiny_llava, write_checkpoint

IMAGE = random_image(40, 40, 0)


@dataclass
class World:
    """What the cases may use."""

    lvlm: ss.LVLM
    qwen: ss.LVLM
    sample: ss.models.Sample
    folder: Path
    model: Any = field(default=None)

    def prepare(self, images=IMAGE, text="what is it", **kwargs):
        return self.lvlm.prepare(images, text, **kwargs)

    def run(self, *probes, **kwargs):
        return self.lvlm.run(self.sample, list(probes), **kwargs)

    def inputs(self, **changes):
        return self.lvlm.prepare(inputs={**self.sample.inputs, **changes})

    def load(self, change, **options):
        """Load a copy of a good checkpoint after ``change(folder)``."""
        broken = self.folder.parent / "broken"
        shutil.copytree(self.folder, broken)
        change(broken)
        return ss.LVLM.from_pretrained(broken, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(*tiny_llava(), tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def world(tiny, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    lvlm, qwen = tiny("llava-clip-llama"), tiny("qwen2.5-vl")
    return World(lvlm, qwen, lvlm.prepare(images=IMAGE, text="what is it"), folder)


@pytest.fixture
def passes(tiny):
    """How many forward passes a test made."""
    made = []
    hooks = [
        tiny(family).module.register_forward_pre_hook(
            lambda module, _: None if id(module) in MEASURING else made.append(1)
        )
        for family in ("llava-clip-llama", "qwen2.5-vl")
    ]
    yield made
    for hook in hooks:
        hook.remove()


def having(probe, **fields):
    """A probe with wrong fields, as an untyped caller makes it: under pytest types are checked."""
    wrong = copy.copy(probe)
    for name, value in fields.items():
        object.__setattr__(wrong, name, value)
    return wrong


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(config))


def cut(folder, name, keep=0.5):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])


def own_code(folder, model_type="custom"):
    """A checkpoint with code of its own, which leaves a mark if it is ever run."""
    code = f"open({str(folder / 'ran')!r}, 'w').write('it ran')\n"
    for name in ("configuration_own.py", "modeling_own.py", "processing_own.py"):
        (folder / name).write_text(code)
    edit_config(
        folder,
        model_type=model_type,
        auto_map={
            "AutoConfig": "configuration_own.Config",
            "AutoModelForImageTextToText": "modeling_own.Model",
            "AutoProcessor": "processing_own.Processor",
        },
    )


def sharded(folder):
    model, _ = tiny_llava()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    return sorted(folder.glob("model-*.safetensors"))


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def changed(processor, **settings):
    """A processor with other settings; its parts are shared."""
    other = copy.copy(processor)
    for name, value in settings.items():
        setattr(other, name, value)
    return other


def without_pad(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = None
    return changed(processor, tokenizer=tokenizer)


def filmed(world, **more):
    """Inputs of an image, and of a video of four tokens behind it."""
    inputs = dict(world.qwen.prepare(IMAGE, "what").inputs)
    video = torch.full((1, 4), world.qwen.module.config.video_token_id)
    for name, part in (("input_ids", video), ("attention_mask", torch.ones_like(video))):
        inputs[name] = torch.cat([inputs[name], part], dim=1)
    return {**inputs, **more}


def text_only():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def mask(world, *shape, dtype=torch.bool):
    return torch.zeros(shape or tuple(world.sample.tokens.live.shape), dtype=dtype)


MASS = ss.AttentionMass({"image": "image"})


def per_layer(world):
    return mask(world, 1, 3, world.sample.tokens.live.shape[1])


# name -> (wrong use, error if it is another than its table's, what its message must say)
INPUTS = {
    "no image": (lambda w: w.prepare(images=None), "no image; expected at least one"),
    "empty list of images": (lambda w: w.prepare(images=[]), "no image"),
    "a row without image": (
        lambda w: w.prepare([[IMAGE], []], ["a", "b"]),
        "no image in row 1",
    ),
    "no text": (lambda w: w.prepare(text=None), "no text; expected a question"),
    "empty text": (lambda w: w.prepare(text=""), "no text"),
    "text of another type": (lambda w: w.prepare(text=5), "text of type int"),
    "texts of another type": (
        lambda w: w.prepare([IMAGE, IMAGE], ["a", b"b"]),
        "text of type bytes; expected a str",
    ),
    "fewer images than rows": (
        lambda w: w.prepare([IMAGE], ["a", "b"]),
        "1 image entries for 2 texts",
    ),
    "more image tokens than images": (
        lambda w: w.prepare(text="<image> and <image>", rendered=True),
        "2 '<image>' tokens and 1 images in row 0",
    ),
    "fewer image tokens than images": (
        lambda w: w.prepare([IMAGE, IMAGE], "<image> what", rendered=True),
        "1 '<image>' tokens and 2 images",
    ),
    "missing image path": (
        lambda w: w.prepare("nowhere.png"),
        "'nowhere.png', which is neither an existing file nor a URL",
    ),
    "a file that is no image": (
        lambda w: w.prepare(write(w.folder, "notes.png", "no pixels here")),
        "no readable image .*JPEG, PNG",
    ),
    "a truncated image": (
        lambda w: (
            IMAGE.resize((400, 400)).save(w.folder / "cut.png"),
            cut(w.folder, "cut.png"),
            w.prepare(w.folder / "cut.png"),
        ),
        "no readable image",
    ),
    "image of another type": (lambda w: w.prepare(3.5), "image of type float"),
    "an image the processor refuses": (
        lambda w: w.qwen.prepare(Image.new("RGB", (6000, 10)), "what"),
        r"images of \[\(6000, 10\)\] pixels .* aspect ratio",
    ),
    "inputs together with images": (
        lambda w: w.prepare(inputs={}),
        "inputs together with images or text",
    ),
    "images without a processor": (
        lambda w: ss.LVLM(w.lvlm.module, verify=False).prepare(IMAGE, "what"),
        "no processor; expected one",
    ),
    "a tokenizer for a processor": (
        lambda w: ss.LVLM(w.lvlm.module, w.lvlm.tokenizer),
        "as processor, which has no tokenizer; expected the model's whole processor",
    ),
    "a processor without patch size": (
        lambda w: ss.LVLM(w.lvlm.module, changed(w.lvlm.processor, patch_size=None)),
        "LlavaProcessor without patch_size; .*processor.patch_size = model.config.vision_config",
    ),
    "a processor without strategy": (
        lambda w: ss.LVLM(
            w.lvlm.module, changed(w.lvlm.processor, vision_feature_select_strategy=None)
        ),
        "without vision_feature_select_strategy",
    ),
    "a processor of another tower": (
        lambda w: ss.LVLM(w.lvlm.module, changed(w.lvlm.processor, num_additional_image_tokens=0)),
        r"Got \[15\] image tokens per row, .* its patch_size and num_additional_image_tokens",
    ),
    "rows without a pad token": (
        lambda w: ss.LVLM(w.lvlm.module, without_pad(w.lvlm.processor), verify=False).prepare(
            IMAGE, ["a", "b c"]
        ),
        "2 rows and a tokenizer without a pad token; .*pad_token = processor.tokenizer.eos_token",
    ),
    "a video beside an image": (
        lambda w: w.qwen.prepare(inputs=filmed(w, pixel_values_videos=torch.zeros(16, 1176))),
        r"Got 4 video tokens \(id 7\) and pixel_values_videos; expected still images.*Write the frames",
    ),
    "video tokens alone": (
        lambda w: w.qwen.prepare(inputs=filmed(w)),
        "Got 4 video tokens .* and no pixel_values_videos",
    ),
    "a video without an image": (
        lambda w: w.qwen.prepare(
            inputs=filmed(w, pixel_values=None, pixel_values_videos=torch.zeros(16, 1176))
        ),
        "Got 4 video tokens .*Write the frames as images",
    ),
    "a video in a question": (
        lambda w: w.qwen.prepare(IMAGE, "what is <|video_pad|>"),
        "'<.video_pad.>' inside of .*an image or a video",
    ),
    "inputs that are no dict": (
        lambda w: w.lvlm.prepare(inputs="what"),
        "inputs of type str; expected the processor's output",
    ),
    "inputs without pixels": (
        lambda w: w.lvlm.prepare(inputs={"input_ids": w.sample.inputs["input_ids"]}),
        r"missing \['pixel_values'\]",
    ),
    "inputs without ids": (
        lambda w: w.inputs(input_ids=None),
        r"missing \['input_ids'\]",
    ),
    "a mask that is added": (
        lambda w: w.inputs(attention_mask=w.sample.inputs["attention_mask"] * -10000.0),
        r"an attention_mask with the values \[-10000.0\]; expected 1 .* and 0",
    ),
    "a mask of packed texts": (
        lambda w: w.inputs(attention_mask=w.sample.inputs["attention_mask"].cumsum(1) // 20 + 1),
        r"an attention_mask with the values \[2\]; expected 1",
    ),
    "ids as lists": (
        lambda w: w.inputs(input_ids=w.sample.inputs["input_ids"].tolist()),
        "input_ids of type list; expected a tensor. Write return_tensors='pt'",
    ),
    "one row without batch": (
        lambda w: w.inputs(input_ids=w.sample.inputs["input_ids"][0]),
        r"expected a tensor \[batch pos\]. Write input_ids\[None\]",
    ),
    "mask of another length": (
        lambda w: w.inputs(attention_mask=torch.ones(1, 3)),
        r"attention_mask of shape \(1, 3\)",
    ),
    "a row of padding": (
        lambda w: w.inputs(attention_mask=torch.zeros_like(w.sample.inputs["input_ids"])),
        r"rows \[0\] with nothing but padding",
    ),
    "ids of another tokenizer": (
        lambda w: w.inputs(input_ids=w.sample.inputs["input_ids"] + 30000),
        "token id 3.*another model's processor",
    ),
    "truncated prompt": (
        lambda w: w.inputs(
            input_ids=w.sample.inputs["input_ids"][:, :9],
            attention_mask=w.sample.inputs["attention_mask"][:, :9],
        ),
        r"Got \[5\] image tokens per row, .*do not match.* Was the prompt truncated",
    ),
    "pixels of fewer images": (
        lambda w: w.lvlm.prepare(
            inputs={
                **w.prepare([IMAGE, IMAGE]).inputs,
                "pixel_values": w.sample.inputs["pixel_values"],
            }
        ),
        r"Got \[32\] image tokens per row, .*expected all that its own processor makes",
    ),
    "NaN pixels": (
        lambda w: w.inputs(pixel_values=w.sample.inputs["pixel_values"] * float("nan")),
        "NaN or infinite pixel_values",
    ),
    "infinite pixels": (
        lambda w: w.inputs(pixel_values=w.sample.inputs["pixel_values"] / 0),
        "NaN or infinite pixel_values",
    ),
    "pixels without grid": (
        lambda w: w.qwen.prepare(
            inputs={
                k: v
                for k, v in w.qwen.prepare(IMAGE, "what").inputs.items()
                if k != "image_grid_thw"
            }
        ),
        "pixel_values without image_grid_thw",
    ),
    "pixels of another rank": (
        lambda w: w.inputs(pixel_values=torch.zeros(4, 4)),
        r"does not take these inputs .*expected all that its own processor makes",
    ),
}
RUNS = {
    "no sample": (lambda w: w.lvlm.run("what"), "Got str as sample"),
    "images instead of a sample": (lambda w: w.lvlm.run(IMAGE, []), "lvlm.prepare"),
    "a sample of another model": (
        lambda w: w.qwen.run(w.sample),
        "a sample of a 'llava' model of another layout",
    ),
    "a single probe": (
        lambda w: w.lvlm.run(w.sample, MASS),
        ProbeError,
        r"one AttentionMass; expected a list of probes. Write probes=\[probe\]",
    ),
    "a class for a probe": (
        lambda w: w.run(ss.TokenNorms),
        ProbeError,
        r"the class TokenNorms .* Write TokenNorms\(...\)",
    ),
    "a name for a probe": (lambda w: w.run("mass"), ProbeError, "Got 'mass' among the probes"),
    "None for the probes": (lambda w: w.lvlm.run(w.sample, None), ProbeError, "probes=None"),
    "unknown logits": (
        lambda w: w.run(logits="foo"),
        ProbeError,
        "logits='foo'; expected one of .'all', 'last', None.",
    ),
    "unknown remote": (
        lambda w: w.run(remote="ndif"),
        "remote='ndif'; expected True for NDIF",
    ),
    "remote without a processor": (
        lambda w: ss.LVLM(w.lvlm.module, verify=False).run(w.sample, remote="local"),
        "remote=... for a model without a processor",
    ),
    "no new tokens": (
        lambda w: w.lvlm.generate(w.sample, max_new_tokens=0),
        "max_new_tokens=0; expected an int of at least 1",
    ),
    "new tokens that are no int": (
        lambda w: w.lvlm.generate(w.sample, max_new_tokens="many"),
        "max_new_tokens='many'",
    ),
    "beams": (
        lambda w: w.lvlm.generate(w.sample, num_beams=3),
        "num_beams=3; expected 1. Every decode step is probed with one query per row",
    ),
    "no cache": (
        lambda w: w.lvlm.generate(w.sample, use_cache=False),
        "use_cache=False; expected True",
    ),
    "inputs as options": (
        lambda w: w.lvlm.generate(w.sample, input_ids=w.sample.inputs["input_ids"]),
        r"\['input_ids'\] as options of generate",
    ),
    "padding on the right": (
        lambda w: w.lvlm.generate(
            w.inputs(
                **{
                    k: torch.nn.functional.pad(w.sample.inputs[k], (0, 2))
                    for k in ("input_ids", "attention_mask")
                }
            )
        ),
        "right-padded batch .*padding_side = 'left'",
    ),
    "a probe that did not run": (
        lambda w: ss.models.Run(torch.zeros(1), {MASS: None})[ss.TokenNorms()],
        ProbeError,
        r"TokenNorms, which did not run; expected one of this run's, \['AttentionMass'\]",
    ),
    "a result by name": (
        lambda w: ss.models.Run(torch.zeros(1), {})["AttentionMass"],
        ProbeError,
        "'AttentionMass', which did not run",
    ),
}
SELECTIONS = {
    "unknown selection": (
        lambda w: w.run(ss.AttentionMass({"a": "imgae"})),
        "'imgae'; expected one of .* Did you mean 'image'",
    ),
    "an image that is not there": (
        lambda w: w.run(ss.AttentionMass({"a": "image:1"})),
        "'image:1'.*Did you mean 'image:0'",
    ),
    "unknown vision selection": (
        lambda w: w.run(ss.AttentionMass({"a": "patches"}, tower="vision")),
        "'patches'.*Did you mean 'patch'",
    ),
    "a name that is empty here": (
        lambda w: w.qwen.run(w.qwen.prepare(IMAGE, "what"), [ss.AttentionPatterns("bos")]),
        "'bos' as queries or rows, which stands for no token .* write 'first'",
    ),
    "mask of another batch": (
        lambda w: w.run(ss.AttentionMass({"a": mask(w, 2, 5)})),
        r"mask of shape \(2, 5\).*belongs to the sample it was made from",
    ),
    "int mask": (
        lambda w: w.run(ss.AttentionMass({"a": mask(w, dtype=torch.long)})),
        r"dtype torch.int64.*mask\[row, index\] = True",
    ),
    "a set": (
        lambda w: w.run(ss.AttentionMass({"a": {0, 3}})),
        "selection of type set.*expected a name .* or a boolean tensor",
    ),
    "per-layer mask as queries": (
        lambda w: w.run(ss.AttentionMass({"a": "image"}, queries=per_layer(w))),
        ProbeError,
        r"per-layer mask of shape \(1, 3, \d+\) as queries .* Write mask.any\(dim=1\)",
    ),
    "no groups": (lambda w: w.run(ss.AttentionMass({})), ProbeError, "groups={}; expected a dict"),
    "groups that are no dict": (
        lambda w: w.run(having(ss.ContributionNorms({}), groups=["image"])),
        ProbeError,
        r"groups=\['image'\]; expected a dict",
    ),
    "a group without a name": (
        lambda w: w.run(having(MASS, groups={0: "image"})),
        ProbeError,
        r"group names \[0\]; expected strings",
    ),
    "unknown merge": (
        lambda w: w.sample.tokens.from_vision(torch.zeros(1, 17), merge="sum"),
        "merge='sum'; expected one of",
    ),
    "scores of other images": (
        lambda w: w.sample.tokens.from_vision(torch.zeros(2, 17)),
        r"scores of shape \(2, 17\); expected \(1, 17\)",
    ),
}
PROBES = {
    "negative layer": (
        lambda w: w.run(ss.TokenNorms(layers=[-1])),
        LayerError,
        "layer -1 .*never negative: write 2 for the last block",
    ),
    "layer beyond the last": (
        lambda w: w.run(ss.TokenNorms(layers=[3])),
        LayerError,
        "layer 3 in the language tower; expected 0 to 2",
    ),
    "layer that is no int": (
        lambda w: w.run(ss.TokenNorms(layers=1.0)),
        LayerError,
        r"layer 1.0 of type float.*Write layers=\[0, 1\]",
    ),
    "layer by name": (
        lambda w: w.run(ss.TokenNorms(layers="all")),
        LayerError,
        "'all' of type str.*layers=None for all",
    ),
    "True for a layer": (lambda w: w.run(ss.TokenNorms(layers=[True])), LayerError, "layer True"),
    "no layers": (lambda w: w.run(ss.TokenNorms(layers=[])), LayerError, "Got no layers"),
    "unknown tower": (
        lambda w: w.run(having(ss.TokenNorms(), tower="visual")),
        "tower='visual'; expected one of .'vision', 'language'.. Write tower='vision'",
    ),
    "unknown site": (
        lambda w: w.run(ss.TokenNorms(site="resid_mid")),
        "site='resid_mid'; expected one of",
    ),
    "the attention site for states": (
        lambda w: w.run(ss.MassiveActivations(site="attention")),
        "site='attention'",
    ),
    "a site of the wrong tower": (
        lambda w: ss.Site("projector", "resid_pre"),
        r"site 'resid_pre' in the projector tower; expected one of \('input', 'output'\)",
    ),
    "dimensions out of range": (
        lambda w: w.run(ss.SinkDimensionScores([1415])),
        "dimension 1415 in the language tower; expected 0 to 63. Sink dimensions belong to one",
    ),
    "no dimensions": (
        lambda w: w.run(ss.SinkDimensionScores([])),
        "no dimensions; expected at least one",
    ),
    "a bare dimension": (
        lambda w: w.run(having(ss.probes.ChannelValues([5]), channels=5)),
        r"dimensions 5; expected a list of channel indices. Write \[5\]",
    ),
    "unknown normalisation": (
        lambda w: w.run(ss.SinkDimensionScores([0], normalize="l2")),
        "normalize='l2'; expected one of .'rms', 'none'",
    ),
    "more channels than there are": (
        lambda w: w.run(ss.MassiveActivations(k=65)),
        "k=65; expected 1 to 64 channels",
    ),
    "no tokens of the lens": (
        lambda w: w.run(ss.LogitLens(k=0)),
        "k=0; expected 1 to 4.. tokens",
    ),
    "the lens on the vision tower": (
        lambda w: w.run(ss.LogitLens(tower="vision")),
        "vision tower has no LM head",
    ),
    "unknown precision": (
        lambda w: w.run(ss.AttentionMass({"a": "image"}, precision="fp32")),
        "precision='fp32'; expected one of .'model', 'float32'",
    ),
    "a group that was not asked for": (
        lambda w: w.run(MASS)[MASS].group("text"),
        r"group='text'; expected one of \('image',\)",
    ),
    "over a null that was not asked for": (
        lambda w: (lambda p: w.run(p)[p].excess())(ss.ReceivedAttention()),
        r"without the attention of other tokens .* Write ReceivedAttention\(others=True\)",
    ),
}
MODELS = {
    "a name as model": (
        lambda w: ss.LVLM("llava-hf/llava-1.5-7b-hf"),
        r"Got a str; .*ss.LVLM.from_pretrained\(name\)",
    ),
    "a layer": (
        lambda w: ss.LVLM(torch.nn.Linear(2, 2)),
        "Got a Linear; expected a transformers image-text-to-text model",
    ),
    "a model without head": (
        lambda w: ss.LVLM(w.lvlm.module.model),
        "LlavaModel without an LM head; expected the ...ForConditionalGeneration class",
    ),
    "iteration over a model": (
        lambda w: list(w.lvlm),
        r"Write lvlm.module.get_submodule\(path\) for the module at one of the paths of lvlm.anatomy",
    ),
}
CHECKPOINTS = {
    "a model as name": (
        lambda w: ss.LVLM.from_pretrained(w.lvlm.module),
        r"checkpoint of type Llava.*write ss.LVLM\(model, processor\)",
    ),
    "a folder that is not there": (
        lambda w: ss.LVLM.from_pretrained("./nowhere/at-all"),
        "'./nowhere/at-all', which is no folder",
    ),
    "a file": (
        lambda w: ss.LVLM.from_pretrained(w.folder / "config.json"),
        "which is no folder; expected the folder that save_pretrained",
    ),
    "no config": (
        lambda w: w.load(lambda f: (f / "config.json").unlink()),
        "holds no config.json",
    ),
    "broken config": (
        lambda w: w.load(lambda f: write(f, "config.json", '{"model_type": ')),
        "not a valid JSON file.*folder written by save_pretrained",
    ),
    "config of no model": (
        lambda w: w.load(lambda f: write(f, "config.json", "{}")),
        "Unrecognized model",
    ),
    "config of a wrong type": (
        lambda w: w.load(lambda f: edit_config(f, text_config__hidden_size="wide")),
        "hidden_size",
    ),
    "unknown model type": (
        lambda w: w.load(lambda f: edit_config(f, model_type="llawa")),
        "model type `llawa`",
    ),
    "the config of another family": (
        lambda w: w.load(lambda f: edit_config(f, model_type="llava_next_video")),
        "lacks 1 weights, such as .*image_newline",
    ),
    "truncated weights": (
        lambda w: w.load(lambda f: cut(f, "model.safetensors")),
        "SafetensorError.*damaged or cut off. Download it again",
    ),
    "empty weights": (
        lambda w: w.load(lambda f: cut(f, "model.safetensors", 0)),
        "damaged or cut off",
    ),
    "no weights": (
        lambda w: w.load(lambda f: (f / "model.safetensors").unlink()),
        "no file named model.safetensors",
    ),
    "a missing shard": (
        lambda w: w.load(lambda f: sharded(f)[1].unlink()),
        "No such file or directory: .*model-00002",
    ),
    "a broken index": (
        lambda w: w.load(lambda f: (sharded(f), cut(f, "model.safetensors.index.json"))),
        "JSONDecodeError",
    ),
    "weights of another size": (
        lambda w: w.load(lambda f: edit_config(f, text_config__intermediate_size=32)),
        "could not be loaded .RuntimeError",
    ),
    "weights of fewer layers": (
        lambda w: w.load(lambda f: edit_config(f, text_config__num_hidden_layers=4)),
        "lacks 9 weights, such as .*layers.3.*They would be random",
    ),
    "no tokenizer": (
        lambda w: w.load(lambda f: (f / "tokenizer.json").unlink()),
        "The processor of .* could not be loaded .*tokenizer files",
    ),
    "a broken tokenizer": (
        lambda w: w.load(lambda f: cut(f, "tokenizer.json")),
        "The processor of .*JSONDecodeError",
    ),
    "no processor": (
        lambda w: w.load(lambda f: (f / "processor_config.json").unlink()),
        "The processor of .* could not be loaded",
    ),
    "a broken processor": (
        lambda w: w.load(lambda f: cut(f, "processor_config.json")),
        "The processor of .*not a valid JSON",
    ),
    "code of its own": (
        lambda w: w.load(own_code),
        "holds its own code; .* write trust_remote_code=True",
    ),
    "unknown dtype": (
        lambda w: ss.LVLM.from_pretrained(w.folder, dtype="float7"),
        "dtype='float7'; expected 'auto'",
    ),
    "unknown kernel": (
        lambda w: ss.LVLM.from_pretrained(w.folder, attn_implementation="magic"),
        'attn_implementation="magic"',
    ),
    "a kernel that is not installed": (
        lambda w: ss.LVLM.from_pretrained(w.folder, attn_implementation="flash_attention_2"),
        "FlashAttention2 .*install it, or choose another attn_implementation",
    ),
    "unknown device": (
        lambda w: ss.LVLM.from_pretrained(w.folder, device_map="nonsense"),
        "device_map",
    ),
}
TABLES = (
    (InputError, INPUTS),
    (InputError, RUNS),
    (SelectionError, SELECTIONS),
    (ProbeError, PROBES),
    (ModelError, MODELS),
    (CheckpointError, CHECKPOINTS),
)
CASES = {
    name: (case[0], case[1] if len(case) == 3 else error, case[-1])
    for error, table in TABLES
    for name, case in table.items()
}
AFTER_A_PASS = {"a group that was not asked for", "over a null that was not asked for"}


@pytest.mark.parametrize("name", CASES)
def test_wrong_use_is_refused(world, passes, name):
    wrong_use, error, says = CASES[name]
    with pytest.raises(error, match=says) as caught:
        wrong_use(world)
    assert isinstance(caught.value, SinkscopeError)
    assert passes == [] or name in AFTER_A_PASS
    message = str(caught.value)
    assert any(word in message for word in ("expected", "Write", "write"))
    assert message.endswith((".", "?")), message


def test_there_are_enough_cases():
    assert len(CASES) >= 35


def test_nan_weights_are_noticed(tiny):
    """NaN in one weight of the decoder reaches every logit: the run says so."""
    module, processor = tiny_llava()
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(IMAGE, "what is it")
    module.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or infinite logits at .* live positions"):
        lvlm.run(sample)
    with pytest.raises(NonFiniteError, match="first in row 0"):
        lvlm.generate(sample, max_new_tokens=2)
    with pytest.raises(NonFiniteError, match="bfloat16 or float32"):
        ss.LVLM(module, processor)


def test_a_repository_without_network_fails_at_once(monkeypatch):
    import time

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    for remote in (False, True):
        with pytest.raises(
            CheckpointError, match=r"'nobody/nothing' could not be loaded .*hub repo"
        ):
            ss.LVLM.from_pretrained("nobody/nothing", remote=remote)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("model_type", ["custom", "llava"])
def test_code_in_a_checkpoint_never_runs_unasked(world, model_type, remote):
    """Neither of an unknown type, which is refused, nor beside a type transformers knows."""
    own_code(world.folder, model_type)
    if model_type == "custom":
        with pytest.raises(CheckpointError, match="trust_remote_code"):
            ss.LVLM.from_pretrained(world.folder, remote=remote)
    else:
        ss.LVLM.from_pretrained(world.folder, remote=remote)
    assert not (world.folder / "ran").exists()
    assert not list(world.folder.glob("**/__pycache__"))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("trust", ["False", "false", "no", "True", 1, 0, None, np.True_])
def test_code_in_a_checkpoint_is_not_trusted_by_a_text(world, trust, remote):
    """``bool("False")`` is True: only True and False are taken, whatever would count as one of them."""
    own_code(world.folder)
    with pytest.raises(InputError, match=f"trust_remote_code={trust!r}; expected True or False"):
        ss.LVLM.from_pretrained(world.folder, trust_remote_code=trust, remote=remote)
    assert not (world.folder / "ran").exists()


def test_code_in_a_checkpoint_runs_if_trusted(world):
    """The mark of `own_code` does appear when the code runs, so the test above can fail."""
    own_code(world.folder)
    with pytest.raises(CheckpointError):
        ss.LVLM.from_pretrained(world.folder, trust_remote_code=True)
    assert (world.folder / "ran").exists()


def test_one_row_needs_no_pad_token(world):
    lvlm = ss.LVLM(world.lvlm.module, without_pad(world.lvlm.processor))
    for name, value in lvlm.prepare(IMAGE, "what is it").inputs.items():
        assert torch.equal(value, world.sample.inputs[name])
