"""The command line: one file per command; each parses options, calls one public function and prints its result.

A command imports that function when it is called, and the tables of its result after that, so that the help, the
version and errors about mistyped options do not wait for torch.
"""
