"""What optsample doctor says of the TRL that is installed."""

import trl

from optsample_triton import cli


def test_it_takes_a_step_of_the_trainer(capsys):
    assert cli.main(["doctor"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert any(line.split()[:2] == ["trl", trl.__version__] for line in lines)
    assert any(
        line.startswith("TRL trainer ") and line.endswith("one step of ISReshapeGRPOTrainer: ok") for line in lines
    )
    assert "trying: TRL trainer ..." in captured.err


def test_it_says_in_one_sentence_what_fails(capsys, monkeypatch, tmp_path):
    """As when a release renames what this package uses; the process that tries it sees another trl."""
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("class GRPOConfig: pass\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{cli.Path(cli.__file__).parents[1]}")
    monkeypatch.setattr(cli, "_TESTED", {"trl": "1.0"})
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("TRL trainer ")]
    assert "FAILED: ImportError: cannot import name 'GRPOTrainer'" in line
    advice = "To do: pip install 'trl==1.0', the newest that was tested"
    assert lines[-1] == f"{advice}, since TRL trainer raised ImportError."
