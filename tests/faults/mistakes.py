"""What users get wrong: each command is refused in one line that names what was given, with exit code 2, before a model is examined."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clbench.models.tiny import fresh_llama, word_tokenizer
from tests.conftest import QUIET
from tests.faults.warm import TINY, Outcome, command

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WORDS = ["no", "yes", "sport", "?", "a", "b", *(f"w{number}" for number in range(40))]
SPORT = {
    "_target_": "tasks.rows.Rows",
    "rows": "sport",
    "prompt": "{text} sport ?",
    "answer": "label",
    "choices": ["no", "yes"],
}
KINDS = {
    "sport": SPORT,
    "free": SPORT | {"prompt": "{text}", "choices": []},
    "letters": SPORT | {"answer": "right", "choices": "options"},
}
PROBE = {"probes": {"stream": {"_target_": "clbench.examine.matrix.Matrix"}}}
OWN = ("model.name=model", "stream.name=own", "probe=matrix", "train.max_length=32", "train.steps=1", *QUIET)
QUICKLY = 5.0
"""Seconds of the processor within which a mistake is told, once everything is imported."""
FORGOTTEN = 99
"""The exit code of a command that went on to examine the model."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A command line that is refused with a line that has `named` in it; `prepare` does in the folder what the user did."""

    arguments: tuple[str, ...]
    named: str
    prepare: Callable[[Path], object] = lambda folder: None
    module: str = "clbench"

    @property
    def name(self) -> str:
        return f"{' '.join(self.arguments)} ({self.named})"

    def typed(self, cache: Path) -> list[str]:
        """The whole command line, in which what is wrong comes last."""
        if self.module != "clbench":
            return list(self.arguments)
        flags = ["--config-dir", "conf"] if self.arguments[:1] == OWN[:1] else []
        base = () if flags else TINY
        return [*flags, *base, "engine.device=cpu", "results_dir=results", f"cache_dir={cache}", *self.arguments]


