"""Every example runs from end to end on a tiny model saved in a folder, is short, and says what it lacks."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import remote
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tiny import LLAVA, LLAVA_NEXT, QWEN2_5_VL, TinyFamily, picture, sharpen

import vltok
from vltok.families.vlm import VLMS
from vltok.serving import vllm_overrides

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAT = "{% for part in messages[0].content %}{{ part.text if part.type == 'text' else %r }} {% endfor %}"


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., str]:
    """Run an example as a script and return what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    picture(0).save(path)
    return path


def saved(family: TinyFamily, folder: Path, with_template: bool = True) -> Path:
    """A folder as a hub name stands for: weights, config, tokenizer, processor, chat template."""
    processor = family.processor()
    if with_template:
        processor.chat_template = CHAT.replace("%r", repr(family.image))
    processor.save_pretrained(folder)
    family.model().save_pretrained(folder)
    return folder


def test_every_example_is_at_most_40_lines_and_is_run_here():
    here = Path(__file__).read_text(encoding="utf-8")
    files = sorted(EXAMPLES.glob("*.py"))
    assert files
    for file in files:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 40
        assert f'run("{file.name}"' in here


@pytest.mark.parametrize("with_template", [True, False])
def test_prune_llava_prints_both_answers_and_the_report(run, image, tmp_path, with_template):
    folder = saved(LLAVA, tmp_path / "model", with_template)
    printed = run("prune_llava.py", image, "w1 w2", "--model", folder, "--keep-ratio", 0.25)
    assert "visual tokens 16 -> 4" in printed
    assert "entries per layer" in printed
    answers = {line.partition(": ")[0]: line.partition(": ")[2] for line in printed.splitlines()}
    assert set(answers["all visual tokens"].split()) <= {f"w{i}" for i in range(40)}
    assert answers["all visual tokens"] != answers["keep_ratio=0.25"]


def test_prune_llava_takes_other_families(run, image, tmp_path):
    folder = saved(QWEN2_5_VL, tmp_path / "model")
    printed = run("prune_llava.py", image, "w1 w2", "--model", folder)
    before, after = re.search(r"visual tokens (\d+) -> (\d+)", printed).groups()
    assert int(after) == max(1, round(0.1 * int(before)))


def test_tokenpacker_llava_prints_both_answers_and_the_report(run, image, tmp_path):
    folder = saved(LLAVA, tmp_path / "model")
    printed = run("tokenpacker_llava.py", image, "w1 w2", "--model", folder)
    assert "projector: 16 patches -> 4 visual tokens (images, crops: 1)" in printed
    answers = dict(line.split(": ", 1) for line in printed.splitlines())
    assert set(answers["condensed"].split()) <= {f"w{i}" for i in range(40)}
    assert answers["condensed"] != answers["all visual tokens"]


def test_tokenpacker_llava_loads_trained_weights(run, image, tmp_path):
    folder, model = saved(LLAVA, tmp_path / "model"), LLAVA.model()
    with vltok.apply(model, vltok.TokenPacker(scale_factor=4), processor=LLAVA.processor()) as handle:
        vltok.save(handle, tmp_path / "adapter")
    printed = run("tokenpacker_llava.py", image, "w1 w2", "--model", folder, "--adapter", tmp_path / "adapter")
    assert "projector: 16 patches -> 1 visual tokens" in printed


