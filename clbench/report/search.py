"""What a search found: of every method with several settings a row for each, and which one is chosen.

A setting is chosen by the harmonic mean of average accuracy and of what was kept: retention_probability or, in a search that probes no knowledge, the
inverse of the perplexity ratio, each cut to 0 .. 1. All are means over its blocks. By the arithmetic mean a setting that learns nothing and therefore
keeps everything would be chosen.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from clbench.config import BLOCK_KEYS, identity
from clbench.report.columns import columns_of
from clbench.report.measures import SETTING
from clbench.report.summary import Summary


def search(summary: Summary) -> pd.DataFrame:
    """The table search.csv: by stream, model and method, the chosen setting first."""
    configs = summary.records.runs.set_index("run")["config"]
    groups = summary.leaderboard.groupby([*SETTING, "method"])
    tables = [_of_method(own, configs) for _, own in groups if len(own) > 1]
    return pd.concat([pd.DataFrame(columns=columns_of("search.csv")), *tables], ignore_index=True)


def _of_method(rows: pd.DataFrame, configs: pd.Series) -> pd.DataFrame:
    tried = pd.DataFrame([identity(configs[runs[0]]) for runs in rows["runs"]], index=rows.index)
    tried = tried.drop(columns=[key for key in BLOCK_KEYS if key in tried])
    swept = tried.loc[:, tried.astype(str).nunique() > 1]
    probed = rows["retention_probability"].notna().any()
    learned, kept = rows["average_accuracy"], rows["retention_probability"] if probed else 1 / rows["perplexity_ratio"]
    kept = kept.clip(0.0, 1.0)
    value = 2 * learned * kept / (learned + kept)
    table = rows.assign(
        settings=[", ".join(f"{key}={one[key]}" for key in swept) for one in swept.to_dict("records")],
        criterion=value,
        chosen=(value == value.max()).astype(int),
        edge=[", ".join(_edges(one, swept)) for one in swept.to_dict("records")],
    )
    return table[columns_of("search.csv")].sort_values("criterion", ascending=False, kind="stable")


def _edges(setting: Mapping[str, Any], swept: pd.DataFrame) -> Iterator[str]:
    """Which values of a setting are the lowest or the highest that were tried."""
    for key, value in setting.items():
        for end, name in ((swept[key].min(), "lowest"), (swept[key].max(), "highest")):
            if value == end:
                yield f"{key} {name}"
