"""A Student as lm-eval sees a model.

All three verbs give what lm-eval's own class gives for the same model (`HFLM` with `add_bos_token=True`), with one BOS before every context.
In rolling log-likelihoods that class also predicts the BOS, from a BOS before it; so does this one, because its numbers are for comparing.
The perplexity probe, which is ours, does not.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from transformers import PreTrainedTokenizerBase

from clbench.data.encoder import clip_left
from clbench.examine.student import Student
from clbench.examine.text import rolling_nll
from clbench.types import UserMistake


class StudentLM(TemplateLM):
    """`student` behind lm-eval's interface, reading up to `max_length` tokens (None: as many as the model has positions for)."""

    backend = "causal"

    def __init__(self, student: Student, *, max_length: int | None = None) -> None:
        super().__init__()
        self.student = student
        self.max_length = min(max_length or student.positions, student.positions)

    @property
    def eot_token_id(self) -> int:
        return self.student.encoder.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS."""
        return self.student.encoder.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids with one BOS in front unless `add_special_tokens` is False."""
        ids = self.student.encoder.prompt(string)
        return list(ids[1:] if add_special_tokens is False else ids)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return self.student.log_likelihoods(pairs, max_length=self.max_length)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the longest input."""
        texts = [self.student.encoder.prompt(request.args[0]) for request in requests]
        return [-nll for nll in rolling_nll(self.student, texts, window=self.max_length)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first of the request's stop strings; requests of equal settings share batches."""
        encoder, answers = self.student.encoder, [""] * len(requests)
        alike: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[self._settings(request.args[1])].append(index)
        for (stops, max_new_tokens), members in alike.items():
            room = self.max_length - max_new_tokens
            prompts = [clip_left(encoder.prompt(requests[index].args[0]), room) for index in members]
            has_ended = stopped(stops, encoder.tokenizer)
            written = self.student.write(prompts, max_new_tokens=max_new_tokens, has_ended=has_ended)
            texts = encoder.tokenizer.batch_decode(written, skip_special_tokens=True)
            for index, text in zip(members, texts, strict=True):
                answers[index] = postprocess_generated_text(text, list(stops), None)
        return answers

    def _settings(self, given: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """The stop strings, EOS's text last, and the most tokens to write; raises UserMistake where they cannot be had."""
        settings = normalize_gen_kwargs(given)
        if settings["do_sample"]:
            raise UserMistake(
                "a task of probe.tasks draws its answers at random (do_sample), probes never; take it out"
            )
        count = settings["max_gen_toks"]
        if count >= self.max_length:
            raise UserMistake(
                f"a task of probe.tasks writes {count} tokens, the model has {self.max_length}; take it out"
            )
        eos = self.student.encoder.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        return (*settings["until"], eos), count


def stopped(stops: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], list[bool]]:
    """Gives the function that tells of rows of token ids whether the newest token of each completes a stop string."""
    # A stop string that the newest token completes lies within as many tokens as it has bytes, and one cut by their edge.
    tail = max((len(stop.encode()) for stop in stops), default=0) + 1

    def has_ended(written: list[list[int]]) -> list[bool]:
        texts = tokenizer.batch_decode([ids[-tail:] for ids in written], skip_special_tokens=True)
        return [postprocess_generated_text(text, list(stops), None) != text for text in texts]

    return has_ended
