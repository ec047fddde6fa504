"""The benchmark of merging runs, and says how many patches are left."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from eval import token_merging


def invoke(*arguments: str):
    app = token_merging.typer.Typer()
    app.command()(token_merging.main)
    return CliRunner().invoke(app, arguments)


def test_it_measures_and_writes_json(tmp_path):
    path = tmp_path / "out.json"
    done = invoke("--model", "test_vit", "--merges", "1,7", "--batch", "2", "--rounds", "1", "--json", str(path))
    assert done.exit_code == 0, done.output
    results = json.loads(path.read_text())["results"]
    assert [each["r"] for each in results] == [0, 1, 7]
    before = results[0]["patches"]
    depth = before - results[1]["patches"]
    assert depth > 1 and results[2]["patches"] == before - 7 * depth
    assert results[0]["faster"] == 1 and min(each["pictures_per_second"] for each in results) > 0
    assert invoke("--device", "tpu").exit_code == 2
    assert invoke("--merges", "0").exit_code == 2
