"""Records of LLaVA and of datasets become the same samples; a faulty one is named."""

from __future__ import annotations

import contextlib
import io
import json

import datasets
import pytest
import torch
from PIL import Image
from tiny import picture
from train.records import record
from transformers.image_utils import load_image

from vltok.train import BadImageError, Conversations, Sample, SampleError, Turn, open_image, read_sample
from vltok.train.data import open_video, pad_square

TURNS = [{"from": "human", "value": "<image>\nw1"}, {"from": "gpt", "value": "w2"}]


def test_a_llava_record_is_read(tmp_path):
    sample = read_sample({"id": "a7", "image": "x/1.png", "conversations": TURNS}, images=tmp_path)
    assert sample == Sample(
        "sample 'a7'", (Turn("user", "<image>\nw1"), Turn("assistant", "w2")), (tmp_path / "x/1.png",)
    )


def test_messages_with_parts_are_read_like_conversations_with_marks():
    first, second = picture(1), picture(2)
    parts = [{"type": "image"}, {"type": "text", "text": "w1 "}, {"type": "image"}, {"type": "text", "text": " w2"}]
    messages = [
        {"role": "system", "content": "w9"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "w3"}]},
    ]
    sample = read_sample({"messages": messages, "images": [first, second]}, "sample 4")
    assert sample.name == "sample 4"
    assert sample.turns == (Turn("system", "w9"), Turn("user", "<image>w1 <image> w2"), Turn("assistant", "w3"))
    assert sample.images == (first, second)


def test_pictures_may_stand_in_the_parts_themselves():
    parts = [{"type": "image", "path": "1.png"}, {"type": "text", "text": "w1"}]
    sample = read_sample({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "w2"}]})
    assert sample.images == ("1.png",)


def test_rows_of_a_datasets_table_become_samples_with_their_pictures():
    rows = {
        "image": [picture(0), None],
        "conversations": [TURNS, [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]],
    }
    table = datasets.Dataset.from_dict(rows)
    decoded = table.cast_column("image", datasets.Image())
    encoded = decoded.cast_column("image", datasets.Image(decode=False))
    for data in (Conversations(decoded), Conversations(encoded)):
        assert [len(data[index].images) for index in range(len(data))] == [1, 0]
        assert open_image(data[0].images[0], "s").tobytes() == picture(0).tobytes()
        assert data[1].name == "sample 1"


def test_a_table_saved_to_disk_is_opened(tmp_path, folder):
    datasets.Dataset.from_list(folder.records).save_to_disk(tmp_path / "table")
    data = Conversations.from_file(tmp_path / "table", folder.path)
    assert [data[index] for index in range(8)] == [Conversations.from_file(folder.file)[index] for index in range(8)]


def test_a_text_without_pictures_is_a_sample():
    turns = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    assert read_sample({"id": 1, "conversations": turns, "image": None}).images == ()


def test_answers_before_the_first_question_are_left_out():
    turns = [{"from": "gpt", "value": "w0"}, *TURNS]
    assert read_sample({"image": "1.png", "conversations": turns}).turns[0].text == "<image>\nw1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "0 images but 1 <image>"),
        ({"image": ["1.png", "2.png"]}, "2 images but 1 <image>"),
        ({"image": 5}, "an image must be a file"),
        ({"conversations": None}, "has no turns"),
        ({"conversations": "w1"}, "has no turns"),
        ({"conversations": [TURNS[0]]}, "no answer"),
        ({"conversations": [*TURNS, TURNS[1]]}, "must take turns, got user, assistant, assistant"),
        ({"conversations": [{"from": "bot", "value": "w1"}]}, "from 'bot'; allowed are 'system', 'human'"),
        ({"conversations": [{"from": "human", "value": 3}, TURNS[1]]}, "must be a string, got 3"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}]}, "belong into questions"),
        ({"conversations": [{"from": "human", "value": [{"type": "audio"}]}]}, 'must be of type "text"'),
        ({"conversations": ["w1"]}, "a turn must be an object"),
    ],
)
def test_a_faulty_record_is_an_error_that_names_it(change, message):
    with pytest.raises(SampleError, match="sample 'a7'") as error:
        read_sample({"id": "a7", "image": "1.png", "conversations": TURNS} | change)
    assert message in str(error.value)


