"""Who is measured. Each file is a process of its own:
`python -m benchmarks.sides.NAME SPEC`, see benchmarks/serving.py."""
