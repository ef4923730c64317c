"""The documents' claims, measured: `python -m bench.theory` (`make theory`).

One module per family of claims. Each holds PARTS, the measurements, which give rows, and CLAIMS, which read the rows
and judge. `report` fills docs/theory-report.md from both, `figures` draws the pictures.
"""