def test_a_file_is_checked_whole_and_its_faulty_samples_are_listed(tmp_path):
    good = {"id": "good", "image": "1.png", "conversations": TURNS}
    bad = [{"id": f"bad{index}", "conversations": TURNS} for index in range(7)]
    (tmp_path / "data.json").write_text(json.dumps([good, *bad, 3]))
    with pytest.raises(SampleError, match="8 faulty samples") as error:
        Conversations.from_file(tmp_path / "data.json")
    assert [f"bad{index}" in str(error.value) for index in range(7)] == [True] * 5 + [False] * 2
    assert "3 more" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[{", "not a JSON file.*line 1"), ("{}", "must hold a list"), ("[]", "no samples"), ("[3]", "must be an object")],
)
def test_a_file_that_is_no_list_of_samples_is_refused(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(SampleError, match=message):
        Conversations.from_file(tmp_path / "data.json")


def test_pictures_count_from_the_folder_of_the_file_unless_told(tmp_path, folder):
    assert Conversations.from_file(folder.file)[0].images == (folder.path / "0.png",)
    assert Conversations.from_file(folder.file, tmp_path)[0].images == (tmp_path / "0.png",)


def test_a_missing_or_broken_picture_is_an_error_that_names_file_and_sample(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    for name in ("missing.png", "text.png", "half.png"):
        with pytest.raises(BadImageError, match=f"sample 3: can't open .*{name}"):
            open_image(tmp_path / name, "sample 3")
    with pytest.raises(BadImageError, match="given as bytes"):
        open_image(b"no picture", "sample 3")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_stands_upright_wherever_it_comes_from(tmp_path, orientation, format):
    photo, path = picture(3, (80, 40)), tmp_path / f"photo.{format.lower()}"
    (exif := photo.getexif())[0x0112] = orientation
    photo.save(path, format, exif=exif)
    right = load_image(str(path))
    table = datasets.Dataset.from_list([{"image": str(path), "conversations": TURNS}])
    encoded = table.cast_column("image", datasets.Image(decode=False))
    sources = {
        "JSON": Conversations([{"image": path.name, "conversations": TURNS}], tmp_path)[0].images[0],
        "a table": Conversations(table.cast_column("image", datasets.Image()))[0].images[0],
        "an undecoded table": Conversations(encoded)[0].images[0],
        "bytes": path.read_bytes(),
        "a picture": Image.open(path),
        "a picture in a part": read_sample(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": Image.open(path)}]},
                    {"role": "assistant", "content": "w2"},
                ]
            }
        ).images[0],
    }
    for name, source in sources.items():
        image = open_image(source, name)
        assert (image.size, image.tobytes()) == (right.size, right.tobytes()), name


def test_a_picture_with_damaged_exif_is_opened_or_named(tmp_path):
    for noise in (b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x09"):
        picture(0).save(tmp_path / "photo.jpeg", exif=noise)
        with contextlib.suppress(BadImageError):
            assert open_image(tmp_path / "photo.jpeg", "s").mode == "RGB"


def test_a_picture_is_centred_on_a_square():
    padded = pad_square(picture(0, (6, 3)), (1, 2, 3))
    assert padded.size == (6, 6)
    assert padded.crop((0, 1, 6, 4)).tobytes() == picture(0, (6, 3)).tobytes()
    assert {padded.getpixel((x, y)) for x in range(6) for y in (0, 4, 5)} == {(1, 2, 3)}
    assert pad_square(picture(0, (3, 6)), (0, 0, 0)).crop((1, 0, 4, 6)).tobytes() == picture(0, (3, 6)).tobytes()


def test_grey_pictures_and_those_with_alpha_become_rgb():
    assert open_image(Image.new("LA", (2, 2)), "s").mode == "RGB"


def test_videos_are_files_arrays_and_lists_of_frames(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"film")
    frames = [picture(index) for index in range(3)]
    frames[0].save(tmp_path / "0.png")
    array = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    given = ["a.mp4", ["0.png", *frames[1:]], array]
    row = record("s", [], "<video> w1 <video> <video>", "w2") | {"video": given}
    sample = read_sample(row, images=tmp_path)
    assert sample.media["image"] == ()
    file, pictures, same = (open_video(source, "s") for source in sample.videos)
    assert file == str(tmp_path / "a.mp4") and same is array
    assert pictures.shape == (3, 56, 56, 3)
    for frame, own in zip(frames, pictures, strict=True):
        assert Image.fromarray(own.numpy()).tobytes() == frame.tobytes()
    alone = record("s", [], "<video>w1", "w2")
    assert read_sample(alone | {"video": "a.mp4"}).videos == ("a.mp4",)
    assert read_sample(alone | {"videos": array}).videos[0] is array
    inline = {"role": "user", "content": [{"type": "video", "video": "b.mp4"}, {"type": "text", "text": "w1"}]}
    assert read_sample({"messages": [inline, {"role": "assistant", "content": "w2"}]}).videos == ("b.mp4",)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (None, "0 videos but 1 <video>"),
        (["a.mp4", "b.mp4"], "2 videos but 1 <video>"),
        (7, "a video must be a file, a list of images or an array"),
        (torch.zeros(4, 4, 3), "must be a file"),
    ],
)
def test_a_faulty_video_is_an_error_that_names_its_sample(video, message):
    with pytest.raises(SampleError, match=f"sample 's'.*{message}"):
        read_sample(record("s", [], "<video>w1", "w2") | {"video": video})


def test_a_video_that_is_missing_is_told_like_an_image():
    with pytest.raises(BadImageError, match=r"s: can't open no.mp4: there is no such file"):
        open_video("no.mp4", "s")


def test_lines_and_tables_are_read_like_a_list(tmp_path, folder):
    lines = tmp_path / "data.jsonl"
    text = "\n".join(json.dumps(row | {"note": "a line\u2028of its own"}, ensure_ascii=False) for row in folder.records)
    lines.write_text(text + "\n", encoding="utf-8")
    table = tmp_path / "data.parquet"
    datasets.Dataset.from_list(folder.records).to_parquet(str(table))
    expected = Conversations.from_file(folder.file)
    for file in (lines, table):
        found = Conversations.from_file(file, folder.path)
        assert Conversations.from_file(file)[0].images == (tmp_path / "0.png",)
        assert [found[index] for index in range(len(found))] == [expected[index] for index in range(len(expected))]
    lines.write_text("[1]\n{", encoding="utf-8")
    with pytest.raises(SampleError, match="is not a JSON file"):
        Conversations.from_file(lines)
