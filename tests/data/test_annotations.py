import json
import subprocess
import sys
from pathlib import Path

import pytest

from stts_lightning.data.annotations import AnnotationError, Video, Videos, check_files, read_folder, read_list
from stts_lightning.data.labels import read_class_names


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


def test_lists_of_every_common_form(tmp_path: Path) -> None:
    """The same two videos and labels, whatever the columns and separators."""
    for text in (
        "path\tlabel\na.mp4\t0\nb c.mp4\t1\n",
        "a.mp4\t0\nb c.mp4\t1\n",
        '"path","label"\n"a.mp4","0"\n"b c.mp4","1"\n',
        "label,path\n0,a.mp4\n1,b c.mp4\n",
        ",path,label\n0,a.mp4,0\n1,b c.mp4,1\n",
        "filename,label,split\na.mp4,0,train\nb c.mp4,1,train\n",
        "Video;Class\na.mp4;0\nb c.mp4;1\n",
        "path label\na.mp4 0\n'b c.mp4' 1\n".replace("'", '"'),
        "video,class\na.mp4,0.0\nb c.mp4,1.0\n",
        "a.mp4 0.0\nb c.mp4 1.0\n",
    ):
        videos = read_list(write(tmp_path / "list.csv", text))
        assert [(v.path.name, v.label) for v in videos.videos] == [("a.mp4", 0), ("b c.mp4", 1)], text
        assert videos.classes == ("0", "1")


def test_labels_may_be_words(tmp_path: Path) -> None:
    for text in (
        "a.mp4 riding a bike\nb.mp4 run\n",
        "a.mp4,riding a bike\nb.mp4,run\n",
        'a.mp4,"riding a bike"\nb.mp4,run\n',
        "path,class\na.mp4,riding a bike\nb.mp4,run\n",
        "a.mp4 action\nb.mp4 class\n",
    ):
        videos = read_list(write(tmp_path / "list.csv", text))
        assert [v.label for v in videos.videos] == [0, 1] and videos.classes[0] in ("riding a bike", "action"), text
    assert read_list(write(tmp_path / "list.csv", 'a.mp4,"Putting, then taking"\n')).classes == ("Putting, then taking",)


def test_frame_folders_in_lists_and_class_folders(tmp_path: Path) -> None:
    for text in ("x/a 40 0\nx/b 33 1\n", "x/a,40,0\nx/b,33,1\n", "path,num_frames,label\nx/a,40,0\nx/b,33,1\n"):
        videos = read_list(write(tmp_path / "list.txt", text))
        assert [(v.path, v.frames, v.label) for v in videos.videos] == [(tmp_path / "x/a", 40, 0), (tmp_path / "x/b", 33, 1)]
    for name in ("c/run/v1/img_00001.jpg", "c/run/v1/img_00002.jpg", "c/jump/v2.mp4", "c/jump/notes/readme.txt"):
        write(tmp_path / name, "")
    videos = read_folder(tmp_path / "c")
    assert [(v.path.name, v.label) for v in videos.videos] == [("v2.mp4", 0), ("v1", 1)]
    check_files(videos, "folder")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\nb.mp4 1\nc.mp4 -1\n", r"line 3: label '-1' is no whole number"),
        ("a.mp4,nan\nb.mp4,1\n", r"line 1: label 'nan'; every video needs a label"),
        ("path,label\na.mp4,\nb.mp4,1\n", r"line 2: label ''; every video needs a label"),
        ("a.mp4 0\nb.mp4 1.5\n", r"line 2: label '1.5' is no whole number"),
        ("a.mp4 0.25\nb.mp4 1.5\n", r"line 1: label '0.25' is no whole number"),
        ("a.mp4 0\nb.mp4 walk\n", r"line 2: label 'walk' is no whole number"),
        ("a.mp4 0\nb.mp4 99999999\n", r"line 2: label 99999999; 2 videos do not make"),
        ("a.mp4 0 2\nb.mp4 1\n", r"line 1: several labels \(0 2\) for a.mp4.*multi-label data sets are not supported"),
        ("a.mp4,0,2\nb.mp4,1\n", r"line 1: several labels \(0,2\)"),
        ("a.mp4 0|2\nb.mp4 1\n", r"line 1: several labels \(0\|2\)"),
        ("a.mp4,run,train\n", r"line 1: expected 'path label'"),
        ("foo,label\na.mp4,0\n", r"line 1: a header without a column for the path; name it one of path, "),
        ("path,label\na.mp4,0,x,y\nb.mp4\n", r"line 3: expected path,label"),
        ("path,label,split\na.mp4,0,train\nb.mp4,1,val\n", r"line 3: split 'val' after 'train'"),
        ("path,frames,label\na,many,0\n", r"line 2: frames='many' is no number"),
        ("path,label,set\na.mp4,0,train\nb.mp4,1,test\n", r"line 3: split 'test' after 'train'"),
        ("label,youtube_id,time_start,time_end,split\nx,a,0,10,train\ny,b,0,10,val\n", r"line 3: split 'val' after 'train'"),
        ("path,label,label\na.mp4,0,1\n", r"column 'label' is there twice"),
        ("path,start,end,label\na.mp4,0,5,0\n", r"column 'end': parts of videos are not supported"),
        ("path,label\na.mp4,run;walk\n", r"line 2: several labels \(run;walk\)"),
        ("path,label\na.mp4,run|walk\n", r"line 2: several labels \(run\|walk\)"),
        ('path,label\na.mp4,"[0, 2]"\n', r"line 2: several labels \(\[0, 2\]\)"),
        ('a.mp4 "run\n', r"line 1: expected 'path label'"),
    ],
)
def test_labels_and_columns_that_would_shift_classes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_list(write(tmp_path / "list.csv", text))


