"""lmms-eval's models with methods answer what apply() and generate() answer by hand, and unpruned what its own do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import INTERNVL, LLAVA, LLAVA_ONEVISION, QWEN2_5_VL, TinyFamily, clip, picture
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata
from zoo.qwen import QWEN3_VL

import vltok
from eval.canvas.data import Canvases
from eval.canvas.model import MODEL_DIR
from vltok.errors import CheckpointError

pytest.importorskip("lmms_eval")
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model, get_model_manifest, list_available_models

from vltok.integrations.lmms_eval import MODELS
from vltok.integrations.lmms_eval.generation import cut, generate_kwargs
from vltok.integrations.lmms_eval.usage import Usage
from vltok.integrations.lmms_eval.videos import read

ROWS = {row.key: row for row in (LLAVA, QWEN2_5_VL, INTERNVL)}
VIDEO_ROWS = {row.key: row for row in (QWEN2_5_VL, INTERNVL, LLAVA_ONEVISION)}
METHODS = [None, "divprune;keep_ratio=0.25", "todre;keep_ratio=0.5;tau=0.9"]
GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "do_sample": False, "until": ["\n\n"]}
TEMPLATE = """\
{%- for turn in messages %}{% for part in turn.content -%}
{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %} {{ part.text }} w39{% endif %}
{%- endfor %}{% endfor %}"""
FRAMES = 4


def template(row: TinyFamily) -> str:
    """A chat template that shows pictures as the family does, with a word behind each question."""
    return TEMPLATE.replace("IMAGE", row.image).replace("VIDEO", row.video)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    """Writes tiny models into folders as from_pretrained takes them, each once."""
    written: dict[tuple[str, bool], Path] = {}

    def write(row: TinyFamily, chats: bool = True) -> Path:
        if (row.key, chats) not in written:
            path = written[row.key, chats] = tmp_path_factory.mktemp(row.key)
            row.model().save_pretrained(path)
            processor = row.processor()
            processor.chat_template = template(row) if chats else None
            processor.save_pretrained(path)
        return written[row.key, chats]

    return write


def model(path: Path, name: str = "vltok", **given: Any) -> Any:
    """A model of lmms-eval, as its command line makes it."""
    given = {"pretrained": path, "dtype": "float32", "device": "cpu", **given}
    text = ",".join(f"{key}={value}" for key, value in given.items() if value is not None)
    return get_model(name).create_from_arg_string(text)


def requests(lm: Any, documents: Sequence[dict[str, Any]], **asked: Any) -> list[Instance]:
    """The requests of a task "t" whose documents hold a question and what is to be seen."""
    lm.task_dict["t"] = {"test": documents}

    def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        pictures = [{"type": kind, "url": url} for kind in ("image", "video") for url in doc.get(f"{kind}s", ())]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["question"]}]}]

    return [
        Instance(
            "generate_until",
            (doc["question"], to_messages, GREEDY | asked, number, "t", "test"),
            0,
            {"task": "t", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(documents)
    ]


def documents(row: TinyFamily) -> list[dict[str, Any]]:
    """Questions of several lengths about one image, two, and none."""
    return [
        {"question": "w1 w2 w3", "images": [picture(1, row.size)]},
        {"question": "w4", "images": [picture(2, row.other_size)]},
        {"question": "w5 w6", "images": [picture(3, row.size), picture(4, row.other_size)]},
        {"question": "w7 w8 w9 w10"},
        {"question": "w11 w12", "images": [picture(5, row.size)]},
    ]


def texts(lm: Any, asked: list[Instance]) -> list[str]:
    return [result.text for result in lm.generate_until(asked)]


def by_hand(path: Path, method: str | None, prompts: list[tuple[str, dict[str, Any]]], tokens: int = 6) -> list[str]:
    """Each answer with nothing but vltok.apply() and generate()."""
    plain = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    if method is not None:
        vltok.apply(plain, method.replace(";", ","), processor=processor)
    answers = []
    for text, pictures in prompts:
        inputs = processor(text=[text], return_tensors="pt", **pictures)
        written = plain.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers += processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_answers_are_those_of_apply_and_generate(row, method, folder):
    path, asked = folder(row), documents(row)
    lm = model(path, method=method)
    prompts = [
        (
            row.image * len(doc.get("images", ())) + f" {doc['question']} w39",
            {"images": doc["images"]} if "images" in doc else {},
        )
        for doc in asked
    ]
    expected = by_hand(path, method, prompts)
    assert texts(lm, requests(lm, asked)) == expected
    assert len({*expected}) == len(expected)  # each question has an answer of its own


@pytest.mark.parametrize("method", [None, "divprune;keep_ratio=0.25"])
@pytest.mark.parametrize("row", [LLAVA, INTERNVL], ids=lambda row: row.key)
def test_without_a_chat_template_the_prompt_is_images_and_question(row, method, folder):
    path = folder(row, chats=False)
    lm = model(path, method=method)
    asked = [doc for doc in documents(row) if "images" in doc]
    prompts = [
        ("\n".join([row.image] * len(doc["images"]) + [doc["question"]]), {"images": doc["images"]}) for doc in asked
    ]
    assert texts(lm, requests(lm, asked)) == by_hand(path, method, prompts)


@pytest.mark.parametrize("method", METHODS)
def test_the_trained_model_answers_as_by_hand(method):
    source = Canvases("test", seed=3)
    drawn = [source.canvas(index) for index in range(3)]
    asked = [
        {"question": question.text, "images": [Image.fromarray(canvas.image)], "answer": question.answer}
        for index, canvas in enumerate(drawn)
        for question in source.questions(index)
    ]
    lm = model(MODEL_DIR, method=method, batch_size=4)
    found = texts(lm, requests(lm, asked, max_new_tokens=2))
    prompts = [(f"<image> {doc['question']}", {"images": doc["images"]}) for doc in asked]
    assert found == by_hand(MODEL_DIR, method, prompts, tokens=2)
    if method is None:
        assert sum(text == doc["answer"] for text, doc in zip(found, asked, strict=True)) > 0.8 * len(asked)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_batch_answers_and_counts_like_one_at_a_time(row, method, folder):
    alone, batched = (model(folder(row), method=method, batch_size=size) for size in (1, 4))
    asked = documents(row)
    assert texts(batched, requests(batched, asked)) == texts(alone, requests(alone, asked))
    assert [replace(each, kv_bytes=0) for each in batched.usage] == [replace(each, kv_bytes=0) for each in alone.usage]


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A file of 12 frames, 4 a second, and its frames as they are decoded."""
    import av

    path = tmp_path_factory.mktemp("video") / "clip.mkv"
    with av.open(path, "w") as file:
        stream = file.add_stream("ffv1", rate=4)  # loses nothing
        stream.width = stream.height = 56
        stream.pix_fmt = "bgr0"
        frames = clip(7, (56, 56), 12)
        for frame in frames.numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode())
    return path, frames


