"""Answers written by vLLM (`engine.generation=vllm`), from the weights that are examined.

vLLM keeps a copy of the model in this process. Before the first answers of each examination it is given all weights as they are then, adapters
folded in; its prefix cache, which holds keys and values of older weights, is emptied; and its log-probabilities of some prompts must then be
ours. So every method is written by the same code: adapters under ids of their own would do for LoRA alone, and not for methods that change the
base. Log-likelihoods stay with `student`.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from clbench.adapters import folded, is_folded, ordinary
from clbench.architecture import causal_lm
from clbench.student import Ids, Student
from clbench.types import UserMistake

CHECKED = 8
"""Prompts of which vLLM's log-probabilities are compared with ours."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""How far they may be apart, in nats per token, as a mean over the prompts of absolute differences.

Of tiny models 1e-7 and 2e-4 were seen; weights of before one stage at a rate of 1e-4 were 7e-3 and 2e-3 away, at 1e-2 0.4 and 0.06: in bfloat16
those of a weak training are not told apart.
"""


class VllmWriter:
    """vLLM with the weights of whichever student wrote last. `settings`: further arguments of `vllm.LLM`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserMistake(
                "engine.generation=vllm needs the package vllm; pip install 'clbench[vllm]', or choose engine.generation=local"
            )
        self.settings = dict(settings)
        self.student: Student | None = None
        self.llm: Any = None

    @property
    def name(self) -> str:
        """What decides its answers beside the weights."""
        import vllm

        return f"vllm {vllm.__version__} {sorted(self.settings.items())}"

    def write(self, student: Student, prompts: Sequence[Ids], *, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations in token ids, until EOS (left out) or to `max_new_tokens`."""
        if not prompts:
            return []
        if self.student is not student:
            self.take(student, prompts[:CHECKED])
        end = student.encoder.tokenizer.eos_token_id
        written = [
            output.outputs[0].token_ids for output in self._generate(prompts, max_tokens=max_new_tokens, stop=[end])
        ]
        return [list(ids[:-1]) if ids and ids[-1] == end else list(ids) for ids in written]

    def take(self, student: Student, prompts: Sequence[Ids]) -> None:
        """Gives vLLM the weights of `student`; AssertionError where it then thinks otherwise of `prompts`."""
        model = student.model
        with nullcontext() if is_folded(model) else folded(model):
            plain = ordinary(causal_lm(model))
            if self.llm is None:
                self.llm = self._start(plain, positions=student.positions)
            weights = plain.state_dict()
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        assert self.llm.reset_prefix_cache(), "vLLM kept keys and values of older weights"
        apart = self._apart(student, [prompt for prompt in prompts if len(prompt) > 1])
        assert apart <= TOLERANCES[plain.dtype], f"vLLM's log-probabilities are {apart} nats a token from ours"
        self.student = student

    def _apart(self, student: Student, prompts: Sequence[Ids]) -> float:
        """How far vLLM's log-probabilities of the prompts' tokens are from ours, in nats per token."""
        counted = student.tokens_scored
        expected = student.log_likelihoods([(prompt[:1], prompt[1:]) for prompt in prompts])
        student.tokens_scored = counted
        differences = []
        for prompt, output, (ours, _) in zip(
            prompts, self._generate(prompts, max_tokens=1, stop=[], prompt_logprobs=0), expected, strict=True
        ):
            places = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            theirs = sum(found[token].logprob for token, found in places)
            differences.append(abs(theirs - ours) / (len(prompt) - 1))
        return sum(differences) / max(1, len(differences))

    def _start(self, plain: PreTrainedModel, *, positions: int) -> Any:
        """vLLM in this process, whose weights are still to come."""
        threads = torch.get_num_threads()
        # In this process, so that weights are handed over as they are; on a CPU torch's threads stay ours.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        plain.config.architectures = [type(plain).__name__]
        with tempfile.TemporaryDirectory() as folder:
            plain.config.save_pretrained(folder)
            llm = LLM(
                **{"max_model_len": positions, "seed": 0, **self.settings},
                model=folder,
                dtype=str(plain.dtype).removeprefix("torch."),
                load_format="dummy",
                skip_tokenizer_init=True,
            )
        torch.set_num_threads(threads)
        return llm

    def _generate(self, prompts: Sequence[Ids], *, max_tokens: int, stop: list[int], **more: Any) -> list[Any]:
        from vllm import SamplingParams

        greedy = SamplingParams(
            temperature=0, max_tokens=max_tokens, stop_token_ids=stop, ignore_eos=True, detokenize=False, **more
        )
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return self.llm.generate(asked, greedy, use_tqdm=False)
