"""Cases and verdicts of calls, shared by the tests and by `mla-cute check`."""
