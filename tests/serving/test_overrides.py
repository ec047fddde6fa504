"""The overrides that vLLM is started with hold what was asked for, and what can't be served is refused at once."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from matrix import FAMILIES
from tiny import LLAVA
from typer.testing import CliRunner

import vltok
from vltok.cli import app
from vltok.errors import CheckpointError, UnsupportedInputError, UnsupportedModelError
from vltok.serving import vllm_overrides
from vltok.serving.__main__ import app as printing
from vltok.serving.architectures import ARCHITECTURES, BY_NAME, CONDENSED
from vltok.serving.condenser import SavedCondenser
from vltok.serving.options import CONDENSER, FIELD, Pruning


@pytest.fixture
def folder(tmp_path):
    LLAVA.model().config.save_pretrained(tmp_path / "my model")
    return tmp_path / "my model"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_type_gets_its_own_architecture(kind):
    overrides = vllm_overrides(kind, "divprune,keep_ratio=0.25")
    assert [BY_NAME[name] for name in overrides["architectures"]] == [ARCHITECTURES[kind]]
    assert overrides[FIELD] == {"method": "divprune", "keep_ratio": 0.25}


def test_folder_config_and_type_give_the_same(folder):
    config = LLAVA.model().config
    made = [vllm_overrides(model, "stride,num_keep=4") for model in (folder, str(folder), config, config.model_type)]
    assert made == made[:1] * 4


@pytest.mark.parametrize(
    "method",
    [
        vltok.ToDRE(keep_ratio=0.3, relevance=False, pivot="center"),
        vltok.StrideTokens(keep_ratio=0.25, regions=(2, 2)),
        vltok.RandomTokens(num_keep=7, seed=3),
        vltok.DivPrune(keep_ratio=1.0),
    ],
    ids=lambda method: method.name,
)
def test_a_server_reads_the_method_that_was_asked_for(method):
    overrides = json.loads(json.dumps(vllm_overrides("llava", method, max_keep_ratio=1.0)))
    pruning = Pruning.of_field(overrides[FIELD])
    assert pruning.selector == method
    assert (pruning.largest.keep_ratio, pruning.largest.num_keep) == (1.0, None)


def test_the_largest_count_is_handed_on():
    field = vllm_overrides("llava", "divprune,keep_ratio=0.25", max_num_keep=300)[FIELD]
    assert Pruning.of_field(field).largest.num_keep == 300


@pytest.fixture(scope="module")
def saving(tmp_path_factory):
    """Saves methods of a tiny model in a folder."""

    def saved(*methods, family=LLAVA):
        folder = tmp_path_factory.mktemp("condensed")
        with vltok.apply(family.model(), list(methods), processor=family.processor()) as handle:
            vltok.save(handle, folder)
        return folder

    return saved


def test_a_folder_of_a_condenser_gets_an_architecture_of_its_own(saving, folder):
    condenser = saving(vltok.TokenPacker(2))
    overrides = vllm_overrides(folder, condenser)
    assert overrides == vllm_overrides("llava", str(condenser)) == json.loads(json.dumps(overrides))
    (name,) = overrides["architectures"]
    assert name == CONDENSED["llava"].name and name not in BY_NAME
    assert SavedCondenser.of_config(SimpleNamespace(**overrides)).method.scales == (2,)


def test_the_folder_is_found_from_everywhere(saving, monkeypatch):
    condenser = saving(vltok.AveragePool(2))
    monkeypatch.chdir(condenser.parent)
    assert vllm_overrides("llava", condenser.name)[CONDENSER] == str(condenser)


NEXT = FAMILIES["llava_next-cls"]


def test_condensers_that_can_not_be_served_are_refused(saving, tmp_path):
    plain = saving(vltok.AveragePool(2))
    for given, says in [
        (saving(vltok.AveragePool((2, 1))), "leave one of them in its scale_factor"),
        (saving(vltok.AveragePool(2), vltok.DivPrune(keep_ratio=0.5)), "one condenser alone"),
        (saving(vltok.SOFT(ratio=2)), "one condenser alone"),
        (saving(vltok.AveragePool(NEXT.packer_scale), family=NEXT), "served on 'llava' alone"),
        (tmp_path, "has no vltok_config.json"),
    ]:
        with pytest.raises((UnsupportedModelError, CheckpointError), match=says):
            vllm_overrides("llava", given)
    with pytest.raises(UnsupportedModelError, match="can't be served with a condenser; these can: llava"):
        vllm_overrides(AXES, plain)
    with pytest.raises(ValueError, match="leave max_keep_ratio"):
        vllm_overrides("llava", plain, max_keep_ratio=0.5)
    config = SimpleNamespace(model_type="llava", vltok={})
    with pytest.raises(CheckpointError, match="serve the model that it was made from"):
        vllm_overrides(config, plain)
    (plain / "vltok.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no vltok\.safetensors"):
        vllm_overrides("llava", plain)


def test_what_tells_cached_images_apart_is_what_the_folder_holds(saving):
    first, other = saving(vltok.AveragePool(2)), saving(vltok.AveragePool(2))
    before = SavedCondenser.of_folder(first).identity()
    assert SavedCondenser.of_folder(other).identity() == before
    shutil.copy(saving(vltok.PixelShuffle(2)) / "vltok.safetensors", other)
    assert SavedCondenser.of_folder(other).identity() != before


AXES = next(kind for kind, own in ARCHITECTURES.items() if own.has_axes)


@pytest.mark.parametrize(
    ("model", "method", "error", "says"),
    [
        ("llava", "todre,keep_ratio=0.25", UnsupportedModelError, "give relevance=False"),
        ("llava", "cdpruner,keep_ratio=0.25", UnsupportedModelError, "reads the question"),
        ("llava", "fastv,keep_ratio=0.25", UnsupportedModelError, "inside the decoder; .* choose a selector"),
        ("llava", "tokenpacker", UnsupportedModelError, "modules of its own .* or give the folder"),
        ("llava", "divprun,keep_ratio=0.25", CheckpointError, "did you mean 'divprune'"),
        ("llava", "divprune,keep_rate=0.25", CheckpointError, "did you mean 'keep_ratio'"),
        ("llava", "divprune,keep_ratio=1.5", ValueError, "keep_ratio"),
        (AXES, "divprune,keep_ratio=0.5,positions=reindex", UnsupportedInputError, 'use "keep"'),
        ("somebody/llava-on-a-hub", "divprune,keep_ratio=0.25", CheckpointError, "nothing is downloaded"),
        (object(), "divprune,keep_ratio=0.25", CheckpointError, "got object"),
    ],
)
def test_what_can_not_be_served_is_refused(model, method, error, says):
    with pytest.raises(error, match=says):
        vllm_overrides(model, method)


def test_both_largest_budgets_are_refused():
    with pytest.raises(ValueError, match="one of keep_ratio and num_keep"):
        vllm_overrides("llava", "divprune,keep_ratio=0.25", max_keep_ratio=0.5, max_num_keep=4)


def test_a_model_that_nobody_serves_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModelError, match="'bert' can't be served pruned; these can: llava"):
        vllm_overrides(folder, "divprune,keep_ratio=0.25")


def test_a_checkpoint_with_a_method_on_it_is_refused(folder):
    model = LLAVA.model()
    with vltok.apply(model, vltok.TokenPacker(2), processor=LLAVA.processor()):
        model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="remove the method"):
        vllm_overrides(folder, "divprune,keep_ratio=0.25")


def test_a_method_without_a_name_is_refused():
    class Mine(vltok.Selector):
        """Has no name that a server could find."""

    with pytest.raises(CheckpointError, match=r"give Mine one: @vltok\.register"):
        vllm_overrides("llava", Mine(keep_ratio=0.5))


def test_the_command_prints_json():
    done = CliRunner().invoke(printing, ["llava", "divprune,keep_ratio=0.25", "--max-keep-ratio", "0.5"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == vllm_overrides("llava", "divprune,keep_ratio=0.25", max_keep_ratio=0.5)


@pytest.mark.parametrize(("app", "name"), [(printing, []), (app, ["serve"])], ids=["vltok.serving", "vltok serve"])
def test_commands_say_what_is_wrong(app, name):
    done = CliRunner().invoke(app, [*name, "llava", "fastv,keep_ratio=0.25"])
    assert done.exit_code == 1
    assert done.output.startswith("error: fastv can't be served")


def test_serve_prints_a_line_that_a_shell_reads(folder):
    given = [str(folder), "divprune,keep_ratio=0.25", "--own-budgets", "--", "--host", "127.0.0.1"]
    done = CliRunner().invoke(app, ["serve", *given])
    assert done.exit_code == 0, done.output
    (line,) = done.output.splitlines()
    *command, overrides, trust, host, address = shlex.split(line)
    assert command == ["vllm", "serve", str(folder), "--hf-overrides"]
    assert json.loads(overrides) == vllm_overrides(folder, "divprune,keep_ratio=0.25")
    assert (trust, host, address) == ("--trust-request-mm-kwargs", "--host", "127.0.0.1")


def test_only_a_server_with_own_budgets_trusts_its_requests():
    plain = CliRunner().invoke(app, ["serve", "llava", "divprune,keep_ratio=0.25"]).output
    largest = CliRunner().invoke(app, ["serve", "llava", "divprune,keep_ratio=0.25", "--max-num-keep", "9"]).output
    assert ("--trust" in plain, "--trust" in largest) == (False, True)


def test_neither_vllm_nor_transformers_is_loaded():
    code = (
        "import sys, vltok.serving; vltok.serving.vllm_overrides('llava', 'divprune,keep_ratio=0.25'); "
        "print({'vllm', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
