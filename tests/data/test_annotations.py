import json
from pathlib import Path

import pytest

from stts_lightning.data.annotations import AnnotationError, check_files, read_folder, read_list


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    ["a.mp4 0\nb c.mp4 1\n", "a.mp4,0\nb c.mp4,1\n", "path,label\na.mp4,0\nb c.mp4,1\n", "\ufeffa.mp4 0\r\nb c.mp4 1\r\n"],
)
def test_text_and_csv(tmp_path: Path, text: str) -> None:
    videos = read_list(write(tmp_path / "train.csv", text))
    assert [(v.path.name, v.label) for v in videos.videos] == [("a.mp4", 0), ("b c.mp4", 1)]
    assert videos.classes == ("0", "1")


def test_kinetics_csv_and_json(tmp_path: Path) -> None:
    rows = "label,youtube_id,time_start,time_end,split\nabseiling,xyz,10,20,train\nzumba,abc,0,10,train\n"
    videos = read_list(write(tmp_path / "k.csv", rows))
    assert [v.path.name for v in videos.videos] == ["xyz_000010_000020.mp4", "abc_000000_000010.mp4"]
    assert videos.classes == ("abseiling", "zumba")
    content = {"xyz": {"annotations": {"label": "abseiling", "segment": [10.0, 20.0]}, "subset": "train"}}
    assert read_list(write(tmp_path / "k.json", json.dumps(content))).videos[0].path.name == "xyz_000010_000020.mp4"


def test_something_something_json(tmp_path: Path) -> None:
    content = [{"id": "1", "template": "Holding [something]"}, {"id": "2", "template": "Dropping [something]"}]
    videos = read_list(write(tmp_path / "s.json", json.dumps(content)))
    assert [(v.path.name, v.label) for v in videos.videos] == [("1.webm", 1), ("2.webm", 0)]
    assert videos.classes == ("Dropping something", "Holding something")


def test_class_folders(tmp_path: Path) -> None:
    for name in ("run/b.mp4", "jump/a.mp4", "jump/notes.txt"):
        write(tmp_path / name, "")
    videos = read_folder(tmp_path)
    assert [(v.path.name, v.label) for v in videos.videos] == [("a.mp4", 0), ("b.mp4", 1)]
    with pytest.raises(AnnotationError, match="class folder 'run' is not among the 1 known"):
        read_folder(tmp_path, ["jump"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\nb.mp4\n", r"line 2: expected 'path label'"),
        ("", "it names no videos"),
        ("a.mp4 0\nb.mp4 x\nc.mp4 9\n", None),
    ],
)
def test_unreadable_lists(tmp_path: Path, text: str, message: str | None) -> None:
    write(tmp_path / "list.txt", text)
    if message is None:
        write(tmp_path / "classes.txt", "a\nb\n")
        message = r"line 2: label 'x' is neither in 0..1 nor a class name"
    with pytest.raises(AnnotationError, match=message):
        read_list(tmp_path / "list.txt")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="data folder .*nowhere: does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(AnnotationError, match="list file .*none.csv: does not exist"):
        read_list(tmp_path / "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnnotationError, match="no videos in"):
        read_folder(tmp_path / "empty")
    videos = read_list(write(tmp_path / "l.txt", "a.mp4 0\nb.mp4 0\n"))
    with pytest.raises(AnnotationError, match=r"2 of 2 listed videos do not exist, first .*a.mp4"):
        check_files(videos, "list")
