"""Pretraining of a tiny model: a stream of token ids, fixed windows, AdamW. A few minutes of a CPU.

>>> packed([[1, 2], [3, 4, 5], [6]], length=4, pad=0).tolist()
[[1, 2, 0, 0], [3, 4, 5, 6]]
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from clbench.data.sampling import generator
from clbench.progress import Line

WARM_UP_SHARE = 0.05
PARTS = 2


def packed(texts: Sequence[Sequence[int]], *, length: int, pad: int) -> Tensor:
    """Token ids [windows, length]: texts in their order, whole where they fit into a window, padded; longer ones are cut.

    A small model learns what a statement says from statements that it sees whole.
    """
    packed: list[list[int]] = [[]]
    for text in texts:
        for start in range(0, len(text), length):
            piece = text[start : start + length]
            if len(packed[-1]) + len(piece) > length:
                packed.append([])
            packed[-1].extend(piece)
    return torch.tensor([window + [pad] * (length - len(window)) for window in packed])


def pretrain(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    *,
    label: str,
    pad: int,
    steps: int,
    batch_size: int,
    length: int,
    lr: float,
    seed: int,
) -> float:
    """Trains `model` in place on token ids `texts`, `pad` left out of the loss; returns the last loss in nats per token.

    Learning rate: linear warm-up, then a cosine to zero. Each epoch passes the windows in a fresh order. A batch is always read in PARTS parts,
    each by a thread, so that the weights are the same bytes on one core and on two.
    """
    pieces, parameters = packed(texts, length=length, pad=pad), list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps=steps))

    def gradients(batch_BT: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The total loss of some windows in nats, and its gradients."""
        logits_BTV = model(input_ids=batch_BT, use_cache=False).logits
        labels = batch_BT[:, 1:].flatten()
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels, ignore_index=pad, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, parameters)

    loss = torch.tensor(math.nan)
    model.train()
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with Line(f"pretraining {label} (once)", total=steps) as line, ThreadPoolExecutor(PARTS, **one_thread) as pool:
        for step, rows in zip(range(steps), orders(len(pieces), batch_size=batch_size, seed=seed), strict=False):
            batch_BT = pieces[rows]
            losses, parts = zip(*pool.map(gradients, batch_BT.chunk(PARTS)), strict=True)
            targets = (batch_BT[:, 1:] != pad).sum()
            loss = sum(losses) / targets
            for parameter, *of_parts in zip(parameters, *parts, strict=True):
                parameter.grad = sum(of_parts) / targets
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            line.show(step + 1, f"pretraining {label} (once): step {step + 1}/{steps}, loss {loss.item():.3f}")
    model.eval()
    return loss.item()


def warm_cosine(step: int, *, steps: int) -> float:
    """The learning rate of `step` (from 0) as a share of the highest one."""
    warm_up = max(1, round(steps * WARM_UP_SHARE))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def orders(count: int, *, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of window indices; the windows that do not fill an epoch's last batch wait for the next epoch."""
    assert count >= batch_size, (count, batch_size)
    epoch = 0
    while True:
        order = torch.randperm(count, generator=generator(seed, "pretraining order", epoch))
        yield from order[: count // batch_size * batch_size].view(-1, batch_size)
        epoch += 1
