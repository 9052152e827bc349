"""What `python src/benchmark.py` measures: lines that take turns, ours beside other implementations."""
