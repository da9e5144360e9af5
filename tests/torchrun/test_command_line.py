"""`raylaunch run` as far as it gets without a cluster: what is refused on the way, with which exit code."""

from __future__ import annotations

from raylaunch.torchrun.run import main


def test_an_argument_that_is_no_utf_8_is_refused(capsys):
    assert main(["train.py", "caf\udce9"]) == 2
    assert "'caf\\udce9': isn't UTF-8" in capsys.readouterr().err


def test_a_working_directory_that_is_gone_is_told(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main(["train.py"]) == 2
    assert "the working directory is gone" in capsys.readouterr().err
