"""The command line: one module per command, and no logic that a program could not use too."""
