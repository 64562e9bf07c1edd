"""Quantised linear maps: stand-ins, and those of bitsandbytes and torchao where these are installed."""

import torch
from torch import nn


class Linear8(nn.Linear):
    """As bitsandbytes and its like keep a linear map: int8, one scale per row."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(whole, requires_grad=False), linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Rounds8(Linear8):
    """As LLM.int8: it rounds what it reads to 8 bits too, a row at a time."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return super().forward((x / scale).round() * scale)


def replaced(module, make):
    """The decoder's linear maps of 64 channels, made anew."""
    decoder = module.model.language_model
    for path, part in list(decoder.named_modules()):
        if isinstance(part, nn.Linear) and part.in_features == 64:
            owner, _, name = path.rpartition(".")
            setattr(decoder.get_submodule(owner), name, make(part))
    return module


def in_8_bit(part):
    from bitsandbytes.nn import Linear8bitLt

    made = Linear8bitLt(64, part.out_features, part.bias is not None, has_fp16_weights=False)
    made.load_state_dict(part.state_dict())
    return made.to("cpu")


def in_4_bit(part):
    from bitsandbytes.nn import Linear4bit

    how = {"quant_type": "nf4", "compute_dtype": torch.float32}
    made = Linear4bit(64, part.out_features, part.bias is not None, **how)
    made.load_state_dict(part.state_dict())
    return made.to("cpu")


def packs():
    """Whether this CPU has the kernel for 4-bit weights that passes no gradient."""
    return bool(in_4_bit(nn.Linear(64, 64)).support_avx512bf16_for_cpu)


def by_torchao(module):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())  # the head too
    return module


def dequantised(module):
    """The same with ordinary linear maps of the weights that are left after rounding."""
    for path, part in list(module.named_modules()):
        weight = getattr(part, "weight", None)
        if not isinstance(part, nn.Linear) or type(weight) is nn.Parameter:
            continue
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            whole = dequantize_4bit(weight.data, weight.quant_state)
        elif getattr(weight, "SCB", None) is not None:
            whole = weight.data.float() * weight.SCB[:, None] / 127
        else:
            whole = weight.dequantize()
        made = nn.Linear(part.in_features, part.out_features, part.bias is not None)
        made.weight.data, made.bias = whole.detach().float().clone(), part.bias
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, made)
    return module