def test_finetune_tokenpacker_trains_a_projector_that_loads_and_answers(run, image, tmp_path):
    folder = saved(LLAVA, tmp_path / "model", with_template=False)
    turns = [{"from": "human", "value": "<image>\nw1"}, {"from": "gpt", "value": "w2 w3"}]
    rows = [{"id": i, "image": image.name, "conversations": turns} for i in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    arguments = (folder, tmp_path / "data.json", tmp_path / "out", "--steps", 3, "--batch", 2)
    printed = run("finetune_tokenpacker.py", *arguments)
    assert "16 patches -> 4 visual tokens" in printed
    handle = vltok.load(LLAVA.model(), tmp_path / "out/adapter", processor=LLAVA.processor())
    assert (handle.methods[0].scale_factor, handle.methods[0].init) == (2, "pool")


def test_own_selector_prints_an_answer_and_the_report(run):
    printed = run("own_selector.py")
    assert "visual tokens 256 -> 26" in printed
    assert printed.splitlines()[0].endswith("</s>")


def test_compare_methods_prints_answers_and_draws_what_was_kept(run, image, tmp_path):
    folder, out = saved(LLAVA, tmp_path / "model"), tmp_path / "compared.png"
    options = ("--model", folder, "--methods", "divprune;stride", "--keep-ratio", 0.25, "--out", out)
    printed = run("compare_methods.py", image, "w1 w2", *options)
    assert [line.partition(":")[0] for line in printed.splitlines()] == ["divprune", "stride"]
    with Image.open(out) as drawn:
        assert drawn.width > drawn.height > 100


def test_compare_methods_says_that_tiles_form_no_grid(run, image, tmp_path, capsys):
    folder = saved(LLAVA_NEXT, tmp_path / "model")
    with pytest.raises(SystemExit):
        run("compare_methods.py", image, "w1", "--model", folder, "--methods", "stride")
    assert "form no grid to draw on" in capsys.readouterr().err


def test_soft_vit_teaches_new_attention_and_saves_it(run, image, tmp_path):
    save_file(sharpen(timm.create_model("test_vit")).state_dict(), tmp_path / "vit.safetensors")
    options = ("--model", "test_vit", "--weights", tmp_path / "vit.safetensors", "--steps", 12)
    printed = run("soft_vit.py", tmp_path, tmp_path / "attention", *options)
    assert "softmax-free attention in blocks 0 to 5, 25 landmarks for 100 patches" in printed
    first, later = (float(share) for share in re.findall(r"differ by ([\d.]+)%", printed))
    assert later < first
    model = timm.create_model("test_vit")
    assert vltok.load(model, tmp_path / "attention").family == "timm_vit"


@pytest.mark.parametrize("model", ["somebody/a-model-nobody-has", "an/empty/folder", "only-a-processor"])
def test_prune_llava_says_what_is_needed_when_the_weights_are_missing(run, image, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    Path("an/empty/folder").mkdir(parents=True)
    LLAVA.processor().save_pretrained("only-a-processor")
    LLAVA.model().config.save_pretrained("only-a-processor")
    with pytest.raises(SystemExit) as stopped:
        run("prune_llava.py", image, "w1 w2", "--model", model)
    first_line = str(stopped.value.code).splitlines()[0]
    assert first_line.startswith(f"{model} is not here")
    assert "with --model" in first_line
    assert "with --download" in first_line
    assert stopped.value.__suppress_context__, "a traceback is no message"


def test_prune_llava_names_a_missing_picture(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("prune_llava.py", tmp_path / "no.png", "w1 w2", "--model", "nothing")
    assert "there is no picture" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--download"]], ids=["by default", "when asked"])
def test_prune_llava_downloads_only_when_asked(run, image, monkeypatch, arguments):
    asked = []

    def load(name: str, *, dtype: str, local_files_only: bool) -> None:
        asked.append((name, local_files_only))
        raise OSError

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", load)
    with pytest.raises(SystemExit):
        run("prune_llava.py", image, "w1 w2", *arguments)
    assert asked == ([("llava-hf/llava-1.5-7b-hf", False)] if arguments else [])


def test_robust_vit_trains_with_both_losses_and_saves_the_model(run, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(2):
            picture(number, (40, 40)).save(tmp_path / "pictures" / label / f"{number}.png")
    printed = run("robust_vit.py", tmp_path / "pictures", tmp_path / "robust.pt", "--model", "test_vit", "--steps", 2)
    assert "step 0: loss" in printed
    assert "tokens pooled at 4 scales" in printed and "attention diversification loss of blocks 0 to 5" in printed
    model = timm.create_model("test_vit", num_classes=2)
    with vltok.apply(model, vltok.TAP()):
        model.load_state_dict(torch.load(tmp_path / "robust.pt", weights_only=True))


@pytest.mark.parametrize("unit", ["entry", "run"])
def test_prune_own_model_makes_code_beside_weights_known(run, image, tmp_path, unit):
    with remote.saved(tmp_path / "own", tmp_path / "modules") as folder:
        printed = run("prune_own_model.py", folder, image, "w1 <image> w2", "--image-token-id", 4, "--unit", unit)
    assert VLMS.pop("own").facts["unit"] == unit
    assert "visual tokens 16 -> 4" in printed
    assert set(printed.splitlines()[-1].split()) <= {f"w{i}" for i in range(40)}


class Completed:
    """What vLLM gives back for a request, here the length of its prompt and its own words."""

    def __init__(self, request: dict) -> None:
        ratio = request["mm_processor_kwargs"]["visual_keep_ratio"]
        self.prompt_token_ids = [0] * round(16 * ratio)
        self.outputs = [types.SimpleNamespace(text=f" {request['multi_modal_data']['image'].mode} at {ratio}")]


def test_serve_vllm_asks_every_question_under_every_budget_in_one_batch(run, image, tmp_path, monkeypatch):
    started, batches = [], []

    class Engine:
        def __init__(self, model: str, **options: object) -> None:
            started.append((model, options["hf_overrides"]))

        def generate(self, requests: list[dict], sampling: dict) -> list[Completed]:
            batches.append(requests)
            return [Completed(request) for request in requests]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=dict))
    folder = saved(LLAVA, tmp_path / "model")
    options = ("--model", folder, "--keep-ratios", 0.25, 0.5)
    printed = run("serve_vllm.py", image, "w1 w2", "w3", *options).splitlines()
    assert started == [(str(folder), vllm_overrides(folder, "divprune,keep_ratio=0.5"))]
    assert [line.rpartition(", ")[2] for line in printed] == ["4 tokens: RGB at 0.25", "8 tokens: RGB at 0.5"] * 2
    assert [request["prompt"].strip() for request in batches.pop()] == ["<image> w1 w2"] * 2 + ["<image> w3"] * 2
    assert batches == []


def test_serve_vllm_says_that_it_needs_vllm(run, image, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit, match=r"needs vLLM: python -m pip install 'vltok\[vllm\]'"):
        run("serve_vllm.py", image, "w1")


def test_the_servers_script_is_bash_and_describes_itself():
    script = EXAMPLES / "serve_vllm.sh"
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=True).stderr == ""
    told = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1].strip() == "examples/serve_vllm.sh MODEL IMAGE QUESTION [further options of vLLM ...]"
    assert subprocess.run([script, "MODEL"], capture_output=True).returncode == 1


