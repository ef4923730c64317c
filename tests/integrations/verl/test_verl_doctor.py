"""What optsample doctor says of the verl that is installed."""

from optsample_triton import cli


def test_it_calls_a_loss(capsys):
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("verl loss ")]
    assert line.endswith("the policy loss is_reshape: ok")
