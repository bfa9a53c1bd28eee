"""The installed wheel: conf, baselines and tasks travel with it."""

import os
import subprocess
import sys


def test_an_installed_wheel_composes_and_refuses_like_a_checkout(site, tmp_path):
    # -P and the wheel's folder first: neither the checkout nor its editable install may answer.
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    where = "import clbench, baselines.seq, tasks.world; print(clbench.__file__, baselines.seq.__file__, tasks.world.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(site)) for path in found.stdout.split()), found.stdout
    composed = subprocess.run(
        [sys.executable, "-m", "clbench", "--cfg", "job"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert composed.returncode == 0, composed.stderr
    assert "baselines.seq.Seq" in composed.stdout and "world_facts" in composed.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "clbench", "method=nonesuch"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2 and "nonesuch" in refused.stderr
    # A tasks.py of the user's hides none of the wheel's own: its tasks are found before the probe's field is refused.
    (tmp_path / "tasks.py").write_text("raise RuntimeError('not this one')\n")
    del environment["PYTHONSAFEPATH"]
    for start in ([sys.executable, "-m", "clbench"], [str(site / "bin" / "clbench")]):
        hidden = subprocess.run(
            [*start, "+probe.probes.stream.nonesuch=1", f"cache_dir={tmp_path}"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert hidden.returncode == 2 and "probe.probes.stream.nonesuch" in hidden.stderr, hidden.stderr
    assert (site / "tasks" / "lm_eval" / "world_facts_x4.yaml").is_file()
    assert (site / "clbench" / "report" / "report.js").is_file()