@pytest.mark.parametrize("method", [None, "divprune;keep_ratio=0.25"])
@pytest.mark.parametrize("row", VIDEO_ROWS.values(), ids=VIDEO_ROWS)
def test_videos_are_answered_from_frames_at_equal_distances(row, method, folder, video):
    path, frames = video
    lm = model(folder(row), method=method, max_num_frames=FRAMES)
    asked = [{"question": "w1", "videos": [str(path)]}, {"question": "w2 w3", "videos": [str(path)]}]
    picked = frames[[0, 4, 7, 11]]
    metadata = VideoMetadata(total_num_frames=12, fps=4.0, frames_indices=[0, 4, 7, 11])
    given = {"videos": [picked], "video_metadata": [metadata], "do_sample_frames": False}
    prompts = [(f"{row.video} {doc['question']} w39", given) for doc in asked]
    assert texts(lm, requests(lm, asked)) == by_hand(folder(row), method, prompts)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"most": 32}, range(12)),
        ({"most": 3}, [0, 6, 11]),
        ({"most": 32, "fps": 1}, [0, 6, 11]),  # three seconds
        ({"most": 2, "fps": 4}, [0, 11]),
        ({"most": 3, "start": 1.0, "end": 2.0}, [4, 6, 8]),
        ({"most": 1, "start": 2.5}, [10]),
    ],
)
def test_frames_are_those_of_the_file(given, expected, video):
    path, frames = video
    seen, metadata = read(str(path), **given)
    assert np.array_equal(seen, frames[list(expected)].numpy())
    assert (metadata.frames_indices, metadata.fps) == ([*expected], 4.0)


def test_tasks_may_ask_about_a_part_of_a_video(folder, video):
    path, frames = video
    lm = model(folder(QWEN2_5_VL), max_num_frames=2)
    part = {"path": str(path), "video_start": 1.0, "video_end": 2.0}
    metadata = VideoMetadata(total_num_frames=5, fps=4.0, frames_indices=[4, 8])
    given = {"videos": [frames[[4, 8]]], "video_metadata": [metadata], "do_sample_frames": False}
    prompts = [(f"{QWEN2_5_VL.video} w1 w39", given)]
    found = texts(lm, requests(lm, [{"question": "w1", "videos": [part]}]))
    assert found == by_hand(folder(QWEN2_5_VL), None, prompts)


