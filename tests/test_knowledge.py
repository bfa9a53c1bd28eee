"""The lm-eval probe: the same numbers as lm-eval's own model class, item by item; groups, frozen items, floors, rows that lie offline."""

import copy
import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from lm_eval.api.instance import Instance
from lm_eval.config.group import GroupConfig
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.tasks import TaskManager
from omegaconf import OmegaConf

from clbench.build import build
from clbench.config.composition import CONF_DIR, compose
from clbench.data.encoder import Encoder
from clbench.examine.knowledge import Knowledge, answer, names_in
from clbench.examine.knowledge.ledger_row import aggregated, of_items
from clbench.examine.lm import StudentLM
from clbench.examine.lm_tasks import resolve, subset, task_index, whole_index
from clbench.examine.student import Student
from clbench.examine.text import Text
from clbench.types import UserMistake
from tests.test_probes import SENTENCES, STREAM, tiny_student

REAL_ROWS = os.environ.get("CLBENCH_DATA")
FOLDERS = {
    "Rowan/hellaswag": "hellaswag",
    "allenai/ai2_arc:ARC-Challenge": "arc_challenge",
    "baber/piqa": "piqa",
    "winogrande": "winogrande",
    "allenai/winogrande": "winogrande",
    "cais/mmlu": "mmlu",
    "truthfulqa/truthful_qa": "truthful_qa_mc",
    "EleutherAI/lambada_openai": "lambada_openai",
    "EleutherAI/wikitext_document_level": "pages",
    "openai/gsm8k": "gsm8k",
}
COLUMNS = {"cais/mmlu": "subject"}
TASKS = ["hellaswag", "arc_challenge", "piqa", "winogrande", "mmlu_stem"]
SEARCH = list(OmegaConf.load(Path(CONF_DIR) / "probe" / "mini.yaml").probes.knowledge.search)
HALVES = [sentence.split(" and ") for sentence in SENTENCES]


@pytest.fixture(scope="module")
def student():
    return tiny_student()


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def named(name):
    """The tasks behind each row of the ledger that `name` stands for."""
    return resolve(name, task_index([name], search=SEARCH))


def subjects():
    """The 19 subjects of mmlu_stem in the order in which lm-eval's group lists them."""
    return [task.config["dataset_name"] for task in named("mmlu_stem")["mmlu_stem"].tasks]


def hellaswag_row(i, half):
    return {
        "ind": i,
        "activity_label": "Work",
        "ctx_a": half[0],
        "ctx_b": "",
        "ctx": half[0],
        "endings": [half[-1] if k == i % 4 else HALVES[(i + k + 1) % 5][-1] + "!" * k for k in range(4)],
        "source_id": "",
        "split": "val",
        "split_type": "",
        "label": str(i % 4),
    }


