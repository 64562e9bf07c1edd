"""What is loaded from a folder is bitwise what was saved there, for every family."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

import sinkscope as ss
from sinkscope.cli.recipes import read_recipe
from sinkscope.errors import CheckpointError
from sinkscope.models import loading
from sinkscope.models.loading import ImageQwen2_5_VLProcessor
from sinkscope.testing import TINY, random_image, write_checkpoint

FAMILIES = tuple(TINY)
PROBES = [
    ss.AttentionMass({"image": "image"}),
    ss.AttentionMass({"patch": "patch"}, tower="vision"),
    ss.ReceivedAttention(),
    ss.TokenNorms(tower="vision"),
    ss.LogitLens(),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders[family]``: a checkpoint of the family, written once."""
    where = tmp_path_factory.mktemp("checkpoints")
    return {family: write_checkpoint(*TINY[family](), where / family) for family in FAMILIES}


def same(one, other):
    """All tensors of two results are bitwise the same."""
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), getattr(other, name).nan_to_num()), name


@pytest.mark.parametrize(
    ("family", "remote"),
    [
        *((family, False) for family in FAMILIES),
        *((f, "local") for f in ("llava-clip-llama", "qwen2.5-vl")),
    ],
)
def test_a_loaded_model_is_bitwise_the_one_in_memory(tiny, batch, folders, family, remote):
    here, loaded = tiny(family), ss.LVLM.from_pretrained(folders[family], remote=remote)
    assert loaded.verified
    assert not loaded.module.training
    assert loaded.name == str(folders[family])
    assert loaded.anatomy == here.anatomy
    ours, theirs = batch(here), batch(loaded)
    for name in ours.inputs:
        assert torch.equal(ours.inputs[name], theirs.inputs[name]), name
    one = here.run(ours, probes=PROBES, logits="all")
    other = loaded.run(theirs, probes=PROBES, logits="all")
    assert torch.equal(one.logits, other.logits)
    for probe in PROBES:
        same(one[probe], other[probe])
    first = here.generate(ours, max_new_tokens=3)
    assert torch.equal(first.sequences, loaded.generate(theirs, max_new_tokens=3).sequences)


def test_a_model_without_weights_has_its_generation_config(tmp_path):
    """Where an answer ends on the server is known here."""
    model, processor = TINY["llava-clip-llama"]()
    model.generation_config.update(eos_token_id=[2, 7], do_sample=True)
    folder = write_checkpoint(model, processor, tmp_path / "model")
    config = ss.LVLM.from_pretrained(folder, remote=True).module.generation_config
    assert (config.eos_token_id, config.do_sample) == ([2, 7], True)
    (folder / "generation_config.json").unlink()
    ss.LVLM.from_pretrained(folder, remote=True)


def test_a_remote_default_is_remembered(folders):
    """Remote runs keep the last logits only, unless asked; the model knows that it is remote."""
    lvlm = ss.LVLM.from_pretrained(folders["llava-clip-llama"], remote="local")
    sample = lvlm.prepare(images=random_image(), text="what")
    assert lvlm.run(sample).logits.shape[1] == 1
    assert lvlm.run(sample, remote=False).logits.shape[1] == sample.tokens.ids.shape[1]


@pytest.mark.parametrize("name", [str, lambda folder: folder])
def test_names_may_be_paths(folders, name):
    assert ss.LVLM.from_pretrained(name(folders["llava-clip-llama"])).verified


def test_home_is_expanded(folders, monkeypatch):
    folder = folders["llava-clip-llama"]
    monkeypatch.setenv("HOME", str(folder.parent))
    assert ss.LVLM.from_pretrained(f"~/{folder.name}").name == f"~/{folder.name}"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_respected(folders, dtype):
    lvlm = ss.LVLM.from_pretrained(folders["qwen2.5-vl"], dtype=dtype)
    assert lvlm.module.dtype == torch.bfloat16


def test_dtype_auto_is_what_was_saved(tmp_path):
    folder = write_checkpoint(*TINY["llava-clip-llama"](dtype=torch.bfloat16), tmp_path)
    assert ss.LVLM.from_pretrained(folder).module.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_implementation_is_respected(folders, family, kernel):
    lvlm = ss.LVLM.from_pretrained(folders[family], attn_implementation=kernel)
    assert (lvlm.anatomy.vision.kernel, lvlm.anatomy.language.kernel) == (kernel, kernel)


def test_device_map_is_respected(folders, monkeypatch):
    pytest.importorskip("accelerate")
    passed, real = {}, transformers.AutoModelForImageTextToText.from_pretrained

    def spy(name, **options):
        passed.update(options)
        return real(name, **options)

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", spy)
    lvlm = ss.LVLM.from_pretrained(folders["llava-clip-llama"], device_map="cpu")
    assert lvlm.device == torch.device("cpu")
    assert passed["device_map"] == "cpu"


@dataclass
class EightBits(QuantizationConfigMixin):
    """A quantisation that needs no package: what `EightBitQuantizer` reads."""

    quant_method: str = "eight-bits"
    levels: int = 127