# lmms-eval's models: a tiny model for each, an image that nobody resizes, and what both are told.
OURS = {
    "llava_hf": (LLAVA, (56, 56), {"dtype": "bfloat16"}),
    "qwen2_5_vl": (QWEN2_5_VL, (56, 56), {"min_pixels": 3136, "max_pixels": 6272}),
    "qwen3_vl": (QWEN3_VL, (64, 64), {}),
    "internvl_hf": (INTERNVL, (112, 56), {}),
}


@pytest.mark.parametrize("name", OURS)
def test_unpruned_answers_are_those_of_lmms_evals_own_models(name, folder):
    pytest.importorskip("decord")  # which they import
    row, size, given = OURS[name]
    shipped = model(folder(row), name, **{"dtype": None, "device_map": "cpu", **given})
    lm = model(folder(row), f"vltok_{name}", **{"dtype": None, **given})
    asked = [{"question": f"w{n}", "images": [picture(n, size)]} for n in range(1, 4)]
    expected = [result.text for result in shipped.generate_until(requests(shipped, asked))]
    assert texts(lm, requests(lm, asked)) == expected
    assert all(expected)


def test_usage_counts_tokens_and_bytes(folder):
    asked = [{"question": "w1 w2", "images": [picture(1, LLAVA.size)] * 2}, {"question": "w1"}]
    whole = 2 * LLAVA.tokens[0]
    entry = 2 * 4 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes of a float32
    for method, kept in ((None, whole), ("divprune;keep_ratio=0.25", whole // 4)):
        lm = model(folder(LLAVA), method=method)
        lm.generate_until(requests(lm, asked))
        assert lm.usage == [
            Usage("t", 0, whole, kept, kept + 3, entry * (kept + 3)),  # with w39
            Usage("t", 1, 0, 0, 2, entry * 2),
        ]


def test_usage_counts_what_leaves_inside_the_decoder_and_what_a_projector_condenses(folder):
    question = [{"question": "w1 w2", "images": [picture(1, LLAVA.size)]}]
    whole = LLAVA.tokens[0]
    lm = model(folder(LLAVA), method="fastv;keep_ratio=0.5;layer=2")
    lm.generate_until(requests(lm, question))
    condensed = model(folder(LLAVA), method="average_pool;scale_factor=2")
    condensed.generate_until(requests(condensed, question))
    plain = model(folder(LLAVA))
    plain.generate_until(requests(plain, question))
    entering = plain.usage[0].tokens_per_layer
    assert lm.usage[0].tokens_per_layer == entering - whole / 2 / 2  # half of the tokens leave after two of four layers
    assert (condensed.usage[0].visual_tokens, condensed.usage[0].kept_tokens) == (whole, whole // 4)
    assert condensed.usage[0].tokens_per_layer == entering - whole + whole // 4


def test_usage_leaves_out_what_only_fills_up_a_process(folder):
    lm = model(folder(LLAVA))
    asked = requests(lm, documents(LLAVA)[:2])
    asked[1].metadata["__padding_only__"] = True
    assert len(lm.generate_until(asked)) == 2
    assert [each.doc_id for each in lm.usage] == [0]


def test_beams_are_answered_and_counted(folder):
    lm = model(folder(LLAVA), method="divprune;keep_ratio=0.25", batch_size=2)
    alone = model(folder(LLAVA), method="divprune;keep_ratio=0.25")
    asked = documents(LLAVA)[1:3]
    assert texts(lm, requests(lm, asked, num_beams=3)) == texts(alone, requests(alone, asked, num_beams=3))
    assert [each.kept_tokens for each in lm.usage] == [4, 8]


def test_an_error_names_its_document_and_ends_the_run(folder, tmp_path):
    lm = model(folder(LLAVA), batch_size=2)
    asked = [*documents(LLAVA)[:2], {"question": "w3", "images": [str(tmp_path / "missing.png")]}]
    with pytest.raises(RuntimeError, match=r"document 2 of task t: FileNotFoundError.*missing\.png"):
        lm.generate_until(requests(lm, asked))
    with pytest.raises(RuntimeError, match="document 0 of task t, document 1 of task t: ZeroDivisionError"):
        lm.generate_until(requests(lm, documents(LLAVA)[:2], num_beams=0))
    with pytest.raises(RuntimeError, match=r"document 0 of task t: UnsupportedInputError: .* takes no videos"):
        lm.generate_until(requests(lm, [{"question": "w1", "videos": ["clip.mp4"]}]))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "divprun;keep_ratio=0.1"}, CheckpointError, "did you mean 'divprune'"),
        ({"method": "divprune;keep=0.1"}, CheckpointError, "unknown field 'keep' of divprune"),
        ({"method": "divprune;keep_ratio=2"}, ValueError, "keep_ratio"),
        ({"method": "divprune;keep_ratio"}, ValueError, "written once, as key=value"),
        ({"method": "divprune", "saved": "folder"}, ValueError, "method= or saved=, not both"),
        ({"metod": "divprune"}, TypeError, "takes no argument metod; it takes pretrained, method"),
        ({"batch_size": "auto"}, ValueError, "batch_size must be a whole number of at least 1, got 'auto'"),
        ({"pretrained": None}, TypeError, "give pretrained=FOLDER"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(given, error, words):
    with pytest.raises(error, match=words):  # the folder isn't there, and nobody looks
        model(Path("nowhere"), **given)


def test_in_python_methods_may_be_given_as_they_are(folder):
    method = vltok.DivPrune(keep_ratio=0.25)
    for given in (method, [method]):
        lm = get_model("vltok")(pretrained=folder(LLAVA), method=given, device="cpu")
        assert lm.handle.methods == (method,)


def test_a_size_that_images_cannot_have_is_refused(folder):
    with pytest.raises(ValueError, match="CLIPImageProcessor has no max_patches"):
        model(folder(LLAVA), max_patches=4)


def test_what_chat_models_are_not_asked_is_refused(folder):
    lm = model(folder(LLAVA))
    with pytest.raises(NotImplementedError, match="rates no given answers"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="tasks of one round"):
        lm.generate_until_multi_round([])


def test_saved_methods_are_loaded_with_their_weights(tmp_path, folder):
    row = LLAVA
    plain, processor = row.model(), row.processor()
    processor.chat_template = template(row)
    handle = vltok.apply(plain, vltok.TokenPacker(scale_factor=2, init="random"), processor=processor)
    vltok.save(handle, tmp_path)
    inputs = processor(text=[f"{row.image} w1 w39"], images=[picture(1)], return_tensors="pt")
    written = plain.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    lm = model(folder(row), saved=tmp_path)
    found = texts(lm, requests(lm, [{"question": "w1", "images": [picture(1)]}]))
    assert found == processor.batch_decode(written, skip_special_tokens=True)


def test_a_chat_template_and_a_system_prompt_can_be_given(folder, tmp_path):
    (tmp_path / "chat.jinja").write_text(template(LLAVA).replace("w39", "w38"))
    path = folder(LLAVA, chats=False)
    lm = model(path, chat_template=tmp_path / "chat.jinja", system_prompt="w30")
    found = texts(lm, requests(lm, [{"question": "w1", "images": [picture(1)]}]))
    assert found == by_hand(path, None, [("w30 w38<image> w1 w38", {"images": [picture(1)]})])


def test_answers_end_where_the_task_says():
    assert cut("yes. ASSISTANT: no", ["ASSISTANT:"]) == "yes. "
    assert cut("a b c", "b") == "a "
    assert cut("one\n\ntwo", ["\n\n"]) == "one\n\ntwo"
    assert cut("as it is", None) == "as it is"


def test_generation_is_greedy_unless_a_temperature_is_given():
    asked = {
        "temperature": 0,
        "top_p": 1.0,
        "num_beams": 1,
        "do_sample": False,
        "until": ["x"],
        "image_aspect_ratio": 1,
    }
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    assert generate_kwargs(asked, 9) == {"max_new_tokens": 9, "num_beams": 1, **greedy}
    sampled = {"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert generate_kwargs({"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9}, 9) == sampled


def test_lmms_eval_finds_the_models():
    assert {*MODELS} <= {*list_available_models()}
    for name, cls in MODELS.items():
        assert get_model_manifest(name).chat_class_path == f"vltok.integrations.lmms_eval.model.{cls}"
        assert get_model(name).__name__ == cls and not get_model(name).is_simple


def test_named_models_only_differ_in_defaults():
    for cls in (get_model(name) for name in MODELS if name != "vltok"):
        assert [name for name in vars(cls) if not name.startswith("_")] == ["defaults"]
        assert cls.defaults["pretrained"]
