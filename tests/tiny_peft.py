"""Adapters of tiny checkpoints, made, saved and merged by peft itself."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.tensors.adapters import CONFIG, WEIGHTS

PEFT_WARNS = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
"""For tests that call peft: it warns of ties and idle patterns, and calls what the newest transformers will drop."""


def adapted(base: Path, folder: Path, *, dtype: str = "float32", **options: Any) -> dict[str, np.ndarray]:
    """Write a random adapter of ``base``, with a copy of the base beside it, into ``folder``.

    Args:
        dtype: of the adapter's tensors.
        options: of peft's ``LoraConfig``; with ``task_type="SEQ_CLS"`` there is a head of three classes.

    Returns:
        The tensors of the model that peft merges in float32, by their names there.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(5)
    if options.get("task_type") == "SEQ_CLS":
        auto: Any = AutoModelForSequenceClassification
        model = auto.from_pretrained(base, dtype=torch.float32, num_labels=3)
    else:
        auto = AutoModelForCausalLM
        model = auto.from_pretrained(base, dtype=torch.float32)
    adapter: Any = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:  # B would be zero, and what is saved as it is would be the base's
                values = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
                parameter.copy_(values.to(getattr(torch, dtype)))
    if dtype != "float32":
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    adapter.save_pretrained(folder / "adapter")
    for parameter in adapter.parameters():
        parameter.data = parameter.data.float()
    merged = adapter.merge_and_unload()
    for path in base.iterdir():
        shutil.copy(path, folder / path.name)
    for name in (CONFIG, WEIGHTS):
        (folder / "adapter" / name).rename(folder / name)
    return {name: tensor.numpy() for name, tensor in merged.state_dict().items()}
