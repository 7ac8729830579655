"""What two hosts compare to know that they run the same."""

from pathlib import Path

from neox.versions import differences, software, source_digest


def test_digest_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    for place in ("a", "b", "c", "d"):
        (tmp_path / place / "inner").mkdir(parents=True)
        (tmp_path / place / "inner" / "x.py").write_text("x = 1\n")
        (tmp_path / place / "notes.txt").write_text(place)
    (tmp_path / "c" / "inner" / "x.py").write_text("x = 2\n")
    (tmp_path / "d" / "inner" / "x.py").rename(tmp_path / "d" / "inner" / "y.py")
    digests = {place: source_digest(tmp_path / place) for place in "abcd"}
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 3


def test_software_of_this_process() -> None:
    found = software()
    assert found["torch"].startswith("2.")
    assert len(found["neox source"]) == 12


def test_differences() -> None:
    same = {"torch": "2.13", "numpy": "2.4"}
    assert differences({"n1": same, "n2": dict(same)}) == []
    other = {"torch": "2.11"}
    assert differences({"n1": same, "n2": other, "n3": same}) == [
        "numpy: 2.4 on n1, n3; missing on n2",
        "torch: 2.13 on n1, n3; 2.11 on n2",
    ]
