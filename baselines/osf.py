"""OSF: orthogonal subspace fine-tuning. The large singular directions of every weight stay, the small ones train, from their values.

    W = U S V^T;  the first k triples are frozen (h), the others train (l), and gradients are kept out of what the frozen ones span:
    dU_l <- dU_l - U_h U_h^T dU_l,      dV_l <- dV_l - dV_l V_h^T V_h;      after every task: W <- U_h S_h V_h^T + U_l S_l V_l^T, decomposed again.

Paper: arXiv 2504.07097; layers, projection and merge are PEFT's (`peft.OSFConfig`). k is `preserved` of min(in, out). Far more
weights train than in LoRA (on the embedded world's model two thirds of all), so it is to be compared with seq_full; no setting makes it SEQ.
Orthogonality holds for gradients, not for Adam's steps.
Deviation: the paper raises k from task to task by the importance of layers; here it is the same for all tasks and layers, as in PEFT.

Card:
- paper: arXiv 2504.07097
- trainable: (1 - preserved) min(in, out) (in + out) per layer
- memory: in out per layer, in the checkpoint
- compute: two products with the frozen directions per layer and step; one SVD per layer and task
- deviations: k does not grow
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from peft import OSFConfig, get_peft_model
from peft.tuners.osf import OSFLayer
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Module

from clbench.models.cur import oriented
from clbench.models.limits import check_unshared
from clbench.models.lora import targeted
from clbench.models.pairs import ADAPTER
from clbench.protocols import Method
from clbench.types import UserMistake


@dataclass(kw_only=True)
class Osf(Method):
    """Fine-tuning of the singular triples beyond the first `preserved` of min(in, out) of the layers named by `targets`."""

    merges = True
    decomposes = True

    preserved: Annotated[float, Field(gt=0, lt=1)]
    targets: list[str] | str
    seed: int
    layers: dict[str, OSFLayer] = field(default_factory=dict)

    def wrap(self, model: Module) -> Module:
        """Replaces the targeted layers by decomposed ones; what trains is float32, whatever the weights are."""
        found = targeted(model, self.targets, kinds=(nn.Linear,))
        if not found:
            raise UserMistake(
                f"method.targets={self.targets}: none is a torch.nn.Linear, which PEFT's OSF needs; choose another method"
            )
        check_unshared(model, list(found))
        wrapped = get_peft_model(model, OSFConfig(target_modules=list(found), effective_rank=self.preserved))
        self.layers = {name: layer for name, layer in wrapped.named_modules() if isinstance(layer, OSFLayer)}
        for layer in self.layers.values():
            in_float32(layer)
        return wrapped

    def consolidate(self, model: Module) -> None:
        for layer in self.layers.values():
            weight = oriented(layer.get_base_layer())
            weight += layer.get_delta_weight(ADAPTER).detach()
            self.decompose(layer)

    def decompose(self, layer: OSFLayer) -> None:
        """Starts the layer afresh from its weight: the frozen and the trainable directions of that, and an update of 0."""
        for hook in layer.hook_handles:
            hook.remove()
        layer.hook_handles.clear()
        layer.update_layer(ADAPTER, layer.effective_rank[ADAPTER], OSFConfig())
        in_float32(layer)

    def state_dict(self) -> dict[str, Any]:
        """The weights that were merged into."""
        return {name: oriented(layer.get_base_layer()).clone() for name, layer in self.layers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts merged weights back and decomposes them; within a stage they are there already, and what was trained of them stays."""
        for name, layer in self.layers.items():
            weight = oriented(layer.get_base_layer())
            if not torch.equal(weight, state[name].to(weight)):
                weight.copy_(state[name])
                self.decompose(layer)


@torch.no_grad()
def in_float32(layer: OSFLayer) -> None:
    """The layer's trainable factors and what they started from, in float32."""
    factors: dict[str, Tensor] = dict(layer.osf_svd_params[ADAPTER].named_parameters())
    starts = {"U_low": layer._osf_U_low_init, "S_low": layer._osf_S_low_init, "V_low": layer._osf_V_low_init}
    for name, factor in factors.items():
        factor.data = factor.data.float()
        starts[name][ADAPTER] = factor.detach().clone()
    for frozen in (layer._osf_U_high, layer._osf_V_high):
        if ADAPTER in frozen:
            frozen[ADAPTER] = frozen.get_buffer(ADAPTER).float()