def test_numbers_beside_names_say_how_classes_are_numbered(tmp_path: Path) -> None:
    videos = read_list(write(tmp_path / "list.csv", "path,label,label_id\na.mp4,walk,0\nb.mp4,run,1\n"))
    assert [v.label for v in videos.videos] == [0, 1]
    assert read_list(write(tmp_path / "list.txt", 'a.mp4 "riding a bike"\n')).classes == ("riding a bike",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"annotations": {"label": "x"}}, "a": {"annotations": {"label": "y"}}}', "'a' is there twice"),
        (
            '{"a": {"annotations": {"label": "x"}, "subset": "train"}, "b": {"annotations": {"label": "x"}, "subset": "val"}}',
            "entry 2: split 'val' after 'train'",
        ),
    ],
)
def test_json_that_would_lose_videos_or_mix_splits_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_list(write(tmp_path / "list.json", text))


def test_a_listed_folder_without_pictures_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(AnnotationError, match="1 of 1 listed videos do not exist"):
        check_files(read_list(write(tmp_path / "list.txt", "a 10 0\n")), "list")


def test_several_labels_in_json_are_refused(tmp_path: Path) -> None:
    content = {"xyz": {"annotations": {"label": ["run", "jump"], "segment": [0, 10]}}}
    with pytest.raises(AnnotationError, match="entry 1: several labels"):
        read_list(write(tmp_path / "k.json", json.dumps(content)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 1\nb.mp4 2\nc.mp4 3\n", "no video has label 0; labels count from 0, so subtract 1"),
        ("a.mp4 0\nb.mp4 1\nc.mp4 4\n", "2 of 5 classes have no video: 2, 3"),
    ],
)
def test_gaps_between_labels_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, message: str) -> None:
    read_list(write(tmp_path / "list.txt", text))
    assert message in caplog.text


def test_videos_a_class_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    read_list(write(tmp_path / "list.txt", "a.mp4 0\nb.mp4 1\nc.mp4 1\n"))
    assert "videos: 3, classes: 2, videos a class: 1 to 2" in caplog.text


def test_class_names_of_a_file(tmp_path: Path) -> None:
    assert read_class_names(write(tmp_path / "c.txt", "b\na\n\n")) == ("b", "a")
    assert read_class_names(write(tmp_path / "labels.json", '{"Holding [x]": "1", "Dropping [x]": "0"}')) == (
        "Dropping x",
        "Holding x",
    )
    for text, message in (("a\n\nb\n", "line 2: blank"), ("a\nb\na\n", "'a' is there twice"), ("\n", "names no classes")):
        with pytest.raises(AnnotationError, match=message):
            read_class_names(write(tmp_path / "c.txt", text))
    for text in ('{"a": 0, "b": 2}', '{"a": 0, "b": 0}', '{"a": "x"}', "3"):
        with pytest.raises(AnnotationError, match="labels.json"):
            read_class_names(write(tmp_path / "labels.json", text))


def test_files_of_other_programs_are_no_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [
        "a/v.mp4",
        "b/w.MTS",
        "b/w.gif",
        "a/._v.mp4",
        "a/@eaDir/v.mp4",
        ".ipynb_checkpoints/v.mp4",
        "a/notes.txt",
        "a/Thumbs.db",
    ]
    for name in names:
        write(tmp_path / name, "")
    (tmp_path / "empty").mkdir()
    videos = read_folder(tmp_path)
    assert videos.classes == ("a", "b")
    assert [v.path.name for v in videos.videos] == ["v.mp4", "w.MTS", "w.gif"]
    assert "left out what is no video by its suffix: 1 .txt, 1 .db" in caplog.text or "1 .db, 1 .txt" in caplog.text


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
    with pytest.raises(AnnotationError, match="list file .*empty: is a folder; give a file, or dataset=folder"):
        read_list(tmp_path / "empty")
    with pytest.raises(AnnotationError, match="data folder .*l.txt: is a file; give a folder of class folders, or dataset=list"):
        read_folder(write(tmp_path / "l.txt", "a.mp4 0\n"))
    videos = read_list(write(tmp_path / "l.txt", "a.mp4 0\nb.mp4 0\n"))
    with pytest.raises(
        AnnotationError, match=r"2 of 2 listed videos do not exist, first .*a.mp4; paths in a list start from dataset.root"
    ):
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
