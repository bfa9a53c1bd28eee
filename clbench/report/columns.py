"""What every column of every CSV file means: the one place that says so, rendered as results/COLUMNS.md and below leaderboard.md.

`python -m clbench.report.columns` prints the page. Not here: how a number is worked out (metrics, differences).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from clbench.report.differences import DRAWS, EXACT_BLOCKS, FEWEST_BLOCKS, SIGN_DRAWS

PAGE = """\
# The columns of the tables

`python -m clbench.leaderboard results_dir` writes these files from the records of all runs, but for the last three, which stand in `results/`; `leaderboard.json` has the rows of `leaderboard.csv`. An empty cell is a number that does not exist (backward transfer of one task), never 0. `X`, `X_low`, `X_high` are a mean over blocks and its 95 % Student-t interval, empty for one block.

R[i, j] is the score on task j after stage i; stage 0 is the untouched model, T the last stage; stage j trains task j. A block is one task order with one seed. Blocks of one order share it: what an order does to all methods alike cancels in a paired difference, what it does to one method is seen as often as there are orders.

`python -m clbench.report.columns` makes this page up to there.
"""


@dataclass(frozen=True)
class Column:
    """One column: what it holds, in which unit, by which formula, and where the number comes from; with `bounds` also its _low and _high."""

    name: str
    unit: str
    definition: str
    formula: str = ""
    source: str = ""
    bounds: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the file that it describes."""
        return tuple(f"{self.name}{end}" for end in ("", "_low", "_high")) if self.bounds else (self.name,)


def _measure(name: str, unit: str, definition: str, formula: str = "", source: str = "") -> Column:
    return Column(name, unit, definition, formula, source, bounds=True)


# fmt: off
# A line is a column, however long.
LOPEZ, CHAUDHRY = "arXiv 1706.08840", "arXiv 1801.10112"
STREAM = Column("stream", "name", "the stream that was trained", source="manifest.json")
ORDER = Column("order", "name", "the order of its tasks: default, reversed, latin:K, random:SEED", source="manifest.json")
MODEL = Column("model", "name", "the model that was trained", source="manifest.json")
METHOD = Column("method", "name", "the method", source="manifest.json")
VARIANT = Column("variant", "8 hexadecimal digits", "what all blocks of a row have in common, as one number", "SHA-256 of the configuration without order, seeds, places and what changes no score", "manifest.json")
HASH = Column("stream_hash", "12 hexadecimal digits", "the stream's rows, prompts and metrics, whatever the order of its tasks; only equal ones are compared", "SHA-256", "manifest.json")
SEED = Column("seed", "number", "the seed of the run", source="manifest.json")
STAGE = Column("stage", "count", "how many stages were trained; 0 is the untouched model", source="scores.jsonl")
STAGE_NAME = Column("stage_name", "name", "the task of that stage, `base` for the untouched model", source="scores.jsonl")
RUN = Column("run", "name", "the directory of the run's records", source="manifest.json")
RETENTION = "share of the untouched model's accuracy on base knowledge, above that of guessing or of always the commonest answer, that is left, all probes together; undefined where the untouched model is within two standard errors of that floor"
RETAINED = "sum over probes of (accuracy after - floor) / sum of (accuracy before - floor); floor: chance, or the share of the commonest right answer (a label, else a position) where that is more"
PROBABILITY = "the same of the probability of the right choice among the choices, all probes of multiple choice together: softmax over the log-likelihoods of the choices, per character where acc_norm is the metric"
PROBABLE = "as retention, of the mean probability; floor: chance"
GUESSING = "(1 - before) (1 - after) chance / (1 - chance)"
LOST = (
    ("lost", "share of items that turned wrong", "items right before and wrong after / items", ""),
    ("gained", "share of items that turned right", "items wrong before and right after / items", ""),
    ("lost_corrected", "share of items that turned wrong beyond what guessing explains", f"max(0, lost - {GUESSING})", ", arXiv 2510.17776"),
    ("gained_corrected", "share of items that turned right beyond what guessing explains", f"max(0, gained - {GUESSING})", ", arXiv 2510.17776"),
)
PERPLEXITY = ("perplexity_ratio", "ratio", "perplexity per token over that of the untouched model, on text that it knew", "exp of the mean rise of negative log-likelihood per token", "probe perplexity, nll_token")
DRIFT = ("bits_per_byte_drift", "bits per byte", "rise of the bits that a byte of that text needs", "bits_per_byte - that of stage 0", "probe perplexity")