def truthful_row(i, sentence):
    return {
        "question": f"What do we know of {sentence[:12]}?",
        "mc1_targets": {"choices": [f"Nothing, {i}.", sentence], "labels": [1, 0]},
        "mc2_targets": {"choices": ["Nothing.", "Little.", sentence, "All."][: 2 + i], "labels": [1, 1, 0, 0][: 2 + i]},
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Invented rows in the shape of the hub's datasets."""
    root = tmp_path_factory.mktemp("data")
    write(root / "hellaswag", "validation", [hellaswag_row(i, half) for i, half in enumerate(HALVES)])
    arc = [
        {
            "id": str(i),
            "question": f"What happens when {sentence[:30]}?",
            "choices": {"text": ["fish", "the old book", "butter and salt", "a tree"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i, sentence in enumerate(SENTENCES)
    ]
    write(root / "arc_challenge", "test", arc)
    pairs = [{"goal": s[:20], "sol1": s[20:], "sol2": s[25:], "label": i % 2} for i, s in enumerate(SENTENCES)]
    write(root / "piqa", "validation", pairs)
    gaps = [
        {
            "sentence": f"The dog saw the cat because _ {s[:12]}.",
            "option1": "the dog",
            "option2": "the cat",
            "answer": str(1 + i % 2),
        }
        for i, s in enumerate(SENTENCES)
    ]
    write(root / "winogrande", "validation", gaps)
    questions = [
        {
            "question": f"{place} {subject}: {SENTENCES[k % 5]}",
            "subject": subject,
            "choices": [w * 2 for w in "wxyz"],
            "answer": (k + place) % 3,
        }
        # The file lists the subjects backwards: their order in it may not matter.
        for k, subject in reversed(list(enumerate(subjects())))
        for place in range(2)
    ]
    write(root / "mmlu", "test", questions)
    write(root / "truthful_qa_mc", "validation", [truthful_row(i, s) for i, s in enumerate(SENTENCES[:3])])
    write(root / "pages", "test", [{"page": f" = Page {k} = \n \n " + " , ".join(SENTENCES[k:] * 3)} for k in range(3)])
    sums = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(7)]
    write(root / "gsm8k", "train", sums)
    write(root / "gsm8k", "test", sums[:2])
    return root


def probe(data_dir, *tasks, **settings):
    where = {"data_dir": str(data_dir), "folders": FOLDERS, "columns": COLUMNS, "search": SEARCH}
    return Knowledge(name="knowledge", tasks=list(tasks), **where | settings)


@pytest.fixture(scope="module")
def knowledge(data_dir):
    return probe(data_dir, *TASKS)


def hflm(student, **settings):
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=student.model,
        tokenizer=student.encoder.tokenizer,
        batch_size=3,
        max_length=student.model.config.max_position_embeddings,
        device="cpu",
        **{"add_bos_token": True} | settings,
    )


def evaluated(student, row):
    """lm-eval's own run of the tasks behind a row of the ledger."""
    from lm_eval.evaluator import evaluate

    return evaluate(
        hflm(student),
        task_dict={task.task_name: task for task in row.tasks},
        samples={task.task_name: list(ids) for task, ids in zip(row.tasks, row.chosen, strict=True)},
        bootstrap_iters=0,
        log_samples=True,
    )


def assert_equal_item_by_item(student, knowledge):
    found = {(s.task, s.metric): s for s in knowledge.measure(student, STREAM, 1)}
    for row in knowledge.ledger_rows:
        samples = evaluated(student, row)["samples"]
        ordered = [s for t in row.tasks for s in sorted(samples[t.task_name], key=lambda sample: sample["doc_id"])]
        metrics = [metric for metric in ("acc", "acc_norm") if metric in ordered[0]]
        assert metrics and all(len(indices) for indices in row.chosen)
        for metric in metrics:
            assert list(found[row.name, metric].items) == [sample[metric] for sample in ordered], (row.name, metric)


def test_scores_equal_lm_evals_own_model_item_by_item(student, knowledge):
    assert_equal_item_by_item(student, knowledge)


@pytest.mark.skipif(REAL_ROWS is None, reason="CLBENCH_DATA names no folder of real rows")
def test_scores_of_real_rows_equal_lm_evals_own_model_item_by_item():
    tasks = ["hellaswag", "arc_challenge", "piqa", "winogrande", "truthfulqa_mc1", "mmlu_anatomy", "mmlu_virology"]
    items = {task: 10 if task.startswith("mmlu") else 20 for task in tasks}
    knowledge = probe(REAL_ROWS, *tasks, items=items)
    assert_equal_item_by_item(tiny_student(positions=2048), knowledge)


@pytest.mark.parametrize(
    ("name", "choices", "gold"),
    [
        ("hellaswag", lambda doc: doc["endings"], lambda doc: int(doc["label"])),  # acc_norm: per character
        ("winogrande", None, lambda doc: int(doc["answer"]) - 1),  # acc
        ("mmlu_stem", None, lambda doc: doc["answer"]),
    ],
)
def test_the_probability_of_the_right_choice_is_the_softmax_over_lm_evals_log_likelihoods(
    student, knowledge, name, choices, gold
):
    row = next(row for row in knowledge.ledger_rows if row.name == name)
    found = {s.metric: s for s in knowledge.measure(student, STREAM, 1) if s.task == name}["probability"]
    samples = evaluated(student, row)["samples"]
    ordered = [s for t in row.tasks for s in sorted(samples[t.task_name], key=lambda sample: sample["doc_id"])]
    expected = []
    for sample in ordered:
        nats = [value for value, _ in sample["filtered_resps"]]
        if choices:
            nats = [value / len(choice) for value, choice in zip(nats, choices(sample["doc"]), strict=True)]
        shares = [math.exp(value) for value in nats]
        expected.append(shares[gold(sample["doc"])] / sum(shares))
    assert found.items == pytest.approx(expected, abs=1e-4) and found.n == len(expected)
    assert found.value == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_written_answers_and_running_text_have_no_probability_of_the_right_choice(data_dir):
    student = tiny_student(positions=1024)
    for name in ("gsm8k", "wikitext"):
        assert "probability" not in {s.metric for s in probe(data_dir, name).measure(student, STREAM, 0)}


def test_log_likelihoods_equal_lm_evals_own(student, knowledge):
    requests = [one for row in knowledge.ledger_rows for task in row.tasks for one in task.instances][:200]
    theirs = hflm(student).loglikelihood(requests, disable_tqdm=True)
    ours = StudentLM(student).loglikelihood(requests)
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_what_is_read_does_not_depend_on_the_longest_training_input(student, knowledge):
    def outcomes(one):
        return [answer(row, StudentLM(one)) for row in knowledge.ledger_rows[:2]]

    assert outcomes(tiny_student(max_length=12)) == outcomes(student)
    assert StudentLM(student, max_length=12).max_length == 12 and StudentLM(student).max_length == 256


def test_rolling_log_likelihood_equals_lm_evals_own_and_gives_its_word_perplexity(student, data_dir):
    knowledge = probe(data_dir, "wikitext")
    found = {s.metric: s for s in knowledge.measure(student, STREAM, 1)}
    theirs = evaluated(student, knowledge.ledger_rows[0])["results"]["wikitext"]
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found[metric].value == pytest.approx(theirs[f"{metric},none"], rel=1e-5)
        assert found[metric].n == 3 and math.isnan(found[metric].stderr) and found[metric].items == ()


def test_the_perplexity_probe_gives_lm_evals_rolling_log_likelihood_of_the_text_itself(student, data_dir):
    (task,) = probe(data_dir, "wikitext").ledger_rows[0].tasks
    texts = [instance.args[0] for instance in task.instances]
    theirs = hflm(student, add_bos_token=False).loglikelihood_rolling(task.instances, disable_tqdm=True)
    text = Text(name="p", task="t", texts=texts, window=256)
    text.begin(student)
    (score,) = [score for score in text.measure(student, STREAM, 0) if score.metric == "nll_token"]
    assert score.items == pytest.approx([-value for value in theirs], rel=1e-5)
    assert max(len(student.encoder.text(text)) for text in texts) > 256  # more than one window somewhere


def asked(*prompts, **settings):
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(settings)), idx=0) for prompt in prompts
    ]