class EightBitQuantizer(HfQuantizer):
    """Rounds the weights of the decoder's linear maps, row by row, as 8-bit formats do."""

    is_serializable = is_trainable = False

    def _process_model_after_weight_loading(self, model, **kwargs):
        for layer in model.get_decoder().layers:
            for linear in (part for part in layer.modules() if isinstance(part, torch.nn.Linear)):
                step = linear.weight.abs().amax(1, keepdim=True) / self.quantization_config.levels
                linear.weight.data = (linear.weight / step).round() * step
        return model


@pytest.mark.parametrize(
    "given", [EightBits(levels=7), {"quant_method": "eight-bits", "levels": 7}]
)
def test_quantisation_is_respected(folders, monkeypatch, given):
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "eight-bits", EightBits)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "eight-bits", EightBitQuantizer)
    folder = folders["llava-clip-llama"]
    lvlm = ss.LVLM.from_pretrained(folder, quantization_config=given)
    loader = transformers.AutoModelForImageTextToText
    theirs = loader.from_pretrained(folder, quantization_config=given)
    plain = ss.LVLM.from_pretrained(folder)
    sample = plain.prepare(images=random_image(), text="what")
    with torch.no_grad():
        want = theirs(**sample.inputs).logits
    torch.testing.assert_close(lvlm.run(sample).logits, want, rtol=0, atol=0)
    assert (want - plain.run(sample).logits).abs().max() > 1e-3
    flags = {"model": {"name": str(folder), "quantization_config": given}, "data": "scenes"}
    recipe = read_recipe("sweep", None, flags, ss.sweep)
    torch.testing.assert_close(recipe.load().run(sample).logits, want, rtol=0, atol=0)
    assert recipe.load(weights=False).device.type == "meta"
    with pytest.raises(
        CheckpointError, match="Got a quantization_config for a model without weights"
    ):
        ss.LVLM.from_pretrained(folder, quantization_config=given, remote=True)


def test_a_quantiser_that_is_not_installed_is_named(folders):
    with pytest.raises(CheckpointError, match=r"optimum-quanto.*install it, or choose another"):
        ss.LVLM.from_pretrained(
            folders["llava-clip-llama"],
            quantization_config=transformers.QuantoConfig(),
        )


def test_shards_are_put_together(tiny, tmp_path):
    model, processor = TINY["llava-clip-llama"]()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sample = tiny("llava-clip-llama").prepare(images=random_image(), text="what")
    want = tiny("llava-clip-llama").run(sample).logits
    assert torch.equal(ss.LVLM.from_pretrained(tmp_path).run(sample).logits, want)


@pytest.mark.parametrize("layout", ["new", "old"])
def test_qwen_loads_without_torchvision(folders, tmp_path, layout):
    """Its AutoProcessor needs torchvision for videos; images need none. Old folders, too.

    The hub's folders have ``preprocessor_config.json`` and keep the template with the tokenizer.
    """
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2.5-vl"], folder)
    if layout == "old":
        settings = json.loads((folder / "processor_config.json").read_text())
        (folder / "processor_config.json").unlink()
        images = settings["image_processor"] | {"processor_class": "Qwen2_5_VLProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        template = folder / "chat_template.jinja"
        tokenizer["chat_template"] = template.read_text()
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        template.unlink()
    lvlm = ss.LVLM.from_pretrained(folder)
    assert isinstance(lvlm.processor, ImageQwen2_5_VLProcessor)
    sample = lvlm.prepare(images=random_image(112, 84), text="what")
    assert sample.texts[0].startswith("<|im_start|>system")
    assert sample.tokens.vision.grid.tolist() == [[6, 8]]


def test_the_processor_of_images_refuses_videos(tiny):
    processor = tiny("qwen2.5-vl").processor
    with pytest.raises(ValueError, match="takes images and text, but videos came"):
        processor(text=["what"], videos=[object()])


def test_a_missing_package_is_named(folders, monkeypatch):
    """Where the family has no processor without that package, the import error is passed on."""

    def needs_a_package(*args, **kwargs):
        raise ImportError("SomeProcessor requires the sausage library")

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", needs_a_package)
    with pytest.raises(
        CheckpointError, match=r"could not be loaded .*requires the sausage library"
    ):
        ss.LVLM.from_pretrained(folders["llava-clip-llama"])


def test_a_tokenizer_is_no_processor(folders, monkeypatch):
    """AutoProcessor gives the tokenizer alone where it finds no processor; that is not enough."""
    tokenizer = TINY["llava-clip-llama"]()[1].tokenizer
    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", lambda *a, **k: tokenizer)
    with pytest.raises(CheckpointError, match=r"without \['tokenizer', 'image_processor'\]"):
        loading.read_processor(str(folders["llava-clip-llama"]), {})


def test_models_without_processor_are_verified_on_made_inputs_and_take_ready_ones(tiny, batch):
    """The prepared inputs of another LVLM of the same layout work."""
    full = tiny("llava-clip-llama")
    bare = ss.LVLM(full.module)
    assert bare.verified
    assert bare.anatomy == full.anatomy
    sample = batch(full)
    ready = bare.prepare(inputs=sample.inputs)
    assert torch.equal(bare.run(ready).logits, full.run(sample).logits)
    assert bare.generate(ready, max_new_tokens=2).text is None
    assert not ss.LVLM(full.module, full.processor, verify=False).verified
