"""Token ids on tokenizers that behave as those of real models do: lm-eval's own class, and the text as it stands, say what is right."""

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clbench.data.encoder import Encoder
from clbench.examine.lm import StudentLM
from clbench.examine.student import Student
from clbench.models.tiny import word_tokenizer
from clbench.types import Example, UserMistake
from tests.test_probes import SENTENCES

MOST = 24
KINDS = {
    "llama": "spaces as ▁, one put before the text, BOS added (Llama-2, Mistral, Phi-3)",
    "metaspace": "the same by a pre-tokenizer (newer conversions of them)",
    "gemma": "spaces as ▁, none put before the text, BOS added",
    "gpt2": "bytes, no BOS added, BOS and EOS one token (GPT-2, NeoX, Falcon)",
    "qwen": "bytes, no BOS at all",
    "bloom": "bytes, no BOS added, though there is one",
}


def tokenizer_like(kind: str) -> PreTrainedTokenizerFast:
    bytes_ = kind in ("gpt2", "qwen", "bloom")
    tokenizer = Tokenizer(models.BPE(unk_token=None if bytes_ else "<unk>"))
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_ else [*"▁?!.,:;\n", *map(chr, range(33, 127))]
    if bytes_:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        # Trained as SentencePiece does, within words; used without splitting, as the conversions are.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "metaspace" else "never")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    texts = [f"{sentence} {sentence}?" for sentence in SENTENCES]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind in ("llama", "gemma"):
        replaced = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if kind == "llama" else replaced
        )
        tokenizer.pre_tokenizer = None
    if not bytes_:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bos = {"qwen": None, "gpt2": "</s>"}.get(kind, "<s>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if fast.bos_token is None:
        fast.bos_token = "</s>"  # as load_tokenizer does
    return fast


def student_with(tokenizer: PreTrainedTokenizerFast) -> Student:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MOST,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Student(LlamaForCausalLM(config).eval(), Encoder(tokenizer, max_length=MOST))


def hflm(student: Student):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=student.model, tokenizer=student.encoder.tokenizer, batch_size=1, device="cpu")


def instances(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


CONTEXTS = [
    ("", "A dog"),
    ("", " yes"),
    ("Does the dog bark?", " yes"),
    ("Does the dog bark? ", "no"),
    ("Answer:", " the man"),
    ("<s>A dog", " barks"),
    ("A man</s> spelled <pad> it", " out</s>"),
    (" ".join(SENTENCES), " a dog"),
    (" ".join(SENTENCES), " and the old man"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_reads_the_same_tokens_from_us_as_from_its_own_class(kind):
    student = student_with(tokenizer_like(kind))
    ours, theirs = StudentLM(student), hflm(student)
    assert ours.max_length == theirs.max_length == MOST
    asked = instances("loglikelihood", *CONTEXTS)
    pairs = zip(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True)
    for (value, greedy), (expected, expected_greedy) in pairs:
        assert value == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy
    whole = instances("loglikelihood_rolling", ("",), ("A dog",), (" ".join(SENTENCES),), ("<s>A</s>dog",))
    expected = theirs.loglikelihood_rolling(whole, disable_tqdm=True)
    assert ours.loglikelihood_rolling(whole) == pytest.approx(expected, abs=1e-3)
    settings = {"until": ["\n"], "max_gen_toks": 5}
    written = instances("generate_until", *((context, settings) for context, _ in CONTEXTS if context))
    assert ours.generate_until(written) == theirs.generate_until(written, disable_tqdm=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["Does the dog bark?", "Text: a man\nAnswer:", "bark"])
@pytest.mark.parametrize("answer", ["yes", "the old man.", "12"])
def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt(kind, prompt, answer):
    tokenizer = tokenizer_like(kind)
    encoder = Encoder(tokenizer, max_length=100)
    whole = tokenizer(f"{prompt} {answer}")["input_ids"]  # with BOS where the tokenizer gives one by itself
    encoded = encoder.example(Example(id="0", prompt=prompt, answer=answer))
    assert encoded.ids == (*whole, tokenizer.eos_token_id)
    assert (encoded.ids[0] == tokenizer.bos_token_id) == (kind not in ("gpt2", "qwen", "bloom"))
    assert encoded.ids[: encoded.answer_start] == encoder.prompt(prompt)
    assert encoded.ids[encoded.answer_start : -1] == encoder.answer(answer)


def test_without_a_bos_a_long_prompt_keeps_its_end_and_an_empty_one_begins_with_the_token_that_stands_for_it():
    tokenizer = tokenizer_like("qwen")
    encoder = Encoder(tokenizer, max_length=5)
    whole = encoder.prompt("Does the dog bark?")
    assert whole == tuple(tokenizer("Does the dog bark?")["input_ids"]) and len(whole) > 4
    example = Example(id="0", prompt="Does the dog bark?", answer="1")
    answer = (*encoder.answer("1"), tokenizer.eos_token_id)
    assert encoder.example(example).ids == (*whole[len(answer) - 5 :], *answer)
    assert encoder.prompt("") == (tokenizer.eos_token_id,)


def test_a_word_tokenizer_of_ours_puts_one_bos_before_a_text_for_lm_eval_and_answers_keep_their_tokens():
    tokenizer = word_tokenizer("does the dog bark yes no".split())
    encoder = Encoder(tokenizer, max_length=100)
    assert encoder.own("the dog", special=True) == encoder.prompt("the dog") == (tokenizer.bos_token_id, 5, 6)
    assert encoder.answer("yes") == tuple(encoder.text(" yes")) == (8,)


def test_a_token_that_spans_context_and_continuation_is_refused_in_one_line():
    student = student_with(tokenizer_like("gpt2"))
    assert student.encoder.own("the", special=True) == student.encoder.own("the", special=True)
    with pytest.raises(UserMistake, match="spans") as refused:
        StudentLM(student).loglikelihood(instances("loglikelihood", ("A do", "g")))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserMistake, match="tokens"):
        StudentLM(student).loglikelihood(instances("loglikelihood", ("A", " and".join(SENTENCES))))
