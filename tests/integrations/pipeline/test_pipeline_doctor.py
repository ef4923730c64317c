"""What optsample doctor says of the packages of the pipeline."""

from optsample_triton import cli


def test_it_generates_and_analyzes(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("pipeline ")]
    assert line.endswith("generate and analyze: ok")