LEADERBOARD = (
    *(STREAM, MODEL, METHOD, VARIANT),
    Column("n_orders", "count", "task orders", "orders that arrange the stream's tasks otherwise", "manifest.json"),
    Column("n_seeds", "count", "seeds", "different seeds", "manifest.json"),
    Column("n_blocks", "count", f"blocks, different pairs of order and seed; of fewer than {FEWEST_BLOCKS} no difference is claimed", source="manifest.json"),
    _measure("average_accuracy", "fraction of 1", "mean score over all tasks after the last stage", "mean over j of R[T, j]", LOPEZ),
    _measure("learning_accuracy", "fraction of 1", "mean score on each task right after its own stage", "mean over j of R[j, j]", "arXiv 1810.11910"),
    _measure("bwt", "fraction of 1", "backward transfer: mean change of a score from its task's own stage to the end", "mean over j < T of R[T, j] - R[j, j]", LOPEZ),
    _measure("forgetting", "fraction of 1", "mean drop from a task's best score to the end", "mean over j < T of max over j <= i < T of R[i, j] - R[T, j]", CHAUDHRY),
    _measure("fwt", "fraction of 1", "forward transfer: mean gain on a task before its own stage", "mean over j > 1 of R[j - 1, j] - R[0, j]", LOPEZ),
    _measure("retention", "fraction of 1", RETENTION, RETAINED, "probe knowledge"),
    _measure("retention_probability", "fraction of 1", PROBABILITY, PROBABLE, "probe knowledge, probability"),
    _measure("retention_min", "fraction of 1", "retention of the probe that keeps least", "lowest (accuracy after - floor) / (accuracy before - floor)", "probe knowledge"),
    _measure(*PERPLEXITY),
    _measure(*DRIFT),
    _measure("kl_to_base", "nats per token", "divergence of the predictions on fixed text from those of the untouched model", "mean over positions of KL(untouched || now)", "probe divergence"),
    _measure("update_norm", "ratio", "size of the update of all linear layers, relative to the untouched weights", "||W - W_0||_F / ||W_0||_F, estimated on 16 random inputs a layer", "probe update"),
    _measure("format_validity", "fraction of 1", "share of answers that have the form their task asks for", source="probe stream"),
    _measure("format_loss", "fraction of 1", "accuracy by likelihood less accuracy of the written answer, on closed tasks", source="probe stream"),
    _measure("base_accuracy", "fraction of 1", "average accuracy of the untouched model", "mean over j of R[0, j]", "probe stream"),
    _measure("chance_accuracy", "fraction of 1", "average accuracy of guessing", "mean over tasks, 0 for free answers", "probe stream"),
    _measure("majority_accuracy", "fraction of 1", "average accuracy of the commonest answer", source="probe stream"),
    _measure("format_only_accuracy", "fraction of 1", "average accuracy of the right answers to other questions", source="probe stream"),
    _measure("copy_accuracy", "fraction of 1", "average accuracy of what stands at one place of each prompt", source="probe stream"),
    _measure("seconds_train", "seconds", "wall time of training", "sum over stages", "cost.jsonl"),
    _measure("seconds_probe", "seconds", "wall time of examining", "sum over stages", "cost.jsonl"),
    _measure("seconds_other", "seconds", "wall time of the rest of a stage", "sum over stages", "cost.jsonl"),
    _measure("tokens_trained", "tokens", "tokens that went through training", "sum over stages", "cost.jsonl"),
    _measure("tokens_replayed", "tokens", "those of them that were replayed", "sum over stages", "cost.jsonl"),
    _measure("trainable_parameters", "count", "trainable parameters", "highest of the stages", "cost.jsonl"),
    _measure("peak_memory_bytes", "bytes", "peak memory", "highest of the stages", "cost.jsonl"),
    _measure("flops", "operations", "floating-point operations of training", "sum over stages", "cost.jsonl"),
    Column("order_sensitivity", "fraction of 1", "how far average accuracy depends on the task order; empty for one order. It holds the noise of the seeds, too", "highest less lowest mean of an order", "after OPD, arXiv 1902.09432"),
    *(
        Column(f"{name}_rank_{end}", "rank", f"the {end} rank by {name} that differences.csv leaves open, among the rows of the setting that train and have the measure", formula, "differences.csv")
        for name in ("average_accuracy", "retention")
        for end, formula in (("best", "1 + rows separated as better"), ("worst", "their number - rows separated as worse"))
    ),
    HASH,
    Column("notes", "text", "what must be known before a row is trusted", source="manifest.json, the row"),
)

MEASURES = tuple(column.name for column in LEADERBOARD if column.bounds)
"""What a run amounts to: the columns of leaderboard.csv that have an interval over blocks."""

