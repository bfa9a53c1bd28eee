"""LoRA and DoRA through PEFT."""

from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import Module
from transformers.pytorch_utils import Conv1D

from clbench.data.sampling import seeded
from clbench.models.targets import targeted


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): a weight's update is `alpha / rank * B A`, A [rank, in], B [out, rank]."""

    rank: int
    alpha: float
    targets: list[str]
    dropout: float = 0.0
    dora: bool = False

    def add(self, model: Module, *, seed: int) -> PeftModel:
        """`model` with its weights frozen and fresh adapters on every layer whose name ends in one of `targets`, of which each must name one."""
        targeted(model, self.targets, kinds=(nn.Linear, nn.Embedding, Conv1D))
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            lora_dropout=self.dropout,
            use_dora=self.dora,
            task_type="CAUSAL_LM",
        )
        with seeded(seed, "adapter"):
            return get_peft_model(model, config)