def test_generated_answers_equal_lm_evals_own_with_stops_and_lengths(student):
    prompts = [SENTENCES[0], "A dog", SENTENCES[3][:30], "She opens"]
    written = StudentLM(student).generate_until(asked(*prompts, until=[], max_gen_toks=12))
    stop = written[1][3:5]  # something that the second answer really says
    requests = [
        *asked(*prompts, until=[], max_gen_toks=12),
        *asked(*prompts, until=[stop], max_gen_toks=12),
        *asked(*prompts, until=["never", stop], max_gen_toks=5),
    ]
    ours = StudentLM(student).generate_until(requests)
    assert ours == hflm(student).generate_until(requests, disable_tqdm=True)
    assert ours[:4] == written and ours[5] == written[1].split(stop)[0] != written[1]
    assert postprocess_generated_text(" 4 Question: 5", ["5", "Question:"], None) == " 4 "


def test_requests_of_equal_settings_are_generated_in_one_batch_that_ends_with_its_last_stop(student, monkeypatch):
    calls = []

    def spy(ids, **arguments):
        written = generate(ids, **arguments)
        calls.append((len(ids), written.shape[1] - ids.shape[1]))
        return written

    generate = student.model.generate
    monkeypatch.setattr(student.model, "generate", spy)
    prompts = ["A dog", "She opens", "A man"]
    full = StudentLM(student).generate_until(asked(*prompts, until=[], max_gen_toks=12))
    assert calls == [(3, 12)]
    stops = [answer[3:5] for answer in full]
    calls.clear()
    StudentLM(student).generate_until([*asked(*prompts, until=stops, max_gen_toks=12), *asked("A", max_gen_toks=3)])
    assert [rows for rows, _ in calls] == [3, 1] and calls[0][1] < 12


def test_a_task_that_samples_or_leaves_no_room_for_its_prompt_is_refused(student):
    with pytest.raises(UserMistake, match="do_sample"):
        StudentLM(student).generate_until(asked("A", do_sample=True, temperature=0.7))
    with pytest.raises(UserMistake, match="256 tokens"):
        StudentLM(student).generate_until(asked("A", until=[]))


def test_a_generated_task_is_scored_by_each_of_its_filters(data_dir):
    student = tiny_student(positions=1024)
    knowledge = probe(data_dir, "gsm8k")
    found = {s.metric: s for s in knowledge.measure(student, STREAM, 0)}
    assert set(found) == {"exact_match,strict-match", "exact_match,flexible-extract", "chance"}
    assert [found[metric].n for metric in sorted(found)] == [2, 2, 2] and found["chance"].value == 0.0
    prompt = knowledge.ledger_rows[0].tasks[0].instances[0].args[0]
    assert prompt.count("####") == 5  # five examples, the same ones every time
    assert prompt == probe(data_dir, "gsm8k").ledger_rows[0].tasks[0].instances[0].args[0]


def test_requests_are_built_once_and_scored_again(student, knowledge):
    instances = [task.instances for row in knowledge.ledger_rows for task in row.tasks]
    first = [(s.task, s.metric, s.value) for s in knowledge.measure(student, STREAM, 1)]
    assert first == [(s.task, s.metric, s.value) for s in knowledge.measure(student, STREAM, 1)]
    again = [task.instances for row in knowledge.ledger_rows for task in row.tasks]
    assert all(one is other for one, other in zip(instances, again, strict=True))


def test_the_tokens_it_reads_are_counted(data_dir):
    student = tiny_student()
    list(probe(data_dir, "piqa").measure(student, STREAM, 1))
    assert student.tokens_scored > 5 * 2 * 10


def test_floors_are_those_of_the_rows(student, data_dir, knowledge):
    found = {(s.task, s.metric): s.value for s in knowledge.measure(student, STREAM, 0)}
    assert [found[task, "chance"] for task in TASKS] == [0.25, 0.25, 0.5, 0.5, 0.25]
    # Gold letters (k + place) % 3 of 19 subjects, two rows each: A 13, B 13, C 12.
    assert found["mmlu_stem", "majority"] == pytest.approx(13 / 38)
    # The invented rows of two more tasks offer the same choices; golds 0 1 2 3 0 and 0 1 0 1 0.
    assert (found["arc_challenge", "majority"], found["winogrande", "majority"]) == (0.4, 0.6)
    # Where choices differ between rows it is the commonest position: golds 0 1 2 3 0 and 0 1 0 1 0.
    assert (found["hellaswag", "majority"], found["piqa", "majority"]) == (0.4, 0.6)
    assert ("piqa", "chance") not in {(s.task, s.metric) for s in knowledge.measure(student, STREAM, 1)}
    # A task may score a share of probability: two of two, of three, of four choices are right.
    shares = {s.metric: s for s in probe(data_dir, "truthfulqa_mc2").measure(student, STREAM, 0)}
    assert shares["chance"].items == pytest.approx((2 / 2, 2 / 3, 2 / 4))
    # The right choice comes always first, by the way the rows are written: its position is no answer that a model could give.
    found = {s.metric: s.value for s in probe(data_dir, "truthfulqa_mc1").measure(student, STREAM, 0)}
    assert found["chance"] == 0.5 and "majority" not in found