DIFFERENCES = (
    *(STREAM, MODEL, HASH),
    Column("measure", "name", "what the two rows are compared by: a column of leaderboard.csv, or log_perplexity_ratio, the logarithm of perplexity_ratio; lower is better for that and for kl_to_base", source="leaderboard.csv"),
    METHOD,
    VARIANT,
    Column("other", "name", "the method that it is compared with", source="manifest.json"),
    Column("other_variant", "8 hexadecimal digits", "the variant of the other", "as variant", "manifest.json"),
    Column("n_blocks", "count", "blocks that both have; where their probes measured other items there is none", source="manifest.json, items/"),
    Column("n_items", "count", "items per block behind the difference that both keep; 0 where they were not kept", source="items/"),
    Column("difference", "unit of the measure", "the method less the other", "mean over common blocks", "the measure of each run"),
    Column("low", "unit of the measure", "lower end of its 95 % interval", f"two-level bootstrap: blocks, then items, the same for both methods, {DRAWS} draws; deviations stretched to those of Student's interval with the standard error and degrees of freedom of p", "Owen and Eckles 2012; Hesterberg 2015"),
    Column("high", "unit of the measure", "upper end of its 95 % interval", "as low", "as low"),
    Column("p", "probability", f"two-sided p of no difference; empty below {FEWEST_BLOCKS} blocks", "paired t: difference / sqrt(s^2 / B + what another draw of items adds), blocks and items crossed, Satterthwaite's degrees of freedom", "Clark 1973; Satterthwaite 1946"),
    Column("p_permutation", "probability", "two-sided p of no difference that takes nothing for normal; with six blocks never below 2/64, so hardly any correction over many pairs can be passed with it alone", f"share of sign flips over blocks as far from 0: all up to {EXACT_BLOCKS} blocks, beyond {SIGN_DRAWS} draws", "Fisher 1935; Phipson and Smyth 2010"),
    Column("q", "probability", "p corrected for all pairs of the measure in the setting: the least false discovery rate that makes the pair a discovery", "smallest p (i) * pairs / i from i on", "Benjamini and Hochberg 1995; Yekutieli 2008"),
    Column("verdict", "word", f"better or worse: the method against the other, where q and p_permutation are at most 0.05; not separated; too few blocks: below {FEWEST_BLOCKS}", source="n_blocks, q, p_permutation, difference"),
    Column("blocks_needed", "count", f"blocks that would separate the pair in 80 % of cases, if difference and spread are what was seen; at least {FEWEST_BLOCKS}, empty where no number is enough", "s^2 / (difference^2 / (z[1 - a/2] + z[0.8])^2 - v) + z[1 - a/2]^2 / 2, v what items add, a = 0.05 * max(1, pairs with q <= 0.05) / pairs", "Guenther 1981"),
)

RETENTIONS = (
    *(STREAM, ORDER, MODEL, METHOD, SEED, STAGE, STAGE_NAME),
    Column("retention", "fraction of 1", RETENTION, RETAINED, "probe knowledge"),
    Column("retention_low", "fraction of 1", "lower end of its 95 % interval over items, of this run alone", "2.5 % quantile under a Dirichlet posterior over the pairs (before, after) of each probe, with half an item in each of the four pairs of right and wrong", "Rubin 1981; arXiv 2503.01747"),
    Column("retention_high", "fraction of 1", "upper end of that interval", "97.5 % quantile", "as low"),
    Column("retention_min", "fraction of 1", "retention of the probe that keeps least", source="probe knowledge"),
    Column("retention_min_probe", "name", "that probe", source="probe knowledge"),
    Column("retention_probability", "fraction of 1", PROBABILITY, PROBABLE, "probe knowledge, probability"),
    Column("retention_probability_low", "fraction of 1", "lower end of its 95 % interval over items, of this run alone", "as retention_low", "as retention_low"),
    Column("retention_probability_high", "fraction of 1", "upper end of that interval", "as retention_high", "as retention_high"),
    *(Column(name, "fraction of 1", what, f"mean over probes{f' of {formula}' * bool(formula)}", f"probe knowledge{paper}") for name, what, formula, paper in LOST),
    Column("perplexity", "perplexity per token", "perplexity on text that the untouched model knew", "exp of the mean negative log-likelihood per token", "probe perplexity, nll_token"),
    Column(*PERPLEXITY),
    Column("bits_per_byte", "bits per byte", "bits that a UTF-8 byte of that text needs", source="probe perplexity"),
    Column(*DRIFT),
    Column("reason", "text", "why a number of the row does not exist", source="probe knowledge"),
    *(HASH, RUN),
)

