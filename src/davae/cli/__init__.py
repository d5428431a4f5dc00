"""The command line: one file a verb; each reads options, calls one public function and prints its result.

A verb imports that function when it is called, and the tables of its result after that: the help, the version and an
answer to a mistyped word must not wait for torch. Nowhere else in davae do functions import.
"""
