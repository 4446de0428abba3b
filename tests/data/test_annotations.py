import json
import subprocess
import sys
from pathlib import Path

import pytest

from stts_lightning.data.annotations import AnnotationError, Video, Videos, check_files, read_folder, read_list


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


def test_paths_with_commas_spaces_quotes_and_letters_of_any_script(tmp_path: Path) -> None:
    names = ["a,b.mp4", "c d.mp4", "ü_日本.mp4", "x'y.mp4", "folder,1/e f.mp4"]
    for text in (
        "".join(f"{name} {label}\n" for label, name in enumerate(names)),
        "".join(f'"{name}",{label}\n' for label, name in enumerate(names)),
        "path,label\n" + "".join(f"{name},{label}\n" for label, name in enumerate(names)),
    ):
        videos = read_list(write(tmp_path / "train.csv", text))
        assert [(str(v.path.relative_to(tmp_path)), v.label) for v in videos.videos] == list(zip(names, range(5), strict=True))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["list.txt", "list.json"])
def test_a_list_in_another_encoding_is_one_clear_error(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes("ü.mp4 0\nb.mp4 1\n".encode(encoding))
    with pytest.raises(AnnotationError, match=rf"list file .*{name}.*: not UTF-8 .*; save it as UTF-8"):
        read_list(tmp_path / name)


def test_repeats_are_told_of_and_contradictions_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    videos = read_list(write(tmp_path / "list.txt", "a.mp4 0\nb.mp4 1\na.mp4 0\na.mp4 0\n"))
    assert len(videos) == 4 and "2 lines repeat a video" in caplog.text and "a.mp4" in caplog.text
    with pytest.raises(AnnotationError, match=r"a.mp4 is listed with the labels 0 and 1"):
        read_list(write(tmp_path / "list.txt", "a.mp4 0\nb.mp4 1\na.mp4 1\n"))


def test_packed_videos_are_the_videos() -> None:
    plain = (Video(Path("a/b.mp4"), 3), Video(Path("c.mp4"), 0, 17), Video(Path("d.mp4"), 1, 5, "pyav"))
    packed = Videos(plain)
    assert tuple(packed) == plain and packed[-1] == plain[2] and tuple(packed[1:]) == plain[1:]
    for index in (3, -4):
        with pytest.raises(IndexError):
            packed[index]


def test_a_million_lines_fit_in_little_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is the list's: 1,000,000 lines of 60 letters."""
    code = (
        "import sys, resource\n"
        "with open('list.txt', 'w') as f:\n"
        "    f.writelines(f'some/folder/of/{i % 400:03d}/video_{i:030d}.mp4 {i % 400}\\n' for i in range(10**6))\n"
        "from stts_lightning.data.annotations import read_list\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "videos = read_list('list.txt')\n"
        "assert len(videos) == 10**6 and videos.videos[999_999].label == 399, len(videos)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400, "MiB"