@pytest.mark.parametrize("form", ["multiple_choice", "generate_until"])
def test_always_the_same_answer_scores_the_majority_wherever_its_words_stand(form, student, tmp_path):
    """Four of five answers are yes, which is offered first and second in turn, or written."""
    rows = [
        {"text": f"Is {k} so?", "offered": ["yes", "no"][:: 1 if k % 2 else -1], "right": "no" if k % 5 == 0 else "yes"}
        for k in range(20)
    ]
    write(tmp_path / "quiz", "all", rows)
    yaml = {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "quiz" / "all.jsonl")}},
        "test_split": "test",
        "output_type": form,
        "doc_to_text": "{{text}}",
        "doc_to_target": "right",
    }
    if form == "multiple_choice":
        yaml |= {"doc_to_choice": "{{offered}}"}
    else:
        yaml |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}, "metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "own").mkdir()
    OmegaConf.save(OmegaConf.create(yaml), tmp_path / "own" / "quiz.yaml")
    knowledge = Knowledge(name="k", tasks=["quiz"], include_path=str(tmp_path / "own"))
    found = {s.metric: s for s in knowledge.measure(student, STREAM, 0)}
    assert found["majority"].value == 0.8
    assert sorted(found["majority"].items) == [0.0] * 4 + [1.0] * 16


def test_lambada_has_a_chance_of_zero_and_a_perplexity_of_the_corpus(student, tmp_path):
    write(tmp_path / "lambada_openai", "test", [{"text": sentence.rstrip(".")} for sentence in SENTENCES])
    knowledge = probe(tmp_path, "lambada_openai")
    found = {s.metric: s for s in knowledge.measure(student, STREAM, 0)}
    theirs = evaluated(student, knowledge.ledger_rows[0])["results"]["lambada_openai"]
    assert found["acc"].value == theirs["acc,none"] and found["chance"].value == 0.0
    assert found["perplexity"].value == pytest.approx(theirs["perplexity,none"], rel=1e-4)
    mean = sum(found["perplexity"].items) / 5  # its items are log-likelihoods in nats
    assert found["perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-6)
    assert knowledge.documents()["lambada_openai"][0] == SENTENCES[0].rstrip(".")


def test_a_group_is_one_row_whose_items_stand_in_the_order_of_its_tasks(student, knowledge):
    row = knowledge.ledger_rows[-1]
    assert row.name == "mmlu_stem" and len(row.tasks) == 19
    (score,) = [s for s in knowledge.measure(student, STREAM, 1) if (s.task, s.metric) == ("mmlu_stem", "acc")]
    alone = [answer(replace(row, tasks=(task,)), StudentLM(student))["acc"][0] for task in row.tasks]
    assert score.n == 38 and list(score.items) == [item for one in alone for item in one]
    texts = knowledge.documents()["mmlu_stem"]
    assert [text.split()[1].rstrip(":") for text in texts[::2]] == subjects()
    assert [text.split()[0] for text in texts] == ["0", "1"] * 19


def from_files(data_dir, task, *splits):
    """lm-eval's own task as its users point it at files, without any code of ours."""
    files = {split: str(data_dir / FOLDER_OF.get(task, task) / f"{split}.jsonl") for split in splits}
    changes = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return {"group": "one", "task": [{"task": task, **changes}]}


SCORED = {"arc_challenge": "test"}
FOLDER_OF = {"triviaqa": "trivia_qa"}
SHOWN = {"hellaswag": 3, "arc_challenge": 4, "winogrande": 2, "triviaqa": 2, "mmlu_anatomy": 5}


@pytest.fixture(scope="module")
def shown_dir(data_dir, tmp_path_factory):
    """The invented rows, and others for examples where lm-eval takes them."""
    root = shutil.copytree(data_dir, tmp_path_factory.mktemp("shown"), dirs_exist_ok=True)
    write(root / "hellaswag", "train", [hellaswag_row(i, HALVES[(i + 2) % 5]) for i in range(9)])
    for name, split in (("arc_challenge", "test"), ("winogrande", "validation")):
        rows = (root / name / f"{split}.jsonl").read_text().splitlines()
        write(root / name, "train", [json.loads(row) for row in rows[::-1]])
    trivia = [
        {"question": f"Who {s[: i + 9]}", "answer": {"aliases": [s[-9:], s[:4]]}} for i, s in enumerate(SENTENCES)
    ]
    write(root / "trivia_qa", "train", trivia)
    write(root / "trivia_qa", "validation", trivia[:3])
    dev = [
        {"question": f"{k} {subject}?", "subject": subject, "choices": [w * 2 for w in "wxyz"], "answer": k % 4}
        for subject in subjects()
        for k in range(5)
    ]
    write(root / "mmlu", "dev", dev)
    for split in ("dev", "test"):  # for lm-eval, which takes a whole file
        rows = map(json.loads, (root / "mmlu" / f"{split}.jsonl").read_text().splitlines())
        write(root / "mmlu_anatomy", split, [row for row in rows if row["subject"] == "anatomy"])
    return root


CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}: {{ m.content | trim }}\n\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def chatting(student):
    """The same student, whose tokenizer has a chat template that it uses; BOS stands in the template."""
    tokenizer = copy.deepcopy(student.encoder.tokenizer)
    tokenizer.chat_template = CHAT
    return Student(student.model, Encoder(tokenizer, max_length=student.encoder.max_length, chat=True))


