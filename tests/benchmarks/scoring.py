"""Scoring multiple-choice items: ours against lm-eval's HFLM on the same requests; equality first, then the ratio of CPU seconds.

    make bench

One thread, a random Llama of 4 layers and width 256, interleaved repetitions; prints the median seconds of each and their ratio.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clbench.data import Encoder
from clbench.student import Student

REPETITIONS = 5
SHAPES = {"4 options of 6 tokens after 40": (40, 40, 4, 6), "4 one-token options after 200": (20, 200, 4, 1)}
"""Items, context tokens, options, tokens per option."""


def make_model(vocabulary: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model, and a tokenizer with one token per word."""
    words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{index}": index for index in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return LlamaForCausalLM(config).eval(), fast


def requests(shape: tuple[int, int, int, int], vocabulary: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Random (context, continuation) pairs; the options of an item share its context."""
    items, context_length, options, length = shape
    rng = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(items):
        context = (0, *torch.randint(3, vocabulary, (context_length,), generator=rng).tolist())
        pairs += [
            (context, tuple(torch.randint(3, vocabulary, (length,), generator=rng).tolist())) for _ in range(options)
        ]
    return pairs


def main() -> None:
    """Prints one line per vocabulary and shape."""
    torch.set_num_threads(1)
    for vocabulary in (512, 32_000):
        model, tokenizer = make_model(vocabulary)
        student = Student(model, Encoder(tokenizer, max_length=1024))
        peers = {
            size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=1024, device="cpu")
            for size in (8, 32)
        }
        for name, shape in SHAPES.items():
            pairs = requests(shape, vocabulary)
            theirs = [
                (("", str(index)), list(context), list(continuation))
                for index, (context, continuation) in enumerate(pairs)
            ]
            runs = SimpleNamespace(ours=[], peers={size: [] for size in peers})
            for _ in range(REPETITIONS):
                started = time.process_time()
                scored = student.log_likelihoods(pairs)
                runs.ours.append(time.process_time() - started)
                for size, peer in peers.items():
                    started = time.process_time()
                    expected = peer._loglikelihood_tokens(theirs, disable_tqdm=True)
                    runs.peers[size].append(time.process_time() - started)
                    gap = max(abs(a[0] - b[0]) for a, b in zip(scored, expected, strict=True))
                    assert gap <= 1e-4, gap
                    assert [a[1] for a in scored] == [b[1] for b in expected]
            ours, peer = (
                statistics.median(runs.ours),
                min(statistics.median(seconds) for seconds in runs.peers.values()),
            )
            print(
                f"vocabulary {vocabulary:6}  {name:32}  HFLM {peer:.2f} s  ours {ours:.2f} s  ratio {peer / ours:.1f}"
            )


if __name__ == "__main__":
    main()