PROBES = (
    *(STREAM, ORDER, MODEL, METHOD, SEED, STAGE, STAGE_NAME),
    Column("task", "name", "the base-knowledge task that probed", source="scores.jsonl"),
    Column("floor", "fraction of 1", "accuracy that needs no knowledge", "max(chance, majority), at stage 0; majority: the share of the commonest right answer", "probe knowledge"),
    Column("before", "fraction of 1", "accuracy of the untouched model", "mean over items", "probe knowledge"),
    Column("after", "fraction of 1", "accuracy after the stage", "mean over items", "probe knowledge"),
    Column("retention", "fraction of 1", "share of what the untouched model knew above the floor that is left; empty where it is within two standard errors of the floor", "(after - floor) / (before - floor)", "probe knowledge"),
    Column("delta", "fraction of 1", "change of accuracy", "after - before", "probe knowledge"),
    Column("stderr_paired", "fraction of 1", "standard error of that change over the same items", "deviation of the items' changes / sqrt(n)", "probe knowledge"),
    *(Column(name, "fraction of 1", what, formula, f"probe knowledge{paper}") for name, what, formula, paper in LOST),
    Column("retention_probability", "fraction of 1", "the same as retention of the probability of the right choice; empty where none was recorded", "(mean after - chance) / (mean before - chance)", "probe knowledge, probability"),
    Column("reason", "text", "why retention does not exist", source="probe knowledge"),
    *(HASH, RUN),
)

STAGES = (
    *(STREAM, ORDER, MODEL, METHOD, SEED, STAGE, STAGE_NAME),
    Column("probe", "name", "what measured; EXAMINATION/PROBE what did afterwards (clbench.examine), which ranks nothing; a second view of a method's weights is a method METHOD@VIEW", source="scores.jsonl, examined/"),
    Column("task", "name", "what was measured on", source="scores.jsonl"),
    Column("metric", "name", "what was measured", source="scores.jsonl"),
    Column("value", "unit of the metric", "what was found", source="scores.jsonl"),
    Column("n", "count", "items or tokens that it is over", source="scores.jsonl"),
    Column("stderr", "unit of the metric", "standard error of a mean over items", "sample deviation / sqrt(n)", "scores.jsonl"),
    RUN,
)

SEARCH = (
    *(STREAM, MODEL, HASH),
    METHOD,
    VARIANT,
    Column("settings", "key=value", "the values in which the settings of the method differ", source="manifest.json"),
    *(replace(one, bounds=False) for one in LEADERBOARD if one.name in ("n_blocks", "average_accuracy", "learning_accuracy", "retention", "retention_probability", "perplexity_ratio")),
    Column("criterion", "fraction of 1", "what a setting is chosen by", "2 a k / (a + k) with a = average_accuracy and k = retention_probability or, where no knowledge was probed, 1 / perplexity_ratio, cut to 0 .. 1", "the columns named"),
    Column("chosen", "0 or 1", "1 of the setting with the highest criterion", "criterion = its highest of the method", "criterion"),
    Column("edge", "key and end", "which of its values are the lowest or the highest that were tried", source="settings of the method's rows"),
)

FILES: Mapping[str, tuple[str, tuple[Column, ...]]] = {
    "leaderboard.csv": ("stream, model, method and variant, over all its blocks", LEADERBOARD),
    "differences.csv": ("measure and pair of rows of the leaderboard that can be compared; rows that train nothing are left out", DIFFERENCES),
    "retention.csv": ("run and stage", RETENTIONS),
    "probes.csv": ("run, stage and probe of base knowledge", PROBES),
    "search.csv": ("setting of a method that has several; the chosen one of each method first", SEARCH),
    "stages.csv": ("run, stage, probe, task and metric", STAGES),
}
"""By file that is written from the records, what it has one row for, and its columns in order."""
# fmt: on


def columns_of(file: str) -> list[str]:
    """The columns of a file, in order."""
    return [name for one in FILES[file][1] for name in one.names]


def page() -> str:
    """results/COLUMNS.md up to the files that are written by hand."""
    lines = [PAGE]
    for file, (rows, columns) in FILES.items():
        lines += [f"## {file}", "", f"One row per {rows}.", "", "| column | unit | what it is | formula | source |"]
        lines.append("|---|---|---|---|---|")
        for one in columns:
            names = ", ".join(f"`{name}`" for name in one.names)
            cells = [names, one.unit, one.definition, one.formula, one.source]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def legend(headings: Mapping[str, str]) -> str:
    """One line for each heading of a table, which stands for a column of leaderboard.csv: what that is."""
    meant = {one.name: one for one in LEADERBOARD}
    return "\n".join(f"{name[:1].upper()}{name[1:]}: {meant[column].definition}." for name, column in headings.items())


if __name__ == "__main__":
    print(page(), end="")
