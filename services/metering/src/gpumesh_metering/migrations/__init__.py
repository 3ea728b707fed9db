"""Numbered SQL files; run at start by gpumesh_runtime.database.migrate."""
