"""`mla-cute check`, run in this process."""

import pytest


def invoke(*arguments):
    pytest.importorskip("typer", reason="the command line needs the extra cli")
    from typer.testing import CliRunner

    from mla_cute.cli import app

    return CliRunner().invoke(app.app, ["check", *arguments])
