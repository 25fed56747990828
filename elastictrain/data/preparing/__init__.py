"""Preparing data: read, map, filter, deduplicate, tokenise, shuffle, and write as Parquet, restartably.

Two passes. The first reads *parts* (neighbouring blocks of the input) and writes each one's rows, sorted by key, into
*runs*, cut by *slots* (ranges of the key). The second takes a few neighbouring slots out of all runs, sorts them,
drops what is there twice, and writes one file. In between, with `near_duplicates`, `pairs` finds which documents are
nearly the same. What is written follows from the plan alone: `plan`, `rows` and `near` are pure, `part`, `pairs` and
`output` do one unit of work each, and `driver` says which units there are and which of them are done. Who carries them
out, how many at a time and how often, changes nothing.
"""
