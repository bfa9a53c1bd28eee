"""A Student as lm-eval sees a model, and lm-eval's requests scored by it.

All three verbs give what lm-eval's own class gives for the same model (`HFLM` with `add_bos_token=True`), with one BOS before every context.
In rolling log-likelihoods that class also predicts the BOS, from a BOS before it; so does this one, because its numbers are for comparing.
The perplexity probe, which is ours, does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from clbench.data.encoder import clip_left
from clbench.examine.rolling import Ids, rolling_nll
from clbench.examine.student import Student
from clbench.types import UserMistake

Outcomes = dict[str, list[Any]]
"""Per metric what each item gave, in the order of the items: a number, or what the metric's aggregation takes."""


class StudentLM(TemplateLM):
    """`student` behind lm-eval's interface, reading up to `max_length` tokens (None: as many as the model has positions for)."""

    backend = "causal"

    def __init__(self, student: Student, *, max_length: int | None = None) -> None:
        super().__init__()
        self.encoder = student.encoder
        self.max_length = student.positions if max_length is None else min(max_length, student.positions)
        self.student = student

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token's id."""
        return self.encoder.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS."""
        return self.encoder.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids with one BOS in front unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self.encoder.text(string)
        return list(self.encoder.prompt(string))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self.student.log_likelihoods(
            [(tuple(context), tuple(continuation)) for _, context, continuation in requests],
            max_length=self.max_length,
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the longest input."""
        texts = [tuple(self.tok_encode(request.args[0])) for request in requests]
        return [-nll for nll in rolling_nll(self.student, texts, window=self.max_length)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first of the request's stop strings; requests of equal settings share batches."""
        answers = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._settings(request.args[1])].append(index)
        for (stops, max_new_tokens), members in groups.items():
            prompts = [self.encoder.prompt(requests[index].args[0]) for index in members]
            found = self._generate(prompts, stops=stops, max_new_tokens=max_new_tokens)
            for index, answer in zip(members, found, strict=True):
                answers[index] = answer
        return answers

    def _settings(self, given: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """The stop strings, EOS's text last, and the most tokens to write; raises UserMistake where the task wants samples."""
        settings = normalize_gen_kwargs(given)
        if settings["do_sample"]:
            raise UserMistake(
                "a task of probe.tasks draws its answers at random (do_sample), probes decode greedily; take it out (conf/probe)"
            )
        eos = self.encoder.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        return (*settings["until"], eos), settings["max_gen_toks"]

    def _generate(self, prompts: Sequence[Ids], stops: Sequence[str], max_new_tokens: int) -> list[str]:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserMistake(
                f"a task of probe.tasks asks for answers of {max_new_tokens} tokens, the model reads {self.max_length}; take it out (conf/probe)"
            )
        rows = [clip_left(prompt, room) for prompt in prompts]
        tokenizer = self.encoder.tokenizer
        written = self.student.write(rows, max_new_tokens=max_new_tokens, has_ended=Until(tokenizer, stops))
        return [cut(text, stops) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


class Until:
    """Whether what each row wrote holds a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stop for stop in stops if stop)
        # A stop string that the newest token completes lies within as many tokens as it has bytes, and one cut by their edge.
        self.tail = max((len(stop.encode()) for stop in self.stops), default=0) + 1

    def __call__(self, written: list[list[int]]) -> list[bool]:
        """Of each row's token ids, the newest of which was not there when last asked."""
        texts = self.tokenizer.batch_decode([ids[-self.tail :] for ids in written], skip_special_tokens=True)
        return [any(stop in text for stop in self.stops) for text in texts]


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` before each of the stop strings in turn, its white space as it is.

    >>> cut(" 4 Question: 5", ["Question:", ""])
    ' 4 '
    """
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def run_task(task: Task, model: StudentLM) -> Outcomes:
    """Scores the task's requests; per metric the outcome of every document. Where a task has several filters, `metric,filter`."""
    by_type: dict[str, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}
        by_type[instance.request_type].append(instance)
    verbs = {
        "loglikelihood": model.loglikelihood,
        "loglikelihood_rolling": model.loglikelihood_rolling,
        "generate_until": model.generate_until,
    }
    for kind, instances in by_type.items():
        for instance, response in zip(instances, verbs[kind](instances, disable_tqdm=True), strict=True):
            instance.resps.append(response)
    task.apply_filters()
    outcomes: Outcomes = defaultdict(list)
    for members in by_document(task):
        filters = list(members[0].filtered_resps)
        for name in filters:
            results = task.process_results(members[0].doc, [instance.filtered_resps[name] for instance in members])
            for metric, value in results.items():
                outcomes[metric if len(filters) == 1 else f"{metric},{name}"].append(value)
    return dict(outcomes)


def by_document(task: Task) -> list[list[Instance]]:
    """The task's requests, one list per document, both in order."""
    documents: dict[int, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        documents[instance.doc_id].append(instance)
    return [sorted(members, key=lambda instance: instance.idx) for _, members in sorted(documents.items())]
