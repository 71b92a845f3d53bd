"""Experiments: one command compares ways of decoding over a prompt set, and leaves a folder from which every table and
figure can be made again.

`config` what to run · `grid` its cells · `prompts` over what · `runner` runs it · `journal` keeps the rows ·
`stats` turns rows into figures · `tables`, `figures`, `report` show them · `reproduce` runs it again.
"""
