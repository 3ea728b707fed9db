"""The `gpumesh` command: one module per audience; common.py has what all commands share."""