def folder_of_user(folder: Path) -> Path:
    """A model, rows, a task of each kind and a probe; made where it is not there yet."""
    if folder.exists():
        return folder
    tokenizer = word_tokenizer(WORDS)
    fresh_llama(tokenizer, architecture=SIZES, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split in ("train", "test"):
        rows = [
            {"text": f"w{number} w{number % 7}", "label": ("no", "yes")[number % 2], "options": ["a", "b"], "right": 1}
            for number in range(24)
        ]
        write_rows(folder, *map(json.dumps, rows), split=split)
    for kind, yaml in KINDS.items():
        write(folder / "conf" / "task" / f"{kind}.yaml", json.dumps(yaml))
    write(folder / "conf" / "probe" / "matrix.yaml", json.dumps(PROBE))
    return folder


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_rows(folder: Path, *lines: str | bytes, split: str = "train") -> None:
    content = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    write(folder / "sport" / f"{split}.jsonl", content)


def told(mistake: Mistake, *, template: Path, folder: Path, cache: Path) -> tuple[Outcome, list[str]]:
    """How the command ended in a copy of the user's folder, and what of that is wrong."""
    shutil.copytree(template, folder)
    mistake.prepare(folder)
    found = command(mistake.typed(cache), folder=folder, module=mistake.module, first=stop_at_the_model)
    wrong = found.faults
    if found.code != 2:
        wrong.append(f"exit code {found.code}")
    lines = [line for line in found.err.splitlines() if line.strip()]
    if len(lines) != 1 or mistake.named not in found.err:
        wrong.append(f"no single line with {mistake.named!r}: {found.err[-600:]!r}")
    if found.work > QUICKLY:
        wrong.append(f"{found.work:.1f} s")
    runs = folder / "results" / "runs"
    if runs.is_dir() and any(runs.iterdir()):
        wrong.append("something is recorded")
    if [path for path in folder.parent.iterdir() if path.name == "escaped"]:
        wrong.append("something is written outside results_dir")
    shutil.rmtree(folder)
    return found, wrong


def stop_at_the_model() -> None:
    """Has this process end where a model is examined: no mistake gets there."""
    from clbench import experiment

    def went_on(*given: object, **named: object) -> None:
        raise SystemExit(FORGOTTEN)

    experiment.measure_untouched = went_on


def values(named: str, *arguments: str) -> Mistake:
    return Mistake(arguments=arguments, named=named)


def each(*arguments: str) -> list[Mistake]:
    """One mistake each, whose line names the key that is before the sign of equality."""
    return [values(argument.lstrip("+~").partition("=")[0], argument) for argument in arguments]


def rows_of(task: str, named: str, *lines: str | bytes, split: str = "train") -> Mistake:
    """Rows that are not as they have to be, in line 25 of a file of 24 good ones."""

    def spoil(folder: Path) -> None:
        good = (folder / "sport" / f"{split}.jsonl").read_bytes()
        write_rows(folder, good.rstrip(b"\n"), *lines, split=split)

    return Mistake(arguments=(*OWN, f"stream.tasks=[{task}]"), named=named, prepare=spoil)


def row(**changed: object) -> str:
    return json.dumps({"text": "w1 w2", "label": "no", "options": ["a", "b"], "right": 1} | changed)


def yaml_of(named: str, **changed: object) -> Mistake:
    """A task's yaml that does not say what it has to."""
    return own_yaml("task/sport", json.dumps(SPORT | changed), named=named)


def own_yaml(option: str, text: str, *, named: str = "") -> Mistake:
    """`text` is the yaml of an option in the user's folder; named is, unless something else is, the option."""
    return Mistake(
        arguments=(*OWN, "stream.tasks=[sport]"),
        named=named or option.rpartition("/")[2],
        prepare=lambda folder: write(folder / "conf" / f"{option}.yaml", text),
    )


def model(named: str, prepare: Callable[[Path], object]) -> Mistake:
    """Something is wrong in the model's folder."""
    arguments = (*OWN, "stream.tasks=[sport]")
    return Mistake(arguments=arguments, named=named, prepare=lambda folder: prepare(folder / "model"))


def config(file: str = "config.json", **changed: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(whole | changed))

    return change


def content(name: str, content: str | bytes | None) -> Callable[[Path], None]:
    """A file of the model's folder with another content; without any it is gone."""
    return lambda folder: (folder / name).unlink() if content is None else write(folder / name, content)


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")

    return rewrite


def without(part: str) -> Callable[[dict[str, Tensor]], None]:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return drop


def under_another_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def adapter_without_a_base(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    write(folder / "adapter_config.json", json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


NUMBERS = each(
    *("train.lr=nan", "train.lr=inf", "train.lr=-1", "train.lr=abc", "train.lr=", "train.epochs=nan", "train.steps=-1"),
    *("train.steps=1.5", "train.steps=null", "train.warmup=nan", "train.warmup=2", "train.beta1=1.5"),
    *("train.beta2=-1", "train.weight_decay=nan", "train.clip=nan", "train.clip=-1", "train.batch_size=0"),
    *("train.micro_batch_size=0", "train.micro_batch_tokens=0", "train.max_length=4", "train.max_length=100000"),
    *("train.checkpoint_steps=0", "train.cut=right", "train.schedule=step", "seed=-1", "seed=abc", "seed=null"),
    *("engine.threads=0", "engine.threads=100000", "engine.device=tpu", "engine.device=cuda", "engine.dtype=float16"),
    *("engine.zero_stage=4", "engine.zero_stage=2", "engine.processes=2", "engine.name=ddp", "engine.offload=all"),
    *("engine.shard_base=true", "tracking.wandb=foo", "resume=perhaps", "resume=must"),
    *("stream.limit=0", "stream.last=0", "stream.train_rows=0", "stream.test_rows=-1", "stream.too_long=maybe"),
    *("probe.limit=0", "probe.limit=-1", "probe.text_tokens=1", "probe.shots=-1"),
    *("probe.cadence.stream=every:0", "probe.cadence.nonesuch=all", "order=sideways", "order=latin:x"),
    *("optimize=accuracy", "model.steps=-1", "model.tokenizer=letters", "model.lr=nan", "model.seed=abc"),
    *("model.batch_size=0", "model.corpus.lines=many", "model.architecture.num_hidden_layers=nan"),
    *("method.lora.rank=0", "method.lora.rank=1.5", "method.lora.rank=4096", "method.lora.alpha=nan"),
    *("method.lora.dropout=1", "method.lora.targets=3", "probe.probes.perplexity.window=0"),
)
FIELDS = [
    values("method.strength", "method=ewc", "method.strength=nan"),
    values("method.strength", "method=ewc", "method.strength=abc"),
    values("method.strength", "method=ewc", "method.strength=-1"),
    values("method.fisher_examples", "method=ewc", "method.fisher_examples=0"),
    values("method.ratio", "method=er", "method.ratio=-1"),
    values("method.fraction", "method=er", "method.fraction=2"),
    values("method.capacity", "method=er", "method.capacity=0"),
    values("method.decay", "method=ilora", "method.decay=2"),
    values("rank", "method=curlora", "method.rank=100000"),
    values("nope", "method.lora.targets=[nope]"),
    values("targets", "method.lora.targets=all"),
    values("shots", "probe.shots=abc"),
    values("method.lora.x", "+method.lora.x.y=2"),
    values("model.architecture", "model.architecture.hidden_size=33"),
    values("model.architecture", "model.architecture.hidden_size=0"),
    values("model.architecture", "model.architecture.num_attention_heads=0"),
]
GROUPS = [
    *each("method=null", "model=null", "stream=null", "train=null", "probe=null", "engine=null", "tracking=null"),
    *each("method=nonesuch", "model=nonesuch", "stream=nonesuch", "probe=nonesuch", "+experiment=nonesuch"),
    *each("settings=nonesuch", "method=[seq,er]", "tasks={}", "method=", "method=3"),
    *each("~method", "~model", "~stream", "~probe", "~train", "~engine", "~seed", "~method.lora", "~probe.probes"),
    *each("stream.tasks=[]", "stream.tasks=null", "stream.tasks=world_total", "stream.tasks=[world_total,world_total]"),
    *each("method.lora=null", "model.corpus=null", "model.architecture=null"),
    *each("method._target_=null", "probe.probes.stream=null", "probe.tasks=[nonesuch]", "probe.probes=null"),
    *each("nonesuch=1", "train.nonesuch=1", "+train.nonesuch=1", "+nonesuch=1", "method.nonesuch=1", "+method.x=1"),
    *each("+probe.probes.x=3", "+model.architecture.nonesuch=3", "method.lora=3"),
    values("nonesuch", "stream.tasks=[nonesuch]"),
    values("method.name", "method._target_=baselines.er.Er"),
    values("os.system", "method._target_=os.system", "method.name=x"),
    values("pandas.read_pickle", "method._target_=pandas.read_pickle", "method.name=x"),
    values("nonesuch.Nonesuch", "method._target_=nonesuch.Nonesuch", "method.name=x"),
    values("baselines.seq.Seq", "model._target_=baselines.seq.Seq"),
    values("subprocess.run", "model.corpus._target_=subprocess.run"),
    values("world", *OWN, "stream=seq16", "stream.name=x"),
    values("stream", *OWN),
]
WORDS_TYPED = [
    values("train.lr", "train.lr"),
    values("=3", "=3"),
    values("[1", "train.lr=[1"),
    values("a b", "train.lr=a b c: ["),
    values("nowhere", "--config-dir=nowhere"),
    values("nonesuch", "--config-name=nonesuch"),
]
NAMES = [values("plain name", "stream.name=../x")]
NAMES += each(
    *(
        "method.name=../../escaped",
        "method.name=a/b",
        f"method.name={'n' * 300}",
        "method.name='<b>'",
        "method.name=''",
    ),
    *("model.label=../escaped", "model.label='a|b'", "experiment=../x", "+probe.probes.a b={}"),
)
PLACES = [
    values("results_dir", "results_dir=conf/task/sport.yaml"),
    values("results_dir", "results_dir=/proc/nowhere"),
    values("results_dir", "results_dir="),
    values("results_dir", "results_dir=null"),
    values("cache_dir", "cache_dir=conf/task/sport.yaml"),
    values("cache_dir", "cache_dir="),
    values("data_dir", "data_dir=nowhere"),
    values("data_dir", "data_dir=conf/task/sport.yaml"),
    values("boolq", "data_dir=sport", "stream.tasks=[boolq]"),
    Mistake(arguments=("nowhere",), named="nowhere", module="clbench.leaderboard"),
    Mistake(arguments=("nowhere",), named="nowhere", module="clbench.report"),
    Mistake(arguments=("nowhere",), named="nowhere", module="clbench.verify"),
    Mistake(arguments=("conf",), named="conf", module="clbench.verify"),
    Mistake(arguments=("nowhere", "out=out"), named="nowhere", module="clbench.export"),
    Mistake(arguments=("nowhere", "conf"), named="nowhere", module="clbench.compare"),
    Mistake(arguments=("nowhere", "probe=matrix"), named="nowhere", module="clbench.examine"),
    Mistake(arguments=("method=nonesuch",), named="nonesuch", module="clbench.contract"),
    Mistake(arguments=("nonesuch",), named="nonesuch", module="clbench.doctor"),
    Mistake(arguments=("method=nonesuch",), named="nonesuch", module="clbench.doctor"),
]
ROWS = [
    rows_of("sport", "line 25", '{"text": "w1",'),
    rows_of("sport", "line 25", '[{"text": "w1"}]'),
    rows_of("sport", "line 25", "3"),
    rows_of("sport", "line 25", '{"text": "café"}'.encode("latin-1")),
    rows_of("sport", "line 25", '{"text": "\\ud800", "label": "no"}'),
    rows_of("sport", "line 25", row(text=None)),
    rows_of("sport", "line 25", row(label=None)),
    rows_of("sport", "line 25", row(label="maybe")),
    rows_of("sport", "line 25", row(text=3)),
    rows_of("sport", "line 25", '{"text": NaN, "label": "no"}'),
    rows_of("sport", "line 25", '{"label": "no"}'),
    rows_of("free", "line 25", row(label=None)),
    rows_of("free", "line 25", row(text=None), split="test"),
    rows_of("letters", "line 25", row(right=2)),
    rows_of("letters", "line 25", row(right=-1)),
    rows_of("letters", "line 25", row(right="a")),
    rows_of("letters", "line 25", row(options=["a", None])),
    rows_of("letters", "line 25", row(options=None)),
    rows_of("letters", "line 25", row(options=[1, 2])),
    rows_of("letters", "line 25", row(options="ab")),
    Mistake(
        arguments=(*OWN, "stream.tasks=[free]"),
        named="train.max_length",
        prepare=lambda folder: write_rows(folder, row(label="w1 " * 60), row()),
    ),
    Mistake(
        arguments=(*OWN, "stream.tasks=[sport]"), named="sport", prepare=lambda folder: write_rows(folder, split="test")
    ),
    Mistake(
        arguments=(*OWN, "stream.tasks=[sport]"),
        named="train.jsonl",
        prepare=lambda folder: (folder / "sport" / "train.jsonl").unlink(),
    ),
    yaml_of("yes", choices=[True, False]),
    yaml_of("label", choices=["no"]),
    yaml_of("nonesuch", prompt="{nonesuch} ?"),
    yaml_of("prompt", prompt="{text ?"),
    yaml_of("nonesuch", answer="nonesuch"),
    yaml_of("nonesuch", metric="nonesuch"),
    yaml_of("rows", rows=None),
    yaml_of("max_test", max_test=-1),
    yaml_of("nowhere", rows="nowhere.jsonl"),
    yaml_of("nonesuch", nonesuch=3),
    yaml_of("_target_", _target_="tasks.rows.Nonesuch"),
    own_yaml("task/sport", "a: [1\nb: }"),
    own_yaml("task/sport", ""),
    own_yaml("task/sport", "[1, 2]"),
    own_yaml("probe/matrix", "probes: [1"),
]
JSONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
MODELS = [
    *(model("model", content(name, "[]")) for name in JSONS),
    *(model("model", content(name, '"text"')) for name in JSONS),
    *(model("model", content(name, "null")) for name in JSONS),
    *(model("model", content(name, '{"a": ')) for name in JSONS),
    *(model("model", content(name, b"\xff\xfe\x00")) for name in JSONS),
    model("model", content("config.json", None)),
    model("model", content("config.json", "{}")),
    model("tokenizer", content("tokenizer.json", None)),
    model("its configuration: ", config("generation_config.json", pad_token_id="x")),
    model("its tokenizer: ", config("tokenizer.json", version=1)),
    model("its tokenizer: ", config("tokenizer.json", added_tokens=None)),
    model("its tokenizer: ", config("tokenizer.json", model={"type": "WordLevel"})),
    model("its tokenizer: ", config("tokenizer_config.json", eos_token=1)),
    model("its tokenizer: ", config("tokenizer_config.json", added_tokens_decoder=[1])),
    model("model", content("model.safetensors", None)),
    model("model", content("model.safetensors", b"")),
    model("model", content("model.safetensors", b"\xff" * 4096)),
    model("model", lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))),
    model("model.safetensors.index.json", content("model.safetensors.index.json", "[]")),
    model("model", content("special_tokens_map.json", "[]")),
    model("model", content("adapter_config.json", "[]")),
    model("model", content("adapter_config.json", "{}")),
    model("pytorch_model.bin", pickled),
    model("names no base", adapter_without_a_base),
    model("nonesuch", config(model_type="nonesuch")),
    model("hidden_size", config(hidden_size="wide")),
    model("model", config(hidden_size=32)),
    model("model", config(hidden_size=None)),
    model("model", config(num_attention_heads=3)),
    model("model", config(num_hidden_layers=3)),
    model("model", config(num_hidden_layers=1)),
    model("model", config(vocab_size=7)),
    model("positions", config(max_position_embeddings=16)),
    model("t5", config(model_type="t5")),
    model("model", config(model_type="bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    model("model", config(auto_map={"AutoConfig": "mine.C"}, model_type="mine")),
    model("missing: model.layers.1.mlp.up_proj.weight", weights(without("layers.1.mlp.up_proj"))),
    model("missing", weights(without(".layers.1."))),
    model("unknown: other.", weights(under_another_prefix)),
    model("unknown: extra", weights(lambda tensors: tensors.update(extra=torch.zeros(2)))),
    model("instead of", weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(17)}))),
    model("not finite", weights(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))),
    model("model", lambda folder: shutil.rmtree(folder)),
    Mistake(arguments=(*OWN, "stream.tasks=[sport]", "model.revision=nowhere", "model.name=a/b"), named="a/b"),
    Mistake(arguments=(*OWN, "stream.tasks=[sport]", "model.name=null"), named="model.name"),
]
ALL = (*NUMBERS, *FIELDS, *GROUPS, *WORDS_TYPED, *NAMES, *PLACES, *ROWS, *MODELS)
