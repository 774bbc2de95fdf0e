"""Fine-tuning steps of Unsloth: its own model classes, adapters and kernels, on the bench's weights.

``FastLlamaModel.from_pretrained`` and ``get_peft_model`` run as they are. What reads files is put
aside: the checkpoint, which is the bench's model instead, and the tokenizer. It patches transformers
and PEFT for good, so nothing else may be measured in its process. Each block is compiled in the
first step, which takes up to a minute.
"""

import importlib
import tempfile
from typing import Any

import torch
from torch import Tensor

from bench.models import Subject
from bench.train_cases import (
    ALPHA,
    MODULES,
    RANK,
    Absent,
    Case,
    Provider,
    Step,
    draw_adapters,
)
from bench.train_peers import make_optimizer, mark_quantized, training_step

_CLASSES = {
    "llama": ("unsloth.models.llama", "FastLlamaModel", "LlamaForCausalLM"),
    "qwen2": ("unsloth.models.qwen2", "FastQwen2Model", "Qwen2ForCausalLM"),
}
_CHECKPOINTING = {"recompute": True, "offload": "unsloth", "save": False}
# of unsloth.models.llama: what reads or checks files, and what it is to return
_READERS = {
    "load_correct_tokenizer": lambda **_: _Tokenizer(),
    "check_tokenizer": lambda **options: options["tokenizer"],
    "patch_tokenizer": lambda model, tokenizer: (model, tokenizer),
    "patch_saving_functions": lambda model, **_: model,
    "patch_model_and_tokenizer": lambda model, tokenizer, **_: (model, tokenizer),
    "maybe_prefetch_hf_snapshot": lambda *_, **__: False,
    "get_statistics": lambda *_, **__: None,
    "warn_if_bitsandbytes_quantized_nothing": lambda *_, **__: None,
    "_restore_dropped_fp8_scales": lambda *_, **__: None,
}


class _Tokenizer:
    """As much of a tokenizer as Unsloth asks for."""

    padding_side, pad_token, bos_token, eos_token = "right", "<pad>", "<s>", "</s>"
    unk_token, chat_template, name_or_path = "<unk>", None, "none"
    pad_token_id, eos_token_id, bos_token_id = 0, 1, 2
    vocab_size, model_max_length = 100, 2048

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, *_: object, **__: object) -> dict[str, list[int]]:
        return {"input_ids": [0]}


def unsloth_step(subject: Subject, case: Case, provider: Provider, batches: list[Tensor]) -> Step:
    """A step of Unsloth's model, under autocast and with adapters in fp32, as it trains."""
    kind = subject.files.config.model_type
    module, name, architecture = _CLASSES[kind]
    fast = getattr(_load(module), name)
    length = batches[0].shape[1]
    with tempfile.TemporaryDirectory() as folder:
        config = subject.files.config
        config.architectures = [architecture]
        config.save_pretrained(folder)
        _replace_readers(subject)
        model, _ = fast.from_pretrained(
            model_name=folder,
            max_seq_length=length,
            dtype=torch.bfloat16,
            load_in_4bit=True,
            device_map={"": 0},
            local_files_only=True,
        )
    adapted = fast.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=list(MODULES),
        layers_to_transform=case.early,
        use_gradient_checkpointing=_CHECKPOINTING[provider.activations],
        random_state=1,
    )
    draw_adapters(adapted.named_parameters())
    adapted.for_training()
    return training_step(adapted, make_optimizer(adapted, "adamw"), batches, autocast=True)


def _load(module: str) -> Any:
    try:
        importlib.import_module("unsloth")
        return importlib.import_module(module)
    # it raises NotImplementedError without a GPU, RuntimeError and others of versions it does not know
    except Exception as error:
        raise Absent(f"unsloth cannot be imported: {type(error).__name__}: {error}") from error


def _replace_readers(subject: Subject) -> None:
    llama = importlib.import_module("unsloth.models.llama")

    class InMemory:
        """Stands for transformers' ``AutoModelForCausalLM``."""

        @staticmethod
        def from_pretrained(*_: object, **__: object) -> Any:
            model = subject.causal_lm()
            mark_quantized(model)
            return model

    llama.AutoModelForCausalLM = InMemory
    for name, reader in _READERS.items():
        # Unsloth may have dropped one: then nothing calls it
        if hasattr(llama, name):
            setattr(llama, name, reader)
    importlib.import_module("unsloth.tokenizer_utils").zero_pad_embedding_rows = lambda *_, **__: (
        None
    )
