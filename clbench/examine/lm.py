"""A Student as lm-eval sees a model.

All three verbs give what lm-eval's own class gives for the same model (`HFLM` at its defaults): the tokenizer alone says whether a BOS stands
before a context (Llama's does, Qwen's and GPT-2's do not), a special token that a text spells is one, and a context that is too long loses its
beginning, BOS and all. In rolling log-likelihoods that class also predicts the BOS, from a BOS before it; so does this one, because its numbers
are for comparing. The perplexity probe, which is ours, does not.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from transformers import PreTrainedTokenizerBase

from clbench.data.chat import Message, rendered
from clbench.examine.student import Student
from clbench.examine.text import read_windows
from clbench.models.loss import causal_lm
from clbench.types import Ids, UserMistake


class StudentLM(TemplateLM):
    """`student` behind lm-eval's interface, reading up to `max_length` tokens (None: as many as lm-eval's own class)."""

    backend = "causal"

    def __init__(self, student: Student, *, max_length: int | None = None) -> None:
        super().__init__()
        self.student = student
        longest = resolve_max_length(causal_lm(student.model).config, student.encoder.tokenizer)
        self.max_length = min(max_length or longest, longest)

    @property
    def eot_token_id(self) -> int:
        return self.student.encoder.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS."""
        return self.student.encoder.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with what the tokenizer puts around a text unless that begins with BOS or `add_special_tokens` says otherwise."""
        if add_special_tokens is None:
            encoder = self.student.encoder
            add_special_tokens = not has_bos_prefix(string, encoder.tokenizer.decode([self.prefix_token_id]))
        return list(self.student.encoder.own(string, special=add_special_tokens))

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a chat, its last message open where no prompt is added; without the system's messages where the template takes none."""
        form = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        tokenizer = self.student.encoder.tokenizer
        try:
            return rendered(tokenizer, chat_history, **form)
        except TemplateError:
            return rendered(tokenizer, [one for one in chat_history if one["role"] != "system"], **form)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request) for request in requests]
        return self.student.log_likelihoods(pairs, max_length=self.max_length)

    def _pair(self, texts: tuple[str, str], context: Sequence[int], continuation: Sequence[int]) -> tuple[Ids, Ids]:
        """The ids of a request, its context cut from the left; raises UserMistake where lm-eval's own class asserts."""
        kept = context[-(self.max_length + 1 - len(continuation)) :]
        if not 0 < len(continuation) <= self.max_length or not kept:
            raise UserMistake(
                f"a task of probe.tasks asks for {texts[1][:40]!r} after {texts[0][-40:]!r}, {len(continuation)} tokens of "
                f"{self.max_length} that the model reads; where it is 0, one token spans the context and the continuation; take the task out"
            )
        return tuple(kept), tuple(continuation)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the longest input."""
        texts = [tuple(self.tok_encode(request.args[0])) for request in requests]
        nll, _ = read_windows(self.student, texts, window=self.max_length)
        return [-one for one in nll]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first of the request's stop strings; requests of equal settings share batches."""
        encoder, answers = self.student.encoder, [""] * len(requests)
        alike: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[self._settings(request.args[1])].append(index)
        for (stops, max_new_tokens), members in alike.items():
            room = self.max_length - max_new_tokens
            prompts = [tuple(self.tok_encode(requests[index].args[0]))[-room:] for index in members]
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
        return (*settings["until"], str(eos)), count


def stopped(stops: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], list[bool]]:
    """Gives the function that tells of rows of token ids whether the newest token of each completes a stop string."""
    # A stop string that the newest token completes lies within as many tokens as it has bytes, and one cut by their edge.
    tail = max((len(stop.encode()) for stop in stops), default=0) + 1

    def has_ended(written: list[list[int]]) -> list[bool]:
        texts = tokenizer.batch_decode([ids[-tail:] for ids in written], skip_special_tokens=True)
        return [postprocess_generated_text(text, list(stops), None) != text for text in texts]

    return has_ended
