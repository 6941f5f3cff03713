"""What the findings are worth: runs with a known outcome, and what every rule and every `stop_on` would have done.

`python -m benchmarks.evidence` trains them (`--quick`: a few, shortened), judges them and writes
`results/stopping.json`.
"""