def test_a_chat_is_rendered_as_by_lm_evals_own_class(student):
    student = chatting(student)
    ours, theirs = StudentLM(student), hflm(student)
    told, asked, said = ({"role": role, "content": f"{role}s words"} for role in ("system", "user", "assistant"))
    for chat in ([asked], [told, asked], [asked, said, asked]):
        assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.apply_chat_template([asked, said], False) == theirs.apply_chat_template([asked, said], False)
    text = ours.apply_chat_template([asked])
    assert ours.tok_encode(text) == theirs.tok_encode(text) == list(student.encoder.prompt(asked["content"]))
    assert ours.tok_encode(text).count(student.encoder.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("chat", [False, True])
def test_shots_give_what_lm_eval_gives_item_by_item(shown_dir, tmp_path, monkeypatch, chat):
    from lm_eval.evaluator import simple_evaluate

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    student = tiny_student(positions=1500)
    student = chatting(student) if chat else student
    folders = FOLDERS | {"mandarjoshi/trivia_qa": "trivia_qa"}
    knowledge = probe(shown_dir, *SHOWN, shots=SHOWN, folders=folders, search=[*SEARCH, "triviaqa"])
    assert [row.name for row in knowledge.ledger_rows] == [f"{task}@{shots}" for task, shots in SHOWN.items()]
    knowledge.begin(student)
    found = {(s.task, s.metric): s for s in knowledge.measure(student, STREAM, 1)}
    home = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(include_defaults=False, include_path=[home / name for name in (*SEARCH, "triviaqa")])
    for task, shots in SHOWN.items():
        splits = ("dev", "test") if task == "mmlu_anatomy" else ("train", SCORED.get(task, "validation"))
        theirs = simple_evaluate(
            hflm(student),
            tasks=[from_files(shown_dir, task, *splits)],
            num_fewshot=shots,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
        samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
        for metric in {"acc", "acc_norm", "exact_match"} & samples[0].keys():
            assert list(found[f"{task}@{shots}", metric].items) == [sample[metric] for sample in samples]
        (row,) = [row for row in knowledge.ledger_rows if row.name == f"{task}@{shots}"]
        prompts = [asked[0].args[0] for _, asked in row.documents()]
        assert prompts == [sample["arguments"][0][0] for sample in samples]
        assert all(prompt.startswith("<s>") and prompt.count("user:") == shots + 1 for prompt in prompts if chat)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_ROWS, reason="CLBENCH_DATA names no folder of real rows")
def test_published_shots_of_real_rows_equal_lm_evals_own():
    student = tiny_student(positions=12_000)
    knowledge = probe(REAL_ROWS, "arc_challenge", "mmlu", shots={"arc_challenge": 25, "mmlu": 5}, limit=1)
    assert [row.name for row in knowledge.ledger_rows] == ["arc_challenge@25", "mmlu@5"]
    assert_equal_item_by_item(student, knowledge)


def test_a_group_shows_the_examples_of_each_of_its_tasks_which_need_no_other_split(shown_dir):
    (row,) = probe(shown_dir, "mmlu_stem", shots=5, items={"mmlu_stem": 19}).ledger_rows
    assert row.name == "mmlu_stem@5" and len(row.documents()) == 19
    for subject, (_, asked) in zip(subjects(), row.documents(), strict=True):
        questions = [line for line in asked[0].args[0].splitlines() if line.endswith(f"{subject}?")]
        assert questions == [f"{k} {subject}?" for k in range(5)]


def test_a_name_tells_of_shots_that_the_tasks_yaml_does_not(shown_dir):
    def names(*tasks, **settings):
        return [row.name for row in probe(shown_dir, *tasks, **settings).ledger_rows]

    assert names("hellaswag", "gsm8k", shots=5) == ["hellaswag@5", "gsm8k"]  # five is gsm8k's own number
    assert names("hellaswag", "gsm8k", shots={"gsm8k": 2, "mmlu": 5}) == ["hellaswag", "gsm8k@2"]
    assert names({"task": "hellaswag", "num_fewshot": 2}, "hellaswag") == ["hellaswag@2", "hellaswag"]
    assert names("truthfulqa_mc1", shots=5) == ["truthfulqa_mc1"]  # 0 by its yaml, which lm-eval keeps
    chosen = [
        probe(shown_dir, "piqa", "hellaswag", shots=s, items={"hellaswag": 2}).ledger_rows[1].chosen
        for s in (None, {"hellaswag": 3})
    ]
    assert chosen[0] == chosen[1] and len(chosen[0][0]) == 2  # what is frozen are the questions


def test_shots_that_cannot_be_had_are_mistakes(data_dir, shown_dir):
    for shots, said in (
        ({"hellasag": 5}, "'hellasag'"),
        (-1, "whole numbers"),
        ({"piqa": "5"}, "whole numbers"),
        (True, "whole numbers"),
    ):
        with pytest.raises(UserMistake, match=said):
            probe(shown_dir, "hellaswag", shots=shots)
    with pytest.raises(UserMistake, match=r"hellaswag/train.jsonl"):
        probe(data_dir, "hellaswag", shots=5)
    with pytest.raises(UserMistake, match="is to show 10 examples, its split for them has 9"):
        probe(shown_dir, "hellaswag", shots=10)


def test_shots_are_a_key_of_the_configuration(overrides):
    config = compose([*overrides, "probe.shots={mmlu:5}", "probe.tasks=[{task:mmlu,num_fewshot:5}]"])
    assert config.probe.probes["knowledge"]["shots"] == {"mmlu": 5}
    assert config.probe.probes["knowledge"]["tasks"] == [{"task": "mmlu", "num_fewshot": 5}]


def test_an_entry_of_probe_tasks_is_one_of_lm_eval_groups(overrides, command):
    """It changes settings of its task; one that names nothing is told."""
    config = compose([*overrides, "probe.tasks=[{task:world_facts_x64,doc_to_text:'So {{question}}'},world_facts_x8]"])
    (knowledge,) = [probe for probe in build(config).probes if isinstance(probe, Knowledge)]
    changed, plain = knowledge.ledger_rows
    assert (changed.name, plain.name) == ("world_facts_x64", "world_facts_x8")
    assert all(request.args[0].startswith("So ") for request in changed.tasks[0].instances)
    for entry in (
        "{num_fewshot:1}",
        "{group:g,task:[world_facts_x8,{num_fewshot:1}]}",
        "{group:g,task:[1]}",
        "t0_eval",
    ):
        code, _, errors = command("clbench", *overrides, f"probe.tasks=[{entry}]")
        assert code == 2 and "names neither a task nor a group of lm-eval" in errors


def test_what_a_group_averages_over_its_tasks_is_what_lm_eval_averages(student, tmp_path, monkeypatch):
    from lm_eval.evaluator import simple_evaluate

    def task(name, split):
        files = {"data_files": {"test": str(tmp_path / "quiz" / f"{split}.jsonl")}}
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": files,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": ["no", "yes"],
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": "acc"}, {"metric": "f1"}],
        }

    rows = [{"text": f"{s[:20]}?", "label": k % 2} for k, s in enumerate([*SENTENCES, SENTENCES[0]])]
    write(tmp_path / "quiz", "short", rows[:2])
    write(tmp_path / "quiz", "long", [row | {"label": k // 3} for k, row in enumerate(rows[2:])])
    (tmp_path / "pairs").mkdir()
    group = {
        "group": "pair",
        "task": ["short", "long"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}, {"metric": "f1"}],
    }
    for name, yaml in {"short": task("short", "short"), "long": task("long", "long"), "pair": group}.items():
        OmegaConf.save(OmegaConf.create(yaml), tmp_path / "pairs" / f"{name}.yaml")
    (tmp_path / "pairs" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    knowledge = Knowledge(name="knowledge", tasks=["pair"], include="pairs:.")
    found = {s.metric: s for s in knowledge.measure(student, STREAM, 1)}
    # The same folder by its path; that other rows lie offline is no matter to tasks that name files of their own.
    by_path = Knowledge(name="k", tasks=["pair"], include_path=str(tmp_path / "pairs"), data_dir=str(tmp_path / "none"))
    assert {s.metric: s.items for s in by_path.measure(student, STREAM, 1)} == {k: s.items for k, s in found.items()}
    score, by_task = found["acc"], found["acc_by_task"]
    manager = TaskManager(include_path=str(tmp_path / "pairs"), include_defaults=False)
    settings: dict[str, Any] = {"task_manager": manager, "bootstrap_iters": 2, "verbosity": "ERROR"}
    theirs = simple_evaluate(hflm(student), tasks=["pair"], **settings)["results"]["pair"]
    assert score.value == pytest.approx(theirs["acc,none"]) and score.n == 6
    assert score.stderr == pytest.approx(theirs["acc_stderr,none"])
    assert score.value != pytest.approx(sum(score.items) / 6)
    assert by_task.items == (sum(score.items[:2]) / 2, sum(score.items[2:]) / 4) and by_task.value == score.value
    # F1 is no mean over items: the group's is the average of its tasks', by their sizes.
    assert found["f1"].value == pytest.approx(theirs["f1,none"]) and found["f1"].n == 6
    (row,) = knowledge.ledger_rows
    pooled = aggregated(replace(row, by_size={}), "f1", answer(row, StudentLM(student))["f1"])["f1"]
    assert pooled.n == 6 and pooled.value != pytest.approx(found["f1"].value)


def test_a_metric_that_so_few_documents_do_not_define_is_told():
    def share_of_the_rare(values):
        return sum(values) / sum(value > 1 for value in values)

    assert of_items([2, 4], share_of_the_rare).value == 3
    with pytest.raises(UserMistake, match=r"share_of_the_rare\) is not defined on the 2 documents"):
        of_items([0, 1], share_of_the_rare)


@pytest.mark.slow
def test_every_group_of_lm_eval_weighs_its_tasks_as_lm_eval_reads_its_yaml():
    """A second reader of the yamls beside `resolve`: lm-eval's own."""
    index, averaged = whole_index(), 0
    refused = {"flan_held_in", "t0_eval"}  # whose members are no tasks of the index
    for name in {*index.all_groups} - refused:
        stated = index.task_index[name].cfg.get("aggregate_metric_list")
        listed: Any = GroupConfig(group=name, aggregate_metric_list=stated).aggregate_metric_list
        for row in resolve(name, index).values():
            if row.asked == name and len(row.tasks) > 1:
                assert row.by_size == {one.metric: bool(one.weight_by_size) for one in listed or ()}, name
                averaged += bool(listed)
    assert averaged > 500


@pytest.mark.slow
def test_a_group_of_unlike_tasks_is_its_members():
    ((name, mmlu),) = named("mmlu").items()
    assert (name, len(mmlu.tasks), mmlu.tasks[0].config.get("num_fewshot")) == ("mmlu", 57, None)
    openllm = resolve("openllm", task_index(["openllm"], search=[*SEARCH, "benchmarks"]))
    # What the group sets for its members stands in their names; five is what gsm8k's own yaml says.
    assert {"arc_challenge@25", "hellaswag@10", "mmlu@5", "winogrande@5", "gsm8k"} < set(openllm)
    assert {task.config["num_fewshot"] for task in openllm["mmlu@5"].tasks} == {5}
    assert list(named("truthfulqa")) == ["truthfulqa_gen", "truthfulqa_mc1", "truthfulqa_mc2"]
    (arc,) = named("ai2_arc").values()
    assert [task.name for task in arc.tasks] == ["arc_challenge", "arc_easy"]


@pytest.mark.slow
def test_the_folders_that_are_searched_hold_all_that_their_names_stand_for():
    few, whole = task_index([], search=SEARCH), task_index(["acp_bench"])  # which is named in a file that is no .yaml
    assert len(few.task_index) < 200 and len(whole.task_index) > 10_000
    for name in (*few.all_subtasks, *few.all_groups):
        assert resolve(name, few) == resolve(name, whole)
    assert set(OmegaConf.load(Path(CONF_DIR) / "probe" / "full.yaml").tasks) < {*few.all_subtasks, *few.all_groups}


def test_a_slip_in_a_name_is_told_without_reading_all_of_lm_eval(monkeypatch):
    monkeypatch.setattr("clbench.examine.lm_tasks.whole_index", lambda *_: pytest.fail("all of it is read"))
    with pytest.raises(UserMistake, match="'nonesuch', which lm-eval does not know"):
        Knowledge(name="k", tasks=["nonesuch"])
    with pytest.raises(UserMistake, match="'nonesuch', which lm-eval does not know"):
        Knowledge(name="k", tasks=[{"group": "nonegroup", "task": ["piqa", {"task": "nonesuch"}]}], search=["piqa"])
    assert list(names_in(["a", {"group": "b", "task": ["c", {"task": "d", "num_fewshot": 1}]}])) == ["a", "b", "c", "d"]


def test_frozen_items_are_those_of_the_lowest_hashes():
    ranked = sorted(range(50), key=lambda index: hashlib.sha256(f"piqa/{index}".encode()).hexdigest())
    assert subset("piqa", size=50, wanted=7) == tuple(sorted(ranked[:7]))
    assert set(subset("piqa", size=50, wanted=7)) < set(subset("piqa", size=50, wanted=8))
    assert subset("piqa", size=50, wanted=7) != subset("winogrande", size=50, wanted=7)
    assert subset("piqa", size=3, wanted=None) == (0, 1, 2) and subset("piqa", size=3, wanted=[2, 0]) == (0, 2)
    for wanted in (0, 51, [], [1, 1], [50], [-1]):
        with pytest.raises(UserMistake, match="piqa"):
            subset("piqa", size=50, wanted=wanted)


def test_frozen_items_score_as_they_do_in_the_whole_task(student, data_dir, knowledge):
    whole = {(s.task, s.metric): s.items for s in knowledge.measure(student, STREAM, 1)}
    few = probe(data_dir, "hellaswag", "piqa", "mmlu_stem", items={"hellaswag": [3, 1], "piqa": 2, "mmlu_stem": 19})
    found = {(s.task, s.metric): s.items for s in few.measure(student, STREAM, 1)}
    assert found["hellaswag", "acc_norm"] == tuple(whole["hellaswag", "acc_norm"][i] for i in (1, 3))
    chosen = subset("piqa", size=5, wanted=2)
    assert found["piqa", "acc"] == tuple(whole["piqa", "acc"][i] for i in chosen)
    # An equal number of each subject, each subject drawn by its own name.
    picked = [subset(f"mmlu_{subject}", size=2, wanted=1)[0] for subject in subjects()]
    assert few.ledger_rows[2].chosen == tuple((i,) for i in picked) and 0 < sum(picked) < 19
    assert found["mmlu_stem", "acc"] == tuple(whole["mmlu_stem", "acc"][2 * k + i] for k, i in enumerate(picked))
    assert [len(indices) for indices in probe(data_dir, "piqa", items={"piqa": 3}, limit=2).ledger_rows[0].chosen] == [
        2
    ]


def test_items_that_cannot_be_meant_are_mistakes(data_dir):
    for items, said in (
        ({"mmlu_stem": 20}, "multiple, e.g. 19"),
        ({"mmlu_stem": [1]}, "list them by task"),
        ({"piqa": 6}, "has 5"),
        ({"pika": 2}, "'pika'"),
    ):
        with pytest.raises(UserMistake, match=said):
            probe(data_dir, "mmlu_stem" if "mmlu_stem" in items else "piqa", items=items)
    with pytest.raises(UserMistake, match="'openllm'.*reported one by one"):
        probe(data_dir, "openllm", items={"openllm": 6}, search=[*SEARCH, "benchmarks"])
    probe(data_dir, "piqa", items={"piqa": 2, "boolq": 400})  # what is not measured lies idle


def test_documents_are_questions_with_their_choices(data_dir, knowledge):
    texts = knowledge.documents()
    assert texts["piqa"][0] == f"Question: {SENTENCES[0][:20]}\nAnswer:\n{SENTENCES[0][20:]}\n{SENTENCES[0][25:]}"
    assert texts["winogrande"][0].split("\n") == [
        f"The dog saw the cat because the {animal} {SENTENCES[0][:12]}." for animal in ("dog", "cat")
    ]
    assert len(texts["mmlu_stem"]) == 38
    assert probe(data_dir, "gsm8k").documents()["gsm8k"] == [
        f"Question: What is {i} plus {i}?\nAnswer:" for i in (0, 1)
    ]


def test_datasets_are_the_hub_addresses_of_the_tasks(data_dir, knowledge):
    specs = knowledge.datasets()
    assert len(specs) == 4 + 19
    assert [(s.name, s.hub, s.config) for s in specs[1:2]] == [("arc_challenge", "allenai/ai2_arc", "ARC-Challenge")]
    assert (specs[-1].name, specs[-1].hub, specs[-1].config) == ("mmlu", "cais/mmlu", subjects()[-1])
    rows = {"piqa": [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}]}
    assert Knowledge(name="knowledge", tasks=["piqa"], rows=rows, search=SEARCH).datasets() == ()


def test_rows_that_are_not_there_are_mistakes(data_dir):
    with pytest.raises(UserMistake, match="nonesuch"):
        probe(data_dir, "nonesuch")
    with pytest.raises(UserMistake, match="folders"):
        probe(data_dir, "piqa", folders={})
    # ARC-Easy has the same hub name as ARC-Challenge: its rows may not be taken for it.
    with pytest.raises(UserMistake, match=r"arc_easy.*ARC-Easy.*folders"):
        probe(data_dir, "arc_easy")
    with pytest.raises(UserMistake, match=r"lambada_openai.*lambada_openai/test.jsonl.*probe=mini_local"):
        probe(data_dir, "lambada_openai")


def test_a_dataset_that_the_hub_does_not_give_is_a_mistake(tmp_path, monkeypatch):
    yaml = "task: quiz\ndataset_path: nobody/no-such-set\noutput_type: multiple_choice\ntest_split: test\n"
    (tmp_path / "quizzes").mkdir()
    (tmp_path / "quizzes" / "__init__.py").touch()
    (tmp_path / "quizzes" / "quiz.yaml").write_text(yaml)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserMistake, match="'quiz': 'nobody/no-such-set' could not be loaded"):
        Knowledge(name="knowledge", tasks=["quiz"], include="quizzes:.")


def test_a_subject_without_rows_is_a_mistake(tmp_path):
    write(tmp_path / "mmlu", "test", [{"question": "?", "subject": "anatomy", "choices": list("wxyz"), "answer": 0}])
    with pytest.raises(UserMistake, match="no row of 'virology'"):
        probe(tmp_path, "mmlu_virology")


def test_the_suites_name_what_they_freeze():
    conf = {
        name: OmegaConf.load(Path(CONF_DIR) / "probe" / f"{name}.yaml")
        for name in ("mini", "mini_local", "lite", "full")
    }
    mini = conf["mini"].probes.knowledge["items"]
    assert list(conf["mini"].tasks) == list(mini) and sum(mini.values()) == 2370
    assert [task for task in conf["mini"].tasks if task != "lambada_openai"] == list(conf["mini_local"].tasks)
    assert set(conf["lite"].tasks) <= set(conf["lite"].probes.knowledge["items"])
    assert conf["full"].probes.knowledge["items"] is None
