"""Gradients of a model's first blocks in bf16: by transformers' modules, fused, and in fp64."""

from typing import Any, Literal

import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.words import pack
from tli_engine.models.adapters import adapter_tensors, add_lora, add_transposed_copies
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles
from tli_engine.nn import NF4Linear
from tli_engine.testing import random_words

DEPTH = 3
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = torch.device("cpu")
Trained = Literal["adapters", "weights"]
Gradients = dict[str, Tensor]


def assert_gradients_err_no_more(
    files: ModelFiles, trained: Trained, quantize: Any, *, device: torch.device, factor: float
) -> None:
    """Assert that each fused gradient errs ``factor`` times as much as the modules' at most, by its norm.

    Args:
        files: Of a model of widths that the ops take.
        trained: Adapters on every projection, or every weight of the blocks.
        quantize: ``none`` or ``nf4``.
        device: Where bf16 is computed; fp64 is on the CPU.
        factor: Allowed ratio.
    """
    words = pack(random_words(40, 7))
    dhidden = torch.randn(len(words.input_ids), files.config.hidden_size).bfloat16()
    plain = _load(files, trained, quantize, device)
    exact = _of_modules(_in_fp64(plain, files, trained), words, dhidden)
    theirs = _of_modules(plain, words, dhidden)
    ours = _of_fused(_load(files, trained, quantize, device), words, dhidden)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        error, budget = ((grads[name].cpu() - truth).norm() for grads in (ours, theirs))
        assert error <= factor * budget, f"{name}: {error:.2e}, the modules' {budget:.2e}"


def _load(
    files: ModelFiles,
    trained: Trained,
    quantize: Any,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> EarlyModel:
    """With adapters whose B is not zero, or with weights that require a gradient."""
    model = load_early(files, DEPTH, dtype=dtype, device=device, quantize=quantize)
    if trained == "weights":
        model.decoder.layers.requires_grad_()
        return model
    add_lora(model, LoraConfig(layers="0-2", modules=ALL, r=4), DEPTH, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in adapter_tensors(model).items():
        tensor.requires_grad_()
        if ".lora_B." in name:
            tensor.data.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model


def _in_fp64(model: EarlyModel, files: ModelFiles, trained: Trained) -> EarlyModel:
    """The modules in fp64 on the CPU, of the values that the weights of ``model`` have in bf16."""
    exact = _load(files, trained, "none", CPU, torch.float32)
    # an NF4 layer's bias is no parameter
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            held[f"{name}.weight"] = module.weight.dequantize(torch.bfloat16)
    for name, parameter in exact.named_parameters():
        parameter.data = held[name].detach().double().cpu()
    return exact.double()


def _of_modules(model: EarlyModel, words: Any, dhidden: Tensor) -> Gradients:
    own = {n: p for n, p in model.decoder.layers.named_parameters() if p.requires_grad}
    hidden = model(words.to(model.device), DEPTH)
    grads = torch.autograd.grad(hidden, list(own.values()), dhidden.to(hidden))
    return {f"layers.{name}": grad for name, grad in zip(own, grads, strict=True)}


def _of_fused(model: EarlyModel, words: Any, dhidden: Tensor) -> Gradients:
    """By the modules' own names, also where tensors are joined."""
    blocks, words = model.fuse(), words.to(model.device)
    add_transposed_copies(model)
    projections = blocks.projections()
    views = {id(view) for projection in projections for view in projection.views()}
    leaves = {
        f"layers.{name}": parameter
        for name, parameter in model.decoder.layers.named_parameters()
        if parameter.requires_grad and id(parameter) not in views
    }
    for projection in projections:
        joined = projection.joined() | projection.joined_weights()
        leaves |= {name: tensor for name, tensor in joined.items() if tensor.requires_grad}
    x = next(model.hidden_states(words))[1].detach()
    hidden = blocks.run(x, blocks.rows_of(words, x), 0, DEPTH)
    found = torch.autograd.grad(hidden, list(leaves.values()), dhidden.to(hidden))
    grads = dict(zip(leaves, found, strict=True))
    for projection in projections:
        for name in projection.joined_weights().keys() & grads.keys():
            grads |= projection.split(name, grads.pop(name))
        grads |= {name: grads[whole][rows] for name, _, whole, rows in projection.parts()}
        for name in projection.joined():
            del grads[name]
    return grads