# Run in a process of its own, where nothing says that there is no network; prints what reached for it.
ALONE = """
import json, runpy, socket, sys
asked = []
def refuse(*args, **kwargs):
    asked.append(repr(args))
    raise OSError("there is no network here")
sys.modules["vllm"] = None  # its engine is no matter of an example
socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refuse
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    try:
        runpy.run_path(name, run_name="__main__")
    except (SystemExit, OSError) as error:
        print(f"{name} stopped: {error}".splitlines()[0], file=sys.stderr)
print("ASKED", json.dumps(asked))
"""


def test_no_example_sends_a_request_unless_download_is_asked_for(image, tmp_path):
    folder, name = saved(LLAVA, tmp_path / "model", with_template=False), "llava-hf/llava-1.5-7b-hf"
    turns = [{"from": "human", "value": "<image>\nw1"}, {"from": "gpt", "value": "w2"}]
    (data := tmp_path / "data.json").write_text(json.dumps([{"image": image.name, "conversations": turns}] * 2))
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        picture(0).save(tmp_path / "pictures" / label / "0.png")
    with remote.saved(tmp_path / "own", tmp_path / "modules") as own:
        pass
    vit = ("--model", "test_vit", "--steps", 1)
    runs = [
        ("prune_llava.py", image, "w1"),
        ("prune_llava.py", image, "w1", "--model", folder),
        ("tokenpacker_llava.py", image, "w1"),
        ("tokenpacker_llava.py", image, "w1", "--model", folder),
        ("finetune_tokenpacker.py", name, data, tmp_path / "out"),
        ("finetune_tokenpacker.py", folder, data, tmp_path / "out", "--steps", 1, "--batch", 2),
        ("prune_own_model.py", own, image, "w1 <image> w2", "--image-token-id", 4),
        ("own_selector.py",),
        ("compare_methods.py", image, "w1", "--model", folder, "--methods", "stride"),
        ("robust_vit.py", tmp_path / "pictures", tmp_path / "robust.pt", *vit),
        ("soft_vit.py", tmp_path / "pictures", tmp_path / "attention", *vit),
        ("serve_vllm.py", image, "w1", "--model", folder),
    ]
    assert {run[0] for run in runs} == {file.name for file in EXAMPLES.glob("*.py")}
    commands = json.dumps([[str(EXAMPLES / script), *map(str, arguments)] for script, *arguments in runs])
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, commands], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "ASKED []"
    assert done.stderr.count(" stopped: ") == 4, "those that were given a name of the hub, and the one without vLLM"
