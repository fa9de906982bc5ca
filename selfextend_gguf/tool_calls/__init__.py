"""Calls of tools in what models write: formats, the one of a chat template, and reading a text that comes in pieces."""
