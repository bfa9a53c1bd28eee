"""LoRA and DoRA through PEFT."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import PositiveInt
from torch import nn
from torch.nn import Module
from transformers.pytorch_utils import Conv1D

from clbench.data.sampling import seeded
from clbench.models.targets import targeted
from clbench.types import UserMistake


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): a weight's update is `alpha / rank * B A`, A [rank, in], B [out, rank]."""

    rank: PositiveInt
    alpha: float
    targets: list[str] | str
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    dora: bool = False

    def add(self, model: Module, *, seed: int) -> PeftModel:
        """`model` with its weights frozen and fresh adapters on every layer whose name ends in one of `targets`, of which each must name one."""
        layers = targeted(model, self.targets, kinds=(nn.Linear, nn.Embedding, Conv1D))
        for name, layer in layers.items():
            if self.rank > (most := min(layer.weight.shape)):
                raise UserMistake(
                    f"method.lora.rank={self.rank} is more than the smaller side of {name}; set it to {most} at most (conf/method)"
                )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(layers if isinstance(self.targets, str) else self.targets),
            lora_dropout=self.dropout,
            use_dora=self.dora,
            task_type="CAUSAL_LM",
        )
        with seeded(seed, "adapter"):
            try:
                adapted = get_peft_model(model, config)
            except ValueError as error:  # PEFT knows layers that kernels read past an adapter (Mamba's out_proj)
                raise UserMistake(
                    f"method.lora.targets={self.targets}: {str(error).splitlines()[0]} (conf/method)"
                ) from error
        # PEFT takes some names of mixtures of experts for the fused weights of all experts.
        added = {name for name, layer in adapted.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
        if added != layers.keys():
            unlike = min(added ^ layers.keys())
            raise UserMistake(
                f"method.lora.targets={self.targets} of a {model.config.model_type}: PEFT turns {unlike!r} into adapters of fused experts, "
                "which cannot be folded; name the layers of attention, e.g. [q_proj, k_proj, v_proj, o_proj] (conf/method)"
            )
        return adapted
